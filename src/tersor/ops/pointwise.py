"""What becomes of single numbers between products? Gates, relu and soft caps, in one launch where a GPU has kernels.

The torch code here is the definition: everything is float32 until the result is rounded once.
"""

from __future__ import annotations

import functools

import torch

from tersor.errors import ShapeError
from tersor.kernels import jit, small
from tersor.ops import current
from tersor.ops.gates import Gate
from tersor.ops.norm import TARGETS, kernel_serves, launched_early

_launch = functools.lru_cache(1024)(small.prepare_pointwise)


def gated(x: torch.Tensor, gate: Gate) -> torch.Tensor:
    """Return gate and up, whose channels stand one behind the other, as one.

    Args:
        x: [T, 2 F] float16, bfloat16 or float32.
        gate: how they become one.

    Returns:
        [T, F] in that dtype.

    Raises:
        ShapeError: another shape or dtype.
    """
    check("gated", x, gated=True)
    if kernel_serves(x, most=None) and x.shape[1] % (2 * small.CHANNELS) == 0:
        return _launched(x, x.shape[1] // 2, int(gate), None)
    return gate.combine(*x.float().chunk(2, dim=-1)).to(x.dtype)


def relu(x: torch.Tensor) -> torch.Tensor:
    """Return x [T, F], float16, bfloat16 or float32, with 0 in place of what is negative.

    Raises:
        ShapeError: another shape or dtype.
    """
    check("relu", x)
    return _launched(x, x.shape[1], 0, None) if kernel_serves(x, most=None) else torch.relu(x)


def softcap(x: torch.Tensor, cap: float) -> torch.Tensor:
    """Return cap * tanh(x / cap) of x [T, V], float16, bfloat16 or float32 (Gemma 2, arXiv 2408.00118, section 2).

    Raises:
        ShapeError: another shape or dtype.
    """
    check("softcap", x)
    if kernel_serves(x, most=None):
        return _launched(x, x.shape[1], 0, float(cap))
    return (torch.tanh(x.float() / cap) * cap).to(x.dtype)


def check(name: str, x: torch.Tensor, gated: bool = False) -> None:
    """Raise ShapeError where x is not rows in a dtype of these, or has an odd number of channels of gate and up."""
    if x.dim() != 2 or x.dtype not in (*TARGETS, torch.float32):
        raise ShapeError(
            f"{name}: x is {list(x.shape)} {x.dtype}, expected two dimensions in float16, bfloat16 or float32"
        )
    if gated and x.shape[1] % 2:
        raise ShapeError(f"{name}: x is {list(x.shape)}, expected [T, 2 F]: as many channels of the gate as of up")


def _launched(x: torch.Tensor, channels: int, gate: int, cap: float | None) -> torch.Tensor:
    index = x.get_device()
    if index >= 0 and current.device() != index:
        with torch.cuda.device(index):
            return _launched(x, channels, gate, cap)
    x = x.contiguous()
    function = jit.get(small.pointwise_source(TARGETS[x.dtype], gate, cap is not None), index)
    launch = _launch(function, rows=len(x), channels=channels, cap=cap or 0.0)
    out = current.empty((len(x), channels), (channels, 1), x.dtype)
    launch(stream=current.stream(index), x=x.data_ptr(), out=out.data_ptr(), early=launched_early(x.device))
    return out
