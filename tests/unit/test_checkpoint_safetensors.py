"""Safetensors files: every malformed header is one clear line, rows are read alone, and files are exact."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tersor.checkpoint.header import TensorSpec, lay_out
from tersor.checkpoint.names import TORCH_DTYPES
from tersor.checkpoint.reader import SafetensorsFile
from tersor.checkpoint.writer import ShardWriter, shard_names, split_into_shards
from tersor.errors import CheckpointError, OutputError


def write_raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: str = "F32", shape: Sequence[float] = (2,), offsets: Sequence[int] = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


BROKEN = {
    "not json": (b"{oops", b"", "not valid JSON"),
    "not utf-8": (b'{"\xff": 1}', b"", "not valid JSON"),
    "a list": ([1, 2], b"", "a JSON list, not an object"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, b"\0" * 8, "'a' is not a dtype, a shape and data_offsets"),
    "more keys": ({"a": {**entry(), "x": 1}}, b"\0" * 8, "'a' is not a dtype"),
    "dtype": ({"a": entry(dtype="FP32")}, b"\0" * 8, "unknown dtype 'FP32', did you mean 'F32'"),
    "negative size": ({"a": entry(shape=(-2,))}, b"\0" * 8, r"shape \[-2\], not a list of sizes"),
    "fractional size": ({"a": entry(shape=(2.0,))}, b"\0" * 8, "not a list of sizes"),
    "backwards": ({"a": entry(offsets=(8, 0))}, b"\0" * 8, "not a start and an end"),
    "wrong span": ({"a": entry(offsets=(0, 12))}, b"\0" * 12, "needs 8 bytes but its offsets span 12"),
    "overlap": ({"a": entry(), "b": entry(offsets=(4, 12))}, b"\0" * 12, "'b' overlaps the tensor before it"),
    "gap": ({"a": entry(), "b": entry(offsets=(12, 20))}, b"\0" * 20, "'b' leaves a gap before it"),
    "truncated": ({"a": entry(), "b": entry(offsets=(8, 16))}, b"\0" * 12, "truncated: .*12 are there .*'b'"),
    "trailing": ({"a": entry()}, b"\0" * 9, "1 bytes after the last tensor"),
    "twice": (b'{"a": {"dtype":"F32","shape":[0],"data_offsets":[0,0]}, "a": 1}', b"", "'a' stands there twice"),
    "metadata": ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_headers_are_one_line(tmp_path: Path, case: str) -> None:
    header, data, message = BROKEN[case]
    path = write_raw(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        SafetensorsFile(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes, too few"),
        (b"abc", "3 bytes, too few"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (struct.pack("<Q", 1 << 60) + b"{}", "claims a header of 1152921504606846976 bytes"),
        (struct.pack("<Q", 0), "claims a header of 0 bytes"),
        (struct.pack("<Q", 100) + b"{}", "truncated inside its header"),
    ],
)
def test_files_that_are_not_safetensors(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        SafetensorsFile(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot open .*No such file"):
        SafetensorsFile(tmp_path / "absent")


def test_reads_what_the_library_wrote(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dtypes = [dtype for dtype in TORCH_DTYPES.values() if dtype != torch.complex64]
    tensors = {str(dtype): torch.randint(0, 2, (5, 3)).to(dtype) for dtype in dtypes}
    tensors["scalar"] = torch.tensor(2.5)
    tensors["empty"] = torch.empty(0, 4)
    save_file(tensors, tmp_path / "a.safetensors", {"who": "me"})
    with SafetensorsFile(tmp_path / "a.safetensors") as file:
        assert file.metadata == {"who": "me"}
        assert set(file.tensors) == set(tensors)
        for name, tensor in tensors.items():
            read = file.read(name)
            assert read.dtype == tensor.dtype and read.shape == tensor.shape
            assert torch.equal(read.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
            if tensor.dim() == 2 and len(tensor):
                rows = file.read(name, (1, 4)).reshape(-1).view(torch.uint8)
                assert torch.equal(rows, tensor[1:4].reshape(-1).view(torch.uint8))
        with pytest.raises(CheckpointError, match="no tensor 'absent'"):
            file.read("absent")


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(64)}, path)
    with SafetensorsFile(path) as file:
        os.truncate(path, path.stat().st_size - 16)
        with pytest.raises(CheckpointError, match="ends inside tensor 'a'"):
            file.read("a")


SPECS = [TensorSpec("b", "U8", (3,)), TensorSpec("a", "I32", (2, 2)), TensorSpec("c", "BF16", (5,))]


def fill(writer: ShardWriter, order: str) -> None:
    contents = {"a": bytes(range(16)), "b": b"xyz", "c": bytes(range(10))}
    for name in order:
        half = len(contents[name]) // 2
        writer.write(name, half, memoryview(contents[name])[half:])
        writer.write(name, 0, memoryview(contents[name])[:half])


def test_writes_what_the_library_reads_whatever_the_order(tmp_path: Path) -> None:
    for number, order in enumerate(("abc", "cba")):
        writer = ShardWriter(tmp_path / f"{number}.safetensors", SPECS)
        fill(writer, order)
        assert not (tmp_path / f"{number}.safetensors").exists()
        writer.finish()
    assert (tmp_path / "0.safetensors").read_bytes() == (tmp_path / "1.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.safetensors", "1.safetensors"]
    read = load_file(tmp_path / "0.safetensors")
    assert read["b"].tolist() == list(b"xyz")
    assert read["a"].tolist() == [[0x03020100, 0x07060504], [0x0B0A0908, 0x0F0E0D0C]]
    assert read["c"].dtype == torch.bfloat16
    with safe_open(tmp_path / "0.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_every_tensor_is_aligned_to_its_element(tmp_path: Path) -> None:
    places = {spec.name: spec.offset for spec in lay_out(SPECS)}
    assert places == {"a": 0, "c": 16, "b": 26}


def test_an_aborted_file_leaves_nothing(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "a.safetensors", SPECS)
    fill(writer, "ab")
    writer.abort()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_file_whose_header_cannot_be_written_leaves_nothing(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object) -> int:
        raise error

    monkeypatch.setattr(os, "pwrite", fails)
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(OutputError if isinstance(error, OSError) else type(error)):
        ShardWriter(tmp_path / "a.safetensors", SPECS)
    assert not list(tmp_path.iterdir()) and sorted(os.listdir("/proc/self/fd")) == before


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot write .*No such file"):
        ShardWriter(tmp_path / "absent" / "a.safetensors", SPECS)


def test_shards_fill_in_order_and_groups_stay_together() -> None:
    groups = [
        [TensorSpec(f"{index}.{part}", "U8", (size,)) for part in "ab"] for index, size in enumerate((4, 4, 9, 1))
    ]
    assert split_into_shards(groups, 16) == [[0, 1], [2], [3]]
    assert split_into_shards(groups, 1) == [[0], [1], [2], [3]]
    assert split_into_shards(groups, 100) == [[0, 1, 2, 3]]
    assert shard_names(1) == ["model.safetensors"]
    assert shard_names(2)[1] == "model-00002-of-00002.safetensors"
