"""What outliers add to a product on a GPU: in the fused kernel of few tokens, else in a small one ahead of it.

A kernel that adds them itself reads activations turned, eight tokens of a channel at a time, unless there are at most
four. Their order of sums depends on that, and a batch-invariant call has the small kernel, whose order never changes.
So has a gated one: with a gate and outliers one of the fused kernels had too few registers.
"""

from __future__ import annotations

import functools

import torch

from tersor.formats import Activations
from tersor.hardware import Chip
from tersor.kernels import dense, jit, outliers, tune
from tersor.kernels.jit import KernelSource
from tersor.layouts import PackedWeight
from tersor.layouts.gated import gated_channels
from tersor.layouts.packing import LAYOUTS, Packing
from tersor.ops import current, mode, prepared, serve, tensors
from tersor.ops.norm import TARGETS, launched_early

_sums = functools.lru_cache(1024)(outliers.prepare_sums)
_turn = functools.lru_cache(1024)(outliers.prepare_turn)


def inside(weight: PackedWeight, dtype: torch.dtype, capability: tuple[int, int]) -> bool:
    """Tell whether kernels of few tokens add outliers themselves, in the current mode.

    Args:
        weight: the dense part.
        dtype: of activations.
        capability: of the GPU.
    """
    native = dtype in TARGETS and LAYOUTS.get(weight.layout) == TARGETS[dtype]
    return native and capability == (9, 0) and not mode.current().batch_invariant


def sources(
    weight: PackedWeight, dtype: torch.dtype, gate: int, tokens: int, chip: Chip
) -> tuple[list[KernelSource], int]:
    """Return the kernels that calls of up to so many tokens ask for beside those of the dense part.

    Args:
        weight: with outliers, as it lies on the GPU; no number of it is read.
        dtype: of activations.
        gate: how gate and up become one, or 0.
        tokens: at least 1.
        chip: the GPU.

    Returns:
        The kernels, and the tokens up to which one of them makes the whole product.
    """
    kept, own = weight.scheme.outliers, weight.dense
    if mode.current().reference or dtype not in TARGETS or kept is None:
        return [], 0
    found = outliers.sources(TARGETS[dtype], kept.dtype, tokens)
    if gate or not inside(own, dtype, chip.capability):
        return found, 0
    packing, few = Packing.beside(Activations.NATIVE, dtype, own.scheme), min(tokens, tune.MOST_NORMED)
    for n in range(1, few + 1):
        config = tune.choose_normed(tune.LinearProblem.of(packing, own.shape, n), chip)
        if config is None:
            return found, 0
        source = dense.fused_source(packing, TARGETS[dtype], config, gate, outliers=kept.dtype)
        found += [source] if source not in found else []
    return found, few


def multiply(
    x: torch.Tensor,
    weight: PackedWeight,
    own: PackedWeight,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gate: int,
) -> torch.Tensor | None:
    """Return the product where one fused kernel makes all of it, else `None`.

    Args:
        x: [..., IC] on a GPU that has kernels, at least one token.
        weight, own: with outliers, and its dense part.
        bias, residual, gate: as for `serve.linear`; they fit.
    """
    kept, (oc, ic), index, now = weight.scheme.outliers, weight.shape, x.get_device(), mode.current()
    n = x.numel() // ic
    assert weight.outliers is not None and kept is not None
    if gate or n > tune.MOST_NORMED or not inside(own, x.dtype, torch.cuda.get_device_capability(index)):
        return None
    if current.device() != index:
        with torch.cuda.device(index):
            return multiply(x, weight, own, bias, residual, gate)
    key = (n, x.dtype, index, True, gate, prepared.mode_key(now, 0, kept.dtype))
    chosen = prepared.type_of(own).prepared(key, now)
    if chosen.launch is None:
        return None
    rows = tensors.rows_of(x, ic)
    if rows.data_ptr() % 16 or rows.stride(0) % 8:
        rows = tensors.aligned_rows(x, ic)
    held, stride = _held(rows)
    y = tensors.output(x.shape, n, gated_channels(oc) if gate else oc, x.dtype)
    return serve.launched(
        chosen,
        own,
        bias,
        residual,
        y,
        x=rows.data_ptr(),
        x_stride=rows.stride(0),
        x_scale=0,
        kept_words=weight.outliers.data_ptr(),
        kept_x=held.data_ptr(),
        kept_count=weight.outliers.shape[1],
        kept_stride=stride,
    )


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
