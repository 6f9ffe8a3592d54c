"""From a plain weight to the tensors that a checkpoint stores of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tersor.checkpoint.names import DENSE, Storage, stored_tensors
from tersor.compress import DEFAULT_RECIPE, Statistics, encode_blocks
from tersor.errors import NonFiniteError
from tersor.formats import Encoded, Scheme

_SHOWN_ROWS = 3


@dataclass(frozen=True, slots=True)
class Packed:
    """Rows of a compressed weight as they are stored.

    Attributes:
        tensors: name -> tensor, as `checkpoint.names.stored_tensors` describes them.
        squared_error: sum over all weights w of (w - dequantised w)^2.
        squared_norm: sum over all weights w of w^2.
        underflowed: numbers, in the whole weight, of the rows whose scales underflow (`Encoded.underflowed`).
    """

    tensors: dict[str, torch.Tensor]
    squared_error: float
    squared_norm: float
    underflowed: tuple[int, ...] = ()


def pack(
    weight: torch.Tensor,
    scheme: Scheme,
    recipe: str = DEFAULT_RECIPE,
    statistics: Statistics | None = None,
    *,
    first_row: int = 0,
    block_elements: int | None = None,
    storage: Storage = DENSE,
) -> Packed:
    """Encode a weight, or some of its rows, and pack every block while its codes are in the cache.

    Memory beyond weight and result is that of one block a thread.

    Args:
        weight: [rows, IC], any float dtype, any device.
        scheme: element format and scales.
        recipe, statistics, first_row, block_elements: as `compress.encode_blocks` takes them.
        storage: how the weight is stored.

    Returns:
        The tensors of these rows, on the weight's device.

    Raises:
        InputError: no such recipe, or statistics that it needs are not there.
        NonFiniteError: a NaN or an infinity, with its index in the whole weight.
        FormatError: the group size does not divide IC.
        ScaleError: a scale does not fit its dtype; it names the row in the whole weight.
    """
    count, ic = weight.shape
    tensors = {
        name: torch.empty(form.shape, dtype=form.dtype, device=weight.device)
        for name, form in stored_tensors(scheme, count, ic, storage).items()
    }

    underflowed: list[int] = []

    def take(start: int, block: Encoded) -> None:
        underflowed.extend(first_row + start + row for row in block.underflowed)
        packed = storage.pack(block)
        if len(block.codes) == count:
            tensors.update(packed)
            return
        for name, rows in packed.items():
            tensors[name][start : start + len(rows)] = rows

    error, norm = encode_blocks(
        weight, scheme, take, recipe, statistics, first_row=first_row, block_elements=block_elements
    )
    return Packed(tensors, error, norm, tuple(sorted(underflowed)))


def pack_stack(
    weight: torch.Tensor,
    scheme: Scheme,
    recipe: str = DEFAULT_RECIPE,
    *,
    transposed: bool = False,
    storage: Storage = DENSE,
) -> Packed:
    """Encode and pack the weights of all experts of a layer, each on its own.

    Args:
        weight: [E, OC, IC], or [E, IC, OC] where `transposed`; any float dtype, any device.
        scheme, recipe, storage: as for `pack`.
        transposed: whether an expert's weight is [IC, OC].

    Returns:
        Tensors [E, ...] on the weight's device; rows of all experts are counted one after the other.

    Raises:
        NonFiniteError: a NaN or an infinity, with its index in the weight as it is given.
        Others as `pack` does.
    """
    tensors: dict[str, torch.Tensor] = {}
    error, norm = 0.0, 0.0
    underflowed: list[int] = []
    for expert, own in enumerate(weight):
        matrix = own.T if transposed else own
        try:
            packed = pack(matrix, scheme, recipe, storage=storage)
        except NonFiniteError as failure:
            index = failure.index[::-1] if transposed else failure.index
            raise NonFiniteError((expert, *index), failure.value) from None
        for name, tensor in packed.tensors.items():
            if not expert:
                tensors[name] = tensor.new_empty(len(weight), *tensor.shape)
            tensors[name][expert] = tensor
        error, norm = error + packed.squared_error, norm + packed.squared_norm
        underflowed += [expert * len(matrix) + row for row in packed.underflowed]
    return Packed(tensors, error, norm, tuple(underflowed))


def underflow_words(rows: Sequence[int], scheme: Scheme) -> str:
    """Say which rows have scales that underflow, and what helps."""
    shown = ", ".join(map(str, rows[:_SHOWN_ROWS]))
    more = f" and {len(rows) - _SHOWN_ROWS} more" if len(rows) > _SHOWN_ROWS else ""
    wider = "bfloat16" if scheme.scale_dtype == "float16" else "float32"
    way_out = (
        f"use {wider} scales (--scale-dtype)" if scheme.scale_dtype in ("float16", "e8m0") else "leave the tensor alone"
    )
    return (
        f"row{'s' if len(rows) > 1 else ''} {shown}{more}: weights too small for {scheme.scale_dtype} scales became "
        f"zero or far off: {way_out}"
    )
