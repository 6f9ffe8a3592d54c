"""The tree keeps its own rules: which room imports which, what headers include, how long files get."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "tersor"
HEADERS = PACKAGE / "kernels" / "cuda"
EVERY_TIME = "sm90_level.cuh"
"""The header that is read once a level."""

ROOMS = (
    "version",
    "errors",
    "settings",
    "files",
    "hardware",
    "plots",
    "screen",
    "formats",
    "compress",
    "layouts",
    "checkpoint",
    "kernels",
    "planner",
    "ops",
    "nn",
    "offload",
    "models",
    "engine",
    "integrations",
    "llm",
    "one_prompt",
    "evaluate",
    "convert",
    "bench",
    "report",
    "server",
    "cli",
)
"""A room imports only from rooms before it (and itself)."""

ROOF = ("__init__", "__main__")
"""Modules that show the rooms to the world and may import any of them."""

LONGEST = 400

ENVIRONMENT_READERS: dict[str, str] = {
    "settings.py": "the one place where Tersor's variables are read",
    "cli/doctor.py": "shows which of those variables are set, as they stand",
    "bench/vllm/inside.py": "sets, in the process that vLLM has for itself, what vLLM reads",
}
"""Files of the package that may touch the process environment, and why."""


def modules() -> list[Path]:
    """Every Python file of the package."""
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    """The room a file is in: the first part of its path, without a suffix."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(tree: ast.Module, path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, room) for every import of ours, those inside functions and under TYPE_CHECKING too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "tersor" and len(parts) > 1:
                yield node.lineno, parts[1]


def parse(path: Path) -> ast.Module:
    """Return a file's syntax tree."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def test_rooms_are_the_ones_of_the_design() -> None:
    found = {room_of(path) for path in modules()}
    assert found == {*ROOMS, *ROOF}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_rooms_above_it(room: str) -> None:
    allowed = ROOMS[: ROOMS.index(room) + 1]
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports tersor.{other}"
        for path in modules()
        if room_of(path) == room
        for line, other in imported_rooms(parse(path), path)
        if other not in allowed
    ]
    assert not wrong, f"{room} may import {', '.join(allowed)}"


def test_an_arrow_that_points_down_is_seen() -> None:
    source = (
        "def f():\n    from tersor import cli\n    import tersor.nn.linear\nfrom tersor.errors import TersorError\n"
    )
    assert [room for _, room in imported_rooms(ast.parse(source), PACKAGE)] == ["errors", "cli", "nn"]


def test_tile_choice_and_formats_know_neither_compiler_nor_device() -> None:
    """What must run anywhere imports nothing that needs a GPU or a driver."""
    for folder in ("formats", "compress", "layouts", "kernels/tune"):
        for path in (PACKAGE / folder).rglob("*.py"):
            roots = {
                name.split(".")[0]
                for node in ast.walk(parse(path))
                if isinstance(node, (ast.Import, ast.ImportFrom))
                for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""])
            }
            assert not roots & {"cuda", "transformers", "triton"}, path
            assert "torch.cuda" not in path.read_text(), path


def test_all_that_knows_transformers_is_behind_one_door() -> None:
    """Types may be named anywhere, under TYPE_CHECKING; the import hook knows a module by its name alone."""
    door = PACKAGE / "integrations" / "transformers"
    wrong = []
    for path in modules():
        if door in path.parents:
            continue
        tree = parse(path)
        types = {
            inner
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if node not in types and any(name.split(".")[0] == "transformers" for name in names):
                wrong.append(f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}")
    assert not wrong


def test_headers_include_only_each_other() -> None:
    headers = sorted(path for path in HEADERS.rglob("*") if path.is_file() and path.suffix != ".py")
    assert headers
    for header in headers:
        assert header.suffix == ".cuh", f"{header} is not a header"
        text = header.read_text(encoding="utf-8")
        guard = f"#define TERSOR_{str(header.relative_to(HEADERS).with_suffix('')).upper().replace('/', '_')}\n"
        once = "#pragma once" in text or guard in text
        assert once or header.name == EVERY_TIME, f"{header} has neither #pragma once nor {guard}"
        for target in re.findall(r"^\s*#\s*include\s+(.*?)\s*$", text, re.MULTILINE):
            quoted = re.fullmatch(r'"([^"]+)"', target)
            assert quoted, f"{header} includes {target}: only our own headers, in quotes"
            assert (HEADERS / quoted[1]).is_file(), f"{header} includes {target}, which is not in {HEADERS}"


def test_no_file_is_long_without_saying_why() -> None:
    """Above 400 lines the first line gives the reason: it holds the words `lines because`."""
    suffixes = {".py", ".cuh", ".md", ".toml", ""}
    wrong = []
    for path in source_files():
        if path.suffix not in suffixes or path.name == "LICENSE":
            continue
        lines = path.read_text(encoding="utf-8").splitlines()
        if len(lines) > LONGEST and "lines because" not in lines[0]:
            wrong.append(f"{path.relative_to(ROOT)}: {len(lines)} lines")
    assert not wrong


def test_nothing_but_settings_reads_the_environment() -> None:
    wrong = []
    for path in modules():
        if str(path.relative_to(PACKAGE)) in ENVIRONMENT_READERS:
            continue
        for node in ast.walk(parse(path)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            touched = node.attr if isinstance(node, ast.Attribute) else ""
            if {touched, *names} & {"environ", "environb", "getenv", "getenvb", "putenv", "expandvars"}:
                wrong.append(f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}")
    assert not wrong, "read variables in settings.py, or name the file and the reason in ENVIRONMENT_READERS"


def test_every_public_thing_has_a_docstring() -> None:
    wrong = []
    for path in modules():
        tree = parse(path)
        if tree.body and ast.get_docstring(tree) is None:
            wrong.append(str(path.relative_to(ROOT)))
        for node in tree.body:
            wrong += [f"{path.relative_to(ROOT)}:{line} {name}" for line, name in undocumented(node)]
    assert not wrong


def undocumented(node: ast.stmt) -> Iterator[tuple[int, str]]:
    """Yield (line, name) of public functions, classes and methods without a docstring.

    A method without one is fine in a private class or where the class has a base: it may be described there. So is an
    overload, which the function itself describes.
    """
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    if not isinstance(node, kinds) or node.name.startswith("_"):
        return
    overload = any(isinstance(mark, ast.Name) and mark.id == "overload" for mark in node.decorator_list)
    if ast.get_docstring(node) is None and not overload:
        yield node.lineno, node.name
    if isinstance(node, ast.ClassDef) and not node.bases:
        for inner in node.body:
            if isinstance(inner, kinds) and not inner.name.startswith("_") and ast.get_docstring(inner) is None:
                yield inner.lineno, f"{node.name}.{inner.name}"


def test_no_path_or_note_of_a_developers_machine_is_in_the_tree() -> None:
    unwanted = re.compile(r"/home/\w+/|/Users/\w+/|/root/|/work/|\bTODO\b|\bFIXME\b|\bXXX\b")
    wrong = [
        f"{path.relative_to(ROOT)}:{number} {line.strip()}"
        for path in source_files()
        if path != Path(__file__).resolve()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if unwanted.search(line)
    ]
    assert not wrong


def source_files() -> list[Path]:
    """Every text file written by hand: code, tests, benchmarks, documentation and project files."""
    folders = ("src", "tests", "bench", "docs", ".ci")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    files += [path for path in ROOT.iterdir() if path.suffix in (".md", ".toml", ".cff") or path.name == "Makefile"]
    skipped = ("__pycache__", ".json", ".png", ".so", ".pyc", ".safetensors")
    return sorted(path for path in files if path.is_file() and not any(part in str(path) for part in skipped))


HEAVY = (
    "torch",
    "transformers",
    "huggingface_hub",
    "safetensors",
    "numpy",
    "rich",
    "typer",
    "matplotlib",
    "compressed_tensors",
    "cuda",
)


def loaded_by(statement: str, runs: int = 1) -> tuple[set[str], float]:
    """Return which heavy packages a statement loads in a fresh process, and the least seconds of so many processes."""
    code = f"""
import json, sys, time
start = time.perf_counter()
{statement}
seconds = time.perf_counter() - start
print(json.dumps([[name for name in {HEAVY} if name in sys.modules], seconds]), file=sys.stderr)
"""
    results = []
    for _ in range(runs):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
        results.append(json.loads(done.stderr.splitlines()[-1]))
    return set(results[0][0]), min(seconds for _, seconds in results)


def test_import_loads_nothing_heavy_and_is_quick() -> None:
    loaded, seconds = loaded_by("import tersor", runs=3)
    assert loaded == set()
    assert seconds < 0.3


def test_version_and_help_do_not_load_torch() -> None:
    for arguments in (["--version"], ["--help"], ["quantize", "--help"]):
        loaded, _ = loaded_by(f"from tersor.cli.main import run; assert run({arguments}) == 0")
        assert not loaded & {"torch", "transformers", "numpy"}, arguments


def test_lazy_names_are_there() -> None:
    import tersor

    for name in tersor.__all__:
        assert getattr(tersor, name) is not None
    assert set(tersor.__all__) <= set(dir(tersor))
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        tersor.quantise  # noqa: B018
