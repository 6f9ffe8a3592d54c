"""The torch operator `tersor::embedding`: rows of a packed weight, decoded as they are looked up."""

from __future__ import annotations

import torch

from tersor.errors import ShapeError
from tersor.formats import Scheme, dequantize
from tersor.layouts import STREAM, PackedWeight, stream
from tersor.ops import autocast
from tersor.ops.reference import BLOCK_ELEMENTS

_library = torch.library.Library("tersor", "FRAGMENT")
_library.define(
    "embedding(Tensor ids, Tensor data, Tensor scale, Tensor? zero_point, str scheme, int oc, int ic, "
    "ScalarType dtype) -> Tensor"
)


def embedding(ids: torch.Tensor, weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """Return the rows of a packed weight that `ids` name.

    Memory beyond the result is bounded by a block of rows; nothing waits for the device.

    Args:
        ids: int64 or int32, any shape, on the weight's device.
        weight: packed weight [OC, IC] in the stored stream.
        dtype: of the result.

    Returns:
        [..., IC]: decoded in float32 and rounded once.

    Raises:
        ShapeError: ids, layouts or devices that do not fit.
    """
    oc, ic = weight.shape
    if weight.layout != STREAM:
        raise ShapeError(f"embedding: the weight lies in {weight.layout}, rows are looked up in the stored stream")
    return torch.ops.tersor.embedding(
        ids, weight.data, weight.scale, weight.zero_point, weight.scheme.key(), oc, ic, dtype
    )


def _check(ids: torch.Tensor, data: torch.Tensor, scheme: Scheme, oc: int, ic: int) -> None:
    if ids.dtype not in (torch.int64, torch.int32):
        raise ShapeError(f"embedding: ids are {ids.dtype}, expected int64 or int32")
    if ids.device != data.device:
        raise ShapeError(f"embedding: ids are on {ids.device}, the weight on {data.device}")
    words = (oc, stream.row_words(ic, scheme.format.bits))
    if tuple(data.shape) != words or data.dtype != torch.int32:
        raise ShapeError(
            f"embedding: the packed weight is {list(data.shape)} {data.dtype}, expected {list(words)} torch.int32 for "
            f"[{oc}, {ic}] in {scheme.name}"
        )


def _serve(
    ids: torch.Tensor,
    data: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    scheme: str,
    oc: int,
    ic: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    meaning = Scheme.from_key(scheme)
    _check(ids, data, meaning, oc, ic)
    chosen = ids.reshape(-1)
    result = torch.empty(chosen.shape[0], ic, dtype=dtype, device=data.device)
    rows = max(1, BLOCK_ELEMENTS.get(ids.device.type, 1 << 18) // max(ic, 1))
    for first in range(0, chosen.shape[0], rows):
        block = chosen[first : first + rows]
        codes = stream.unpack(data.index_select(0, block), meaning.format.bits, ic)
        zeros = None if zero_point is None else zero_point.index_select(0, block)
        result[first : first + rows] = dequantize(codes, scale.index_select(0, block), zeros, meaning)
    return result.view(*ids.shape, ic)


def _meta(
    ids: torch.Tensor,
    data: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    scheme: str,
    oc: int,
    ic: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    _check(ids, data, Scheme.from_key(scheme), oc, ic)
    return torch.empty(*ids.shape, ic, dtype=dtype, device=data.device)


for _device in autocast.DEVICES:
    _library.impl("embedding", _serve, _device)
torch.library.register_fake("tersor::embedding", _meta, lib=_library)
