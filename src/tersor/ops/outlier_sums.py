"""What outliers add to a product on a GPU: in the fused kernel of compute capability 9.0, else in one ahead of it.

Of many tokens the weight is decoded instead, with its outliers, for cuBLAS, where that is predicted to take less time
(`tune.decodes_beside`); weights that have scales are rounded to the activations' dtype then.

The kernel ahead reads activations turned, eight tokens of a channel at a time, unless there are at most four. It serves
older GPUs, the batch-invariant mode, in which the fused kernel's choice of tiles is another, and outliers that the
activations' dtype does not have.
"""

from __future__ import annotations

import functools

import torch

from tersor.formats import Activations
from tersor.hardware import Chip
from tersor.kernels import dense, jit, outliers, tune
from tersor.kernels.jit import KernelSource
from tersor.layouts import PackedWeight
from tersor.layouts.outliers import rounds_of
from tersor.layouts.packing import LAYOUTS, Packing
from tersor.ops import current, decompressed, dequantized, dispatch, mode, prepared, serve, tensors
from tersor.ops.norm import TARGETS, launched_early

_sums = functools.lru_cache(1024)(outliers.prepare_sums)
_turn = functools.lru_cache(1024)(outliers.prepare_turn)


def inside(weight: PackedWeight, dtype: torch.dtype, capability: tuple[int, int]) -> bool:
    """Tell whether kernels take outliers in their own order, in the current mode, where these are arranged for them.

    Args:
        weight: with outliers, or the dense part.
        dtype: of activations.
        capability: of the GPU.
    """
    native = dtype in TARGETS and LAYOUTS.get(weight.layout) == TARGETS[dtype]
    return native and capability == (9, 0) and not mode.current().batch_invariant


def sources(weight: PackedWeight, dtype: torch.dtype, tokens: int, chip: Chip) -> tuple[list[KernelSource], bool]:
    """Return the kernels that calls of up to so many tokens ask for beside those of the dense part.

    Args:
        weight: with outliers, as it lies on the GPU; no number of it is read.
        dtype: of activations.
        tokens: at least 1.
        chip: the GPU.

    Returns:
        The kernels, and whether they make whole products, whatever the outliers are.
    """
    kept, own = weight.scheme.outliers, weight.dense
    if mode.current().reference or dtype not in TARGETS or kept is None:
        return [], False
    if not inside(own, dtype, chip.capability):
        return outliers.sources(TARGETS[dtype], kept.dtype, tokens), False
    packing, rounds = Packing.beside(Activations.NATIVE, dtype, own.scheme), rounds_of(kept, own.shape[1])
    found: list[KernelSource] = []
    n, complete = 0, kept.dtype == TARGETS[dtype]
    while n < tokens:
        n = tune.filled(n + 1)
        problem = tune.LinearProblem.of(packing, own.shape, n)
        config = tune.choose_beside(problem, rounds, chip)
        if tune.decodes_beside(problem, rounds, chip):
            asked = [dense.dequantize_source(packing, rounds), dense.finish_source(TARGETS[dtype], 0)]
        elif config is None:
            complete = False
            continue
        else:
            asked = [dense.fused_source(packing, TARGETS[dtype], config, outliers=rounds)]
        found += [source for source in asked if source not in found]
    return found if complete else [*found, *outliers.sources(TARGETS[dtype], kept.dtype, tokens)], complete


def multiply(
    x: torch.Tensor,
    weight: PackedWeight,
    own: PackedWeight,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> torch.Tensor | None:
    """Return the product where a fused kernel or cuBLAS makes all of it, else `None`.

    Args:
        x: [..., IC] on a GPU that has kernels, at least one token.
        weight, own: with outliers, and its dense part.
        bias, residual: as for `serve.linear`; they fit.
    """
    kept, (oc, ic), index, now = weight.scheme.outliers, weight.shape, x.get_device(), mode.current()
    n = x.numel() // ic
    if weight.arranged is None or kept is None or not inside(own, x.dtype, torch.cuda.get_device_capability(index)):
        return None
    if current.device() != index:
        with torch.cuda.device(index):
            return multiply(x, weight, own, bias, residual)
    key = (n, x.dtype, index, True, 0, prepared.mode_key(now, 0, rounds_of(kept, ic)))
    chosen = prepared.type_of(own).prepared(key, now)
    if chosen.decision.kernel == dispatch.DEQUANTIZE:
        return decoded(x, weight, own, bias, residual)
    if chosen.launch is None:
        return None
    rows = tensors.rows_of(x, ic)
    if rows.data_ptr() % 16 or rows.stride(0) % 8:
        rows = tensors.aligned_rows(x, ic)
    y = tensors.output(x.shape, n, oc, x.dtype)
    return serve.launched(
        chosen,
        own,
        bias,
        residual,
        y,
        x=rows.data_ptr(),
        x_stride=rows.stride(0),
        x_scale=0,
        kept=weight.arranged.data_ptr(),
    )


def decoded(
    x: torch.Tensor,
    weight: PackedWeight,
    own: PackedWeight,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """Return the product by cuBLAS with the decoded weight; arguments as for `multiply`, on the current device."""
    oc, ic = weight.shape
    rows = tensors.rows_of(x, ic)
    if rows.data_ptr() % 16 or rows.stride(0) % 8:
        rows = tensors.aligned_rows(x, ic)
    added = None if residual is None else tensors.contiguous(residual).view(-1, oc)
    slices = dequantized.with_outliers(weight, prepared.type_of(own))
    y = decompressed.linear(rows, slices, None if bias is None else bias.contiguous(), oc, added, 0)
    return y.view(*x.shape[:-1], oc)


def add(x: torch.Tensor, weight: PackedWeight, residual: torch.Tensor | None) -> torch.Tensor:
    """Return x @ outliers^T + residual, summed in float32 and rounded once to x's dtype, [..., OC].

    Args:
        x: [..., IC] float16 or bfloat16 on a GPU that has kernels, at least one token.
        weight: packed weight [OC, IC] with outliers.
        residual: [..., OC] in x's dtype, or `None`.
    """
    words, kept, (oc, ic) = weight.outliers, weight.scheme.outliers, weight.shape
    assert words is not None and kept is not None
    index = x.get_device()
    if current.device() != index:
        with torch.cuda.device(index):
            return add(x, weight, residual)
    rows = tensors.rows_of(x, ic)
    n, tokens = len(rows), outliers.tile(len(rows))
    if residual is not None:
        residual = tensors.contiguous(residual)
    held, stride = _held(rows)
    out = current.empty((n, oc), (oc, 1), x.dtype)
    source = outliers.sums_source(TARGETS[x.dtype], kept.dtype, tokens)
    launch = _sums(jit.get(source, index), count=words.shape[1], oc=oc, n=n)
    launch(
        stream=current.stream(index),
        x=held.data_ptr(),
        stride=stride,
        words=words.data_ptr(),
        residual=0 if residual is None else residual.data_ptr(),
        out=out.data_ptr(),
        early=launched_early(x.device),
    )
    return out.view(*x.shape[:-1], oc)


def _held(rows: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return activations [N, IC] as kernels read them beside outliers, and the elements of a step.

    Those of few tokens stay, a step from token to token; of more they are turned, a step from channel to channel. What
    is returned is held until the launch; then it is the stream's order that keeps it.
    """
    n, ic = rows.shape
    if outliers.tile(n) != outliers.TURNED:
        return rows, rows.stride(0)
    index, stride = rows.get_device(), outliers.turned_stride(n)
    turned = current.empty((ic, stride), (stride, 1), rows.dtype)
    turn = _turn(jit.get(outliers.turn_source(), index), ic=ic, n=n)
    turn(
        stream=current.stream(index),
        x=rows.data_ptr(),
        stride=rows.stride(0),
        turned=turned.data_ptr(),
        early=launched_early(rows.device),
    )
    return turned, stride
