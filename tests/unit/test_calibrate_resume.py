"""An interrupted calibration: it goes on at the last finished block, with the bytes of one that ran through."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import calibrated, checkpoints, interrupted

from tersor import files
from tersor.compress.encode import RECIPES
from tersor.convert import quantize
from tersor.convert.calibrate import run, store
from tersor.errors import InputError, OutputError, TersorError

HIGH = {
    **calibrated.OPTIONS,
    "effort": "high",
    "calibration_tokens": 64,
    "transforms": ["rotate", "awq", "tweak-norms"],
}


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Put a recipe in the place of the real one whose codes depend on all statistics, too, and take no time."""
    real = RECIPES["gptq"]
    RECIPES["gptq"] = calibrated.quick(real)
    yield
    RECIPES["gptq"] = real


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrated.model("llama", tmp_path_factory.mktemp("llama") / "model", num_hidden_layers=3)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrated.text(tmp_path_factory.mktemp("text") / "calibration.txt")


@pytest.fixture(scope="module")
def whole(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an uninterrupted run writes."""
    output = tmp_path_factory.mktemp("whole") / "out"
    quantize(model, output, calibration=text, **HIGH)
    return written(output)


def written(output: Path) -> dict[str, Any]:
    """Return the bytes of every file; of the log what does not depend on the clock."""
    found: dict[str, Any] = checkpoints.bytes_of(output)
    log = json.loads(found.pop("tersor-calibration.json"))
    for part in (log, *log["blocks"], *log["layers"]):
        part.pop("seconds")
    return {**found, "log": log}


def interrupt(model: Path, text: Path, output: Path, calls: int, **options: Any) -> None:
    """Run until progress was reported so many times."""
    progress = interrupted.at_call(calls)
    with pytest.raises(interrupted.Stopped):
        quantize(model, output, calibration=text, progress=progress, **HIGH, **options)


@pytest.mark.parametrize("calls", [3, 5, 7, 8, 12])
def test_the_result_is_the_same_after_an_interruption_in_any_pass(
    model: Path, text: Path, whole: dict[str, Any], tmp_path: Path, calls: int
) -> None:
    # Three blocks forward, two backward, three calibrated; then tensors are written.
    interrupt(model, text, tmp_path / "out", calls)
    quantize(model, tmp_path / "out", calibration=text, resume=True, **HIGH)
    assert written(tmp_path / "out") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_finished_blocks_are_not_calibrated_again(
    model: Path, text: Path, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(model, text, tmp_path / "out", 8)
    blocks: list[int] = []
    calibrate = run.Run._block
    monkeypatch.setattr(
        run.Run, "_block", lambda self, block, *rest: (blocks.append(block), calibrate(self, block, *rest))[1]
    )
    quantize(model, tmp_path / "out", calibration=text, resume=True, **HIGH)
    assert blocks == [2]
    assert written(tmp_path / "out") == whole


def test_a_killed_process_is_continued_with_the_same_bytes(
    model: Path, text: Path, whole: dict[str, Any], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    program = f"""
import os, signal, torch
torch.set_num_threads({torch.get_num_threads()})
from helpers import calibrated
from tersor import files
from tersor.compress.encode import RECIPES
from tersor.convert import quantize
from tersor.convert.calibrate.store import Store
RECIPES["gptq"] = calibrated.quick(RECIPES["gptq"])
finish = Store.finish
def kill(self, block, *rest):
    finish(self, block, *rest)
    if block == 1:
        os.kill(os.getpid(), signal.SIGKILL)
Store.finish = kill
quantize({str(model)!r}, {str(output)!r}, calibration={str(text)!r}, **{HIGH!r})
"""
    environment = {"PYTHONPATH": ":".join(sys.path), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not output.exists()
    quantize(model, output, calibration=text, resume=True, **HIGH)
    assert written(output) == whole


def test_a_kill_while_what_was_kept_is_removed_leaves_the_whole_output(
    model: Path, text: Path, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that are removed already would else be calibrated again."""

    def killed(folder: Path, **_: Any) -> None:
        next(folder.glob("block-*")).unlink()
        raise interrupted.Stopped

    with monkeypatch.context() as patched:
        patched.setattr(store.shutil, "rmtree", killed)
        with pytest.raises(interrupted.Stopped):
            quantize(model, tmp_path / "out", calibration=text, **HIGH)
    assert not (tmp_path / "out.partial").exists()
    shutil.rmtree(tmp_path / "out" / "calibration")
    assert written(tmp_path / "out") == whole


def test_a_kill_when_the_output_gets_its_name_is_continued(
    model: Path, text: Path, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = files.rename

    def killed(temporary: Path, path: Path) -> None:
        if temporary.is_dir():
            raise interrupted.Stopped
        rename(temporary, path)

    with monkeypatch.context() as patched:
        patched.setattr(files, "rename", killed)
        with pytest.raises(interrupted.Stopped):
            quantize(model, tmp_path / "out", calibration=text, **HIGH)
    monkeypatch.setattr(run.Run, "_block", lambda *_: pytest.fail("it was finished"))
    quantize(model, tmp_path / "out", calibration=text, resume=True, **HIGH)
    assert written(tmp_path / "out") == whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"effort": "normal"}, 'it was made with effort "high", now "normal"'),
        ({"seed": 1}, "it was made with seed 0, now 1"),
        ({"transforms": ["rotate", "awq"]}, r'it was made with transforms \["rotate", "awq", "tweak-norms"\], now'),
        ({"transforms": []}, r'it was made with transforms \["rotate", "awq", "tweak-norms"\], now null'),
        ({"calibration_tokens": 96}, "it was made with .*calibration .*2 windows of 32 tokens.*now .*3 windows"),
    ],
)
def test_a_resume_with_other_options_is_refused(
    model: Path, text: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    interrupt(model, text, tmp_path / "out", 2)
    with pytest.raises(InputError, match=message):
        quantize(model, tmp_path / "out", calibration=text, resume=True, **{**HIGH, **changes})
    assert (tmp_path / "out.partial").exists()


def test_a_resume_with_another_text_of_the_same_name_is_refused(model: Path, text: Path, tmp_path: Path) -> None:
    interrupt(model, text, tmp_path / "out", 2)
    (tmp_path / "other").mkdir()
    other = calibrated.text(tmp_path / "other" / text.name, seed=2)
    with pytest.raises(InputError, match="it was made with calibration tokens"):
        quantize(model, tmp_path / "out", calibration=other, resume=True, **HIGH)


def test_a_device_whose_memory_runs_out_keeps_what_is_finished(
    model: Path, text: Path, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(run.Streams, "advance", fail)
        with pytest.raises(TersorError, match="the memory of cpu ran out: free some, and run again with --resume"):
            quantize(model, tmp_path / "out", calibration=text, **HIGH)
    quantize(model, tmp_path / "out", calibration=text, resume=True, **HIGH)
    assert written(tmp_path / "out") == whole


@pytest.mark.parametrize("number", [2, 5, 8])
def test_a_disk_that_fills_up_keeps_what_is_finished(
    model: Path, text: Path, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    # What goes into three blocks and the last one's gradient, two more gradients, and three finished blocks.
    write, calls = files.write_whole, 0

    def full(path: Path, *rest: Any, **options: Any) -> None:
        nonlocal calls
        calls += path.parent.name == "calibration"
        if calls == number:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_whole", full)
        with pytest.raises(OutputError, match=r"no space left while writing .* run again with --resume"):
            quantize(model, tmp_path / "out", calibration=text, **HIGH)
    assert not (tmp_path / "out").exists()
    quantize(model, tmp_path / "out", calibration=text, resume=True, **HIGH)
    assert written(tmp_path / "out") == whole


def test_a_machine_that_computes_other_bits_is_noticed(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(model, text, tmp_path / "out", 8)
    monkeypatch.setattr(run.Streams, "digest", lambda self: [1, 2])
    with pytest.raises(TersorError, match="block 0 now computes something else than in the interrupted run"):
        quantize(model, tmp_path / "out", calibration=text, resume=True, **HIGH)
    assert (tmp_path / "out.partial").exists()
