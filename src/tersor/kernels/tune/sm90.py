"""The sm90 schedule: wgmma, any number of tokens, one or two persistent CTAs on a multiprocessor."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from tersor.formats import Activations
from tersor.hardware import Chip
from tersor.kernels.tune import cost
from tersor.kernels.tune.problem import INVARIANT_TOKENS, SM90, LinearConfig, LinearProblem
from tersor.kernels.tune.tile import Slots, Tile
from tersor.layouts.blocks import BLOCK_IC

__all__ = [
    "CLUSTER_ROOM",
    "MANY_TOKENS",
    "WIDE_STEP",
    "Slots",
    "Tile",
    "block_microseconds",
    "box_of",
    "box_rows",
    "bytes_a_microsecond",
    "bytes_of_block",
    "candidates",
    "config",
    "fitting",
    "gather_microseconds",
    "invariant_splits",
    "predict",
    "seconds",
    "start_microseconds",
    "tile_of",
    "tile_tokens",
    "tiles",
]

CLUSTER_ROOM = 0.75
"""Of the CTAs that fit on a chip, how many do in clusters of three: multiprocessors come in groups of 16 or 18."""
_CLUSTER_FILL = 0.45
"""Of the multiprocessors, how many the clusters must take: what was measured."""
_GATHER_KILOBYTE = 0.028
"""Microseconds for each 1024 bytes of the parts of a sum that a cluster gathers."""
_LEAST = 64
"""Tokens take several tiles only of so many each: a weight is decoded once for each of them."""
_NARROW, _MOST_NARROW = 128, 4
"""And of fewer tokens than the first they take no more than so many."""
_WIDER = 1.25
MANY_TOKENS, WIDE_STEP = 2048, 64
"""Beyond so many tokens a tile's are a multiple of the second: to fit the count more closely saves less than 3 %."""
_QUANTISED_MILLION = 0.34
"""Microseconds to quantise each 10^6 activations, beside what `Cost.start` has of it."""
_MAX_SPLITS = 16
_MAX_LAST_SPLITS = 6
_ACHIEVED = 0.9
"""Of the datasheet's bandwidth."""
_SHARE = {1: 1.3, 2: 1.4}
"""CTAs meant to share a multiprocessor -> what one multiprocessor can take of that bandwidth, in even shares."""
_X_FROM_L2, _WEIGHTS_FROM_L2 = 0.25, 0.5
"""What a byte from L2 costs of one from memory: of activations, and of weights that another token tile reads, too."""


def config(
    problem: LinearProblem,
    tile: Tile,
    whole_tiles: int,
    splits: int,
    ctas: int,
    chip: Chip,
    gathered: bool = False,
) -> LinearConfig:
    """Return the configuration of one tile shape with its last tiles, those from `whole_tiles` on, split."""
    slots = tile.slots(problem.bits, problem.scale_bytes, chip)
    return LinearConfig(
        schedule=SM90,
        activations=tile.activations,
        n_tile=tile.tokens,
        row_groups=tile.row_groups,
        channel_groups=tile.channel_groups,
        cluster=tile.cluster,
        resident=tile.resident,
        weight_slots=slots.weights,
        x_slots=slots.x,
        token_tiles=-(-problem.n // tile.tokens),
        row_tiles=-(-problem.oc // (tile.rows * tile.cluster)) * tile.cluster,
        whole_tiles=whole_tiles,
        splits=splits,
        gathered=gathered,
        gather_room=slots.gather_room,
        ctas=ctas,
        shared_bytes=tile.shared_bytes(problem.bits, problem.scale_bytes, chip),
    )


def tile_of(config: LinearConfig) -> Tile:
    """Return the tile shape of a configuration."""
    sizes = (config.n_tile, config.row_groups, config.channel_groups, config.cluster, config.resident)
    return Tile(*sizes, config.activations)


def box_rows(config: LinearConfig, n: int) -> int:
    """Return how many of n tokens one copy of activations brings, as `box_of` does for the configuration's tile."""
    return box_of(tile_of(config), n)


def box_of(tile: Tile, n: int) -> int:
    """Return how many tokens one copy of activations brings: a CTA's share of a tile, which has an even share of all.

    Where a tile takes several boxes each but the last has whole groups of eight rows, which a swizzle repeats after.
    """
    pieces = (1 if tile.bytewise else 2) // tile.x_slots_of_block
    boxes, tokens = max(1, tile.cluster // pieces), tile_tokens(tile, n)
    if tile.activations.group_size is not None:
        tokens = min(n, -(-tokens // 4) * 4)  # scales of tokens are copied by fours
    return tokens if boxes == 1 else min(n, -(-tokens // (8 * boxes)) * 8)


def tile_tokens(tile: Tile, n: int) -> int:
    """Return how many of n tokens each token tile has; the last one has the rest."""
    return -(-n // -(-n // tile.tokens))


def tiles(scale_groups: int, activations: Activations = Activations.NATIVE) -> tuple[Tile, ...]:
    """Return the tile shapes for one scale a row (0) or scales in groups, for one way with activations."""
    of_kind = (tile for tile in cost.of(cost.DEFAULT) if tile.activations is activations)
    if scale_groups == 0 and activations.group_size is None:
        return tuple(of_kind)
    return tuple(
        tile
        for tile in of_kind
        if tile.grouped and scale_groups <= (1 if tile.tokens > 128 else _MOST_SCALE_GROUPS.get(tile, scale_groups))
    )


def candidates(problem: LinearProblem, chip: Chip) -> Iterator[LinearConfig]:
    """Yield the configurations worth a prediction; none where the schedule cannot run.

    Tiles are those of `fitting`. Where they do not fill one wave of CTAs all are split, where they fill more than one
    those of the last wave are.

    A batch-invariant problem has wgmma, one channel group and the same splits of all tiles, whatever n.
    """
    return (_chosen(problem, run, chip) for run in _runs(problem, chip))


def predict(problem: LinearProblem, chip: Chip) -> LinearConfig | None:
    """Return the candidate of the least predicted time, the first of equal ones; `None` where there are none."""
    best, least = None, math.inf
    for tile, runs in itertools.groupby(_runs(problem, chip), key=_TILE):
        timed = _timed(problem, tile, chip)
        for run in runs:
            predicted = timed(run.whole_tiles, run.splits, run.gathered)
            if predicted < least:
                best, least = run, predicted
    return None if best is None else _chosen(problem, best, chip)


class _Run(NamedTuple):
    """A candidate before its configuration is made: of those that are predicted, one is chosen."""

    tile: Tile
    whole_tiles: int
    splits: int
    ctas: int
    gathered: bool


_TILE = operator.attrgetter("tile")


def _chosen(problem: LinearProblem, run: _Run, chip: Chip) -> LinearConfig:
    """Return the configuration of a candidate."""
    tile = run.tile
    found = config(problem, tile, run.whole_tiles, run.splits, run.ctas, chip, run.gathered)
    if not problem.batch_invariant:
        return found
    unused = tile.exchange_bytes if tile.few else 0  # wgmma hands no sums over
    return replace(found, few_tokens=0, shared_bytes=found.shared_bytes - unused)


def _runs(problem: LinearProblem, chip: Chip) -> Iterator[_Run]:
    """Yield the candidates, those of a tile one after the other."""
    if chip.capability != (9, 0) or not problem.aligned:
        return
    available = tiles(problem.scale_groups, problem.activations)
    fixed = invariant_splits(problem, chip) if problem.batch_invariant else 0
    blocks = -(-problem.ic // BLOCK_IC)
    for tile in fitting(available, problem.n):
        slots = chip.sms * tile.resident // tile.cluster
        count = -(-problem.oc // (tile.rows * tile.cluster)) * -(-problem.n // tile.tokens)
        if fixed:
            if tile.channel_groups == 1 and not tile.fast_sums:
                yield _Run(tile, 0, fixed, min(count * fixed, slots) * tile.cluster, False)
            continue
        rest = count % slots
        splittings = [
            (0, splits) for splits in range(1, min(_MAX_SPLITS, blocks) + 1) if splits == 1 or count * splits <= slots
        ]
        if count > slots and rest:
            splittings += [(count - rest, splits) for splits in range(2, min(_MAX_LAST_SPLITS, blocks) + 1)]
        gathered = tile.gathered
        for whole, splits in splittings:
            ctas = min(whole + (count - whole) * splits, slots) * tile.cluster
            room = slots if splits == 2 else slots * CLUSTER_ROOM
            fits = whole == 0 and _CLUSTER_FILL * chip.sms <= count * splits <= room
            yield _Run(tile, whole, splits, ctas, fits and 1 < splits <= gathered)


def fitting(available: Sequence[Tile], n: int) -> list[Tile]:
    """Return the tiles that are worth a prediction for n tokens, one at least.

    None is wider than `_WIDER` times the narrowest that holds all tokens, and of tiles that differ in nothing but their
    tokens those are left out that make no fewer token tiles than a narrower one.
    """
    widest = max(tile.tokens for tile in available)
    holding = min((tile.tokens for tile in available if n <= tile.tokens), default=widest)
    found: dict[tuple[object, ...], Tile] = {}
    for tile in sorted(available, key=lambda tile: tile.tokens):
        count = -(-n // tile.tokens)
        if tile.tokens > _WIDER * holding or tile.tokens < min(holding, _LEAST):
            continue
        if tile.tokens < min(holding, _NARROW) and count > _MOST_NARROW:
            continue
        if n > MANY_TOKENS and tile.tokens % WIDE_STEP:
            continue
        same = (tile.row_groups, tile.channel_groups, tile.cluster, tile.resident, tile.activations, count)
        found.setdefault(same, tile)
    return list(found.values())


def invariant_splits(problem: LinearProblem, chip: Chip) -> int:
    """Return the splits that a batch-invariant problem has, whatever its number of tokens."""
    usual = replace(problem, n=INVARIANT_TOKENS, aligned=True, batch_invariant=False)
    options = [found for found in candidates(usual, chip) if found.channel_groups == 1 and not found.whole_tiles]
    return min(options, key=lambda found: seconds(usual, found, chip)).splits


def seconds(problem: LinearProblem, config: LinearConfig, chip: Chip) -> float:
    """Predict the time of a launch in a chain of launches, in seconds.

    CTAs run in waves, as many as fit at a time. A wave takes as long as the longest of three: the arithmetic of its
    busiest multiprocessor, the bytes of that one at the most it can take, the bytes of all at what they share. Bytes
    from L2 count in part: activations, and weights for all token tiles but one. To that come what a launch, each
    further wave and the exchange of split sums cost.
    """
    return _timed(problem, tile_of(config), chip)(config.whole_tiles, config.splits, config.gathered)


def _timed(problem: LinearProblem, tile: Tile, chip: Chip) -> Callable[[int, int, bool], float]:
    """Return what makes of whole tiles, splits and whether these are gathered the seconds of a problem with a tile.

    What does not depend on those three is worked out once: a tile has up to 15 splits, and every new number of tokens
    has a dozen tiles to choose from.
    """
    costs, rows, cluster = cost.of(chip.name)[tile], tile.rows, tile.cluster
    blocks, slots = -(-problem.ic // BLOCK_IC), chip.sms * tile.resident // cluster
    count_of_tiles = -(-problem.n // tile.tokens) * -(-problem.oc // (rows * cluster))
    start, block = start_microseconds(problem, tile, chip), block_microseconds(problem, tile, chip)

    def predicted(whole_tiles: int, splits: int, gathered: bool) -> float:
        shares = (count_of_tiles - whole_tiles) * splits
        total, waves = start, 0
        for items, length in ((whole_tiles, blocks), (shares, -(-blocks // splits))):
            for count, clusters in ((items // slots, slots), (1, items % slots)):
                if not count or not clusters:
                    continue
                total += count * length * block(clusters)
                waves += count
        total += (waves - 1) * costs.item
        if gathered:
            total += gather_microseconds(tile, splits, chip)
        elif splits > 1:
            exchanged = shares * cluster * rows * tile.tokens * 8e-6
            total += costs.exchange + costs.part * splits + costs.exchange_megabyte * exchanged
        return total * 1e-6

    return predicted


def start_microseconds(problem: LinearProblem, tile: Tile, chip: Chip) -> float:
    """Return what a launch costs that has a tile, the quantising of 8-bit activations counted."""
    start = cost.of(chip.name)[tile].start
    return start + _QUANTISED_MILLION * problem.n * problem.ic * 1e-6 if tile.bytewise else start


def gather_microseconds(tile: Tile, splits: int, chip: Chip) -> float:
    """Return what it costs that a cluster adds the splits of a tile."""
    return (splits - 1) * (cost.of(chip.name)[tile].gather + _GATHER_KILOBYTE * tile.part_bytes / 1024)


def block_microseconds(problem: LinearProblem, tile: Tile, chip: Chip) -> Callable[[int], float]:
    """Return what makes of the clusters that run beside each other the microseconds of a block of a tile in each."""
    costs, cluster, bandwidth = cost.of(chip.name)[tile], tile.cluster, chip.bandwidth * _ACHIEVED
    multiprocessors, share, block_bytes = chip.sms // cluster, _SHARE[tile.resident], bytes_of_block(problem, tile)

    def microseconds(clusters: int) -> float:
        busiest = -(-clusters // multiprocessors)
        block = busiest * costs.block
        if clusters <= multiprocessors:
            block += costs.lonely
        shares_taken = max(clusters, busiest * multiprocessors / share)
        return max(block, shares_taken * cluster * block_bytes / bandwidth * 1e6)

    return microseconds


def bytes_of_block(problem: LinearProblem, tile: Tile) -> float:
    """Return the bytes that a block of a tile takes of the memory's speed; from L2 they count in part."""
    token_tiles = -(-problem.n // tile.tokens)
    from_memory = (1 + _WEIGHTS_FROM_L2 * (token_tiles - 1)) / token_tiles
    weights = from_memory * tile.weight_slot_bytes(problem.bits, problem.scale_bytes)
    return weights + _X_FROM_L2 * tile_tokens(tile, problem.n) * BLOCK_IC * problem.activations.bits / 8


def clock(chip: Chip) -> float:
    """Return the clocks a second of a chip's multiprocessors, by the peak of their tensor cores."""
    return chip.fp16_ops / chip.sms / FLOPS_OF_CLOCK


def bytes_a_microsecond(tile: Tile, chip: Chip) -> tuple[float, float]:
    """Return the bytes a microsecond that a chip takes with a tile, and that one of its multiprocessors takes at the
    most, beside others that take less."""
    everywhere = chip.bandwidth * _ACHIEVED * 1e-6
    return everywhere, everywhere * _SHARE[tile.resident] / chip.sms


FLOPS_OF_CLOCK = 4096
"""Of a multiprocessor's tensor cores, on 16-bit floats."""
_MOST_SCALE_GROUPS = {
    Tile(16, 2, 1, 1, 2): 1,
    Tile(32, 1, 4, 1, 1): 2,
}
"""How many scales of a row in a block the registers of a tile have room for, where not for all."""
