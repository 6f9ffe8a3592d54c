"""Which tile for the experts of a layer? How many tokens each gets only the device knows: so by what is expected."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

from tersor.formats import Activations
from tersor.hardware import Chip
from tersor.kernels.tune import cost, experts_sm80, sm90
from tersor.kernels.tune.experts_problem import ExpertsProblem, expected_blocks
from tersor.kernels.tune.experts_sm80 import Sm80ExpertsConfig
from tersor.kernels.tune.problem import SM80, SM90
from tersor.kernels.tune.tile import Slots, Tile
from tersor.layouts.blocks import BLOCK_IC

__all__ = [
    "GATHERED_TOKENS",
    "EitherConfig",
    "ExpertsConfig",
    "ExpertsProblem",
    "Sm80ExpertsConfig",
    "choices",
    "choose_pair",
    "config",
    "expected_blocks",
    "schedule",
    "seconds",
    "shapes",
    "tiles",
]

GATHERED_TOKENS = 16
"""Up to so many tokens in a tile the kernel fetches those of each expert by itself; for more they are put in order
first."""
_MOST_SPLITS = 4
_WIDE = 64
"""Tiles of more tokens are split in two at the most, since their sums are many."""
_ACHIEVED = 0.9
"""Of the datasheet's bandwidth."""
_ORDERING = 2.0
"""Microseconds that it takes to put activations in order, where the kernel does not gather them."""
_LAST_WAVE = 0.25
"""Of a wave of CTAs, how much more than its share the last one takes on average."""
_MOST_SCALE_GROUPS = {Tile(32, 1, 4, 1, 1): 1}
"""How many scales of a row in a block a tile has registers for, where it has for fewer than in a dense kernel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsConfig:
    """How the kernel of the sm90 schedule runs a problem.

    Attributes:
        tile: the compiled shape.
        slots: how its shared memory is dealt out.
        shared_bytes: dynamic shared memory of a CTA.
        ctas: CTAs launched, as many as fit on the chip: what they do is settled there.
        most_splits: parts into which the input channels of a tile of the last wave may be cut.
        few_tokens: tokens up to which mma.sync may multiply; 0 forbids it.
    """

    tile: Tile
    slots: Slots
    shared_bytes: int
    ctas: int
    most_splits: int
    few_tokens: int

    @property
    def block_tokens(self) -> int:
        """Most tokens of a block of the routing tables."""
        return self.tile.tokens

    @property
    def activations(self) -> Activations:
        """What weights are multiplied with."""
        return self.tile.activations

    @property
    def gathers(self) -> bool:
        """Whether the kernel fetches the tokens of each expert by itself."""
        return self.tile.few and self.few_tokens > 0 and self.tile.tokens <= GATHERED_TOKENS

    @property
    def counters(self) -> int:
        """Tiles that may be split: those of less than a wave."""
        return self.ctas if self.most_splits > 1 else 0

    @property
    def floats(self) -> int:
        """Float32 sums that splits exchange."""
        return self.counters * self.most_splits * self.tile.rows * self.tile.tokens


EitherConfig: TypeAlias = ExpertsConfig | Sm80ExpertsConfig
"""How a kernel of either schedule runs a problem. Both know `block_tokens`, `activations`, `gathers`, `counters` and
`floats`."""


def schedule(chip: Chip) -> str:
    """Return the schedule whose kernel takes all experts at once on a chip."""
    return SM90 if chip.capability == (9, 0) else SM80


def config(problem: ExpertsProblem, tile: Tile, chip: Chip) -> ExpertsConfig:
    """Return the configuration of one tile shape of the sm90 schedule."""
    slots = tile.slots(problem.bits, problem.scale_bytes, chip)._replace(gather_room=0)
    rings = slots.weights * tile.weight_slot_bytes(problem.bits, problem.scale_bytes) + slots.x * tile.x_slot_bytes
    blocks = -(-problem.ic // BLOCK_IC)
    unused = tile.exchange_bytes if problem.batch_invariant and tile.few else 0  # wgmma hands no sums over
    return ExpertsConfig(
        tile=tile,
        slots=slots,
        shared_bytes=rings + tile.exchange_bytes - unused,
        ctas=chip.sms * tile.resident,
        most_splits=1 if problem.batch_invariant else min(2 if tile.tokens > _WIDE else _MOST_SPLITS, blocks),
        few_tokens=0 if problem.batch_invariant else tile.tokens,
    )


def tiles(problem: ExpertsProblem) -> tuple[Tile, ...]:
    """Return the tile shapes that can run a problem.

    CTAs share nothing: which of them would be a cluster is not known before the tokens are.
    """
    groups = problem.scale_groups
    available = (
        tile
        for tile in sm90.tiles(groups, problem.activations)
        if tile.cluster == 1 and groups <= _MOST_SCALE_GROUPS.get(tile, groups)
    )
    if problem.batch_invariant:
        return tuple(tile for tile in available if tile.channel_groups == 1 and not tile.fast_sums)
    return tuple(available)


@functools.lru_cache(maxsize=4096)
def choose_pair(up: ExpertsProblem, down: ExpertsProblem, chip: Chip) -> tuple[EitherConfig, EitherConfig]:
    """Return the configurations of two products of the same tokens, which share the routing tables.

    Both have blocks of as many tokens, and of all such pairs this is the one of the least predicted time.
    """
    if schedule(chip) == SM80:
        return experts_sm80.choose_pair(up, down, chip)
    best: dict[int, list[Tile]] = {}
    for problem in (up, down):
        for width in {tile.tokens for tile in tiles(problem)}:
            fitting = [tile for tile in tiles(problem) if tile.tokens == width]
            best.setdefault(width, []).append(min(fitting, key=lambda tile: seconds(problem, tile, chip)))
    pairs = [pair for pair in best.values() if len(pair) == 2]
    chosen = min(pairs, key=lambda pair: seconds(up, pair[0], chip) + seconds(down, pair[1], chip))
    return config(up, chosen[0], chip), config(down, chosen[1], chip)


def choices(up: ExpertsProblem, down: ExpertsProblem, chip: Chip) -> Iterator[tuple[EitherConfig, EitherConfig]]:
    """Yield every pair, but for what follows from the number of tokens, of as many tokens as problems have, or fewer.

    Between two numbers of tokens (`_sampled`) that have the same tiles no other is looked for; between two that differ
    all numbers are tried where they change.
    """
    most = up.tokens

    def at(tokens: int) -> tuple[EitherConfig, EitherConfig]:
        return choose_pair(replace(up, tokens=tokens), replace(down, tokens=tokens), chip)

    def tiles_at(tokens: int) -> list[object]:
        return [one.tile if isinstance(one, ExpertsConfig) else one.block_tokens for one in at(tokens)]

    def between(first: int, last: int) -> Iterator[int]:
        if last - first > 1 and tiles_at(first) != tiles_at(last):
            middle = (first + last) // 2
            yield middle
            yield from between(first, middle)
            yield from between(middle, last)

    sampled = _sampled(most)
    for first, last in zip(sampled, [*sampled[1:], most], strict=True):
        yield at(first)
        yield from map(at, between(first, last))


def _sampled(most: int) -> list[int]:
    """Return numbers of tokens up to `most`, which is one: all of the first 64, then sixteen of every octave."""
    octaves = (2**power * part // 16 for power in range(6, most.bit_length()) for part in range(17, 33))
    return [*(tokens for tokens in (*range(1, 65), *octaves) if tokens < most), most]


def seconds(problem: ExpertsProblem, tile: Tile, chip: Chip) -> float:
    """Predict the time of a launch of the sm90 schedule whose tokens go to experts at random, in seconds.

    As `sm90.seconds`, with as many tiles as are expected: weights of experts that get tokens come from memory once,
    those of further tokens of an expert, and all activations, from L2, where a byte counts half.
    """
    costs = cost.of(chip.name)[tile]
    hit, blocks_hit = expected_blocks(problem.tokens, problem.top_k / problem.experts, tile.tokens)
    row_tiles, blocks = -(-problem.oc // tile.rows), -(-problem.ic // BLOCK_IC)
    weight_bytes = tile.weight_slot_bytes(problem.bits, problem.scale_bytes)
    gathers = config(problem, tile, chip).gathers
    of_tile = problem.tokens * problem.top_k / (problem.experts * blocks_hit) if gathers else tile.tokens
    x_bytes = of_tile * BLOCK_IC * problem.activations.bits / 8
    items = problem.experts * blocks_hit * row_tiles
    waves = items / (chip.sms * tile.resident)
    length = waves + _LAST_WAVE if waves > 1 else 1.0
    block = costs.block + costs.lonely if waves * tile.resident < 1 else tile.resident * costs.block
    read = problem.experts * hit * row_tiles * weight_bytes
    read += (items * (weight_bytes + x_bytes) - read) / 2
    memory = read * blocks / (chip.bandwidth * _ACHIEVED) * 1e6
    start = costs.start + (0 if gathers else _ORDERING)
    return (start + max(length * blocks * block, memory) + max(0.0, waves - 1) * costs.item) * 1e-6


def shapes(problem: ExpertsProblem, chip: Chip) -> tuple[EitherConfig, ...]:
    """Return a configuration of every compiled shape that a chip has for a problem; none where it has no kernel."""
    if schedule(chip) == SM90:
        return tuple(config(problem, tile, chip) for tile in tiles(problem))
    return tuple(config for config in experts_sm80.candidates(problem, chip) if config.splits == 1)
