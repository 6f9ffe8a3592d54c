"""Multiply with a dense packed weight that keeps outliers beside its codes.

The dense part is multiplied as the weight that it is, and what the outliers add stands beside its sums: that is the
definition, x @ dense^T + x @ outliers^T + bias, summed in float32, then the gate, then the residual, rounded once. It
is made of operators that dispatch, so that gradients, torch.compile and autocast are theirs.

On compute capability 9.0 the fused kernel adds them to its sums or, of many tokens, cuBLAS multiplies with a decoded
weight that has them. Elsewhere a small kernel ahead of it sums up the outliers of every row together with the residual,
in float32, and rounds that to the dtype of the activations; the dense kernel adds it as its residual
(`ops.outlier_sums`). So a result is rounded twice there. A gate is applied by itself.

`tersor::outlier_linear` is the same product as one operator with a meta twin, for who traces a model and runs it
without gradients: a trace of `multiply` holds what the sums are made of.
"""

from __future__ import annotations

import functools

import torch

from tersor.formats import Scheme, outlier_columns, outlier_values
from tersor.layouts import PackedWeight
from tersor.layouts.gated import gated_channels
from tersor.layouts.packing import NATIVE
from tersor.ops import autocast, dense, dispatch, outlier_sums, prepared, serve, tensors
from tersor.ops.gates import Gate
from tersor.ops.reference import BLOCK_ELEMENTS

_library = torch.library.Library("tersor", "FRAGMENT")
_library.define(
    "outlier_linear(Tensor x, Tensor data, Tensor scale, Tensor? zero_point, Tensor outliers, Tensor? arranged, "
    "Tensor? bias, str scheme, int oc, int ic, str layout) -> Tensor"
)
_scheme = functools.lru_cache(256)(Scheme.from_key)


def multiply(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, residual: torch.Tensor | None, gate: int
) -> torch.Tensor:
    """Serve a call of `ops.linear` or `ops.gated_linear` with a weight that has outliers.

    Raises:
        ShapeError: sizes, dtypes or devices that do not fit.
    """
    own, dtype = _dense(weight), autocast.activation_dtype(x)
    if not dense.looked_at(x, bias, residual) and not dispatch.environment_reason(dtype, x.device):
        return _beside_kernels(x, weight, own, bias, residual, gate)
    wide = torch.promote_types(dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        rows, bias, residual = (None if one is None else one.to(dtype) for one in (x, bias, residual))
        assert rows is not None
        if x.is_cuda and dtype in NATIVE:  # autograd, a trace or a profiler looks on: kernels take no float32
            beside = sums(rows, weight)
            y = dense.multiply(rows, own, bias, beside if gate or residual is None else beside + residual, 0)
            if not gate:
                return y
            y = Gate(gate).of_rows(y)
            return y if residual is None else y + residual
        rows = rows.to(wide)
        y = dense.multiply(rows, own, None if bias is None else bias.to(wide), None, 0) + sums(rows, weight)
        if gate:
            gated_channels(weight.shape[0])
            y = Gate(gate).of_rows(y)
        return (y if residual is None else y + residual).to(dtype)


def sums(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """Return x [..., IC] @ outliers^T, [..., OC] in x's dtype, a block of rows of the weight at a time.

    In a block the outliers stand among zeros, which are multiplied with as the dense part's are.
    """
    words, kept = weight.outliers, weight.scheme.outliers
    assert words is not None and kept is not None
    oc, ic = weight.shape
    height = max(1, BLOCK_ELEMENTS.get(x.device.type, 1 << 18) // max(1, ic))
    parts = []
    for block in words.split(height):
        values = outlier_values(block, kept.dtype).to(x.dtype)
        rows = torch.zeros(len(block), ic, dtype=x.dtype, device=x.device)
        parts.append(x @ rows.scatter_add_(1, outlier_columns(block), values).T)
    return torch.cat(parts, dim=-1) if parts else x.new_zeros(*x.shape[:-1], oc)


def _beside_kernels(
    x: torch.Tensor,
    weight: PackedWeight,
    own: PackedWeight,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gate: int,
) -> torch.Tensor:
    """Return the product on a GPU that has kernels, where nobody looks on."""
    oc = weight.shape[0]
    serve.check(x, x.shape, own.data, bias, prepared.type_of(own), residual, gated_channels(oc) if gate else oc)
    if not x.numel() or not oc:
        return tensors.empty_result(x, bias, residual, gate, oc)
    added = None if gate else residual
    y = outlier_sums.multiply(x, weight, own, bias, added)
    if y is None:
        y = dense.multiply(x, own, bias, outlier_sums.add(x, weight, added), 0)
    if not gate:
        return y
    y = Gate(gate).of_rows(y)
    return y if residual is None else y + residual


def _dense(weight: PackedWeight) -> PackedWeight:
    """Return the dense part, the same object every time, so that what is kept of it is found again."""
    if torch.compiler.is_compiling():
        return weight.dense
    found: PackedWeight | None = getattr(weight, "note", None)
    if found is None:
        found = weight.dense
        object.__setattr__(weight, "note", found)  # not part of the frozen value
    return found


def _serve(
    x: torch.Tensor,
    data: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    outliers: torch.Tensor,
    arranged: torch.Tensor | None,
    bias: torch.Tensor | None,
    scheme: str,
    oc: int,
    ic: int,
    layout: str,
) -> torch.Tensor:
    """Serve a call of the operator."""
    weight = PackedWeight(_scheme(scheme), (oc, ic), data, scale, zero_point, layout, outliers, arranged)
    if dispatch.environment_reason(x.dtype, x.device):
        return multiply(x, weight, bias, None, 0)
    return _beside_kernels(x, weight, _dense(weight), bias, None, 0)


def _shape_only(
    x: torch.Tensor,
    data: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    outliers: torch.Tensor,
    arranged: torch.Tensor | None,
    bias: torch.Tensor | None,
    scheme: str,
    oc: int,
    ic: int,
    layout: str,
) -> torch.Tensor:
    """Check a call and return an uninitialised result: for tensors without memory."""
    of = prepared.weight_type(_scheme(scheme).dense.key(), oc, ic, layout)
    return serve.shape_only(x, data, scale, zero_point, bias, of, None, 0)


operator = torch.ops.tersor.outlier_linear.default
for _device in autocast.DEVICES:
    _library.impl("outlier_linear", _serve, _device)
    _library.impl("outlier_linear", autocast.casting(operator), f"Autocast{_device}")
torch.library.register_fake("tersor::outlier_linear", _shape_only, lib=_library)
