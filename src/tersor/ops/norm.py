"""How is a row brought to one size? RMS norm and layer norm, by a kernel where a GPU has it, else by the torch code.

The torch code here is the definition: everything is float32 until the result is rounded once.
"""

from __future__ import annotations

import functools

import torch

from tersor.errors import ShapeError
from tersor.formats import Activations
from tersor.hardware import Chip
from tersor.kernels import jit, norms, small
from tersor.kernels.quantizing import codes_stride, scales_stride
from tersor.ops import current, dispatch, mode
from tersor.ops.settled import settled

TARGETS = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
"""Dtypes of rows that kernels take, and their names."""

_launch = functools.lru_cache(1024)(norms.prepare_norm)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return x / sqrt(mean(x^2) + eps) * (weight + offset) of every row (arXiv 1910.07467), added to a residual.

    Args:
        x: [T, H] float16, bfloat16 or float32.
        weight: [H] in the same dtype.
        eps: above 0.
        offset: is added to the weights (1 for Gemma).
        residual: [T, H] in the same dtype: what the norm of a product is added to (Gemma 2 and 3); `None` for nothing.

    Returns:
        [T, H] in that dtype.

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit.
    """
    check("rms_norm", x, weight=(weight, x.shape[1:]), residual=(residual, x.shape))
    if kernel_serves(x, weight, residual):
        return launched(x, weight, None, residual, eps, offset)[0]
    wide = x.float()
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * (weight.float() + offset)
    return (y if residual is None else y + residual.float()).to(x.dtype)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Return (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias of every row (arXiv 1607.06450).

    Args:
        x: [T, H] float16, bfloat16 or float32.
        weight, bias: [H] in the same dtype; the bias may be `None`.
        eps: above 0.

    Returns:
        [T, H] in that dtype.

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit.
    """
    check("layer_norm", x, weight=(weight, x.shape[1:]), bias=(bias, x.shape[1:]))
    if kernel_serves(x, weight, bias):
        return launched(x, weight, bias, None, eps, 0.0, layer=True)[0]
    wide = x.float()
    wide = wide - wide.mean(-1, keepdim=True)
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()
    return (y if bias is None else y + bias.float()).to(x.dtype)


def check(name: str, x: torch.Tensor, **others: tuple[torch.Tensor | None, torch.Size]) -> None:
    """Raise ShapeError where rows [T, H] have no dtype of a norm, or what stands beside them another shape, dtype or
    device than is named."""
    if x.dim() != 2 or x.dtype not in (*TARGETS, torch.float32):
        raise ShapeError(f"{name}: x is {list(x.shape)} {x.dtype}, expected [T, H] in float16, bfloat16 or float32")
    for role, (tensor, shape) in others.items():
        if tensor is not None and (tensor.shape != shape or tensor.dtype != x.dtype or tensor.device != x.device):
            raise ShapeError(
                f"{name}: {role} is {list(tensor.shape)} {tensor.dtype} on {tensor.device}, expected {list(shape)} "
                f"{x.dtype} on {x.device}"
            )


def kernel_serves(x: torch.Tensor, *others: torch.Tensor | None, most: int | None = small.MOST_CHANNELS) -> bool:
    """Tell whether `serving_chip` is any."""
    return serving_chip(x, *others, most=most) is not None


def serving_chip(x: torch.Tensor, *others: torch.Tensor | None, most: int | None = small.MOST_CHANNELS) -> Chip | None:
    """Return the GPU whose kernels of `kernels.small` take rows [T, H] of at most `most` channels and what is beside
    them; `None` where the torch code serves.

    Autograd and `torch.compile` see the torch code, which they know.
    """
    shape = x.shape
    if x.dtype not in TARGETS or not shape[0] or not channels_fit(shape[1], most) or torch.compiler.is_compiling():
        return None
    graded = torch.is_grad_enabled()
    for one in (x, *others):
        if one is not None and (one.data_ptr() % 16 or (graded and one.requires_grad)):
            return None
    return dispatch.kernel_chip(x.device)


def channels_fit(channels: int, most: int | None = small.MOST_CHANNELS) -> bool:
    """Tell whether the kernels of `kernels.small` take rows of so many channels, of at most `most`."""
    return channels > 0 and channels % small.CHANNELS == 0 and (most is None or channels <= most)


def launched_early(device: torch.device) -> bool:
    """Tell whether kernels on a GPU may start before the one ahead of them has ended."""
    chip = dispatch.kernel_chip(device)
    return chip is not None and mode.current().early and chip.capability >= (9, 0)


def launched(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
    offset: float,
    layer: bool = False,
    activations: Activations = Activations.NATIVE,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Launch the kernel of a norm on rows that `kernel_serves`.

    Args:
        x, weight, bias, residual, eps, offset: as for `rms_norm` and `layer_norm`.
        layer: whether it is a layer norm.
        activations: what the result becomes; compute capability 9.0 alone has bytes.

    Returns:
        [T, H] in x's dtype and `None`; of bytes codes [T, H] in rows of whole 16 bytes, and scales, float32 [T] or, in
        groups, [T, `Activations.scales(H)`].
    """
    index = x.get_device()
    if index >= 0 and current.device() != index:
        with torch.cuda.device(index):
            return launched(x, weight, bias, residual, eps, offset, layer, activations)
    if x.stride(1) != 1 or x.stride(0) % small.CHANNELS:
        x = x.contiguous()
    weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else residual.contiguous()
    (rows, channels), chip = x.shape, dispatch.kernel_chip(x.device)
    assert chip is not None
    codes = activations.dtype
    warps = norms.ctas_of_warps(rows, channels, chip.sms) if codes and not layer and residual is None else 0
    function = jit.get(norms.norm_source(TARGETS[x.dtype], layer, channels, activations, warps), index)
    sizes = {"rows": rows, "channels": channels, "sms": chip.sms, "sm_threads": chip.sm_threads}
    launch = _launch(function, eps=float(eps), offset=float(offset), **sizes, warps=warps)
    out_stride = codes_stride(channels) if codes else channels
    out = current.empty((rows, channels), (out_stride, 1), codes or x.dtype)
    scales = empty_scales(rows, channels, activations) if codes else None
    launch(
        stream=current.stream(index),
        x=x.data_ptr(),
        stride=x.stride(0),
        weight=weight.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        residual=0 if residual is None else residual.data_ptr(),
        out=out.data_ptr(),
        out_stride=out_stride,
        ready=settled(weight, weight if bias is None else bias),
        early=launched_early(x.device),
        scales=0 if scales is None else scales.data_ptr(),
    )
    return out, scales


def empty_scales(rows: int, channels: int, activations: Activations) -> torch.Tensor:
    """Return room on the current device for the scales of bytes: float32 [T], or [T, groups] as kernels write them."""
    if activations.group_size is None:
        return current.empty((rows,), (1,), torch.float32)
    return current.empty((rows, activations.scales(channels)), (1, scales_stride(rows)), torch.float32)
