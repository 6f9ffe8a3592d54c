"""The torch operator `tersor::linear`: checks, its meta twin, and the call of whoever serves it."""

from __future__ import annotations

import functools
import math

import torch
from torch.utils.weak import WeakIdKeyDictionary

from tersor.errors import ShapeError
from tersor.formats import Scheme
from tersor.kernels import tune
from tersor.layouts import STREAM, PackedWeight, lanes, scales, stream, tiles
from tersor.ops import dispatch, reference, workspace

_SCRATCH_BYTES = 64 << 20
"""Decoded weights held at a time for a product by cuBLAS; a matrix beyond that is served in slices of rows."""

_used: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Weight or scale tensor -> its version at the last launch."""

_library = torch.library.Library("tersor", "DEF")
_library.define(
    "linear(Tensor x, Tensor data, Tensor scale, Tensor? zero_point, Tensor? bias, str scheme, int oc, int ic, "
    "str layout) -> Tensor"
)


def linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply activations with a packed weight: y = x @ W^T + bias.

    Sums are float32 and scales are applied to the sums, so the result is at least as exact as a float32 product with
    the decoded weight, rounded once (one exception: scales in groups where `explain` says `dequantize + cuBLAS`: there
    scaled weights are rounded to x's dtype first). Inference only: no gradient flows through it.

    Args:
        x: [..., IC], float16, bfloat16 or float32, any strides.
        weight: packed weight [OC, IC] on x's device, in any layout.
        bias: [OC] in x's dtype, or `None`.

    Returns:
        [..., OC] in x's dtype, contiguous.

    Raises:
        ShapeError: sizes, dtypes or devices that do not fit; the message names both sides.
    """
    oc, ic = weight.shape
    return torch.ops.tersor.linear(
        x, weight.data, weight.scale, weight.zero_point, bias, weight.scheme.key(), oc, ic, weight.layout
    )


def _check(
    x: torch.Tensor,
    data: torch.Tensor,
    bias: torch.Tensor | None,
    scheme: Scheme,
    oc: int,
    ic: int,
    layout: str,
) -> None:
    if x.dim() == 0 or x.shape[-1] != ic:
        raise ShapeError(f"linear: x has shape {list(x.shape)}, expected [..., {ic}] for a weight [{oc}, {ic}]")
    if not x.dtype.is_floating_point or x.dtype.itemsize < 2:
        raise ShapeError(f"linear: x is {x.dtype}, expected float16, bfloat16 or float32")
    if data.device != x.device:
        raise ShapeError(f"linear: x is on {x.device}, the weight on {data.device}")
    if bias is not None and (list(bias.shape) != [oc] or bias.dtype != x.dtype or bias.device != x.device):
        raise ShapeError(
            f"linear: bias is {list(bias.shape)} {bias.dtype} on {bias.device}, expected [{oc}] {x.dtype} on {x.device}"
        )
    words = _words(scheme, oc, ic, layout)
    if data.numel() != words or data.dtype != torch.int32:
        raise ShapeError(
            f"linear: the packed weight has {data.numel()} elements of {data.dtype}, expected {words} int32 words for "
            f"[{oc}, {ic}] in {scheme.name} ({layout})"
        )


@functools.lru_cache(maxsize=4096)
def _words(scheme: Scheme, oc: int, ic: int, layout: str) -> int:
    if layout == STREAM:
        return oc * stream.row_words(ic, scheme.format.bits)
    return tiles.row_blocks(oc) * tiles.column_blocks(ic) * 64 * scheme.format.bits


def _serve(
    x: torch.Tensor,
    data: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    bias: torch.Tensor | None,
    scheme: str,
    oc: int,
    ic: int,
    layout: str,
) -> torch.Tensor:
    meaning = Scheme.from_key(scheme)
    _check(x, data, bias, meaning, oc, ic, layout)
    weight = PackedWeight(meaning, (oc, ic), data, scale, zero_point, layout)
    tokens = x.reshape(-1, ic)
    n = tokens.shape[0]
    if n == 0 or oc == 0:
        return x.new_empty(*x.shape[:-1], oc)
    if dispatch.decide(meaning, layout, n, x.dtype, x.device).kernel == dispatch.REFERENCE:
        return reference.linear(tokens, weight, bias).view(*x.shape[:-1], oc)
    if tokens.stride(1) != 1:
        tokens = tokens.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    problem = _problem(tokens, weight)
    with torch.cuda.device(x.device):
        if tune.fused(problem, dispatch.chip(x.device)):
            y = _fused(tokens, weight, bias, problem)
        else:
            y = _dequantized(tokens, weight, bias)
    return y.view(*x.shape[:-1], oc)


def _meta(
    x: torch.Tensor,
    data: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    bias: torch.Tensor | None,
    scheme: str,
    oc: int,
    ic: int,
    layout: str,
) -> torch.Tensor:
    _check(x, data, bias, Scheme.from_key(scheme), oc, ic, layout)
    return x.new_empty(*x.shape[:-1], oc)


_library.impl("linear", _serve, "CPU")
_library.impl("linear", _serve, "CUDA")
torch.library.register_fake("tersor::linear", _meta, lib=_library)


def _problem(x: torch.Tensor, weight: PackedWeight) -> tune.LinearProblem:
    oc, ic = weight.shape
    return tune.LinearProblem(
        oc=oc,
        ic=ic,
        n=x.shape[0],
        bits=weight.scheme.format.bits,
        scale_groups=tiles.scales_in_block(weight.scheme.group_size),
        scale_bytes=scales.row_bytes(weight.scheme),
        aligned=x.data_ptr() % 16 == 0 and x.stride(0) % 8 == 0,
    )


def _fused(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, problem: tune.LinearProblem
) -> torch.Tensor:
    from tersor.kernels import jit
    from tersor.kernels import linear as family

    oc, ic = weight.shape
    n = x.shape[0]
    fmt, target = weight.scheme.format, tiles.LAYOUTS[weight.layout]
    config = tune.choose(problem, dispatch.chip(x.device))
    source = family.fused_source(weight.scheme, target, config)
    y = x.new_empty(n, oc)
    stream_handle = torch.cuda.current_stream(x.device).cuda_stream
    partial = arrived = 0
    if config.splits > 1:
        partial, arrived = workspace.split_sums(x.device, stream_handle, *family.parts(config, n))
    family.launch_fused(
        jit.get(source, x.device),
        config,
        stream_handle,
        bf16=target == "bfloat16",
        weight=weight.data.data_ptr(),
        scale=weight.scale.data_ptr(),
        x=x.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        y=y.data_ptr(),
        partial=partial,
        arrived=arrived,
        x_stride=x.stride(0),
        oc=oc,
        ic=ic,
        n=n,
        aligned=problem.aligned,
        factor=math.ldexp(1.0, lanes.lane(fmt, target).exponent),
        early=_settled(weight.data) & _settled(weight.scale),
    )
    return y


def _settled(tensor: torch.Tensor) -> bool:
    """Tell whether a launch has used this tensor since it was last written: then no kernel just ahead writes it."""
    version = 0 if tensor.is_inference() else tensor._version
    settled = _used.get(tensor) == version
    _used[tensor] = version
    return settled


def _dequantized(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    from tersor.kernels import jit
    from tersor.kernels import linear as family

    oc, ic = weight.shape
    n = x.shape[0]
    fmt, target = weight.scheme.format, tiles.LAYOUTS[weight.layout]
    factor = math.ldexp(1.0, lanes.lane(fmt, target).exponent)
    decode = jit.get(family.dequantize_source(weight.scheme, target), x.device)
    finish = jit.get(family.epilogue_source(weight.scheme, target), x.device)
    stream_handle = torch.cuda.current_stream(x.device).cuda_stream
    y = x.new_empty(n, oc)
    rows = max(1, _SCRATCH_BYTES // (2 * ic) // tiles.UNIT_ROWS) * tiles.UNIT_ROWS
    scratch = x.new_empty(min(rows, oc), ic)
    for first in range(0, oc, rows):
        columns = min(rows, oc - first)
        family.launch_dequantize(
            decode,
            stream_handle,
            weight=weight.data.data_ptr(),
            scale=weight.scale.data_ptr(),
            scratch=scratch.data_ptr(),
            first_row_block=first // tiles.ROWS,
            rows=columns,
            ic=ic,
            factor=factor,
        )
        sums = torch.mm(x, scratch[:columns].T, out_dtype=torch.float32)
        family.launch_epilogue(
            finish,
            stream_handle,
            sums=sums.data_ptr(),
            scale=weight.scale.data_ptr(),
            bias=0 if bias is None else bias.data_ptr(),
            y=y.data_ptr(),
            first=first,
            columns=columns,
            oc=oc,
            n=n,
            factor=factor,
        )
    return y
