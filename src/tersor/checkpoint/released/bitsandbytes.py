"""bitsandbytes: NF4 and FP4 with scales of blocks, which may be compressed again, and int8 with a scale a row."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch

from tersor.checkpoint.header import DTYPE_BITS
from tersor.checkpoint.released.parts import Assembly, check_rank, check_shape, codes_of, read
from tersor.checkpoint.source import StoredTensor
from tersor.errors import CheckpointError

_STATE = ".weight.quant_state.bitsandbytes__"
_INT8_MAX = 127.0
_ROW_MAJOR = 0


def bitsandbytes(assembly: Assembly) -> None:
    """Read 4-bit weights by their `quant_state`, and int8 weights by their `SCB`."""
    for quant_type in ("nf4", "fp4"):
        for stem, state in list(assembly.ending(_STATE + quant_type)):
            _four_bits(assembly, stem, state)
    for stem, scales in list(assembly.ending(".SCB")):
        _int8(assembly, stem, scales)


def _int8(assembly: Assembly, stem: str, scales: StoredTensor) -> None:
    weight = assembly.part(f"{stem}.weight", scales, ("I8",))
    assembly.find(f"{stem}.SCB", ("F32", "F16", "BF16"))
    layout = assembly.find(f"{stem}.weight_format")
    check_rank(weight, 2)
    oc = weight.spec.shape[0]
    check_shape(scales, (oc,), (oc, 1), (1, oc))
    if layout is not None and int(read(layout)) != _ROW_MAJOR:
        raise CheckpointError(f"{layout.file.path}: {weight.spec.name!r} is not stored row after row: save it again")

    def decode(first: int, last: int) -> torch.Tensor:
        scale = read(scales).float().reshape(-1, 1)[first:last]
        return read(weight, (first, last)).float() * scale / _INT8_MAX

    assembly.put(f"{stem}.weight", weight.spec.shape, (weight, scales, layout), decode)


def _four_bits(assembly: Assembly, stem: str, state: StoredTensor) -> None:
    name = f"{stem}.weight"
    weight = assembly.part(name, state, tuple(DTYPE_BITS))
    table = assembly.part(f"{name}.quant_map", weight, ("F32",))
    known = _state(state)
    shape = tuple(known["shape"])
    size = known["blocksize"]
    count = math.prod(shape)
    if len(shape) != 2 or 2 * weight.nbytes != count + count % 2:
        raise CheckpointError(
            f"{weight.file.path}: tensor {name!r} of {weight.nbytes} bytes holds no 4-bit weight {list(shape)}, as "
            f"{state.spec.name!r} says it is"
        )
    check_shape(table, (16,))
    blocks = -(-count // size)
    nested = known.get("nested_blocksize")
    absmax = assembly.part(f"{name}.absmax", weight, ("F32",) if nested is None else ("U8",))
    check_shape(absmax, (blocks,), (blocks, 1))
    nested_absmax = nested_table = None
    if nested is not None:
        nested_absmax = assembly.part(f"{name}.nested_absmax", weight, ("F32",))
        nested_table = assembly.part(f"{name}.nested_quant_map", weight, ("F32",))
        check_shape(nested_absmax, (-(-blocks // nested),))
        check_shape(nested_table, (256,))

    def scales(first: int, last: int) -> torch.Tensor:
        found = read(absmax, (first, last)).reshape(-1)
        if nested is None or nested_absmax is None or nested_table is None:
            return found
        outer = read(nested_absmax)[torch.arange(first, last) // nested]
        return read(nested_table)[found.long()] * outer + known["nested_offset"]

    def decode(first: int, last: int) -> torch.Tensor:
        start, stop = first * shape[1], last * shape[1]
        byte, end = start // 2, -(-stop // 2)
        raw = torch.empty(end - byte, dtype=torch.uint8)
        weight.file.read_into(weight.spec, byte, raw.numpy().data)
        # The first of two weights is in the high half of a byte.
        codes = codes_of(raw, 4, 2 * len(raw)).view(-1, 2).flip(1).reshape(-1)[start - 2 * byte :][: stop - start]
        block = start // size
        scale = scales(block, -(-stop // size)).repeat_interleave(size)[start - block * size :][: stop - start]
        return (read(table)[codes.long()] * scale).view(last - first, shape[1])

    assembly.put(name, shape, (weight, absmax, table, nested_absmax, nested_table, state), decode)


def _state(tensor: StoredTensor) -> Mapping[str, Any]:
    """Return what a `quant_state` tensor, JSON in bytes, says.

    Raises:
        CheckpointError: it is not that, or it lacks something.
    """
    try:
        state = json.loads(bytes(read(tensor).view(torch.uint8).tolist()).decode())
        sizes = [*state["shape"], state["blocksize"], state.get("nested_blocksize", 1)]
        whole = all(type(size) is int and size > 0 for size in sizes)
        if not whole or ("nested_blocksize" in state and not isinstance(state.get("nested_offset"), (int, float))):
            raise ValueError("sizes are not whole numbers, or nested_offset is missing")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{tensor.file.path}: {tensor.spec.name!r} cannot be understood: {error}") from None
    return dict(state)
