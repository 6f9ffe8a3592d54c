"""From a plain weight to the tensors that a checkpoint stores of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from tersor.checkpoint.names import DENSE, SPARSE, VALUES, Form, level_stem, stored_tensors
from tersor.compress import DEFAULT_RECIPE, Statistics, encode_blocks
from tersor.errors import CheckpointError, NonFiniteError
from tersor.formats import Assignment, Encoded, Pruned, ScaleError, Scheme
from tersor.layouts import SparseWeight

_SHOWN_ROWS = 3


@dataclass(frozen=True, slots=True)
class Packed:
    """Rows of a compressed weight as they are stored.

    Attributes:
        tensors: name -> tensor, as `checkpoint.names.stored_tensors` describes them.
        squared_error: sum over all weights w of (w - dequantised w)^2.
        squared_norm: sum over all weights w of w^2.
        underflowed: numbers, in the whole weight, of the rows whose scales underflow (`Encoded.underflowed`).
        starts: of rows of a mixed or pruned weight, name -> which row of the whole tensor is the first of these; of
            values, which word.
    """

    tensors: dict[str, torch.Tensor]
    squared_error: float
    squared_norm: float
    underflowed: tuple[int, ...] = ()
    starts: Mapping[str, int] = field(default_factory=dict)


def pack(
    weight: torch.Tensor,
    scheme: Scheme,
    recipe: str = DEFAULT_RECIPE,
    statistics: Statistics | None = None,
    *,
    first_row: int = 0,
    block_elements: int | None = None,
) -> Packed:
    """Encode a weight, or some of its rows, and pack every block while its codes are in the cache.

    Memory beyond weight and result is that of one block a thread.

    Args:
        weight: [rows, IC], any float dtype, any device.
        scheme: element format and scales.
        recipe, statistics, first_row, block_elements: as `compress.encode_blocks` takes them.

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
        for name, form in stored_tensors(scheme, count, ic).items()
    }

    underflowed: list[int] = []

    def take(start: int, block: Encoded) -> None:
        underflowed.extend(first_row + start + row for row in block.underflowed)
        packed = DENSE.pack(block)
        if len(block.codes) == count:
            tensors.update(packed)
            return
        for name, rows in packed.items():
            tensors[name][start : start + len(rows)] = rows

    error, norm = encode_blocks(
        weight, scheme, take, recipe, statistics, first_row=first_row, block_elements=block_elements
    )
    return Packed(tensors, error, norm, tuple(sorted(underflowed)))


def pack_mixed(
    weight: torch.Tensor,
    assignment: Assignment,
    recipe: str = DEFAULT_RECIPE,
    statistics: Statistics | None = None,
    *,
    first_row: int = 0,
    block_elements: int | None = None,
) -> Packed:
    """Encode rows of a weight, each at its level, and pack those of every level.

    Args:
        weight: [rows, IC], any float dtype, any device.
        assignment: the level of every output feature of the whole weight, or of an expert's.
        recipe, statistics, block_elements: as `compress.encode_blocks` takes them, for the rows of each level.
        first_row: which output feature the first row is; those of experts are counted one after the other.

    Returns:
        The tensors of these rows but for `weight_level`, which the assignment is.

    Raises:
        As `pack` does.
    """
    count, mix = len(weight), assignment.mix
    before, inside = divmod(first_row, len(assignment.level))
    around = assignment.level * (1 + (inside + count - 1) // len(assignment.level))
    level = torch.tensor(list(around[inside : inside + count]), device=weight.device)
    tensors: dict[str, torch.Tensor] = {}
    starts: dict[str, int] = {}
    error, norm = 0.0, 0.0
    underflowed: list[int] = []
    for number, scheme in enumerate(mix.levels):
        features = (level == number).nonzero().flatten()
        if not len(features):
            continue
        rows = (features + first_row).tolist()
        try:
            packed = pack(weight[features], scheme, recipe, statistics, block_elements=block_elements)
        except NonFiniteError as failure:
            row, column = failure.index
            raise NonFiniteError((rows[row], column), failure.value) from None
        except ScaleError as failure:
            raise ScaleError(rows[failure.row], failure.reason) from None
        first = before * assignment.rows[number] + assignment.level.count(number, 0, inside)
        for name, tensor in packed.tensors.items():
            tensors[f"{level_stem(number)}.{name}"] = tensor
            starts[f"{level_stem(number)}.{name}"] = first
        error, norm = error + packed.squared_error, norm + packed.squared_norm
        underflowed += [rows[row] for row in packed.underflowed]
    return Packed(tensors, error, norm, tuple(sorted(underflowed)), starts)


def pack_sparse(
    weight: torch.Tensor,
    form: Pruned,
    recipe: str = DEFAULT_RECIPE,
    statistics: Statistics | None = None,
    *,
    first_row: int = 0,
    block_elements: int | None = None,
) -> Packed:
    """Pack what is left of rows of a pruned weight: what is not zero.

    Args:
        weight: [rows, IC], any float dtype, any device; plain numbers keep their bits, so that it has their dtype.
        form: of the whole weight.
        recipe, statistics, block_elements: as `compress.encode_blocks` takes them, where values are codes.
        first_row: number of the first row in the whole weight.

    Returns:
        The tensors of these rows, on the weight's device.

    Raises:
        CheckpointError: another number of weights is left in a row than the form has.
        Others as `pack` does.
    """
    scheme, kept = form.sparse.scheme, weight != 0
    rows, error, underflowed = len(weight), 0.0, list[int]()
    if scheme is None:
        _check_finite(weight, first_row)
        norm = float(weight.to(torch.float64).square().sum())
        whole = SparseWeight.from_plain(weight, kept)
    else:
        parts: dict[int, SparseWeight] = {}

        def take(start: int, block: Encoded) -> None:
            underflowed.extend(first_row + start + row for row in block.underflowed)
            parts[start] = SparseWeight.from_encoded(block, kept[start : start + len(block.codes)])

        error, norm = encode_blocks(
            weight, scheme, take, recipe, statistics, first_row=first_row, block_elements=block_elements
        )
        whole = SparseWeight.stack([parts[start] for start in sorted(parts)])
    if whole.form != form.cut([(first_row, first_row + rows)]):
        raise CheckpointError("zeros were counted, and there are others now: the weight changed while it was read")
    start = int(form.starts()[first_row])
    return Packed(SPARSE.pack(whole), error, norm, tuple(sorted(underflowed)), {VALUES: start})


def _check_finite(weight: torch.Tensor, first_row: int) -> None:
    """Raise NonFiniteError, with the index in the whole weight, where rows hold a NaN or an infinity."""
    finite = torch.isfinite(weight)
    if not bool(finite.all()):
        row, column = (int(axis) for axis in (~finite).nonzero()[0])
        raise NonFiniteError((first_row + row, column), float(weight[row, column]))


def pack_stack(
    weight: torch.Tensor,
    scheme: Scheme,
    recipe: str = DEFAULT_RECIPE,
    *,
    transposed: bool = False,
) -> Packed:
    """Encode and pack the weights of all experts of a layer, each on its own.

    Args:
        weight: [E, OC, IC], or [E, IC, OC] where `transposed`; any float dtype, any device.
        scheme, recipe: as for `pack`.
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
            packed = pack(matrix, scheme, recipe)
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


def underflow_words(rows: Sequence[int], form: Form) -> str:
    """Say which rows have scales that underflow, and what helps."""
    if isinstance(form, Pruned):
        found = form.sparse.scheme
        assert found is not None, "plain numbers have no scales"
        scheme = found
    else:
        scheme = form.mix.levels[form.level[rows[0] % len(form.level)]] if isinstance(form, Assignment) else form
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
