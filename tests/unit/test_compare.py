"""bench/compare.py: two trees in turn, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "compare.py"
CONTENDERS = """
def packed(scheme, oc, ic, dtype, activations): return scheme, oc
def random(n, ic, dtype): return n
def chained(weights, x, early): return [weights[0], weights[1], x]
def label(scheme, activations): return scheme
"""


def tree(folder: Path, factor: float) -> Path:
    """A package tersor that times by multiplying: rows times tokens times `factor`; a torch that loads in no time."""
    files = {
        "../torch": "float16 = 'float16'",
        "__init__": "",
        "bench/__init__": "",
        "bench/contenders": CONTENDERS,
        "bench/timing": f"def graph_microseconds(calls, replays): return calls[1] * calls[2] * {factor}",
        "bench/shapes": (
            "from types import SimpleNamespace\n"
            "def resolve(words):\n"
            "    sizes = [word.split('x') for word in words]\n"
            "    return [SimpleNamespace(oc=int(oc), ic=int(ic)) for oc, ic in sizes]"
        ),
        "cli/__init__": "",
        "cli/bench": "def schemes(names, shapes): return list(names)",
    }
    for name, text in files.items():
        path = folder / "tersor" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def compare(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)


def test_two_trees_in_turn(tmp_path: Path) -> None:
    before, after = tree(tmp_path / "a", 1.0), tree(tmp_path / "b", 0.5)
    done = compare(str(before), str(after), "--n", "1,16", "--formats", "fp6_e3m2,int4", "10x4", "20x4")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["before", "after", "after", "/", "before"]
    assert lines[1].split() == ["fp6_e3m2", "10x4", "N=1", "10.00", "10.00", "5.00", "5.00", "0.500"]
    assert lines[8].split() == ["int4", "20x4", "N=16", "320.00", "320.00", "160.00", "160.00", "0.500"]
    assert lines[9].split() == ["geometric", "mean", "0.500"]
    assert len(lines) == 10


@pytest.mark.parametrize(
    ("broken", "message"), [("missing", "holds no package tersor"), ("failing", "ended with status 1")]
)
def test_a_tree_that_does_not_run(broken: str, message: str, tmp_path: Path) -> None:
    before, after = tree(tmp_path / "a", 1.0), tmp_path / "b"
    if broken == "failing":
        (tree(after, 1.0) / "tersor" / "bench" / "shapes.py").write_text("raise ImportError")
    done = compare(str(before), str(after), "--n", "1", "10x4")
    assert done.returncode
    assert message in done.stderr
    assert not done.stdout
