"""The Makefile: messages where a machine lacks something, and what is installed where. Nothing is installed here."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout as far as make can see, without .venv."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def make(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make there, with a plain environment."""
    environment = {"PATH": os.environ["PATH"]}
    return subprocess.run(
        ["make", *arguments], cwd=tree, capture_output=True, text=True, check=False, env=environment, timeout=60
    )


def fake_python(tree: Path, condition: str) -> str:
    """Write an interpreter that fails where its arguments hold `condition`, and return how to name it."""
    script = tree / "fake-python"
    script.write_text(f'#!/bin/sh\ncase "$*" in *"{condition}"*) exit 1;; esac\nexec {sys.executable} "$@"\n')
    script.chmod(0o755)
    return f"BASE_PYTHON={script}"


def test_help_names_every_target(tree: Path) -> None:
    done = make(tree)
    assert done.returncode == 0
    for target in ("demo", "test", "lint", "gpu-test", "bench", "clean"):
        assert f"make {target} " in done.stdout


@pytest.mark.parametrize("target", ["demo", "test"])
def test_a_machine_that_lacks_something_is_told_in_one_line(tree: Path, target: str) -> None:
    for argument, message in (
        ("BASE_PYTHON=no-such-python", "no-such-python is not on the PATH"),
        (fake_python(tree, "version_info"), "is too old: Python 3.10 or newer is needed"),
    ):
        done = make(tree, target, argument)
        assert done.returncode == 2
        (line,) = [line for line in done.stderr.splitlines() if not line.startswith("make")]
        assert line.startswith("tersor: ")
        assert message in line
    done = make(tree, target, fake_python(tree, "ensurepip"))
    assert "has no venv or no ensurepip" in done.stderr
    assert "apt install python3-venv" in done.stderr
    assert not (tree / ".venv").exists()


def test_set_up_comes_first_and_torch_for_cpus_before_the_rest(tree: Path) -> None:
    lines = make(tree, "-n", "test", "GPU=").stdout.splitlines()
    steps = [next(i for i, line in enumerate(lines) if word in line) for word in ORDER]
    assert steps == sorted(steps)
    with_gpu = make(tree, "-n", "demo", "GPU=yes").stdout
    assert "torch==" not in with_gpu
    assert "install -e '.[cuda]'" in with_gpu
    without = make(tree, "-n", "demo", "GPU=").stdout
    assert "install -e '.'" in without


ORDER = ("-m venv", "install torch==", "install -e '.[dev]'", "ruff check", "ruff format --check", "pytest")


def test_set_up_is_done_once_and_again_when_the_project_file_changes(tree: Path) -> None:
    stamps = [tree / ".venv" / name for name in (".made", ".ready", ".ready-dev")]
    stamps[0].parent.mkdir()
    old = (tree / "pyproject.toml").stat().st_mtime
    for stamp in stamps:
        stamp.touch()
        os.utime(stamp, (old + 10, old + 10))
    assert "install" not in make(tree, "-n", "test").stdout
    os.utime(tree / "pyproject.toml", (old + 20, old + 20))
    again = make(tree, "-n", "test").stdout
    assert "install -e '.[dev]'" in again
    assert "-m venv" not in again


def test_another_interpreter_is_used_as_it_is(tree: Path) -> None:
    for target, script in (
        ("gpu-test", "bench/gpu_tests.py"),
        (
            "bench",
            "-m tersor bench linear llama-2-70b llama-3-8b --n 1,16,32,64,128,256,1024,4096 --activations 16bit,fp8 "
            "--output bench/results/linear_h200.json",
        ),
        ("bench", "-m tersor bench linear --from bench/results/linear_h200.json 8192x8192 57344x8192"),
        ("demo", "-m tersor demo"),
    ):
        steps = make(tree, "-n", target, "PYTHON=python3").stdout
        assert f"python3 {script}" in steps
        assert "install" not in steps
        assert "venv" not in steps


JUNIT = """<?xml version="1.0" encoding="utf-8"?>
<testsuites><testsuite name="pytest" errors="1" failures="1" skipped="1" tests="5" time="12.5">
<testcase classname="tests.gpu.test_linear_gpu" name="test_products[int4-64]" time="1.0" />
<testcase classname="tests.gpu.test_linear_gpu" name="test_products[int8-32]" time="1"><failure>no</failure></testcase>
<testcase classname="tests.gpu.test_linear_gpu" name="test_products[fp6_e3m2-None]" time="1.0" />
<testcase classname="tests.gpu.test_jit_gpu" name="test_loads" time="1.0"><skipped>no GPU</skipped></testcase>
<testcase classname="tests.gpu.test_jit_gpu" name="test_launches" time="1.0"><error>broken</error></testcase>
</testsuite></testsuites>
"""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`bench/gpu_tests.py` as a module."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    spec = importlib.util.spec_from_file_location("gpu_tests", ROOT / "bench" / "gpu_tests.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_has_to_run_alone_follows_the_rest(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # this test may be one of many itself
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\nmarkers = ["alone: no other beside it"]\n')
    (tmp_path / "test_some_gpu.py").write_text(
        "import os, pytest\nworker = os.environ.get('PYTEST_XDIST_WORKER')\n"
        "@pytest.mark.parametrize('_', range(3))\ndef test_beside(_): assert worker\n"
        "@pytest.mark.alone\ndef test_alone(): assert not worker\n"
        "@pytest.mark.alone\ndef test_wrong(): assert worker\n"
    )
    monkeypatch.setattr(script, "ROOT", tmp_path)
    result, status = script.run([str(tmp_path / "test_some_gpu.py"), "-n2", "-q", "-p", "no:cacheprovider"])
    assert status == 1
    assert result["counts"] == {"passed": 4, "failure": 1}
    assert result["failed"] == ["test_some_gpu.test_wrong"]
    assert result["tests"]["test_some_gpu.test_beside"] == {"passed": 3}
    result, status = script.run([str(tmp_path / "test_some_gpu.py"), "-q", "-p", "no:cacheprovider", "-k", "beside"])
    assert result["counts"] == {"failure": 3} and status == 1


def test_the_summary_of_gpu_tests(script: Any, tmp_path: Path) -> None:
    junit = tmp_path / "junit.xml"
    junit.write_text(JUNIT)
    result = script.summary(junit)
    assert result["counts"] == {"passed": 2, "failure": 1, "skipped": 1, "error": 1}
    assert result["failed"] == ["test_linear_gpu.test_products[int8-32]", "test_jit_gpu.test_launches"]
    assert result["tests"]["test_linear_gpu.test_products"] == {"passed": 2, "failure": 1}
    assert result["seconds"] == 12.5
    functions = ["test_jit_gpu.test_launches", "test_linear_gpu.test_products"]
    after = {"counts": {"passed": 9}, "seconds": 2.0, "failed": [], "tests": {functions[1]: {"passed": 9}}}
    joined = script.joined(result, after, functions)
    assert joined["counts"] == {"passed": 9, "skipped": 1} and joined["failed"] == []
    assert joined["ran_again"] == [{"tests": functions, "seconds": 2.0, "failed_before": result["failed"]}]
    joined = script.joined(result, after, ["test_linear_gpu"])
    assert joined["counts"] == {"passed": 9, "skipped": 1, "error": 1}
    assert joined["failed"] == ["test_jit_gpu.test_launches"]
    twice = script.joined(joined, {**after, "tests": {functions[0]: {"passed": 9}}}, ["test_jit_gpu"])
    assert twice["counts"] == {"passed": 18} and len(twice["ran_again"]) == 2
