"""Interrupted work: the output appears when it is complete, and `resume` gives the same bytes."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import checkpoints, interrupted

from tersor.checkpoint import writer
from tersor.convert import Report, pipeline, quantize
from tersor.errors import InputError, OutputError

OPTIONS: dict[str, Any] = {"format": "int4", "group_size": 32, "shard_size": 12_000}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save("llama", tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def whole(model: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, dict[str, bytes]]:
    """What an uninterrupted run writes."""
    output = tmp_path_factory.mktemp("whole") / "out"
    return quantize(model, output, **OPTIONS), checkpoints.bytes_of(output)


def interrupt(model: Path, output: Path, share: float = 0.5) -> None:
    with pytest.raises(interrupted.Stopped):
        quantize(model, output, **OPTIONS, progress=interrupted.after(share))
    assert not output.exists()


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 0.999])
def test_the_result_is_the_same_after_any_interruption(
    model: Any, whole: tuple[Report, dict[str, bytes]], tmp_path: Path, share: float
) -> None:
    output = tmp_path / "out"
    interrupt(model, output, share)
    assert (tmp_path / "out.partial").is_dir()
    report = quantize(model, output, **OPTIONS, resume=True)
    assert checkpoints.bytes_of(output) == whole[1]
    assert report.rows == whole[0].rows and report.files == whole[0].files
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_finished_shards_are_not_read_again(model: Any, whole: tuple[Report, dict[str, bytes]], tmp_path: Path) -> None:
    interrupt(model, tmp_path / "out", 0.8)
    finished = sorted(path.name for path in (tmp_path / "out.partial").glob("*.safetensors"))
    assert finished and finished[0] == whole[0].files[0]
    calls = []
    report = quantize(model, tmp_path / "out", **OPTIONS, resume=True, progress=lambda *call: calls.append(call))
    assert 0 < report.bytes_read < report.bytes_before
    assert calls[0][0] == report.bytes_before - report.bytes_read


def test_twice_interrupted(model: Any, whole: tuple[Report, dict[str, bytes]], tmp_path: Path) -> None:
    interrupt(model, tmp_path / "out", 0.3)
    with pytest.raises(interrupted.Stopped):
        quantize(model, tmp_path / "out", **OPTIONS, resume=True, progress=interrupted.after(0.7))
    quantize(model, tmp_path / "out", **OPTIONS, resume=True)
    assert checkpoints.bytes_of(tmp_path / "out") == whole[1]


LARGE = 160 << 20
"""Bytes of a tensor that would show in the memory of a process that holds all of it."""

PROGRAM = """
import os, resource, signal
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])  # a block a thread: memory follows the cores, too
from tersor.convert import quantize
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
large = dict(model={large!r}, overrides=["score=fp6_e3m2"], sparse="off")  # its zeros are a hole, not pruned
quantize(**large, output=None, dry_run=True)
before = peak()
quantize(**large, output={large!r} + "-out")
print((peak() - before) * 1024, flush=True)
def progress(done, total, name):
    if done > total / 2:
        os.kill(os.getpid(), signal.SIGKILL)
quantize({model!r}, {output!r}, progress=progress, **{options!r})
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with one tensor of `LARGE` bytes, in a hole of a sparse file."""
    folder, columns = tmp_path_factory.mktemp("large") / "model", 1024
    config = transformers.LlamaConfig(
        architectures=["LlamaForSequenceClassification"],
        vocab_size=8,
        hidden_size=columns,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_labels=LARGE // 2 // columns,
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = transformers.LlamaForSequenceClassification(config)
    header, end = {}, 0
    for name, tensor in model.state_dict().items():
        start, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


@pytest.fixture(scope="module")
def killed(model: Any, large: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """A process of its own that compresses `large`, then is killed amid `model`: its bytes of growth, the output."""
    output = tmp_path_factory.mktemp("killed") / "out"
    program = PROGRAM.format(large=str(large), model=str(model), output=str(output), options=OPTIONS)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return int(done.stdout), output


def test_a_killed_process(model: Any, whole: tuple[Report, dict[str, bytes]], killed: tuple[int, Path]) -> None:
    _, output = killed
    assert not output.exists()
    quantize(model, output, **OPTIONS, resume=True)
    assert checkpoints.bytes_of(output) == whole[1]


def test_memory_does_not_grow_with_the_tensors(killed: tuple[int, Path]) -> None:
    grown, _ = killed
    assert grown < LARGE // 2


def test_resume_without_anything_to_resume(model: Any, whole: tuple[Report, dict[str, bytes]], tmp_path: Path) -> None:
    quantize(model, tmp_path / "out", **OPTIONS, resume=True)
    assert checkpoints.bytes_of(tmp_path / "out") == whole[1]


def test_partial_work_is_not_taken_up_unasked(model: Any, tmp_path: Path) -> None:
    interrupt(model, tmp_path / "out")
    with pytest.raises(InputError, match=r"out.partial is left from an interrupted run: add --resume"):
        quantize(model, tmp_path / "out", **OPTIONS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "int5"}, 'it was made with format "int4", now "int5"; use the same options, or remove it'),
        ({"group_size": 16}, "it was made with group_size 32, now 16"),
        ({"ignore": ["k_proj"]}, r'it was made with ignore \["lm_head"\], now \["k_proj", "lm_head"\]'),
        ({"shard_size": 20_000}, "it was made with shard size 12000, now 20000"),
        ({"export": "compressed-tensors"}, 'it was made with export "tersor", now "compressed'),
    ],
)
def test_other_options_are_refused(model: Any, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    interrupt(model, tmp_path / "out")
    before = checkpoints.bytes_of(tmp_path / "out.partial")
    with pytest.raises(InputError, match=message):
        quantize(model, tmp_path / "out", **{**OPTIONS, **options}, resume=True)
    assert checkpoints.bytes_of(tmp_path / "out.partial") == before


def test_an_option_that_is_left_out_is_another_option(model: Any, tmp_path: Path) -> None:
    with pytest.raises(interrupted.Stopped):
        quantize(model, tmp_path / "out", **OPTIONS, transforms=["rotate"], progress=interrupted.after(0.5))
    with pytest.raises(InputError, match=r'it was made with transforms \["rotate"\], now null'):
        quantize(model, tmp_path / "out", **OPTIONS, resume=True)


def test_another_source_is_refused(model: Any, tmp_path: Path) -> None:
    source = shutil.copytree(model, tmp_path / "model")
    interrupt(source, tmp_path / "out")
    os.utime(source / "model.safetensors", ns=(1, 1))
    with pytest.raises(InputError, match="the source has changed since"):
        quantize(source, tmp_path / "out", **OPTIONS, resume=True)


def test_partial_work_that_was_tampered_with(model: Any, tmp_path: Path) -> None:
    output, partial = tmp_path / "out", tmp_path / "out.partial"
    interrupt(model, output, 0.8)
    first = sorted(partial.glob("*.safetensors"))[0]
    kept = first.read_bytes()
    first.write_bytes(kept[:-1])
    with pytest.raises(InputError, match=f"{first.name} is not as it was finished"):
        quantize(model, output, **OPTIONS, resume=True)
    first.write_bytes(kept)
    state = partial / "tersor-state.json"
    text = state.read_text()
    state.write_text(text[:-20])
    with pytest.raises(InputError, match="cannot be read"):
        quantize(model, output, **OPTIONS, resume=True)
    state.write_text(json.dumps({"identity": {}}))
    with pytest.raises(InputError, match="cannot be read"):
        quantize(model, output, **OPTIONS, resume=True)
    state.unlink()
    with pytest.raises(InputError, match=r"has no tersor-state.json, so it cannot be continued"):
        quantize(model, output, **OPTIONS, resume=True)


def test_two_processes_at_once(model: Any, tmp_path: Path) -> None:
    interrupt(model, tmp_path / "out")
    descriptor = os.open(tmp_path / "out.partial", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(InputError, match="another process is writing"):
        quantize(model, tmp_path / "out", **OPTIONS, resume=True)
    os.close(descriptor)
    quantize(model, tmp_path / "out", **OPTIONS, resume=True)


def test_a_disk_that_fills_up(
    model: Any, whole: tuple[Report, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = 30_000
    write = os.pwrite

    def pwrite(descriptor: int, data: Any, position: int) -> int:
        nonlocal room
        if room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = write(descriptor, data[:room], position)
        room -= count
        return count

    monkeypatch.setattr(writer.os, "pwrite", pwrite)
    with pytest.raises(OutputError, match=r"no space left while writing .* run again with --resume") as caught:
        quantize(model, tmp_path / "out", **OPTIONS)
    assert caught.value.exit_status == 1 and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "out.partial").glob("*.tmp"))
    monkeypatch.setattr(writer.os, "pwrite", write)
    quantize(model, tmp_path / "out", **OPTIONS, resume=True)
    assert checkpoints.bytes_of(tmp_path / "out") == whole[1]


def test_a_disk_that_is_too_small_from_the_start(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tersor.convert import checks

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OutputError, match=r"needs 0.07 GB more and the disk has 0.00 GB free"):
        quantize(model, tmp_path / "out", **OPTIONS)


def test_an_output_that_cannot_be_made(model: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write .*file/out"):
        quantize(model, tmp_path / "file" / "out", **OPTIONS)


def test_an_output_that_cannot_get_its_name_is_kept_for_resume(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.replace

    def refuse(before: Any, after: Any) -> None:
        if Path(after).name == "out":
            raise OSError(errno.EACCES, "Permission denied")
        real(before, after)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(OutputError, match=r"cannot write .*out: Permission denied"):
            quantize(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = quantize(model, tmp_path / "out", resume=True)
    assert report.bytes_read == 0 and (tmp_path / "out/config.json").is_file()


@pytest.mark.parametrize("name", ["gpt_oss", "granitemoe"])
def test_fused_experts_written_in_small_blocks_and_resumed_have_the_same_bytes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoints.save(name, tmp_path / "model")
    options: dict[str, Any] = {"format": "uint4", "shard_size": 12_000}
    quantize(source, tmp_path / "whole", **options)
    monkeypatch.setattr(pipeline, "_CPU_BLOCK_ELEMENTS", 64 * 10)  # rows of two experts in one block
    with pytest.raises(interrupted.Stopped):
        quantize(source, tmp_path / "out", **options, progress=interrupted.after(0.6))
    report = quantize(source, tmp_path / "out", **options, resume=True)
    whole, resumed = (checkpoints.bytes_of(tmp_path / folder) for folder in ("whole", "out"))
    assert whole == resumed and sum(".experts" in row.name or "_linear" in row.name for row in report.compressed) == 4
