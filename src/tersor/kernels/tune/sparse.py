"""Which tile multiplies a pruned weight, how its sums are split, and when it is decoded for cuBLAS instead.

Times are predicted from what is counted, bytes, instructions and accesses of shared memory, by a few constants that a
measurement refits (`SparseCosts`). How a tile's channels are split is a property of the weight in memory, whose queues
begin anew in every run (`layouts.sparse_tiles`): `runs` chooses that for the chip and the shape alone. So does `choose`
choose a tile, whatever the density: every tile reads the same bytes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from tersor.hardware import Chip
from tersor.layouts.blocks import BLOCK_IC, UNIT_OC, ic_blocks

TOKENS = (8, 16, 32, 64, 128, 256)
"""Tokens of tiles; one that has fewer takes a product of all tokens, others several of them in turn."""
SHAPES = ((2, 1, 128), (3, 1, 64), (4, 1, 64), (2, 2, 64), (1, 4, 64))
"""Row groups, CTAs of a multiprocessor, layers of a ring: of tiles of up to 64 tokens."""
MANY_SHAPES = ((2, 1, 64),)
"""The same of more tokens."""

_LAYER_BYTES = 512
_MIRRORED = 2
_MASK_BYTES = 1024
_STORE_BYTES = 8192
_STATIC_BYTES = 1024
_TURNED_BYTES = 9216
_RESERVED = 1024
_MOST_SLOTS = 12
_MOST_X_SLOTS = 8
_LEAST_SLOTS = 4
_MOST_RUNS = 16
_FEW = 64
"""Tokens up to which a slot of activations has a whole block, and results need no room."""
_FLOPS_OF_CLOCK = 4096
"""Of a multiprocessor's tensor cores, on 16-bit floats."""
_COUNTED = 1024
"""Weights of which instructions and clocks are counted: a warp's of half a block."""
_UNIT_COUNTS = UNIT_OC * BLOCK_IC // _COUNTED
_USUAL_BITS = 5.2
"""Of a weight in memory: what runs are chosen for."""
_USUAL_TOKENS = 16
_SCRATCH_BYTES = 64 << 20
"""Decoded weights held at a time for a product by cuBLAS."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseCosts:
    """What the times of kernels of pruned weights are predicted from; counts are of 1,024 weights.

    Attributes:
        start: seconds of a launch before and behind its loads.
        memory: part of the datasheet's bandwidth that all multiprocessors reach together.
        share: what one can take of that, in even shares.
        issue: instructions that a multiprocessor starts in a clock.
        latency: clocks that a warp takes which has a scheduler for itself.
        shared: clocks of shared memory, of values of 8 and of 16 bits; each token adds a quarter.
        tensor: part of the tensor cores' peak that wgmma reaches.
        l2: bytes of activations in a clock of a multiprocessor.
        run: part of its bytes that a weight has more with every run.
        exchange: seconds that sums of several runs take, and for each byte of them.
        cublas: part of the tensor cores' peak that cuBLAS reaches.
        decompress: part of the bandwidth that the kernel reaches which decodes for it.
    """

    start: float = 3.0e-6
    memory: float = 0.9
    share: float = 1.3
    issue: float = 2.8
    latency: float = 420.0
    shared: tuple[float, float] = (27.0, 39.0)
    tensor: float = 0.76
    l2: float = 40.0
    run: float = 0.01
    exchange: tuple[float, float] = (1.5e-6, 5e-13)
    cublas: float = 0.72
    decompress: float = 0.8


COSTS = SparseCosts()
"""Counted for an H200, and not yet fitted to times."""


@dataclass(frozen=True, slots=True)
class SparseTile:
    """A compiled shape of the kernel (sm90_sparse.cuh).

    Attributes:
        tokens: of a tile.
        row_groups: warpgroups that multiply, each 64 output rows.
        resident: CTAs that fit on a multiprocessor.
        layers: of values in the ring of a row group, a power of two from 64 on.
        masks, x_slots: slots of masks and of activations.
        gathers: the most runs that a cluster may add.
        gather_room: parts of sums that have room of their own for that.
    """

    tokens: int
    row_groups: int
    resident: int
    layers: int
    masks: int
    x_slots: int
    gathers: int = 1
    gather_room: int = 0

    def __str__(self) -> str:
        gathers = f"g{self.gathers}" if self.gathers > 1 else ""
        return f"{self.rows}x{self.tokens}r{self.resident}l{self.layers}s{self.masks}x{self.x_slots}{gathers}"

    @property
    def rows(self) -> int:
        """Output rows."""
        return UNIT_OC * self.row_groups

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return 128 * (self.row_groups + 1)

    @property
    def part_bytes(self) -> int:
        """Bytes of a tile's sums."""
        return 4 * self.rows * self.tokens

    @property
    def x_bytes(self) -> int:
        """Bytes of a slot of activations: a block's, or half a block's."""
        return _x_bytes(self.tokens)

    @property
    def slot_bytes(self) -> int:
        """Shared memory without the rings of values."""
        slots = self.x_slots * self.x_bytes + self.masks * self.row_groups * _MASK_BYTES
        return slots + _store_bytes(self.tokens, self.row_groups) + self.gather_room * self.part_bytes

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a CTA."""
        return self.slot_bytes + self.row_groups * (self.layers + _MIRRORED) * _LAYER_BYTES

    def token_tiles(self, n: int) -> int:
        """Return the tiles that n tokens make."""
        return -(-n // self.tokens)

    def share(self, n: int) -> int:
        """Return the tokens of a tile where n tokens are dealt out evenly: the last one may have fewer."""
        return -(-n // self.token_tiles(n))


@dataclass(frozen=True, slots=True)
class SparseConfig:
    """How the kernel runs a problem.

    Attributes:
        tile: the compiled shape.
        runs: of the weight's layout.
        splits: CTAs that a tile's runs are dealt out to: one for each, or one for all.
        gathered: whether these are one cluster, which adds their sums in shared memory.
        ctas: CTAs launched.
    """

    tile: SparseTile
    runs: int
    splits: int
    gathered: bool
    ctas: int

    def __str__(self) -> str:
        return f"{self.tile}, {self.splits} splits of {self.runs} runs, {self.ctas} CTAs"

    def floats(self, oc: int, n: int = 1) -> tuple[int, int]:
        """Return the float32 sums and the counters that splits exchange through memory; zero where none do."""
        if self.splits == 1 or self.gathered:
            return 0, 0
        tiles = -(-oc // self.tile.rows) * self.tile.token_tiles(n)
        return tiles * self.splits * self.tile.rows * self.tile.tokens, tiles


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseProblem:
    """One product y[N, OC] = x[N, IC] @ W^T with a pruned W in kernel tiles.

    Attributes:
        oc, ic, n: sizes; n is at least 1.
        bits: of a value in queues, 8 or 16.
        instructions: of a warp for 1,024 weights (`SparsePacking.instructions`).
        runs: of the layout.
        nbytes: of the weight in memory.
        batch_invariant: whether a row of y must not depend on how many other rows there are.
    """

    oc: int
    ic: int
    n: int
    bits: int
    instructions: int
    runs: int
    nbytes: int
    batch_invariant: bool = False


def tile_for(
    tokens: int, chip: Chip, *, row_groups: int = 2, resident: int = 1, layers: int = 128
) -> SparseTile:
    """Return a tile with as many slots as its shared memory has room for.

    Raises:
        ValueError: shared memory has not room for four slots of each kind.
    """
    room = _room(chip, row_groups, resident, layers) - _STATIC_BYTES - _store_bytes(tokens, row_groups)
    mask_bytes = row_groups * _MASK_BYTES
    if tokens <= _FEW:
        masks = x_slots = min(_MOST_SLOTS, room // (_x_bytes(tokens) + mask_bytes))
    else:
        x_slots = min(_MOST_X_SLOTS, (room - _LEAST_SLOTS * mask_bytes) // _x_bytes(tokens)) // 2 * 2
        masks = min(_MOST_SLOTS, (room - x_slots * _x_bytes(tokens)) // mask_bytes)
    if min(masks, x_slots) < _LEAST_SLOTS:
        raise ValueError(f"tiles of {64 * row_groups} rows and {tokens} tokens have no room for {layers} layers")
    return SparseTile(tokens, row_groups, resident, layers, masks, x_slots)


@functools.cache
def decompress_tile(chip: Chip) -> SparseTile:
    """Return the tile of the kernel that decodes for cuBLAS (sm90_decompress.cuh)."""
    row_groups, resident, layers = 1, 4, 64
    room = _room(chip, row_groups, resident, layers) - _STATIC_BYTES - _TURNED_BYTES - _x_bytes(TOKENS[0])
    return SparseTile(TOKENS[0], row_groups, resident, layers, min(_MOST_SLOTS, room // _MASK_BYTES), 1)


@functools.cache
def tiles(tokens: int, bits: int, chip: Chip) -> tuple[SparseTile, ...]:
    """Return the tiles of so many tokens that shared memory has room for, for values of so many bits."""
    found = []
    for row_groups, resident, layers in SHAPES if tokens <= _FEW else MANY_SHAPES:
        if bits == 16 and layers < 128 and resident * row_groups < 4 and tokens <= _FEW:
            continue
        try:
            found.append(tile_for(tokens, chip, row_groups=row_groups, resident=resident, layers=layers))
        except ValueError:
            continue
    return tuple(found)


def config(tile: SparseTile, oc: int, runs: int, chip: Chip, n: int = 1, splits: int | None = None) -> SparseConfig:
    """Return how a tile runs n tokens with a weight of so many output channels and runs; `splits`: 1 or, by default, all."""
    splits = splits or runs
    count = -(-oc // tile.rows) * tile.token_tiles(n)
    gathered = 1 < splits <= tile.gathers and count * splits <= chip.sms * tile.resident
    items = count * splits
    return SparseConfig(tile, runs, splits, gathered, items if gathered else min(items, chip.sms * tile.resident))


def candidates(problem: SparseProblem, chip: Chip) -> Iterator[SparseConfig]:
    """Yield how the kernel may run a problem: up to 64 tokens with a tile of all of them.

    Batch-invariant it is one tile for every number of tokens.
    """
    if problem.batch_invariant:
        widths: tuple[int, ...] = (_FEW,)
    elif problem.n <= _FEW:
        widths = (next(tokens for tokens in TOKENS if problem.n <= tokens),)
    else:
        widths = tuple(tokens for tokens in TOKENS if tokens >= _FEW)
    for tokens in widths:
        for tile in tiles(tokens, problem.bits, chip):
            for splits in sorted({problem.runs, 1}, reverse=True):
                yield config(tile, problem.oc, problem.runs, chip, problem.n, splits)


def choose(problem: SparseProblem, chip: Chip) -> SparseConfig:
    """Return the configuration that is predicted to compute soonest; of batch-invariant ones the first."""
    if problem.batch_invariant:
        return next(candidates(problem, chip))
    return min(candidates(problem, chip), key=lambda found: compute_seconds(problem, found, chip))


def fused(problem: SparseProblem, chip: Chip) -> bool:
    """Tell whether a product is predicted to take no longer in the kernel than decoded for cuBLAS."""
    if problem.batch_invariant or problem.n <= _FEW:
        return True
    return seconds(problem, choose(problem, chip), chip) <= decompress_seconds(problem, chip)


def seconds(problem: SparseProblem, config: SparseConfig, chip: Chip, costs: SparseCosts = COSTS) -> float:
    """Return the predicted time of a launch."""
    busiest = _busiest(problem, config, chip) / _units(problem, config)
    share = max(1.0, busiest * chip.sms / costs.share)
    moved = problem.nbytes * share + 2 * problem.n * (problem.oc + problem.ic)
    return max(moved / (chip.bandwidth * costs.memory) + costs.start, compute_seconds(problem, config, chip, costs))


def compute_seconds(problem: SparseProblem, config: SparseConfig, chip: Chip, costs: SparseCosts = COSTS) -> float:
    """Return the time that a launch takes where memory is no bound: by instructions, units and exchanges."""
    tile = config.tile
    active = min(tile.resident, -(-config.ctas // chip.sms))
    counted = tile.row_groups * _UNIT_COUNTS
    clocks = max(
        (problem.instructions + tile.tokens / 8) / costs.issue,
        costs.latency / (4 * tile.row_groups * active),
        costs.shared[problem.bits == 16] + tile.tokens / 4,
        2 * _COUNTED * tile.tokens / _FLOPS_OF_CLOCK / costs.tensor,
        2 * BLOCK_IC * min(tile.tokens, problem.n) / counted / costs.l2,
    )
    total = costs.start + _busiest(problem, config, chip) * _UNIT_COUNTS * clocks / clock(chip)
    if config.splits > 1:
        own = tile.part_bytes * config.splits * -(-problem.oc // tile.rows) * tile.token_tiles(problem.n)
        total += costs.exchange[0] + own * costs.exchange[1]
    return total


def cublas_seconds(oc: int, ic: int, n: int, chip: Chip, costs: SparseCosts = COSTS) -> float:
    """Return the predicted time of cuBLAS with a dense weight of 16 bits."""
    return costs.start + max(
        2 * oc * ic / (chip.bandwidth * costs.memory), 2 * oc * ic * n / (chip.fp16_ops * costs.cublas)
    )


def decompress_seconds(problem: SparseProblem, chip: Chip, costs: SparseCosts = COSTS) -> float:
    """Return the predicted time of a product that decodes a slice at a time for cuBLAS."""
    oc, ic = problem.oc, problem.ic
    slices = -(-oc // slice_rows(oc, ic, problem.runs, chip))
    moved = problem.nbytes + 2 * oc * ic
    decoding = slices * 2 * costs.start + moved / (chip.bandwidth * costs.decompress)
    return decoding + cublas_seconds(oc, ic, problem.n, chip, costs)


def slice_rows(oc: int, ic: int, runs: int, chip: Chip) -> int:
    """Return the rows that are decoded at a time: whole units, whose runs fill multiprocessors evenly where they can."""
    most = max(1, min(-(-oc // UNIT_OC), _SCRATCH_BYTES // (2 * ic * UNIT_OC)))
    waves = most * runs // chip.sms
    return UNIT_OC * (most if waves == 0 else waves * chip.sms // runs)


@functools.cache
def runs(oc: int, ic: int, bits: int, chip: Chip) -> int:
    """Return into how many runs the channels of a weight [oc, ic] with values of so many bits are cut for a chip.

    As many as are predicted to take least for few tokens: CTAs are to be even, each run costs the exchange of a tile's
    sums and its queues' unequal ends.
    """
    best, least = 1, math.inf
    for count in range(1, min(_MOST_RUNS, ic_blocks(ic)) + 1):
        usual = _USUAL_BITS * bits / 64 * oc * ic * (1 + COSTS.run * (count - 1))
        problem = SparseProblem(
            oc=oc, ic=ic, n=_USUAL_TOKENS, bits=bits, instructions=126, runs=count, nbytes=round(usual)
        )
        time = seconds(problem, choose(problem, chip), chip)
        if time < least:
            best, least = count, time
    return best


def clock(chip: Chip) -> float:
    """Return the clocks per second that a chip's peak is stated for."""
    return chip.fp16_ops / chip.sms / _FLOPS_OF_CLOCK


def asked(problem: SparseProblem, chip: Chip) -> set[SparseTile]:
    """Return the tiles that `choose` takes for any number of tokens up to `problem.n`, whatever `fused` says."""
    found, n = set(), problem.n
    counts = [count for count in range(1, min(n, 2 * TOKENS[-1]) + 1)]
    while n > 2 * TOKENS[-1]:  # whatever larger ones take is taken by these, too, but for waves of CTAs
        counts.append(n)
        n = n * 3 // 4
    for count in counts:
        found.add(choose(_of_tokens(problem, count), chip).tile)
    return found


def _of_tokens(problem: SparseProblem, n: int) -> SparseProblem:
    return SparseProblem(
        oc=problem.oc, ic=problem.ic, n=n, bits=problem.bits, instructions=problem.instructions, runs=problem.runs,
        nbytes=problem.nbytes, batch_invariant=problem.batch_invariant,
    )  # fmt: skip


def _units(problem: SparseProblem, config: SparseConfig) -> int:
    """Return the blocks of 64 rows by 128 channels that all token tiles have, and the rows of tiles behind the last."""
    rows = -(-problem.oc // config.tile.rows) * config.tile.row_groups
    return rows * ic_blocks(problem.ic) * config.tile.token_tiles(problem.n)


def _busiest(problem: SparseProblem, config: SparseConfig, chip: Chip) -> int:
    """Return how many of these the multiprocessor has that has most."""
    tile = config.tile
    items = -(-problem.oc // tile.rows) * tile.token_tiles(problem.n) * config.splits
    rounds = -(-items // config.ctas)
    return rounds * -(-config.ctas // chip.sms) * -(-ic_blocks(problem.ic) // config.splits) * tile.row_groups


def _room(chip: Chip, row_groups: int, resident: int, layers: int) -> int:
    """Return the shared memory that a CTA has beside the rings of values."""
    return (chip.shared_bytes + _RESERVED) // resident - _RESERVED - row_groups * (layers + _MIRRORED) * _LAYER_BYTES


def _x_bytes(tokens: int) -> int:
    return tokens * (256 if tokens <= _FEW else 128)


def _store_bytes(tokens: int, row_groups: int) -> int:
    return 0 if tokens <= _FEW else row_groups * _STORE_BYTES
