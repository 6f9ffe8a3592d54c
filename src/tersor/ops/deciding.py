"""What is decided ahead of a layer's experts, of few tokens in one launch: norm, logits, choice and tables.

Each number is that of `rms_norm`, `router_logits` and `route_tables`, one after the other, which serve where no kernel
decides. What was decided, `decided_experts` runs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch

from tersor.kernels import deciding, jit
from tersor.kernels.deciding import Decider
from tersor.kernels.routing import MOST_ROUTER_CHANNELS, Choice
from tersor.layouts import Stacked
from tersor.ops import autocast, current, dense, grouped, mode, serve_routing
from tersor.ops.gates import Gate
from tersor.ops.norm import TARGETS, kernel_serves, launched_early
from tersor.ops.router import check as check_router
from tersor.ops.router import router_of
from tersor.ops.settled import settled
from tersor.ops.tables import Tables, elements

_launch = functools.lru_cache(1024)(deciding.prepare)
_combine_launch = functools.lru_cache(1024)(deciding.prepare_combine)


class Gain(NamedTuple):
    """The RMS norm that rows go through first, as `ops.rms_norm` has it.

    Attributes:
        weight: [H] in the rows' dtype.
        eps, offset: as there.
    """

    weight: torch.Tensor
    eps: float
    offset: float = 0.0


@dataclass(frozen=True, slots=True)
class Normed:
    """Rows, and what a norm behind them makes of them.

    Attributes:
        x: [T, H], before the norm: what residuals are.
        y: [T, H] in the same dtype, behind it.
    """

    x: torch.Tensor
    y: torch.Tensor


@dataclass(frozen=True, slots=True)
class Decision:
    """Which experts tokens go through.

    Attributes:
        x: [T, H], rows behind the norm.
        index, weights: int32 and float32 [T, K], as `ops.route` returns them.
        tables: of the index.
        chosen: how the products of experts are served.
    """

    x: torch.Tensor
    index: torch.Tensor
    weights: torch.Tensor
    tables: Tables
    chosen: grouped.Prepared


def decide(
    x: torch.Tensor,
    router: tuple[torch.Tensor, torch.Tensor | None],
    experts: tuple[Stacked, Stacked],
    top_k: int,
    *,
    gate: Gate = Gate.SILU,
    wide: bool = False,
    norm: Gain | None = None,
    scoring: str = "softmax",
    normalize: bool = True,
    bias: torch.Tensor | None = None,
    groups: int = 1,
    top_groups: int = 1,
    scale: float = 1.0,
) -> Decision | None:
    """Decide in one launch which experts tokens go through, where a kernel does that; else return `None`.

    Args:
        x: [T, H] float16 or bfloat16, before the norm where there is one.
        router: weight [E, H] and bias [E] or `None`, as for `ops.router_logits`.
        experts: gate and up, and down, as for `ops.routed_experts`.
        top_k, scoring, normalize, bias, groups, top_groups, scale: as for `ops.route`.
        gate: how gate and up become one.
        wide: as for `ops.router_logits`.
        norm: what rows go through first.

    Raises:
        ShapeError: sizes, dtypes or devices that do not fit; the message names both sides.
    """
    (weight, of_router), gain = router, None if norm is None else norm.weight
    beside = (of_router, *(() if gain is None else (gain,)))
    if autocast.enabled() or not kernel_serves(x, weight, *beside, most=MOST_ROUTER_CHANNELS):
        return None
    if dense.looked_at(x, *beside) or not x.is_contiguous():
        return None
    check_router(x, weight, of_router, wide)
    choice = serve_routing.choice_of(len(weight), top_k, scoring, normalize, bias is not None, groups, top_groups)
    decider = Decider(router=router_of(x.dtype, weight.dtype, wide, x.shape[1]), choice=choice, norms=norm is not None)
    if not decider.fits(len(x)) or (gain is not None and gain.dtype != x.dtype):
        return None
    index = x.get_device()
    if index >= 0 and current.device() != index:
        with torch.cuda.device(index):
            return _decided(x, router, experts, decider, gate, norm, bias, scale)
    return _decided(x, router, experts, decider, gate, norm, bias, scale)


def _decided(
    x: torch.Tensor,
    router: tuple[torch.Tensor, torch.Tensor | None],
    experts: tuple[Stacked, Stacked],
    decider: Decider,
    gate: Gate,
    norm: Gain | None,
    bias: torch.Tensor | None,
    scale: float,
) -> Decision | None:
    """Launch on the current device, that of x."""
    choice: Choice = decider.choice
    chosen = grouped.prepared(x, *experts, choice.top_k, gate)
    if chosen is None:
        return None
    (tokens, channels), (weight, of_router), index = x.shape, router, x.get_device()
    weight = weight.contiguous()
    of_router = None if of_router is None else of_router.contiguous()
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    gain, eps, offset = (None, 0.0, 0.0) if norm is None else norm
    function = jit.get(deciding.source(decider, tokens), index)
    numbers = {"scale": float(scale), "eps": float(eps), "offset": float(offset)}
    launch = _launch(function, decider, tokens=tokens, block_tokens=chosen.block_tokens, **numbers)
    shape, pairs = (tokens, choice.top_k), tokens * choice.top_k
    picked = current.empty(shape, (choice.top_k, 1), torch.int32)
    weights = current.empty(shape, (choice.top_k, 1), torch.float32)
    memory = current.empty((elements(pairs, choice.experts, chosen.block_tokens),), (1,), torch.int32)
    tables = Tables(memory, pairs, choice.experts, chosen.block_tokens)
    order, position, blocks = tables.addresses
    stream = current.stream(index)
    logits = mode.current().workspace.split_sums(index, stream, 0, tokens * choice.experts)[1]
    normed = x if gain is None else current.empty((tokens, channels), (channels, 1), x.dtype)
    ready = settled(weight, weight if of_router is None else of_router)
    if gain is not None:
        ready = settled(gain, gain) and ready
    launch(
        stream=stream,
        x=x.data_ptr(),
        weight=weight.data_ptr(),
        bias=0 if of_router is None else of_router.data_ptr(),
        preferred=0 if bias is None else bias.data_ptr(),
        gain=0 if gain is None else gain.data_ptr(),
        normed=0 if gain is None else normed.data_ptr(),
        index=picked.data_ptr(),
        weights=weights.data_ptr(),
        order=order,
        position=position,
        blocks=blocks,
        logits=logits,
        ready=ready,
        early=launched_early(x.device),
    )
    return Decision(normed, picked, weights, tables, chosen)


def decided_experts(
    decision: Decision,
    gate_up: Stacked,
    down: Stacked,
    *,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    addend: torch.Tensor | None = None,
    behind: Gain | None = None,
) -> torch.Tensor | Normed:
    """Run tokens through the experts that were decided on: [T, H], as `ops.routed_experts` returns it.

    Args:
        decision: of `decide`, with these experts.
        gate_up, down, gate_up_bias, down_bias, addend: as for `ops.routed_experts`.
        behind: the norm that the result goes through, in the same launch as the last sum, or `None`.

    Returns:
        [T, H], or with a norm behind that and the normed rows where a kernel makes both.
    """
    index = decision.x.get_device()
    if index >= 0 and current.device() != index:
        with torch.cuda.device(index):
            return decided_experts(
                decision,
                gate_up,
                down,
                gate_up_bias=gate_up_bias,
                down_bias=down_bias,
                addend=addend,
                behind=behind,
            )
    tables, top_k = decision.tables, decision.index.shape[1]
    y = grouped.products(decision.x, gate_up, down, tables, top_k, gate_up_bias, down_bias, decision.chosen)
    if behind is None or not _norms(y, addend, behind):
        return serve_routing.combine(y, decision.weights, tables, addend, ready=True)
    return _combined(y, decision, addend, behind)


def _norms(y: torch.Tensor, addend: torch.Tensor | None, norm: Gain) -> bool:
    """Tell whether a kernel norms the sum of what experts gave, [P, H], and an addend."""
    known = norm.weight.dtype == y.dtype
    return known and kernel_serves(y, addend, norm.weight, most=deciding.MOST_SUMMED_CHANNELS)


def _combined(y: torch.Tensor, decision: Decision, addend: torch.Tensor | None, norm: Gain) -> Normed:
    """Launch the sum over experts and its norm on the current device, that of y."""
    (tokens, top_k), channels, index = decision.weights.shape, y.shape[1], y.get_device()
    addend = None if addend is None else addend.contiguous()
    gain, eps, offset = norm
    function = jit.get(deciding.combine_source(TARGETS[y.dtype], channels), index)
    sizes = {"tokens": tokens, "top_k": top_k, "channels": channels}
    launch = _combine_launch(function, **sizes, eps=float(eps), offset=float(offset))
    out, normed = (current.empty((tokens, channels), (channels, 1), y.dtype) for _ in range(2))
    _, position, blocks = decision.tables.addresses
    launch(
        stream=current.stream(index),
        y=y.data_ptr(),
        weights=decision.weights.data_ptr(),
        position=position,
        blocks=blocks,
        addend=0 if addend is None else addend.data_ptr(),
        gain=gain.data_ptr(),
        out=out.data_ptr(),
        normed=normed.data_ptr(),
        ready=settled(gain, gain),
        early=launched_early(y.device),
    )
    return Normed(out, normed)
