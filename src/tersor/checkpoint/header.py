"""What does the header of a safetensors file say? Parsed with every check the format asks for, and written.

The format: 8 bytes little-endian header length, that many bytes of JSON (tensor name -> dtype, shape, data_offsets
relative to the end of the header), then the tensors without gaps (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tersor.errors import CheckpointError, did_you_mean

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library."""

DTYPE_BITS: dict[str, int] = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
"""safetensors dtype name -> bits of an element."""

WEIGHT_DTYPES = ("F16", "BF16", "F32", "F64")
"""The dtypes an uncompressed weight has."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor in a safetensors file.

    Attributes:
        name: what the file calls the tensor.
        dtype: a key of `DTYPE_BITS`.
        shape: sizes of the tensor's axes.
        offset: the tensor's first byte in the file's data section; meaningful once the file is laid out.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that the tensor takes in the file."""
        return self.numel * DTYPE_BITS[self.dtype] // 8


def parse(raw: bytes, data_bytes: int, path: str) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    """Parse and check the JSON header of a safetensors file.

    Args:
        raw: the header's bytes, without the length in front.
        data_bytes: size of the data section on disk.
        path: for error messages.

    Returns:
        Tensors by name, in the order of their bytes, and the file's metadata.

    Raises:
        CheckpointError: not JSON, a malformed entry, overlapping or missing bytes.
    """
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not valid JSON ({error}): download the file again") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is a JSON {type(header).__name__}, not an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ in the header does not map names to text")
    specs: list[TensorSpec] = []
    for name, entry in header.items():
        spec, end = _entry(name, entry, path)
        if end - spec.offset != spec.nbytes:
            raise CheckpointError(
                f"{path}: tensor {name!r} of shape {list(spec.shape)} and dtype {spec.dtype} needs {spec.nbytes} "
                f"bytes but its offsets span {end - spec.offset}"
            )
        specs.append(spec)
    specs.sort(key=lambda spec: (spec.offset, spec.offset + spec.nbytes))
    position = 0
    for spec in specs:
        if spec.offset != position:
            what = "overlaps the tensor before it" if spec.offset < position else "leaves a gap before it"
            raise CheckpointError(
                f"{path}: tensor {spec.name!r} {what} (it starts at byte {spec.offset} of the data, expected "
                f"{position})"
            )
        position += spec.nbytes
    if position > data_bytes:
        last = next(spec for spec in specs if spec.offset + spec.nbytes > data_bytes)
        raise CheckpointError(
            f"{path}: truncated: the tensors need {position} bytes and {data_bytes} are there (first incomplete: "
            f"{last.name!r}); download the file again"
        )
    if position < data_bytes:
        raise CheckpointError(f"{path}: {data_bytes - position} bytes after the last tensor belong to nothing")
    return {spec.name: spec for spec in specs}, metadata


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} stands there twice")
    return result


def _entry(name: str, entry: Any, path: str) -> tuple[TensorSpec, int]:
    """Return one tensor of the header and the byte after its last one."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{path}: the header's entry for {name!r} is not a dtype, a shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in DTYPE_BITS:
        raise CheckpointError(
            f"{path}: tensor {name!r} has unknown dtype {dtype!r}{did_you_mean(str(dtype), DTYPE_BITS)}"
        )
    if not _naturals(shape):
        raise CheckpointError(f"{path}: tensor {name!r} has shape {shape!r}, not a list of sizes")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{path}: tensor {name!r} has data_offsets {offsets!r}, not a start and an end")
    return TensorSpec(name, dtype, tuple(shape), offsets[0]), offsets[1]


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 62 for item in value)


def lay_out(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """Give tensors their places in a file: wide dtypes first, so that every tensor is aligned."""
    placed = []
    offset = 0
    for spec in sorted(specs, key=lambda spec: -DTYPE_BITS[spec.dtype]):
        placed.append(TensorSpec(spec.name, spec.dtype, spec.shape, offset))
        offset += spec.nbytes
    return placed


def build(specs: Iterable[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """Return length and header of a file whose tensors are laid out, padded to a multiple of 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for spec in specs:
        offsets = [spec.offset, spec.offset + spec.nbytes]
        entries[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":"), allow_nan=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
