"""Around the experts of a layer, where tokens are few: experts/decide.cuh norms, makes logits, chooses and sorts ahead
of them, experts/combine_norm.cuh adds up behind them and norms the sum.

As in `kernels.routing`, whose `Router` and `Choice` meet here: a kernel's source, its launch prepared for a problem,
then the launch, by addresses and sizes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from tersor.kernels.jit import Function, KernelSource
from tersor.kernels.routing import INPUTS, PIECE, Choice, Router, sorting_warps
from tersor.kernels.small import norm_pieces, norm_threads

MOST_TOKENS = 16
"""Tokens up to which one launch decides."""
MOST_EXPERTS = 256
MOST_CHANNELS, MOST_NORMED_CHANNELS = 8192, 4096
"""Of a row, and of one that the launch norms, too: a thread has four pieces of it at most, or two."""
MOST_SUMMED_CHANNELS = 8192
"""Of a row that is normed behind the sum over experts: a thread has two pieces of it at most."""

_CTA_TOKENS = 4
"""Most tokens of a CTA, which has their rows in registers: half as many beside more weights than `_FEW_REGISTERS`."""
_FEW_REGISTERS = 32
_CHOICE_WARPS = 8
"""Warps that choose, one token at a time, where there are as many tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decider:
    """What is decided ahead of experts.

    Attributes:
        router: makes logits.
        choice: of experts by them.
        norms: whether rows are normed first.
    """

    router: Router
    choice: Choice
    norms: bool

    def fits(self, tokens: int) -> bool:
        """Tell whether one launch decides for so many tokens."""
        few = 0 < tokens <= MOST_TOKENS and self.choice.experts <= MOST_EXPERTS and self.choice.fits()
        return few and self.router.channels <= (MOST_NORMED_CHANNELS if self.norms else MOST_CHANNELS)

    @property
    def logits(self) -> str:
        """Dtype that logits are rounded to."""
        return "float32" if self.router.float_out else self.router.target

    def share(self, tokens: int) -> tuple[int, int]:
        """Return experts and tokens of a CTA."""
        rows, of_cta = self.router.share(tokens)
        few = rows * self.router.registers <= _FEW_REGISTERS
        return rows, min(of_cta, _CTA_TOKENS if few else _CTA_TOKENS // 2)


@functools.lru_cache(1024)
def source(decider: Decider, tokens: int) -> KernelSource:
    """Return the kernel that decides, the same one for many numbers of tokens and channels."""
    return _source(decider.router, decider.choice, decider.norms, decider.logits, decider.share(tokens))


def _source(router: Router, choice: Choice, norms: bool, logits: str, share: tuple[int, int]) -> KernelSource:
    (rows, of_cta), kind = share, "sigmoid" if choice.sigmoid else "softmax"
    return KernelSource(
        name=(
            f"tersor_decide{'_norm' * norms}_{kind}_{'float_' * router.float_weight}{router.target}_{logits}"
            f"_{choice.top_k}_of_{choice.experts}_{router.pieces}_{rows}x{of_cta}"
        ),
        header="experts/decide.cuh",
        parameters={
            "BF16": router.target == "bfloat16",
            "FLOAT_WEIGHT": router.float_weight,
            "PIECES": router.pieces,
            "ROWS": rows,
            "TOKENS": of_cta,
            "EXPERTS": choice.experts,
            "TOP_K": choice.top_k,
            "INPUT": INPUTS[logits],
            "SIGMOID": choice.sigmoid,
            "NORMALIZE": choice.normalize,
            "BIASED": choice.biased,
            "GROUPS": choice.groups,
            "TOP_GROUPS": choice.top_groups,
            "NORM": norms,
        },
        arguments="PPPPPPPPPPPPiiiifff",
    )


DecideLaunch: TypeAlias = Callable[..., None]
"""Launches what decides on one prepared problem: `launch` in `prepare`."""


def prepare(
    function: Function, decider: Decider, *, tokens: int, block_tokens: int, scale: float, eps: float, offset: float
) -> DecideLaunch:
    """Return what launches the decision for `tokens` tokens.

    Args:
        function: `source`, loaded.
        decider: that of the source; it fits so many tokens.
        tokens: at least one.
        block_tokens: most tokens of a block of one expert.
        scale: what weights are multiplied by at last.
        eps, offset: of the norm: added to the mean of squares, and to its weights.
    """
    (rows, of_cta), router, choice = decider.share(tokens), decider.router, decider.choice
    of_row = -(-router.channels // (PIECE * router.pieces * 32))
    pairs = tokens * choice.top_k
    warps = max(of_row, min(tokens, _CHOICE_WARPS), sorting_warps(choice.experts, pairs))
    ctas = -(-choice.experts // rows) * -(-tokens // of_cta) + 1
    grid, block, run = (ctas, 1, 1), (32 * warps, 1, 1), function.launch

    def launch(
        *,
        stream: int,
        x: int,
        weight: int,
        bias: int,
        preferred: int,
        gain: int,
        normed: int,
        index: int,
        weights: int,
        order: int,
        position: int,
        blocks: int,
        logits: int,
        ready: bool,
        early: bool,
    ) -> None:
        """Launch; what is not there has the address 0.

        Args:
            stream: handle of the stream.
            x: address of [tokens, channels], on 16 bytes.
            weight, bias: addresses of [experts, channels], on 16 bytes, and of [experts].
            preferred: address of float32 [experts], the bias of the choice.
            gain, normed: addresses of [channels], the weights of the norm, and of [tokens, channels], on 16 bytes.
            index, weights: addresses of int32 and float32 [tokens, top_k].
            order, position, blocks: addresses of the tables, blocks on 16 bytes.
            logits: address of uint32 [tokens, experts], zero, which are zero again when the kernel has ended.
            ready: whether weight, bias and gain were there before the kernel ahead started.
            early: whether the kernel may start before the one ahead has ended: it waits before it reads or writes.
        """
        # fmt: off
        arguments = (
            x, weight, bias, preferred, gain, normed, index, weights, order, position, blocks, logits,
            tokens, router.channels, block_tokens, ready, scale, eps, offset,
        )
        # fmt: on
        run(grid, block, 0, stream, arguments, early)

    return launch


@functools.cache
def combine_source(target: str, channels: int) -> KernelSource:
    """Return the kernel that adds up what the experts of a token gave and norms the sum, of so many channels.

    Args:
        target: `float16` or `bfloat16`.
        channels: at most `MOST_SUMMED_CHANNELS`.
    """
    return _combine_source(target, norm_pieces(channels))


@functools.cache
def _combine_source(target: str, pieces: int) -> KernelSource:
    return KernelSource(
        name=f"tersor_combine_experts_norm_{target}_{pieces}",
        header="experts/combine_norm.cuh",
        parameters={"BF16": target == "bfloat16", "PIECES": pieces},
        arguments="PPPPPPPPiiffi",
    )


CombineLaunch: TypeAlias = Callable[..., None]
"""Launches the sum over experts and its norm on one prepared problem: `launch` in `prepare_combine`."""


def prepare_combine(
    function: Function, *, tokens: int, top_k: int, channels: int, eps: float, offset: float
) -> CombineLaunch:
    """Return what launches the sum over the experts of `tokens` tokens, at least one, and its norm.

    Args:
        function: `combine_source`, loaded.
        tokens, top_k, channels: sizes, at least one each; channels are those of the source, a multiple of 8.
        eps, offset: as in `prepare`.
    """
    grid, block, run = (tokens, 1, 1), (norm_threads(channels), 1, 1), function.launch

    def launch(
        *,
        stream: int,
        y: int,
        weights: int,
        position: int,
        blocks: int,
        addend: int,
        gain: int,
        out: int,
        normed: int,
        ready: bool,
        early: bool,
    ) -> None:
        """Launch; an addend that is not there has the address 0.

        Args:
            stream: handle of the stream.
            y: address of [tokens * top_k, channels], sorted by expert, on 16 bytes.
            weights: address of float32 [tokens, top_k].
            position, blocks: addresses of the tables.
            addend, out, normed: addresses of [tokens, channels], on 16 bytes.
            gain: address of [channels], on 16 bytes.
            ready: whether gain, weights and tables were there before the kernel ahead started.
            early: as in `prepare`.
        """
        arguments = (y, weights, position, blocks, addend, gain, out, normed, top_k, channels, eps, offset, ready)
        run(grid, block, 0, stream, arguments, early)

    return launch
