"""Around a product of experts: experts/router.cuh (logits) and experts/route.cuh (choice and tables) ahead of it,
experts/combine.cuh behind it.

As in `kernels.dense`: a kernel's source, its launch prepared for a problem, then the launch, by addresses and sizes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from tersor.kernels.jit import Function, KernelSource

MOST_EXPERTS = 512
MOST_TOP_K = 16
MOST_GROUPS = 32

INPUTS = {"float16": 0, "bfloat16": 1, "float32": 2, "int32": 3, "int64": 4}
"""Dtypes of what the route kernel reads, logits or an index -> `INPUT` of route.cuh."""

FEW_TOKENS = 64
"""Tokens up to which one CTA does all; of more, CTAs count who has arrived."""
WARP_PAIRS = 32
"""Pairs up to which one warp sorts."""
_WARPS = 32
"""Most warps of a CTA."""
_WIDE, _WIDE_WARPS = 256, 20
"""Of more experts than these a CTA that chooses has at most so many warps."""
_CHOICE_WARPS = 4
"""Warps of a CTA where no pairs are sorted."""

ROUTER_TOKENS = 64
"""Tokens up to which router.cuh makes logits: each of its CTAs reads its weights for a few of them."""
ROUTER_THREADS = 256
_ROUTER_ROWS, _ROUTER_CTA_TOKENS = 4, 8
"""Most experts and tokens of a CTA."""
_ROUTER_REGISTERS = 64
"""Most registers of a thread that hold weights, where a CTA has several experts."""
PIECE = 8
"""Channels that are read together."""
MOST_ROUTER_CHANNELS = 8 * PIECE * ROUTER_THREADS

_COMBINE_THREADS = 64
_COMBINE_CHANNELS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """How a router chooses experts: `ops.route` says what each field means.

    Attributes:
        experts: how many there are, E.
        top_k: how many a token gets, K.
        sigmoid: whether a score is the sigmoid of a logit; otherwise it is their softmax.
        normalize: whether weights are divided by their sum.
        biased: whether experts are chosen by score plus bias.
        groups, top_groups: of experts, and how many of them are chosen from.
    """

    experts: int
    top_k: int
    sigmoid: bool = False
    normalize: bool = True
    biased: bool = False
    groups: int = 1
    top_groups: int = 1

    def fits(self) -> bool:
        """Tell whether a kernel has registers for it."""
        return self.experts <= MOST_EXPERTS and self.top_k <= MOST_TOP_K and self.groups <= MOST_GROUPS


@functools.cache
def route_source(choice: Choice, logits: str) -> KernelSource:
    """Return the kernel that chooses experts by logits of a dtype and, where asked to, sorts the pairs."""
    kind = "sigmoid" if choice.sigmoid else "softmax"
    return _source(f"tersor_route_{kind}_{logits}_{choice.top_k}_of_{choice.experts}", choice, logits)


@functools.cache
def tables_source(experts: int, index: str) -> KernelSource:
    """Return the kernel that sorts the pairs of an index of a dtype, int32 or int64."""
    return _source(f"tersor_expert_tables_{index}_{experts}", Choice(experts=experts, top_k=1), index)


def _source(name: str, choice: Choice, reads: str) -> KernelSource:
    return KernelSource(
        name=name,
        header="experts/route.cuh",
        parameters={
            "EXPERTS": choice.experts,
            "TOP_K": choice.top_k,
            "INPUT": INPUTS[reads],
            "SIGMOID": choice.sigmoid,
            "NORMALIZE": choice.normalize,
            "BIASED": choice.biased,
            "GROUPS": choice.groups,
            "TOP_GROUPS": choice.top_groups,
        },
        arguments="PPPPPPPPqiif",
    )


@functools.cache
def combine_source(target: str) -> KernelSource:
    """Return the kernel that adds up what the experts of a token gave, in a 16-bit dtype."""
    return KernelSource(
        name=f"tersor_combine_experts_{target}",
        header="experts/combine.cuh",
        parameters={"BF16": target == "bfloat16"},
        arguments="PPPPPPiiii",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """What the logits of a router are made of.

    Attributes:
        target: dtype of activations, `float16` or `bfloat16`.
        float_weight: whether weight and bias are float32; else they are of that dtype.
        float_out: whether logits are float32; else they are of that dtype.
        channels: of a token, a multiple of 8 and at most `MOST_ROUTER_CHANNELS`.
    """

    target: str
    float_weight: bool
    float_out: bool
    channels: int

    @property
    def pieces(self) -> int:
        """Pieces of channels that a thread has at most: 1, 2, 4 or 8; the order of sums depends on it."""
        return next(count for count in (1, 2, 4, 8) if self.channels <= PIECE * ROUTER_THREADS * count)

    @property
    def registers(self) -> int:
        """Registers of a thread that hold weights of one expert."""
        return self.pieces * (PIECE if self.float_weight else PIECE // 2)

    def share(self, tokens: int) -> tuple[int, int]:
        """Return experts and tokens of a CTA: first of all experts, whose weights are read ahead of time."""
        wanted = 1 << (tokens - 1).bit_length()
        rows = min(wanted, _ROUTER_ROWS, max(1, _ROUTER_REGISTERS // self.registers))
        return rows, max(1, min(wanted // _ROUTER_ROWS, _ROUTER_CTA_TOKENS))


@functools.cache
def router_source(router: Router, tokens: int) -> KernelSource:
    """Return the kernel that makes logits, the same one for many numbers of tokens and channels."""
    rows, of_cta = router.share(tokens)
    kinds = f"{'float_' * router.float_weight}{router.target}{'_float' * router.float_out}"
    return KernelSource(
        name=f"tersor_router_{kinds}_{router.pieces}_{rows}x{of_cta}",
        header="experts/router.cuh",
        parameters={
            "BF16": router.target == "bfloat16",
            "FLOAT_WEIGHT": router.float_weight,
            "FLOAT_OUT": router.float_out,
            "PIECES": router.pieces,
            "ROWS": rows,
            "TOKENS": of_cta,
        },
        arguments="PPPPiiii",
    )


RouterLaunch: TypeAlias = Callable[..., None]
"""Launches a router's product on one prepared problem: `launch` in `prepare_router`."""
RouteLaunch: TypeAlias = Callable[..., None]
"""Launches the choice of experts on one prepared problem: `launch` in `prepare_route`."""
TablesLaunch: TypeAlias = Callable[..., None]
"""Launches the sort of an index on one prepared problem: `launch` in `prepare_tables`."""
CombineLaunch: TypeAlias = Callable[..., None]
"""Launches the sum over experts on one prepared problem: `launch` in `prepare_combine`."""


def prepare_router(function: Function, router: Router, *, tokens: int, experts: int) -> RouterLaunch:
    """Return what launches the logits of `tokens` tokens.

    Args:
        function: `router_source`, loaded.
        router: that of the source.
        tokens: at least one; a source for others fits where a CTA's share of both is the same.
        experts: at least one.
    """
    (rows, of_cta), channels = router.share(tokens), router.channels
    threads = -(-channels // (PIECE * router.pieces * 32)) * 32
    grid, block, run = (-(-experts // rows), -(-tokens // of_cta), 1), (threads, 1, 1), function.launch

    def launch(*, stream: int, x: int, weight: int, bias: int, out: int, ready: bool, early: bool) -> None:
        """Launch; a bias that is not there has the address 0.

        Args:
            stream: handle of the stream.
            x: address of [tokens, channels], on 16 bytes.
            weight: address of [experts, channels], on 16 bytes.
            bias: address of [experts].
            out: address of [tokens, experts].
            ready: whether weight and bias were there before the kernel ahead started.
            early: as in `prepare_route`.
        """
        run(grid, block, 0, stream, (x, weight, bias, out, tokens, experts, channels, ready), early)

    return launch


def sorting_warps(experts: int, pairs: int) -> int:
    """Return the least warps of a CTA that sorts: a thread for every expert and one for none, or one warp."""
    return 1 if pairs <= WARP_PAIRS else -(-(experts + 1) // 32)


def prepare_route(function: Function, choice: Choice, *, tokens: int, block_tokens: int, scale: float) -> RouteLaunch:
    """Return what launches the choice of experts for `tokens` tokens.

    Args:
        function: `route_source`, loaded.
        choice: that of the source.
        tokens: at least one.
        block_tokens: most tokens of a block of one expert; 0 where no pairs are sorted.
        scale: what weights are multiplied by at last.
    """
    pairs, most = tokens * choice.top_k, _WARPS if choice.experts <= _WIDE else _WIDE_WARPS
    if not block_tokens:
        warps = min(tokens, _CHOICE_WARPS)
        ctas, counters = -(-tokens // warps), 0
    elif tokens <= FEW_TOKENS:
        ctas, warps = 1, max(min(tokens, most), sorting_warps(choice.experts, pairs))
        counters = 0 if pairs <= WARP_PAIRS else warps * (choice.experts + 1)
    else:
        ctas, warps, counters = -(-tokens // most), most, most * (choice.experts + 1)
    grid, block, shared, run = (ctas, 1, 1), (32 * warps, 1, 1), 4 * counters, function.launch

    def launch(
        *,
        stream: int,
        logits: int,
        stride: int,
        bias: int,
        index: int,
        weights: int,
        order: int,
        position: int,
        blocks: int,
        arrived: int,
        early: bool,
    ) -> None:
        """Launch; what is not there has the address 0.

        Args:
            stream: handle of the stream.
            logits, stride: address of [tokens, experts], and elements from one token to the next.
            bias: address of float32 [experts].
            index, weights: addresses of int32 and float32 [tokens, top_k].
            order, position, blocks: addresses of the tables, blocks on 16 bytes; 0 where no pairs are sorted.
            arrived: address of one uint32, zero, which is zero again when the kernel has ended; 0 where no pairs are
                sorted, or those of at most FEW_TOKENS tokens.
            early: whether the kernel may start before the one ahead has ended: it waits before it reads or writes.
        """
        # fmt: off
        arguments = (
            logits, bias, index, weights, order, position, blocks, arrived, stride, tokens, block_tokens, scale,
        )
        # fmt: on
        run(grid, block, shared, stream, arguments, early)

    return launch


def prepare_tables(function: Function, *, experts: int, pairs: int, block_tokens: int) -> TablesLaunch:
    """Return what launches the sort of an index that names an expert for each of `pairs` pairs, at least one.

    Args:
        function: `tables_source`, loaded.
        experts: those of the source.
        pairs: tokens times experts of a token.
        block_tokens: most tokens of a block of one expert.
    """
    few = pairs <= WARP_PAIRS
    warps = 1 if few else max(sorting_warps(experts, pairs), min(-(-pairs // 32), _WARPS))
    grid, block = (1, 1, 1), (32 * warps, 1, 1)
    shared, run = 0 if few else 4 * warps * (experts + 1), function.launch

    def launch(*, stream: int, index: int, order: int, position: int, blocks: int, early: bool) -> None:
        """Launch.

        Args:
            stream: handle of the stream.
            index: address of the experts of all pairs, contiguous.
            order, position, blocks: addresses of the tables, blocks on 16 bytes.
            early: as in `prepare_route`.
        """
        arguments = (index, 0, 0, 0, order, position, blocks, 0, 1, pairs, block_tokens, 1.0)
        run(grid, block, shared, stream, arguments, early)

    return launch


def prepare_combine(function: Function, *, tokens: int, top_k: int, channels: int, aligned: bool) -> CombineLaunch:
    """Return what launches the sum over the experts of `tokens` tokens, at least one.

    Args:
        function: `combine_source`, loaded.
        tokens, top_k, channels: sizes, at least one each.
        aligned: whether rows start on 16 bytes.
    """
    grid = (tokens, -(-channels // (_COMBINE_THREADS * _COMBINE_CHANNELS)), 1)
    block, run = (_COMBINE_THREADS, 1, 1), function.launch

    def launch(
        *,
        stream: int,
        y: int,
        weights: int,
        position: int,
        blocks: int,
        addend: int,
        out: int,
        ready: bool,
        early: bool,
    ) -> None:
        """Launch; an addend that is not there has the address 0.

        Args:
            stream: handle of the stream.
            y: address of [tokens * top_k, channels], sorted by expert.
            weights: address of float32 [tokens, top_k].
            position, blocks: addresses of the tables.
            addend, out: addresses of [tokens, channels].
            ready: whether weights and tables were there before the kernel ahead started.
            early: as in `prepare_route`.
        """
        arguments = (y, weights, position, blocks, addend, out, top_k, channels, aligned, ready)
        run(grid, block, 0, stream, arguments, early)

    return launch
