"""What do the experts of a layer ask of a kernel? How many tokens each gets only the device knows."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from tersor.formats import Activations
from tersor.layouts.packing import Packing

_LONG = 256
"""Beyond so many tokens an expert, blocks are counted by the mean alone."""


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
            scale_groups=packing.scales_in_block,
            scale_bytes=packing.scale_row_bytes,
            activations=activations,
            batch_invariant=batch_invariant,
        )


def most_blocks(pairs: int, experts: int, width: int) -> int:
    """Return how many blocks of up to `width` pairs of one expert there are at most, whatever experts are chosen."""
    return min(pairs, pairs // width + min(experts, pairs))


@functools.lru_cache(maxsize=65536)
def expected_blocks(tokens: int, share: float, width: int) -> tuple[float, float]:
    """Return how likely an expert gets a token at all, and how many blocks of `width` tokens it is expected to have.

    Args:
        tokens: T.
        share: how likely a token goes to the expert.
        width: tokens in a block.
    """
    if share >= 1:
        return 1.0, float(-(-tokens // width))
    none = (1 - share) ** tokens
    mean = tokens * share
    if mean > _LONG:
        return 1 - none, mean / width + 0.5
    expected, chance = 0.0, none
    last = min(tokens, math.ceil(mean + 8 * math.sqrt(mean) + 8))
    for count in range(1, last + 1):
        chance *= (tokens - count + 1) / count * share / (1 - share)
        expected += chance * -(-count // width)
    return 1 - none, expected
