"""Which tile for the experts of a layer? How many tokens each gets only the device knows: so by what is expected."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from tersor.formats import Activations
from tersor.hardware import Chip
from tersor.kernels.tune import experts_sm80, experts_sm90, sm90
from tersor.kernels.tune.experts_problem import ExpertsProblem, expected_blocks
from tersor.kernels.tune.experts_sm80 import Sm80ExpertsConfig
from tersor.kernels.tune.problem import SM80, SM90
from tersor.kernels.tune.tile import Slots, Tile

__all__ = [
    "ORDERING",
    "EitherConfig",
    "ExpertsConfig",
    "ExpertsProblem",
    "Sm80ExpertsConfig",
    "choices",
    "choices_of_sets",
    "choose_pair",
    "choose_sets",
    "common_tiles",
    "config",
    "counts",
    "deciding",
    "expected_blocks",
    "launch_seconds",
    "least_pair",
    "predicted_seconds",
    "schedule",
    "seconds",
    "shapes",
    "tiles",
    "together",
]

SHAPES = {
    False: (
        *((8, 2, 1, 2), (8, 1, 2, 2), (8, 1, 4, 1), (16, 2, 1, 2), (16, 1, 4, 1), (32, 2, 1, 1), (32, 3, 1, 1)),
        *((48, 3, 1, 1), (64, 2, 1, 1), (80, 3, 1, 1), (96, 2, 1, 1), (128, 2, 1, 1)),
    ),
    True: (
        *((16, 1, 1, 2), (16, 2, 1, 1), (32, 1, 1, 2), (64, 2, 1, 1), (96, 1, 1, 2), (128, 2, 1, 1), (256, 2, 1, 1)),
    ),
}
"""Tokens, row groups, channel groups and resident CTAs of tiles that one launch of several row sets has, with 16-bit
and with 8-bit activations: such as have registers for four levels, and are fast where each level is a launch."""
ORDERING = 2.0
"""Microseconds that it takes to put activations in order, where the kernel does not gather them."""
_FEW_TOKENS, _EIGHTHS = 64, 8
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
        return self.tile.few and self.few_tokens > 0 and self.tile.tokens <= experts_sm90.GATHERED_TOKENS

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
Problems: TypeAlias = tuple[ExpertsProblem, ...]
"""The row sets of a product: one, or one for each level of a mix; which of them are one launch says `together`."""
Configs: TypeAlias = tuple[EitherConfig, ...]
"""How each row set runs; those of one launch have one tile."""


def schedule(chip: Chip) -> str:
    """Return the schedule whose kernel takes all experts at once on a chip."""
    return SM90 if chip.capability == (9, 0) else SM80


@functools.lru_cache(maxsize=4096)
def together(problems: Problems, chip: Chip) -> bool:
    """Tell whether one launch has all row sets of a product: several, on the sm90 schedule and in its usual mode."""
    several = schedule(chip) == SM90 and len(problems) > 1 and not problems[0].batch_invariant
    return several and len({one.activations for one in problems}) == 1 and bool(common_tiles(problems))


def common_tiles(problems: Problems) -> tuple[Tile, ...]:
    """Return the tile shapes that one launch of several row sets may have: of `SHAPES` what all of them can run."""
    kind = problems[0].activations
    few = (Tile(*shape[:3], 1, shape[3], kind) for shape in SHAPES[kind is not Activations.NATIVE])
    return tuple(tile for tile in few if all(tile in tiles(one) for one in problems))


@functools.lru_cache(maxsize=16384)
def counts(problems: Problems, tile: Tile, chip: Chip, first: bool) -> tuple[int, ...]:
    """Return the CTAs of every row set of one launch, of all that fit, at least one each.

    They are dealt out as row tiles are many, then taken from who is done first for who is done last while that is done
    earlier. How many blocks of tokens experts get the device alone knows: these are the counts for what is expected.
    """
    row_tiles = [-(-problem.oc // tile.rows) for problem in problems]
    spare, ends = chip.sms * tile.resident - len(problems), [0, *itertools.accumulate(row_tiles)]
    cuts = [round(spare * end / ends[-1]) for end in ends]
    found = [1 + end - before for before, end in itertools.pairwise(cuts)]
    times = [_microseconds(*one, tile, chip, first) for one in zip(problems, found, strict=True)]
    step = max(1, spare // 8)
    while step:
        last, least = times.index(max(times)), times.index(min(times))
        more, fewer = found[last] + step, found[least] - step
        if last != least and fewer > 0:
            sooner = _microseconds(problems[last], more, tile, chip, first)
            later = _microseconds(problems[least], fewer, tile, chip, first)
            if max(sooner, later) < times[last]:
                found[last], found[least], times[last], times[least] = more, fewer, sooner, later
                continue
        step //= 2
    return tuple(found)


def _microseconds(problem: ExpertsProblem, ctas: int, tile: Tile, chip: Chip, first: bool) -> float:
    load = experts_sm90.load(problem, tile, chip, first, ctas)
    return experts_sm90.microseconds(load, experts_sm90.CONSTANTS)


def config(problem: ExpertsProblem, tile: Tile, chip: Chip) -> ExpertsConfig:
    """Return the configuration of one tile shape of the sm90 schedule."""
    slots = tile.slots(problem.bits, problem.scale_bytes, chip)._replace(gather_room=0)
    rings = slots.weights * tile.weight_slot_bytes(problem.bits, problem.scale_bytes) + slots.x * tile.x_slot_bytes
    unused = tile.exchange_bytes if problem.batch_invariant and tile.few else 0  # wgmma hands no sums over
    return ExpertsConfig(
        tile=tile,
        slots=slots,
        shared_bytes=rings + tile.exchange_bytes - unused,
        ctas=chip.sms * tile.resident,
        most_splits=experts_sm90.most_splits(problem, tile),
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


def deciding(tokens: int) -> int:
    """Return the number of tokens whose tiles so many take: tiles of only so many numbers have to be compiled.

    Up to 64 it is their own, then the next multiple of an eighth of the power of two below.
    """
    if tokens <= _FEW_TOKENS:
        return tokens
    step = (1 << ((tokens - 1).bit_length() - 1)) // _EIGHTHS
    return -(-tokens // step) * step


def choose_pair(up: ExpertsProblem, down: ExpertsProblem, chip: Chip) -> tuple[EitherConfig, EitherConfig]:
    """Return the configurations of two products of the same tokens, as `choose_sets` of one row set each."""
    (first,), (second,) = choose_sets((up,), (down,), chip)
    return first, second


@functools.lru_cache(maxsize=4096)
def choose_sets(ups: Problems, downs: Problems, chip: Chip) -> tuple[Configs, Configs]:
    """Return the configurations of two products of the same tokens, which share the routing tables.

    All have blocks of as many tokens, and of all such choices this is the one of the least predicted time for as many
    tokens as are `deciding`.

    Args:
        ups, downs: the row sets of either product; none of one that is of no account.
        chip: where they run.
    """
    tokens = deciding((*ups, *downs)[0].tokens)
    if schedule(chip) == SM80:
        return experts_sm80.choose_sets(ups, downs, tokens, chip)
    chosen = _least(*(tuple(replace(one, tokens=tokens) for one in sets) for sets in (ups, downs)), chip)
    configs = [config(one, tile, chip) for one, tile in zip((*ups, *downs), chosen, strict=True)]
    return tuple(configs[: len(ups)]), tuple(configs[len(ups) :])


def choices(up: ExpertsProblem, down: ExpertsProblem, chip: Chip) -> Iterator[tuple[EitherConfig, EitherConfig]]:
    """Yield every pair, but for what follows from the number of tokens, that as many tokens or fewer have."""
    for (first,), (second,) in choices_of_sets((up,), (down,), chip):
        yield first, second


def choices_of_sets(ups: Problems, downs: Problems, chip: Chip) -> Iterator[tuple[Configs, Configs]]:
    """Yield every choice of `choose_sets`, but for what follows from the number of tokens, of up to as many tokens."""
    tokens = 0
    while tokens < ups[0].tokens:
        tokens = deciding(tokens + 1)
        yield choose_sets(*(tuple(replace(one, tokens=tokens) for one in sets) for sets in (ups, downs)), chip)


@functools.lru_cache(maxsize=4096)
def _least(ups: Problems, downs: Problems, chip: Chip) -> tuple[Tile, ...]:
    return _least_tiles(_launches(ups, chip), _launches(downs, chip), chip)


def least_pair(
    up: ExpertsProblem, down: ExpertsProblem, ups: Iterable[Tile], downs: Iterable[Tile], chip: Chip
) -> tuple[Tile, Tile]:
    """Return the tiles of as many tokens as each other, one of each product's, of the least predicted time."""
    first, second = _least_tiles([((up,), ups)], [((down,), downs)], chip)
    return first, second


_Launches: TypeAlias = Sequence[tuple[Problems, Iterable[Tile]]]
"""The launches of a product: row sets of each, and the tiles that they may have."""


def _launches(problems: Problems, chip: Chip) -> _Launches:
    if together(problems, chip):
        return [(problems, common_tiles(problems))]
    return [((one,), tiles(one)) for one in problems]


def _least_tiles(ups: _Launches, downs: _Launches, chip: Chip) -> tuple[Tile, ...]:
    """Return the tiles of as many tokens as each other, one of each row set's, of the least predicted time."""
    best: dict[int, list[tuple[float, Tile]]] = {}
    for number, (problems, available) in enumerate((*ups, *downs)):
        first, of_width = number < len(ups), dict[int, tuple[float, Tile]]()
        for tile in available:
            time = launch_seconds(problems, tile, chip, first)
            if first and not experts_sm90.gathers(problems[0], tile):
                time += ORDERING * 1e-6 / len(ups)
            if tile.tokens not in of_width or time < of_width[tile.tokens][0]:
                of_width[tile.tokens] = time, tile
        for width, found in of_width.items():
            best.setdefault(width, []).append(found)
    whole = [found for found in best.values() if len(found) == len(ups) + len(downs)]
    least = min(whole, key=lambda found: sum(time for time, _ in found))
    return tuple(
        tile for (problems, _), (_, tile) in zip((*ups, *downs), least, strict=True) for _ in range(len(problems))
    )


def predicted_seconds(ups: Problems, downs: Problems, chip: Chip) -> float:
    """Predict the time of both products of a layer's experts, all of their row sets, in seconds."""
    chosen = choose_sets(ups, downs, chip)
    total = 0.0
    for first, problems, configs in zip((True, False), (ups, downs), chosen, strict=True):
        if together(problems, chip):
            total += launch_seconds(problems, _tile(configs[0]), chip, first)
        else:
            for problem, own in zip(problems, configs, strict=True):
                if isinstance(own, Sm80ExpertsConfig):
                    total += experts_sm80.seconds(problem, own, chip)
                else:
                    total += seconds(problem, own.tile, chip, first)
        total += ORDERING * 1e-6 * (first and not all(own.gathers for own in configs))
    return total


def _tile(config: EitherConfig) -> Tile:
    assert isinstance(config, ExpertsConfig)
    return config.tile


def launch_seconds(problems: Problems, tile: Tile, chip: Chip, first: bool) -> float:
    """Predict the time of a launch of the sm90 schedule: of one row set, or of several, of which the last one decides.

    Args:
        problems: the row sets.
        tile, chip, first: as for `seconds`.
    """
    if len(problems) == 1:
        return seconds(problems[0], tile, chip, first)
    shared = zip(problems, counts(problems, tile, chip, first), strict=True)
    return max(_microseconds(*one, tile, chip, first) for one in shared) * 1e-6


def seconds(problem: ExpertsProblem, tile: Tile, chip: Chip, first: bool) -> float:
    """Predict the time of a launch of the sm90 schedule whose tokens go to experts at random, in seconds.

    Args:
        problem: one of a layer's two products.
        tile: one of `tiles`.
        chip: where it runs.
        first: whether it is the first of the two, which routes, gathers and gates.
    """
    load = experts_sm90.load(problem, tile, chip, first)
    return experts_sm90.microseconds(load, experts_sm90.CONSTANTS) * 1e-6


def shapes(problem: ExpertsProblem, chip: Chip) -> tuple[EitherConfig, ...]:
    """Return a configuration of every compiled shape that a chip has for a problem; none where it has no kernel."""
    if schedule(chip) == SM90:
        return tuple(config(problem, tile, chip) for tile in tiles(problem))
    return tuple(config for config in experts_sm80.candidates(problem, chip) if config.splits == 1)
