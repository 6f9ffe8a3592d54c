"""How does one launch multiply with a mixed weight? One tile for all row sets, and CTAs for each by what it costs.

A CTA of the sm90 schedule belongs to one row set. A row set's CTAs take its tiles in turn, as many each; of the tiles
left the blocks are dealt out evenly (cuda/mixed/sm90_work.cuh), which no number of rows keeps from filling all CTAs.
Times are those of `tune.sm90`: each row set has its blocks' arithmetic or their bytes, whichever takes longer, and CTAs
are given to the one that would be done last.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

from tersor.formats import Activations
from tersor.hardware import Chip
from tersor.kernels.tune import choice, cost, sm90
from tersor.kernels.tune.problem import LinearProblem
from tersor.kernels.tune.tile import Tile
from tersor.layouts.blocks import BLOCK_IC

SHAPES = {
    False: (
        *((8, 1, 4, 1), (8, 3, 1, 1), (16, 1, 4, 1), (16, 3, 1, 1), (32, 1, 4, 1), (32, 2, 1, 1), (32, 3, 1, 1)),
        *((48, 1, 1, 2), (64, 1, 1, 2), (64, 2, 1, 1), (96, 2, 1, 1), (128, 2, 1, 1), (256, 2, 1, 1)),
    ),
    True: (
        *((16, 1, 1, 2), (16, 2, 1, 1), (32, 1, 1, 2), (64, 1, 1, 2), (64, 2, 1, 1), (96, 1, 1, 2), (128, 2, 1, 1)),
        (256, 2, 1, 1),
    ),
}
"""Tokens, row groups, channel groups and resident CTAs of tiles with 16-bit and with 8-bit activations.

Few of a dense weight's: even shares fill all CTAs whatever the tile, and a kernel takes as long to compile as those of
all its levels."""
_MOST_SCALE_GROUPS = {(32, 1, 4): 0, (16, 3, 1): 1}
"""Tokens, row groups and channel groups of a tile -> scales of a row in a block that its registers have room for."""
_MOST_LEVELS = {Tile(128, 2, 1, 1, 1, Activations.INT8): 3}
"""Tile -> levels whose code its registers have room for beside each other, where they are few."""
_CROWDS = (1, 2)
"""Of the CTAs that fit, at most one of so many is launched."""
_FEW = 64
"""Tokens of a tile whose results are not turned in shared memory (kMany of cuda/dense/sm90_pipeline.cuh)."""
_HIDDEN = 0.5
"""Of what a further tile costs, what a further part costs whose sums are exchanged while whole tiles come in; sums of
more than a few tokens are too many bytes for that."""
_SECTOR_CLOCKS = 0.75
"""Clocks of a multiprocessor that every 32 bytes take in which a warp stores some results; fitted to what mixes of 10 %
of `int8` rows take more than a uniform weight in bench/results/mixed_int8_h200.json."""
_STEPS, _TURNS = 32, 12
"""Numbers of CTAs that are tried for a row set: in so many steps, and as many as have so many tiles or parts each."""


class Share(NamedTuple):
    """What the CTAs of a level have: `Share` in cuda/mixed/sm90_call.cuh.

    Attributes:
        rows: of the row set; 0 where there is none.
        end: clusters of the level and of those before it.
        whole_tiles: tiles taken in turn, over all input channels.
        output: tiles dealt out at the levels before.
    """

    rows: int
    end: int
    whole_tiles: int
    output: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedProblem:
    """One product with a mixed weight.

    Attributes:
        levels: the product with the row set of every level; of one without rows `oc` is 0. They differ in nothing else
            but bits and scales.
        apart: whether results of a row set lie apart from each other, among those of others.
    """

    levels: tuple[LinearProblem, ...]
    apart: bool = True

    @property
    def n(self) -> int:
        """Tokens."""
        return self.levels[0].n

    @property
    def ic(self) -> int:
        """Input channels."""
        return self.levels[0].ic

    @property
    def activations(self) -> Activations:
        """What the weight is multiplied with."""
        return self.levels[0].activations

    def of_tokens(self, n: int) -> MixedProblem:
        """Return the same product with another number of tokens."""
        return replace(self, levels=tuple(replace(level, n=n) for level in self.levels))


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedConfig:
    """How the kernel runs a problem.

    Attributes:
        tile: the compiled shape.
        shared_bytes: dynamic shared memory of a CTA: the most that one of any level has.
        shares: of every level.
        dealt: tiles of clusters that are dealt out, of all levels.
        parts: of such a tile, at the most.
        ctas: CTAs launched.
        splits: CTAs of a cluster, which gathers the sums of one tile; 1 where tiles are taken in turn or dealt out.
    """

    tile: Tile
    shared_bytes: int
    shares: tuple[Share, ...]
    dealt: int
    parts: int
    ctas: int
    splits: int = 1

    @property
    def counters(self) -> int:
        """Counters of those tiles."""
        return self.dealt * self.tile.cluster

    @property
    def floats(self) -> int:
        """Float32 sums that their parts exchange."""
        return self.counters * self.parts * self.tile.rows * self.tile.tokens

    def __str__(self) -> str:
        ends = [share.end for share in self.shares]
        counts = ", ".join(str(end - before) for before, end in zip([0, *ends], ends, strict=False) if end > before)
        return (
            f"row sets in one launch, tiles of {self.tile.rows} rows and {self.tile.tokens} tokens, {self.ctas} CTAs "
            f"({counts} {'clusters ' * (self.splits > 1)}a row set), {self.dealt} tiles dealt out"
        )


def tiles(problem: MixedProblem) -> list[Tile]:
    """Return the tiles that all levels of a problem may have."""
    return tiles_of([level.scale_groups for level in problem.levels], problem.activations)


def tiles_of(scale_groups: Sequence[int], activations: Activations) -> list[Tile]:
    """Return the tiles for levels of which a row has so many scales in a block, or one in all (0)."""
    wanted = {
        Tile(tokens, rows, channels, 1, resident, activations)
        for tokens, rows, channels, resident in SHAPES[activations is not Activations.NATIVE]
    }
    of_levels = [set(sm90.tiles(count, activations)) for count in scale_groups]
    most = max(scale_groups)
    sizes = {tile: (tile.tokens, tile.row_groups, tile.channel_groups) for tile in wanted}
    wanted = {tile for tile, size in sizes.items() if most <= _MOST_SCALE_GROUPS.get(size, most)}
    wanted = {tile for tile in wanted if len(scale_groups) <= _MOST_LEVELS.get(tile, len(scale_groups))}
    return sorted(wanted.intersection(*of_levels), key=lambda tile: (tile.tokens, tile.row_groups, tile.resident))


def choose(problem: MixedProblem, chip: Chip) -> MixedConfig:
    """Return the configuration of the least predicted time, with the tile of `choose_tile`; the chip has the sm90
    schedule.

    Raises:
        InputError: costs of this chip cannot be used; the message names the file.
    """
    tile, best, least = choose_tile(problem, chip), (0, 0), math.inf
    for crowd, splits in runs(problem, tile, chip):
        plan = _Plan(problem, tile, crowd, chip)
        predicted = plan.gathered_seconds(splits, chip) if splits > 1 else plan.seconds(plan.counts())
        if predicted < least:
            best, least = (crowd, splits), predicted
    return configured(problem, tile, *best, chip)


def choose_tile(problem: MixedProblem, chip: Chip) -> Tile:
    """Return the tile of the least time where all levels have as many rows: what else there is to choose needs no other
    kernel, and so weights of one shape have one.

    Raises:
        InputError: as `choose`.
    """
    return _tile(_evenly(problem), choice.filled(problem.n), chip)


def asked(problem: MixedProblem, chip: Chip) -> tuple[Tile, ...]:
    """Return the tiles that `choose` has for a problem of as many tokens or fewer, each once."""
    return _asked(_evenly(problem), problem.n, chip)


def _evenly(problem: MixedProblem) -> MixedProblem:
    """Return the problem of one token where every level has as many rows."""
    rows = -(-sum(level.oc for level in problem.levels) // len(problem.levels))
    return replace(problem, levels=tuple(replace(level, n=1, oc=rows) for level in problem.levels))


@functools.lru_cache(maxsize=16384)
def _tile(evenly: MixedProblem, n: int, chip: Chip) -> Tile:
    problem = evenly.of_tokens(n)
    plans = (_Plan(problem, tile, chip.sms * tile.resident, chip) for tile in sm90.fitting(tiles(problem), n))
    return min(plans, key=lambda plan: plan.busy_microseconds(chip)).tile


@functools.lru_cache(maxsize=1024)
def _asked(evenly: MixedProblem, most: int, chip: Chip) -> tuple[Tile, ...]:
    found, n = dict[Tile, None](), 0
    while n < most:
        n = choice.filled(n + 1)
        found[_tile(evenly, n, chip)] = None
    return tuple(found)


def candidates(problem: MixedProblem, chip: Chip) -> Iterator[MixedConfig]:
    """Yield the configurations that are worth a prediction."""
    for tile in sm90.fitting(tiles(problem), problem.n):
        for crowd, splits in runs(problem, tile, chip):
            yield configured(problem, tile, crowd, splits, chip)


def seconds(problem: MixedProblem, config: MixedConfig, chip: Chip) -> float:
    """Predict the time of a launch in a chain of launches, in seconds."""
    plan = _Plan(problem, config.tile, config.ctas // config.tile.cluster, chip)
    if config.splits > 1:
        return plan.gathered_seconds(config.splits, chip)
    ends = [share.end for share in config.shares]
    counts = [end - before for before, end in zip([0, *ends], ends, strict=False)]
    return plan.seconds([count for count, level in zip(counts, problem.levels, strict=True) if level.oc])


def runs(problem: MixedProblem, tile: Tile, chip: Chip) -> Iterator[tuple[int, int]]:
    """Yield how many clusters a launch may have at the most, and CTAs that gather."""
    fitting = chip.sms * tile.resident // tile.cluster
    yield from ((fitting // part, 1) for part in _CROWDS)
    plan = _Plan(problem, tile, fitting, chip)
    yield from ((plan.all_tiles * splits, splits) for splits in plan.gathering(fitting))


def configured(
    problem: MixedProblem, tile: Tile, crowd: int, splits: int, chip: Chip, *, deals: bool = False
) -> MixedConfig:
    """Return the configuration with a tile, so many clusters at the most, one a row set at the least, and so many CTAs
    in one that gathers.

    Args:
        problem, tile, crowd, splits, chip: of which.
        deals: whether CTAs have shares by tiles, and all tiles that fill no turn are dealt out, whatever that takes.
    """
    plan = _Plan(problem, tile, crowd, chip, deals)
    of_rows = iter([(tiles, tiles, tiles) for tiles in plan.tiles]) if splits > 1 else plan.rows(plan.counts())
    shares, end, output, most = [], 0, 0, 1
    for level in problem.levels:
        count, all_tiles, whole = next(of_rows) if level.oc else (0, 0, 0)
        end += count
        shares.append(Share(level.oc, end, whole, output))
        if whole < all_tiles:
            output += all_tiles - whole
            most = max(most, _parts((all_tiles - whole) * plan.blocks, plan.blocks, count))
    return MixedConfig(
        tile=tile,
        shared_bytes=max(tile.shared_bytes(level.bits, level.scale_bytes, chip) for level in problem.levels),
        shares=tuple(shares),
        dealt=output,
        parts=most,
        ctas=end * tile.cluster * splits,
        splits=splits,
    )


def _parts(left: int, blocks: int, ctas: int) -> int:
    """Return the most parts that a tile has of those whose blocks, `left` in all, are dealt out."""
    ends = [cta * left // ctas for cta in range(ctas + 1)]
    of_tile = Counter(tile for first, end in pairwise(ends) for tile in {first // blocks, (end - 1) // blocks})
    return max(of_tile.values())


def _stored(tile: Tile, tokens: int, share: float, chip: Chip) -> float:
    """Return the microseconds in which a CTA stores a tile's results, of a row set that has such a share of all.

    A warp stores 32 channels of one token at a time or, of few tokens, pairs of eight channels of eight: as many pieces
    of 32 bytes, 16 channels, as these are spread over.
    """
    pieces = 1 + 2 / share if tile.tokens > _FEW else 8 * (1 + 0.5 / share)
    return tokens * tile.rows / 32 * min(pieces, 32) * _SECTOR_CLOCKS / sm90.clock(chip) * 1e6


class _Plan:
    """What a tile and a number of CTAs, in clusters, make of a problem."""

    def __init__(self, problem: MixedProblem, tile: Tile, crowd: int, chip: Chip, deals: bool = False) -> None:
        self.deals, self.tile, self.costs = deals, tile, cost.of(chip.name)[tile]
        self.blocks = -(-problem.ic // BLOCK_IC)
        self.token_tiles = -(-problem.n // tile.tokens)
        self.start = sm90.start_microseconds(problem.levels[0], tile, chip)
        levels = [level for level in problem.levels if level.oc]
        outputs = sum(level.oc for level in levels)
        shares = [level.oc / outputs if problem.apart else 1.0 for level in levels]
        self.stored = [_stored(tile, sm90.tile_tokens(tile, problem.n), share, chip) for share in shares]
        self.tiles = [self.token_tiles * -(-level.oc // (tile.rows * tile.cluster)) for level in levels]
        self.all_tiles = sum(self.tiles)
        self.crowd = max(len(levels), min(crowd, self.all_tiles * self.blocks))
        sizes = [sm90.bytes_of_block(level, tile) * tile.cluster for level in levels]
        everywhere, of_one = sm90.bytes_a_microsecond(tile, chip)
        busiest = -(-self.crowd // (chip.sms // tile.cluster))
        arithmetic = busiest * self.costs.block + (self.costs.lonely if busiest == 1 else 0.0)
        self.of_block = [max(arithmetic, busiest * size / (of_one * tile.cluster)) for size in sizes]
        together = sum(tiles * size for tiles, size in zip(self.tiles, sizes, strict=True))
        self.memory = together * self.blocks / everywhere

    def rows(self, counts: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        """Yield CTAs, tiles, and how many of these are taken in turn, of each row set; the others are dealt out."""
        for tiles, count, *of_set in zip(self.tiles, counts, self.of_block, self.stored, strict=True):
            yield count, tiles, self._best(tiles, count, *of_set)[1]

    def seconds(self, counts: Sequence[int]) -> float:
        """Return the predicted time with as many CTAs for each row set."""
        rows = zip(self.tiles, counts, self.of_block, self.stored, strict=True)
        return (self.start + max(self._best(*of_set)[0] for of_set in rows)) * 1e-6

    def busy_microseconds(self, chip: Chip) -> float:
        """Return the least time where a CTA, or a cluster, has one tile, or all have even shares of everything."""
        costs, slots = self.costs, chip.sms * self.tile.resident // self.tile.cluster
        sets = zip(self.tiles, self.of_block, self.stored, strict=True)
        work = sum(tiles * (of_block * self.blocks + stored) for tiles, of_block, stored in sets)
        turns = -(-self.all_tiles // slots)
        exchange = self._exchange(slots, self.all_tiles) if turns == 1 else costs.item * _HIDDEN
        even = self.start + max(work / slots, self.memory) + (turns - 1) * costs.item + exchange
        one_each = [1] * (self.all_tiles <= slots)
        return min([even, *(self.gathered_seconds(n, chip) * 1e6 for n in (*one_each, *self.gathering(slots)))])

    def gathering(self, slots: int) -> list[int]:
        """Return how many CTAs clusters may have that gather, where so many clusters of one CTA fit on the chip."""
        most = min(self.tile.gathered, self.blocks)
        rooms = {splits: slots * (1 if splits == 2 else sm90.CLUSTER_ROOM) for splits in range(2, most + 1)}
        return [splits for splits, room in rooms.items() if self.all_tiles * splits <= room]

    def gathered_seconds(self, splits: int, chip: Chip) -> float:
        """Return the predicted time where a cluster of so many CTAs has each tile."""
        longest = -(-self.blocks // splits) * max(self.of_block)
        gathered = sm90.gather_microseconds(self.tile, splits, chip)
        return (self.start + max(longest, self.memory) + gathered + max(self.stored)) * 1e-6

    def counts(self) -> list[int]:
        """Return the CTAs of each row set: more and more for the one that is done last, of those that can be
        done sooner, while there are some."""
        if self.deals:
            spare, most = self.crowd - len(self.tiles), [tiles * self.blocks for tiles in self.tiles]
            shares = (1 + spare * tiles // self.all_tiles for tiles in self.tiles)
            return [min(pair) for pair in zip(shares, most, strict=True)]
        ways = [self._ways(*of_set) for of_set in zip(self.tiles, self.of_block, self.stored, strict=True)]
        at = [0] * len(ways)
        spare = self.crowd - sum(way[0][1] for way in ways)
        while some := [number for number, way in enumerate(ways) if at[number] + 1 < len(way)]:
            last = max(some, key=lambda number: ways[number][at[number]][0])
            spare -= ways[last][at[last] + 1][1] - ways[last][at[last]][1]
            if spare < 0:
                break
            at[last] += 1
        return [way[place][1] for way, place in zip(ways, at, strict=True)]

    def _ways(self, tiles: int, of_block: float, stored: float) -> list[tuple[float, int]]:
        """Return times and CTAs of a row set, as many as take less time than all fewer."""
        most = min(self.crowd, tiles * self.blocks)
        tried = {*range(1, most + 1, max(1, self.crowd // _STEPS)), most}
        tried |= {count for turns in range(1, _TURNS) for count in (-(-tiles // turns), turns * tiles) if count <= most}
        found: list[tuple[float, int]] = []
        for count in sorted(tried):
            time = self._best(tiles, count, of_block, stored)[0]
            if not found or time < found[-1][0]:
                found.append((time, count))
        return found

    def _best(self, tiles: int, ctas: int, of_block: float, stored: float) -> tuple[float, int]:
        """Return the least time of a row set, in microseconds, and its whole tiles."""
        costs, blocks = self.costs, self.blocks
        turns, rest = -(-tiles // ctas), tiles % ctas
        more = (turns - 1) * costs.item + turns * stored
        in_turn = max(turns * blocks * of_block, self.memory) + more
        if not rest or rest * blocks < ctas:
            return in_turn, tiles
        length = (turns - 1) * blocks + -(-rest * blocks // ctas)
        hidden = turns > 1 and self.tile.tokens <= _FEW  # ahead of whole tiles
        exchange = costs.item * _HIDDEN if hidden else self._exchange(ctas, rest)
        dealt = max(length * of_block, self.memory) + more + exchange
        return (dealt, tiles - rest) if self.deals or dealt < in_turn else (in_turn, tiles)

    def _exchange(self, ctas: int, tiles: int) -> float:
        """Return the microseconds in which parts of tiles are added that are dealt out to so many CTAs."""
        costs, tile = self.costs, self.tile
        parts, halves = -(-ctas // tiles), ctas % tiles > 0  # where shares meet within tiles, these have one part more
        megabytes = (ctas + tiles * halves) / ctas * self.crowd * tile.cluster * tile.rows * tile.tokens * 8e-6
        return costs.exchange + costs.part * (parts + halves) + costs.exchange_megabyte * megabytes
