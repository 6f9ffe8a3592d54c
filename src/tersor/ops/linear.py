"""The torch operator `tersor::linear`, plain or gated: checks, its meta twin, and the call of whoever serves it."""

from __future__ import annotations

import weakref

import torch

from tersor.errors import ShapeError
from tersor.layouts import PackedWeight, tiles
from tersor.layouts.gated import gated_channels
from tersor.ops import current, dispatch, invariance, measuring, prepared, reference, tensors, workspace

_SCRATCH_BYTES = 64 << 20
"""Decoded weights held at a time for a product by cuBLAS; a matrix beyond that is served in slices of rows."""

_ACTIVATIONS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PLAIN = (torch.Tensor, torch.nn.Parameter)

_used: dict[int, tuple[weakref.ref[torch.Tensor], weakref.ref[torch.Tensor], int | None, int | None]] = {}
"""Identity of a weight's data -> data, scale and their versions at the last launch that used both; inference tensors
have no versions."""

_library = torch.library.Library("tersor", "DEF")
_library.define(
    "linear(Tensor x, Tensor data, Tensor scale, Tensor? zero_point, Tensor? bias, str scheme, int oc, int ic, "
    "str layout, Tensor? residual=None, bool gated=False) -> Tensor"
)


def linear(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None, *, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply activations with a packed weight: y = x @ W^T + bias + residual.

    Sums are float32 and scales are applied to the sums, so the result is at least as exact as a float32 product with
    the decoded weight, rounded once (one exception: scales in groups where `explain` says `dequantize + cuBLAS`: there
    scaled weights are rounded to x's dtype first). Inference only: no gradient flows through it.

    Args:
        x: [..., IC], float16, bfloat16 or float32, any strides.
        weight: packed weight [OC, IC] on x's device, in any layout.
        bias: [OC] in x's dtype, or `None`.
        residual: [..., OC] in x's dtype, any strides, or `None`; added in float32 before the one rounding.

    Returns:
        [..., OC] in x's dtype, contiguous.

    Raises:
        ShapeError: sizes, dtypes or devices that do not fit; the message names both sides.
    """
    return _multiply(x, weight, bias, residual, False)


def gated_linear(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None, *, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply with gate and up at once: y = silu(x @ G^T + bias_G) * (x @ U^T + bias_U) + residual.

    Everything but the sums' order is float32 arithmetic, rounded once; otherwise as `linear`.

    Args:
        x: [..., IC], float16, bfloat16 or float32, any strides.
        weight: `PackedWeight.gate_up(gate, up)` of two weights [F, IC], on x's device, in any layout.
        bias: [rows of the weight] in x's dtype, interleaved in the same way (`layouts.gated.interleave`), or `None`.
        residual: [..., F] in x's dtype, any strides, or `None`.

    Returns:
        [..., F] in x's dtype, contiguous.

    Raises:
        ShapeError: sizes, dtypes or devices that do not fit, or a weight that cannot be a gated one.
    """
    return _multiply(x, weight, bias, residual, True)


def _multiply(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, residual: torch.Tensor | None, gated: bool
) -> torch.Tensor:
    data, scale, zero_point = weight.data, weight.scale, weight.zero_point
    if (
        torch.compiler.is_compiling()
        or _must_dispatch(x, bias)
        or (residual is not None and _must_dispatch(residual, None))
    ):
        oc, ic = weight.shape
        key, layout = weight.scheme.key(), weight.layout
        return _operator(x, data, scale, zero_point, bias, key, oc, ic, layout, residual, gated)
    return _serve(x, data, scale, zero_point, bias, prepared.kind_of(weight), residual, gated)


def _must_dispatch(x: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Tell whether someone has to see the operator: a mode, a transform, a trace, a profiler, autograd or a subclass.

    Where nobody does, the dispatcher would only cost time.
    """
    if type(x) not in _PLAIN or not (x.is_cuda or x.is_cpu) or x.is_neg():
        return True
    if bias is not None and (type(bias) not in _PLAIN or bias.is_neg() or (bias.requires_grad and _grad_enabled())):
        return True
    return (
        _dispatch_modes() > 0
        or _function_modes() > 0
        or _transform() is not None
        or _trace() is not None
        or _profiled()
        or (x.requires_grad and _grad_enabled())
    )


_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_transform = torch._C._functorch.peek_interpreter_stack
_trace = torch._C._get_tracing_state
_profiled = torch.autograd._profiler_enabled
_grad_enabled = torch.is_grad_enabled


def _check(
    x: torch.Tensor,
    shape: torch.Size,
    data: torch.Tensor,
    bias: torch.Tensor | None,
    kind: prepared.Kind,
    residual: torch.Tensor | None,
    outputs: int,
) -> None:
    dtype = x.dtype
    if not shape or shape[-1] != kind.ic:
        raise ShapeError(
            f"linear: x has shape {list(shape)}, expected [..., {kind.ic}] for a weight [{kind.oc}, {kind.ic}]"
        )
    if dtype not in _ACTIVATIONS:
        raise ShapeError(f"linear: x is {dtype}, expected float16, bfloat16 or float32")
    if data.device != x.device:
        raise ShapeError(f"linear: x is on {x.device}, the weight on {data.device}")
    if bias is not None and (bias.shape != (kind.oc,) or bias.dtype != dtype or bias.device != x.device):
        raise ShapeError(
            f"linear: bias is {list(bias.shape)} {bias.dtype} on {bias.device}, expected [{kind.oc}] {dtype} on "
            f"{x.device}"
        )
    if residual is not None:
        expected = (*shape[:-1], outputs)
        if residual.shape != expected or residual.dtype != dtype or residual.device != x.device:
            raise ShapeError(
                f"linear: residual is {list(residual.shape)} {residual.dtype} on {residual.device}, expected "
                f"{list(expected)} {dtype} on {x.device}"
            )


def _serve(
    x: torch.Tensor,
    data: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    bias: torch.Tensor | None,
    kind: prepared.Kind,
    residual: torch.Tensor | None = None,
    gated: bool = False,
) -> torch.Tensor:
    """Check a call and serve it; on the way to a fused kernel every line counts in microseconds."""
    shape, oc, ic = x.shape, kind.oc, kind.ic
    outputs = gated_channels(oc) if gated else oc
    _check(x, shape, data, bias, kind, residual, outputs)
    size = x.numel()
    if size == 0 or oc == 0:
        return tensors.empty_result(x, bias, residual, gated, oc)
    index = x.get_device()
    if index >= 0 and current.device() != index:
        with torch.cuda.device(index):
            return _serve(x, data, scale, zero_point, bias, kind, residual, gated)
    invariant = invariance.batch_invariant()
    n, stride = size // ic, ic
    if not x.is_contiguous():
        x = tensors.rows_of(x, ic)
        stride = x.stride(0)
    address = x.data_ptr()
    aligned = not (address % 16 or stride % 8)
    if invariant and not aligned:
        x = tensors.aligned_rows(x, ic)
        stride, address, aligned = x.stride(0), x.data_ptr(), True
    chosen = kind.plan((n, x.dtype, index, aligned, gated, invariant))
    launch = chosen.launch
    if residual is not None:
        residual = tensors.contiguous(residual)
    if launch is None:
        x = x.reshape(-1, ic)
        added = None if residual is None else residual.view(-1, outputs)
        if chosen.tokens:
            y = _in_turns(x, data, scale, zero_point, bias, kind, added, gated, chosen.tokens)
        elif chosen.decision.kernel == dispatch.DEQUANTIZE:
            y = _dequantized(x, data, scale, bias, kind, added, gated)
        else:
            weight = PackedWeight(kind.scheme, (oc, ic), data, scale, zero_point, kind.layout)
            y = reference.linear(x, weight, bias, added, gated, invariant)
        return y.view(*shape[:-1], outputs)
    y = tensors.output(shape, n, outputs, x.dtype)
    stream = current.stream(index)
    partial = arrived = bias_address = residual_address = x_scale = 0
    if chosen.quantize is not None:
        row = chosen.codes_stride
        codes = current.empty((n, row + 4), (row + 4, 1), torch.uint8)  # held until the launch; then the stream's order
        x_scale = chosen.quantize(stream, address, stride, codes.data_ptr())
        address, stride = codes.data_ptr(), row
    if chosen.floats:
        partial, arrived, _parts = workspace.split_sums(index, stream, chosen.floats, chosen.counters)
    if bias is not None:
        bias = bias if bias.is_contiguous() else bias.contiguous()
        bias_address = bias.data_ptr()
    if residual is not None:
        residual_address = residual.data_ptr()
    launch(
        stream,
        data.data_ptr(),
        scale.data_ptr(),
        address,
        stride,
        x_scale,
        bias_address,
        residual_address,
        y.data_ptr(),
        partial,
        arrived,
        _settled(data, scale) and measuring.current().early,
    )
    return y


def _in_turns(
    x: torch.Tensor,
    data: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    bias: torch.Tensor | None,
    kind: prepared.Kind,
    residual: torch.Tensor | None,
    gated: bool,
    tokens: int,
) -> torch.Tensor:
    """Return the result [N, outputs] of several calls, each of at most `tokens` tokens."""
    parts = []
    for first in range(0, x.shape[0], tokens):
        added = None if residual is None else residual[first : first + tokens]
        part = x[first : first + tokens]
        parts.append(_serve(part, data, scale, zero_point, bias, kind, added, gated))
    return torch.cat(parts)


def _settled(data: torch.Tensor, scale: torch.Tensor) -> bool:
    """Tell whether a launch has used both since they were last written: then no kernel just ahead writes them."""
    name = id(data)
    used = _used.get(name)
    if used is not None and used[0]() is data and used[1]() is scale:
        _, _, of_data, of_scale = used
        if (of_data is None or of_data == data._version) and (of_scale is None or of_scale == scale._version):
            return True
    of_data = None if data.is_inference() else data._version
    of_scale = None if scale.is_inference() else scale._version
    _used[name] = (weakref.ref(data, lambda gone: _forget(name, gone)), weakref.ref(scale), of_data, of_scale)
    return False


def _forget(name: int, gone: weakref.ref[torch.Tensor]) -> None:
    used = _used.get(name)
    if used is not None and used[0] is gone:
        del _used[name]


def _dequantized(
    x: torch.Tensor,
    data: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    kind: prepared.Kind,
    residual: torch.Tensor | None,
    gated: bool,
) -> torch.Tensor:
    """Return the result [N, outputs]: slices of W are decoded into scratch memory and multiplied by cuBLAS."""
    from tersor.kernels import dense as family
    from tersor.kernels import jit

    oc, ic, n = kind.oc, kind.ic, x.shape[0]
    target = tiles.LAYOUTS[kind.layout]
    decode = jit.get(family.dequantize_source(kind.scheme, target), x.device)
    finish = jit.get(family.epilogue_source(kind.scheme, target, gated), x.device)
    stream = current.stream(x.get_device())
    bias = None if bias is None else bias.contiguous()
    y = x.new_empty(n, gated_channels(oc) if gated else oc)
    height = max(1, _SCRATCH_BYTES // (2 * ic) // tiles.UNIT_ROWS) * tiles.UNIT_ROWS
    scratch = x.new_empty(min(height, oc), ic)
    for first in range(0, oc, height):
        columns = min(height, oc - first)
        family.launch_dequantize(
            decode,
            stream,
            weight=data.data_ptr(),
            scale=scale.data_ptr(),
            scratch=scratch.data_ptr(),
            first_row_block=first // tiles.ROWS,
            rows=columns,
            ic=ic,
            factor=kind.factor,
        )
        sums = torch.mm(x, scratch[:columns].T, out_dtype=torch.float32)
        family.launch_epilogue(
            finish,
            stream,
            sums=sums.data_ptr(),
            scale=scale.data_ptr(),
            bias=0 if bias is None else bias.data_ptr(),
            residual=0 if residual is None else residual.data_ptr(),
            y=y.data_ptr(),
            first=first,
            columns=columns,
            oc=oc,
            n=n,
            factor=kind.factor,
        )
    return y


def _call(
    x: torch.Tensor,
    data: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    bias: torch.Tensor | None,
    scheme: str,
    oc: int,
    ic: int,
    layout: str,
    residual: torch.Tensor | None = None,
    gated: bool = False,
) -> torch.Tensor:
    kind = prepared.kind(scheme, oc, ic, layout)
    kind.check(data)
    return _serve(x, data, scale, zero_point, bias, kind, residual, gated)


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
    residual: torch.Tensor | None = None,
    gated: bool = False,
) -> torch.Tensor:
    kind = prepared.kind(scheme, oc, ic, layout)
    kind.check(data)
    outputs = gated_channels(oc) if gated else oc
    _check(x, x.shape, data, bias, kind, residual, outputs)
    return x.new_empty(*x.shape[:-1], outputs)


_library.impl("linear", _call, "CPU")
_library.impl("linear", _call, "CUDA")
torch.library.register_fake("tersor::linear", _meta, lib=_library)
_operator = torch.ops.tersor.linear.default
