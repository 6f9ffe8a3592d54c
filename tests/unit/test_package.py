"""What is shipped: one pure wheel with headers as data, an sdist with everything, a command that starts."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import tersor

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "tersor"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build an sdist and, from it, the wheel."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel alone into a folder of its own."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--no-compile", "--quiet"]
    done = subprocess.run([*command, "--target", str(folder), str(wheel)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def run_in(folder: Path, *command: str) -> str:
    """Run a command that sees the installed wheel before anything else, from an empty place; return its output."""
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=folder, env={"PYTHONPATH": str(folder)}, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_is_pure_and_named_for_the_version(wheel: Path) -> None:
    assert wheel.name == f"tersor-{tersor.__version__}-py3-none-any.whl"


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = f"tersor-{tersor.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"tersor", "_tersor_hook.py", "tersor.pth", info}
    expected = {
        f"tersor/{path.relative_to(PACKAGE).as_posix()}"
        for path in PACKAGE.rglob("*")
        if path.is_file() and path.suffix in (".py", ".cuh", ".typed", ".json", ".html")
    }
    assert "tersor/py.typed" in expected
    assert any(name.startswith("tersor/kernels/cuda/") and name.endswith(".cuh") for name in expected)
    assert {name for name in names if name.startswith("tersor/")} == expected
    assert f"{info}/licenses/LICENSE" in names


def test_the_sdist_holds_what_tests_and_demo_need(wheel: Path) -> None:
    (found,) = wheel.parent.glob("*.tar.gz")
    with tarfile.open(found) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"LICENSE", "README.md", "Makefile", "pyproject.toml", "examples/tiny-lm/model.safetensors"}
    assert needed <= names
    for folder in ("src/tersor", "tests/unit", "docs", "bench"):
        assert any(name.startswith(f"{folder}/") for name in names), folder
    unwanted = [name for name in names if re.search(r"__pycache__|\.pyc$|(^|/)\.venv|_cache/", name)]
    assert not unwanted


def test_metadata_says_licence_python_and_extras(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(f"tersor-{tersor.__version__}.dist-info/METADATA").decode()
        scripts = archive.read(f"tersor-{tersor.__version__}.dist-info/entry_points.txt").decode()
    assert "License-Expression: Apache-2.0" in text
    assert "Requires-Python: >=3.10" in text
    assert "Description-Content-Type: text/markdown" in text
    extras = set(re.findall(r"^Provides-Extra: (.*)$", text, re.MULTILINE))
    wanted = {"calibrate", "cuda", "eval", "grammar", "plan", "plot", "ray", "serve", "tasks", "train", "vllm", "dev"}
    assert extras == wanted
    assert "tersor = tersor.cli.main:main" in scripts
    assert "[vllm.general_plugins]\ntersor = tersor.integrations.vllm:register" in scripts


def test_the_extra_for_gpus_asks_for_what_compiles_kernels_and_no_more(wheel: Path) -> None:
    """cuda-bindings finds NVRTC in nvidia-cuda-nvrtc; a kernel is launched through the driver, which comes with it."""
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(f"tersor-{tersor.__version__}.dist-info/METADATA").decode()
    cuda = set(re.findall(r"^Requires-Dist: ([\w-]+).*extra == 'cuda'$", text, re.MULTILINE))
    imported = {
        match[1]
        for path in PACKAGE.rglob("*.py")
        for match in re.finditer(r"^\s*(?:from|import) (cuda\.\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert imported == {"cuda.bindings"}
    assert cuda == {"cuda-bindings", "nvidia-cuda-nvrtc"}


def test_the_installed_wheel_runs(installed: Path) -> None:
    where = run_in(installed, sys.executable, "-c", "import tersor; print(tersor.__file__)")
    assert Path(where.strip()) == installed / "tersor" / "__init__.py"
    version = f"tersor {tersor.__version__}\n"
    assert run_in(installed, sys.executable, "-m", "tersor", "--version") == version
    assert run_in(installed, str(installed / "bin" / "tersor"), "--version") == version


def test_the_installed_wheel_finds_its_headers(installed: Path) -> None:
    code = (
        "import torch\n"
        "from tersor import ops\n"
        "from tersor.formats import get_scheme\n"
        "from tersor.hardware import chip_named\n"
        "source = ops.kernels_for(get_scheme('fp6_e3m2'), torch.float16, chip_named('H200'))[0]\n"
        "print(len(source.text()), *source.files())"
    )
    length, *headers = run_in(installed, sys.executable, "-c", code).split()
    assert int(length) > 100
    assert {"dense/sm80_linear.cuh", "common/ptx.cuh"} <= set(headers)


def test_the_version_is_stated_once() -> None:
    assert importlib.metadata.version("tersor") == tersor.__version__
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {tersor.__version__}\n" in citation
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(tersor.__version__)}\b", changes, re.MULTILINE)
