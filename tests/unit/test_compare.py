"""bench/compare.py: two trees in turn, each in a process of its own that imports the package itself.

Only what needs a GPU is replaced there, and only by names that the package has: a function of ours that is renamed
makes these tests fail, as it would make the script fail with a tree from before.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "compare.py"

STAND_IN = """
import os

if os.environ.get("TERSOR_COMPARE"):
    import torch

    from tersor import ops
    from tersor.bench import contenders, timing

    made = []  # sizes of the matrices made, the last of which are the activations

    def replace(module, name, function):
        assert callable(getattr(module, name)), name
        setattr(module, name, function)

    def random(rows, columns, dtype):
        made.append((rows, columns))
        return torch.randn(rows, columns).to(dtype)

    def microseconds(calls, replays):
        outputs = [call() for call in calls]
        assert len(outputs) == 3
        return made[-1][0] * made[0][1] * FACTOR  # tokens times input channels

    replace(torch.cuda, "current_device", lambda: 0)
    replace(ops, "preferred_layout", lambda scheme, dtype, device, activations: "tiles_float16")
    replace(timing, "copies", lambda nbytes: 3)
    replace(timing, "graph_microseconds", microseconds)
    replace(contenders, "random", random)
"""


def tree(folder: Path, factor: float) -> Path:
    """A folder that holds this package; where it is imported from there, a product takes tokens * IC * `factor` us."""
    folder.mkdir()
    (folder / "tersor").symlink_to(ROOT / "src" / "tersor")
    (folder / "sitecustomize.py").write_text(STAND_IN.replace("FACTOR", str(factor)))
    return folder


def compare(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script."""
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)


def test_two_trees_in_turn(tmp_path: Path) -> None:
    before, after = tree(tmp_path / "a", 1.0), tree(tmp_path / "b", 0.5)
    words = ("--n", "1,16", "--formats", "fp6_e3m2,int4:g32", "--turns", "1", "96x64", "64x64")
    done = compare(str(before), str(after), *words)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["before", "after", "after", "/", "before"]
    assert lines[1].split() == ["fp6_e3m2", "96x64", "N=1", "64.00", "32.00", "0.500"]
    assert lines[8].split() == ["int4:g32", "64x64", "N=16", "1024.00", "512.00", "0.500"]
    assert lines[9].split() == ["geometric", "mean", "0.500"]
    assert len(lines) == 10


def test_a_ratio_is_of_the_means_over_all_turns() -> None:
    spec = importlib.util.spec_from_file_location("compare", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    shown = script.table([{"a": 1.0, "b": 4.0}, {"a": 3.0, "b": 4.0}], [{"a": 4.0, "b": 2.0}, {"a": 4.0, "b": 2.0}])
    assert [line.split() for line in shown.splitlines()[1:]] == [
        ["a", "1.00", "3.00", "4.00", "4.00", "2.000"],
        ["b", "4.00", "4.00", "2.00", "2.00", "0.500"],
        ["geometric", "mean", "1.000"],
    ]


@pytest.mark.parametrize(
    ("broken", "message"), [("missing", "holds no package tersor"), ("failing", "ended with status 1")]
)
def test_a_tree_that_does_not_run(broken: str, message: str, tmp_path: Path) -> None:
    before, after = tmp_path / "a", tree(tmp_path / "b", 1.0)
    if broken == "failing":
        (before / "tersor").mkdir(parents=True)
        (before / "tersor" / "__init__.py").touch()
        (before / "torch.py").write_text("raise ImportError('this tree needs another torch')")
    done = compare(str(before), str(after), "--n", "1", "64x64")
    assert done.returncode
    assert message in done.stderr
    assert not done.stdout
