"""The sm80 schedule for the experts of a layer: a CTA a tile, in a grid with room for however tokens are routed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from tersor.formats import Activations
from tersor.hardware import Chip
from tersor.kernels.tune import sm80
from tersor.kernels.tune.experts_problem import ExpertsProblem, expected_blocks, most_blocks
from tersor.layouts.blocks import BLOCK_IC

TILES = sm80.TILES
"""Tokens of a tile; experts with more have several."""
_RUN = 32
"""Blocks of tokens whose tiles are launched side by side, row tile by row tile: their activations stay in L2."""
_MOST_SPLITS = 16
_MOST_SUMS = 1 << 24
"""Float32 sums that splits may leave in memory: 64 MB."""
_FROM_L2 = 0.5
"""What a byte from L2 counts, of one from memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sm80ExpertsConfig:
    """How the kernel of the sm80 schedule runs a problem.

    Attributes:
        block_tokens: tokens in a tile, and most of a block of the routing tables.
        stages: slots in the ring of shared memory.
        shared_bytes: dynamic shared memory of a CTA.
        resident: CTAs meant to share a multiprocessor.
        row_tiles: tiles along output channels.
        most_blocks: blocks of tokens that there may be.
        splits: parts into which the input channels of every tile are cut.
        early: whether the chip can start a kernel before the one ahead of it has ended.
    """

    block_tokens: int
    stages: int
    shared_bytes: int
    resident: int
    row_tiles: int
    most_blocks: int
    splits: int
    early: bool

    @property
    def activations(self) -> Activations:
        """What weights are multiplied with."""
        return Activations.NATIVE

    @property
    def gathers(self) -> bool:
        """Whether the kernel fetches the tokens of each expert by itself."""
        return True

    @property
    def grid(self) -> tuple[int, int, int]:
        """CTAs launched: blocks of a run, row tiles, runs times splits. Runs are equally long, and at most `_RUN`."""
        runs = -(-self.most_blocks // _RUN)
        return -(-self.most_blocks // runs), self.row_tiles, runs * self.splits

    @property
    def counters(self) -> int:
        """Tiles that are split."""
        return self.most_blocks * self.row_tiles if self.splits > 1 else 0

    @property
    def floats(self) -> int:
        """Float32 sums that splits exchange."""
        return self.counters * self.splits * sm80.ROWS * self.block_tokens


def config(problem: ExpertsProblem, tile: int, splits: int, chip: Chip) -> Sm80ExpertsConfig:
    """Return the configuration of one token tile and number of splits."""
    depth, resident = sm80.stages(tile, problem.bits, problem.scale_bytes, chip)
    return Sm80ExpertsConfig(
        block_tokens=tile,
        stages=depth,
        shared_bytes=depth * sm80.stage_bytes(tile, problem.bits, problem.scale_bytes),
        resident=resident,
        row_tiles=-(-problem.oc // sm80.ROWS),
        most_blocks=most_blocks(problem.tokens * problem.top_k, problem.experts, tile),
        splits=splits,
        early=chip.capability >= (9, 0),
    )


def candidates(problem: ExpertsProblem, chip: Chip) -> Iterator[Sm80ExpertsConfig]:
    """Yield the configurations that can run a problem: every tile, in every number of splits that memory is left for.

    In a batch-invariant problem nothing is split; the tile does not change a token's sums.
    """
    if problem.activations is not Activations.NATIVE:
        return
    most = 1 if problem.batch_invariant else min(_MOST_SPLITS, -(-problem.ic // BLOCK_IC))
    for tile in TILES:
        yield config(problem, tile, 1, chip)
        for splits in range(2, most + 1):
            split = config(problem, tile, splits, chip)
            if split.floats > _MOST_SUMS:
                break
            yield split


def seconds(problem: ExpertsProblem, config: Sm80ExpertsConfig, chip: Chip) -> float:
    """Predict the time of a launch whose tokens go to experts at random, in seconds.

    As `sm80.seconds`, with as many tiles as are expected: weights of experts that get tokens come from memory once,
    those of further tokens of an expert, and all activations, from L2. The sums that splits exchange count as bytes of
    memory, written and read.
    """
    hit, blocks_hit, _ = expected_blocks(problem.tokens, problem.top_k / problem.experts, config.block_tokens)
    expected = problem.experts * blocks_hit
    weight_bytes = 8 * (256 * problem.bits + 16 * problem.scale_bytes)
    blocks, from_memory = -(-problem.ic // BLOCK_IC), hit / blocks_hit
    x_bytes = problem.tokens * problem.top_k / expected * BLOCK_IC * 2
    exchanged = 8 * problem.tokens * problem.top_k * problem.oc * config.splits if config.splits > 1 else 0
    run = sm80.launch_seconds(
        tile=config.block_tokens,
        ctas=max(1, round(expected * config.row_tiles)) * config.splits,
        resident=config.resident,
        length=-(-blocks // config.splits),
        split=config.splits > 1,
        block_bytes=weight_bytes * (from_memory + _FROM_L2 * (1 - from_memory)) + _FROM_L2 * x_bytes,
        chip=chip,
    )
    return run + exchanged / chip.bandwidth


def choose_sets(
    ups: tuple[ExpertsProblem, ...], downs: tuple[ExpertsProblem, ...], tokens: int, chip: Chip
) -> tuple[tuple[Sm80ExpertsConfig, ...], tuple[Sm80ExpertsConfig, ...]]:
    """Return the configurations of two products of the same tokens, which share the routing tables.

    All have blocks of as many tokens, and of all such choices this is the one of the least predicted time.

    Args:
        ups, downs: the row sets of either product, each a launch.
        tokens: how many the tile is chosen for; the splits are for as many as there are.
        chip: where they run.
    """

    def best(problem: ExpertsProblem) -> dict[int, tuple[float, Sm80ExpertsConfig]]:
        found: dict[int, tuple[float, Sm80ExpertsConfig]] = {}
        for config in candidates(problem, chip):
            time = seconds(problem, config, chip)
            if config.block_tokens not in found or time < found[config.block_tokens][0]:
                found[config.block_tokens] = time, config
        return found

    every = [best(replace(problem, tokens=tokens)) for problem in (*ups, *downs)]
    tile = min(every[0], key=lambda tile: sum(found[tile][0] for found in every))
    first, second = (tuple(best(problem)[tile][1] for problem in sets) for sets in (ups, downs))
    return first, second
