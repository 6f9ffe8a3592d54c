"""What do the experts of a layer ask of a kernel? How many tokens each gets only the device knows."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

from tersor.formats import Activations
from tersor.layouts.packing import Packing

_LONG = 256
_FAR = 8.0
"""Standard deviations from the mean beyond which nothing is counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsProblem:
    """The product of the experts of a layer with the tokens routed to them: y[P, OC] = x @ W_e^T.

    Attributes:
        experts, oc, ic: sizes of the weight.
        tokens, top_k: T, and how many experts each token has.
        bits: width of a code.
        scale_groups, scale_bytes: as in `LinearProblem`.
        activations: what the weight is multiplied with.
        batch_invariant: whether a token's result must not depend on the others.
    """

    experts: int
    oc: int
    ic: int
    tokens: int
    top_k: int
    bits: int
    scale_groups: int = 0
    scale_bytes: int = 0
    activations: Activations = Activations.NATIVE
    batch_invariant: bool = False

    @staticmethod
    def of(
        packing: Packing,
        shape: tuple[int, int, int],
        tokens: int,
        top_k: int,
        activations: Activations = Activations.NATIVE,
        batch_invariant: bool = False,
    ) -> ExpertsProblem:
        """Return the problem that tokens make with weights of a packing and a shape, (E, OC, IC)."""
        return ExpertsProblem(
            experts=shape[0],
            oc=shape[1],
            ic=shape[2],
            tokens=tokens,
            top_k=top_k,
            bits=packing.scheme.format.bits,
            scale_groups=packing.sums_in_block,
            scale_bytes=packing.scale_row_bytes,
            activations=activations,
            batch_invariant=batch_invariant,
        )


def most_blocks(pairs: int, experts: int, width: int) -> int:
    """Return how many blocks of up to `width` pairs of one expert there are at most, whatever experts are chosen."""
    return min(pairs, pairs // width + min(experts, pairs))


class Expected(NamedTuple):
    """What one expert is expected to get of tokens that go to experts at random.

    Attributes:
        hit: how likely that is any token at all.
        blocks: mean number of blocks of its tokens.
        variance: of the blocks of all experts together, for each of them: what one has more of tokens others lack.
    """

    hit: float
    blocks: float
    variance: float


@functools.lru_cache(maxsize=65536)
def expected_blocks(tokens: int, share: float, width: int) -> Expected:
    """Return how likely an expert gets a token, and how many blocks of `width` tokens it is expected to have.

    Beyond `_LONG` tokens an expert their number counts as normally distributed.

    Args:
        tokens: T.
        share: how likely a token goes to the expert.
        width: tokens in a block.
    """
    if share >= 1:
        return Expected(1.0, float(-(-tokens // width)), 0.0)
    none = (1 - share) ** tokens
    mean, spread = tokens * share, tokens * share * (1 - share)
    expected = square = product = 0.0  # blocks, their square, and blocks times tokens less the product of the means
    if mean > _LONG:
        deviation, reach = math.sqrt(spread), 0.0
        before = int(max(0.0, mean - _FAR * deviation) // width)  # blocks that there are for certain
        expected, square = float(before), float(before * before)
        while reach < _FAR:
            reach = (before * width + 0.5 - mean) / deviation
            more = math.erfc(reach / math.sqrt(2)) / 2  # the chance that there is a block after those before it
            expected += more
            square += (2 * before + 1) * more
            product += deviation * math.exp(-reach * reach / 2) / math.sqrt(2 * math.pi)
            before += 1
    else:
        chance = none
        for count in range(1, min(tokens, math.ceil(mean + _FAR * math.sqrt(mean) + _FAR)) + 1):
            chance *= (tokens - count + 1) / count * share / (1 - share)
            blocks = -(-count // width)
            expected += chance * blocks
            square += chance * blocks * blocks
            product += chance * blocks * count
        product -= expected * mean
    return Expected(1 - none, expected, max(0.0, square - expected * expected - product * product / spread))
