"""The torch operator `tersor::mixed_linear` of mixed weights, and its meta twin.

An output feature is what `ops.linear` gives for its row in the row set of its level, but for the order in which
products are summed: that is the definition. On compute capability 9.0 one launch makes all of it (`mixed_launch`).
Everywhere else and in batch-invariant mode a row set is multiplied as the dense weight that it is, and one gather
brings features in order; biases and residuals are taken apart by the same permutation, so that each is added before
the one rounding. Where someone differentiates, or autocast is on, the same is made of the operators of dense weights,
whose gradients and casts are theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from tersor.errors import ShapeError
from tersor.layouts import MixedWeight, PackedWeight
from tersor.layouts.gated import interleave, separate
from tersor.ops import autocast, dense, gradient, mixed_launch, row_sets

_Rows = TypeVar("_Rows")

_library = torch.library.Library("tersor", "FRAGMENT")
_library.define(
    "mixed_linear(Tensor x, Tensor[] weight, str form, Tensor? bias, Tensor? residual=None, int gate=0) -> Tensor"
)


def multiply(
    x: torch.Tensor, weight: MixedWeight, bias: torch.Tensor | None, residual: torch.Tensor | None, gate: int
) -> torch.Tensor:
    """Serve a call of `ops.linear` or `ops.gated_linear`.

    Raises:
        ShapeError: sizes, dtypes or devices that do not fit, or a gate for a weight that is not gate and up.
    """
    outputs = weight.channels if gate else weight.shape[0]
    check(x.shape, weight.shape, weight.gated, bias, residual, gate, outputs)
    if not dense.looked_at(x, bias, residual):
        return _launched(x, weight, bias, residual, gate)
    if autocast.enabled() or gradient.wanted(x, bias, residual):
        return by_row_sets(x, weight, bias, residual, gate)
    return _operator(x, *row_sets.tensors_of(weight), bias, residual, gate)


def by_row_sets(
    x: torch.Tensor, weight: MixedWeight, bias: torch.Tensor | None, residual: torch.Tensor | None, gate: int
) -> torch.Tensor:
    """Return the product, made of those of the row sets."""
    return of_row_sets(dense.multiply, x, weight, bias, residual, gate)


def of_row_sets(
    multiply: Callable[[_Rows, PackedWeight, torch.Tensor | None, torch.Tensor | None, int], torch.Tensor],
    x: _Rows,
    weight: MixedWeight,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gate: int,
) -> torch.Tensor:
    """Return the product of activations of any kind, made of what `multiply` makes of them and each row set.

    Args:
        multiply: as `dense.multiply`, for such activations.
        x, weight, bias, residual, gate: of the whole product.
    """
    biases = [None] * len(weight.sets) if bias is None else by_set(weight, bias)
    added: list[torch.Tensor | None] = [None] * len(weight.sets)
    if residual is not None:
        added = [*(weight.by_set(residual) if gate else by_set(weight, residual))]
    parts = [
        multiply(x, one, own_bias, own_residual, gate)
        for one, own_bias, own_residual in zip(weight.sets, biases, added, strict=True)
    ]
    return weight.of_channels(parts) if gate else weight.in_order(parts).contiguous()


def by_set(weight: MixedWeight, values: torch.Tensor) -> list[torch.Tensor]:
    """Return the values [..., OC] of every set's rows; those of gate and up are interleaved in each."""
    if not weight.gated:
        return weight.by_set(values)
    gates, ups = (weight.by_set(half.movedim(0, -1)) for half in separate(values.movedim(-1, 0)))
    pairs = zip(gates, ups, strict=True)
    return [interleave(gate.movedim(-1, 0), up.movedim(-1, 0)).movedim(0, -1) for gate, up in pairs]


def _launched(
    x: torch.Tensor, weight: MixedWeight, bias: torch.Tensor | None, residual: torch.Tensor | None, gate: int
) -> torch.Tensor:
    y = mixed_launch.multiply(x, weight, bias, residual, gate)
    return by_row_sets(x, weight, bias, residual, gate) if y is None else y


def check(
    given: torch.Size,
    shape: tuple[int, int],
    gated: bool,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gate: int,
    outputs: int,
) -> None:
    """Raise ShapeError where sizes of a call do not fit; dtypes are those of the products of row sets to check.

    Args:
        given: shape of the activations.
        shape, gated: of the weight.
        bias, residual, gate: of the call.
        outputs: channels of the result.
    """
    oc, ic = shape
    if gate and not gated:
        raise ShapeError(f"gated_linear: a mixed weight {list(shape)} is not MixedWeight.gate_up of two")
    if not given or given[-1] != ic:
        raise ShapeError(f"linear: x has shape {list(given)}, expected [..., {ic}] for a weight [{oc}, {ic}]")
    if bias is not None and bias.shape != (oc,):
        raise ShapeError(f"linear: bias is {list(bias.shape)}, expected [{oc}]")
    if residual is not None and residual.shape != (*given[:-1], outputs):
        raise ShapeError(f"linear: residual is {list(residual.shape)}, expected {[*given[:-1], outputs]}")


def _serve(
    x: torch.Tensor,
    weight: Sequence[torch.Tensor],
    form: str,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None = None,
    gate: int = 0,
) -> torch.Tensor:
    """Serve a call of the operator; what stays the same from call to call is kept for each form."""
    shape, gated, channels = row_sets.outputs_of(form)
    check(x.shape, shape, gated, bias, residual, gate, channels if gate else shape[0])
    made = row_sets.weight_of(weight, form)
    mixed_launch.remember(made, form)
    return _launched(x, made, bias, residual, gate)


def _shape_only(
    x: torch.Tensor,
    weight: Sequence[torch.Tensor],
    form: str,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None = None,
    gate: int = 0,
) -> torch.Tensor:
    """Check a call and return an uninitialised result: for tensors without memory."""
    shape, gated, channels = row_sets.outputs_of(form)
    outputs = channels if gate else shape[0]
    check(x.shape, shape, gated, bias, residual, gate, outputs)
    return x.new_empty(*x.shape[:-1], outputs)


def _differentiable(
    x: torch.Tensor,
    weight: Sequence[torch.Tensor],
    form: str,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None = None,
    gate: int = 0,
) -> torch.Tensor:
    """Return the product of operators that have gradients where one is wanted."""
    if gradient.wanted(x, bias, residual):
        return by_row_sets(x, row_sets.weight_of(weight, form), bias, residual, gate)
    with torch._C._AutoDispatchBelowAutograd():
        return _operator(x, weight, form, bias, residual, gate)


def _cast(
    x: torch.Tensor,
    weight: Sequence[torch.Tensor],
    form: str,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None = None,
    gate: int = 0,
) -> torch.Tensor:
    """Return the product of operators that autocast reaches."""
    return by_row_sets(x, row_sets.weight_of(weight, form), bias, residual, gate)


_operator = torch.ops.tersor.mixed_linear.default
for _device in autocast.DEVICES:
    _library.impl("mixed_linear", _serve, _device)
    _library.impl("mixed_linear", _cast, f"Autocast{_device}")
_library.impl("mixed_linear", _differentiable, "Autograd")
torch.library.register_fake("tersor::mixed_linear", _shape_only, lib=_library)
