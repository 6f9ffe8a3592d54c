"""Which logits does a router give its experts? A plain product: by a kernel for few tokens on a GPU, else by torch."""

from __future__ import annotations

import functools

import torch
from torch.nn import functional

from tersor.errors import ShapeError
from tersor.kernels import jit, routing
from tersor.ops import current, mode
from tersor.ops.norm import TARGETS, kernel_serves, launched_early
from tersor.ops.settled import settled

_launch = functools.lru_cache(1024)(routing.prepare_router)


def router_logits(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, wide: bool = False
) -> torch.Tensor:
    """Return x @ W^T + bias, the logits of all experts; sums are float32.

    A kernel serves up to `kernels.routing.ROUTER_TOKENS` tokens: a step that decodes. It fetches its weights while the
    kernel ahead still runs, and gives a token the same bits beside any others: in the batch-invariant mode it serves
    any number of tokens.

    Args:
        x: [T, H] float16, bfloat16 or float32.
        weight: [E, H] in the same dtype or, where `wide`, in float32.
        bias: [E] in the weight's dtype, or `None`.
        wide: whether sums stay float32 (DeepSeek); else they are rounded to x's dtype.

    Returns:
        [T, E] in float32 where `wide`, else in x's dtype.

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit.
    """
    check(x, weight, bias, wide)
    if (
        (len(x) <= routing.ROUTER_TOKENS or mode.current().batch_invariant)
        and len(weight)
        and kernel_serves(x, weight, bias, most=routing.MOST_ROUTER_CHANNELS)
    ):
        return _launched(x, weight, bias, wide)
    if wide:
        return functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    return functional.linear(x, weight, bias)


def check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, wide: bool) -> None:
    """Raise ShapeError where the tensors of `router_logits` do not fit each other."""
    if x.dim() != 2 or x.dtype not in (*TARGETS, torch.float32):
        raise ShapeError(
            f"router_logits: x is {list(x.shape)} {x.dtype}, expected [T, H] in float16, bfloat16 or float32"
        )
    known = (x.dtype, torch.float32) if wide else (x.dtype,)
    fits = weight.dim() == 2 and weight.shape[1] == x.shape[1]
    if not fits or weight.dtype not in known or weight.device != x.device:
        raise ShapeError(
            f"router_logits: weight is {list(weight.shape)} {weight.dtype} on {weight.device}, expected "
            f"[E, {x.shape[1]}] {' or '.join(map(str, dict.fromkeys(known)))} on {x.device}"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype or bias.device != x.device):
        raise ShapeError(
            f"router_logits: bias is {list(bias.shape)} {bias.dtype} on {bias.device}, expected [{len(weight)}] "
            f"{weight.dtype} on {x.device}"
        )


def _launched(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, wide: bool) -> torch.Tensor:
    index = x.get_device()
    if index >= 0 and current.device() != index:
        with torch.cuda.device(index):
            return _launched(x, weight, bias, wide)
    x, weight = x.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    (tokens, channels), experts = x.shape, len(weight)
    router = router_of(x.dtype, weight.dtype, wide, channels)
    function = jit.get(routing.router_source(router, tokens), index)
    launch = _launch(function, router, tokens=tokens, experts=experts)
    out = current.empty((tokens, experts), (experts, 1), torch.float32 if wide else x.dtype)
    launch(
        stream=current.stream(index),
        x=x.data_ptr(),
        weight=weight.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        out=out.data_ptr(),
        ready=settled(weight, weight if bias is None else bias),
        early=launched_early(x.device),
    )
    return out


@functools.cache
def router_of(dtype: torch.dtype, of_weight: torch.dtype, wide: bool, channels: int) -> routing.Router:
    """Return what kernels know of a router with activations and a weight of these dtypes."""
    target, float_weight = TARGETS[dtype], of_weight == torch.float32
    return routing.Router(target=target, float_weight=float_weight, float_out=wide, channels=channels)
