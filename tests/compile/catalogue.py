"""Which kernels do the compile tests build? Few enough to be built in a minute or two, so chosen by pairs.

Every format with every tile, kind of scale and dtype would be some ten thousand kernels. What made ptxas spill, or take
products one after the other, was always two traits that met: a tile and a decode group, many scales and few tokens, and
so on. So the traits of `pairs` meet two by two, each pair in some kernel, and the kernels in which a fault was found
once are all there (`FAULTS`). tests/compile/test_kernels_compile.py reads the pairs back from the kernels' macros.

Elsewhere than on sm_80 its kernels have rings of other depths: of those that differ a few are built. The kernels around
cuBLAS are the same everywhere: sm_80 and sm_90 build half of them each, the others every tenth, all but sm_90 one of
each header, and the others all of attention of two kinds: pages in e4m3, and heads that take most shared memory.
"""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

from compile import around, attended, beside, mixed, mixtures, sparse, tabled
from compile.pairing import GROUP_SIZES, Pair, alike, choose, width

from tersor.formats import SCALE_DTYPES, Activations, Scheme, get, names
from tersor.hardware import CHIPS, Chip
from tersor.kernels import dense, experts, routing
from tersor.kernels.jit import KernelSource
from tersor.kernels.tune import MOST_NORMED, sm80, sm90
from tersor.kernels.tune import experts as tune
from tersor.kernels.tune.problem import FEW_TOKENS, SM90
from tersor.layouts import decode_groups
from tersor.layouts.packing import BYTEWISE, Packing, unsupported_reason
from tersor.ops.gates import Gate

CHIP_OF = {chip.capability: chip for chip in CHIPS.values()}
"""Compute capability -> a chip: rings are as deep as its shared memory allows."""
_HALVES = {(8, 0): (0, 2), (9, 0): (1, 2)}
"""Compute capability -> which half of the kernels around cuBLAS is built for it: the first of them, and a step."""
_SHARE, _LINEAR_SHARE = 10, 4
"""Of those every so many-th is built elsewhere, and of linears that differ from those of sm_80 by their rings alone."""


@dataclass(frozen=True, slots=True)
class Traits:
    """A fused kernel, by what can make ptxas fail.

    Attributes:
        tile: the compiled shape: a tile of the sm90 schedule, or the tokens of one of the sm80 schedule.
        format: name of the element format.
        dtype: of the result, `float16` or `bfloat16`.
        group_size, scale_dtype: of the scales.
        gated: the gate that it ends with (`ops.Gate`), or 0.
        few_tokens: 0 for the batch-invariant mode, in which wgmma multiplies few tokens, too.
        norm: what it has of the norms around it.
    """

    tile: sm90.Tile | int
    format: str
    dtype: str = "float16"
    group_size: int | None = None
    scale_dtype: str = "float16"
    gated: int = 0
    few_tokens: int = FEW_TOKENS
    norm: dense.Norm = dense.Norm.NONE

    @property
    def scheme(self) -> Scheme:
        """What the weight's codes and scales mean."""
        return Scheme(get(self.format), self.group_size, self.scale_dtype)

    @property
    def target(self) -> str:
        """What codes are decoded to."""
        return self.dtype if isinstance(self.tile, int) else BYTEWISE.get(self.tile.activations, self.dtype)

    def exists(self) -> bool:
        """Whether an operator can ask for such a kernel."""
        scheme = self.scheme
        if unsupported_reason(scheme, self.target) or (scheme.has_zero_point and self.scale_dtype == "e8m0"):
            return False
        if isinstance(self.tile, int):
            return True
        return self.tile in sm90.tiles(Packing.of(scheme, self.target).scales_in_block, self.tile.activations)

    def source(self, chip: Chip) -> KernelSource:
        """Return the kernel, with the rings that it has on a chip."""
        packing, tile = Packing.of(self.scheme, self.target), self.tile
        bits, row_bytes = packing.scheme.format.bits, packing.scale_row_bytes
        if isinstance(tile, int):
            depth, _ = sm80.stages(tile, bits, row_bytes, chip)
            shared = depth * sm80.stage_bytes(tile, bits, row_bytes)
            return dense.sm80_source(packing, tile, depth, shared, self.gated)
        slots, shared = tile.slots(bits, row_bytes, chip), tile.shared_bytes(bits, row_bytes, chip)
        if not self.few_tokens and tile.few:
            shared -= tile.exchange_bytes
        return dense.sm90_source(packing, self.dtype, tile, slots, shared, self.gated, self.few_tokens, self.norm)


def pairs(kernel: Traits) -> frozenset[Pair]:
    """Return the pairs of traits that meet in a kernel, of those that have to meet in some kernel."""
    tile, scheme = kernel.tile, kernel.scheme
    like = alike(tile)
    group = decode_groups.decode_group(scheme.format, kernel.target)
    decode = (kernel.target, group.registers, group.finish.name)
    sizes = ("group size", kernel.group_size)
    with_tile = (
        kernel.dtype,
        ("registers", group.registers),
        ("width", "light" if scheme.format.bits < 5 else "middle" if scheme.format.bits < 7 else "heavy"),
        ("zero points", scheme.has_zero_point),
        ("gated", bool(kernel.gated)),
    )
    found: set[Pair] = {(like, trait) for trait in with_tile} | {(tile, "some kernel")}
    found |= {(decode, sizes), (kernel.format, kernel.target)}
    if kernel.group_size is not None:
        found.add((_tokens(tile), ("scale dtype", kernel.scale_dtype)))
    if isinstance(tile, int):  # narrow tiles of the sm80 schedule never had a fault
        found.add((tile, sizes))
        if tile == max(sm80.TILES):
            found.add((_tokens(tile), decode))
    else:  # nor had narrow ones for bytes; the widest take ten times as long as others, and have what FAULTS names
        narrow = tile.bytewise and width(tile) < 128
        found.add((_tokens(tile) if narrow else like, sizes))
        if width(tile) < 256:
            found.add((_tokens(tile), decode))
    return frozenset(found)


def _tokens(tile: sm90.Tile | int) -> object:
    """What stands for all tiles of about as many tokens with the same activations."""
    return ("tokens", tile) if isinstance(tile, int) else ("tokens", width(tile), tile.activations)


FAULTS: dict[str, tuple[Traits, ...]] = {
    "the next kernel told late to start: spills, one tile of 192 rows and fp5": (
        Traits(sm90.Tile(128, 3, 1, 1, 1), "fp6_e3m2"),
        Traits(sm90.Tile(32, 2, 1, 1, 1), "fp5_e2m2"),
        Traits(sm90.Tile(32, 2, 1, 1, 2), "fp5_e2m2", "bfloat16"),
    ),
    "32 tokens, two CTAs of 384 threads, decode groups of 16 registers: one spilled while copying warps kept 40": (
        Traits(sm90.Tile(32, 2, 1, 1, 2), "fp5_e2m2", gated=1),
        Traits(sm90.Tile(32, 2, 1, 1, 2), "fp7_e3m3", "bfloat16"),
    ),
    "scales in groups of 32 and 64 and few tokens: no registers for fragments read once": (
        Traits(sm90.Tile(8, 3, 1, 1, 1), "fp6_e3m2", "float16", 32),
        Traits(sm90.Tile(16, 2, 2, 1, 1), "fp6_e3m2", "bfloat16", 64),
    ),
    "scales in groups of 16 and 16 tokens: all scales of a block loaded at once": (
        Traits(sm90.Tile(16, 3, 1, 1, 1), "fp6_e3m2", "float16", 16),
        Traits(sm90.Tile(16, 1, 4, 1, 1), "fp6_e3m2", "bfloat16", 16),
    ),
    "scales in groups of 64: one decode group at a time, else a register spills": (
        Traits(sm90.Tile(64, 3, 1, 1, 1), "fp6_e3m2", "float16", 64),
        Traits(sm90.Tile(128, 2, 1, 1, 1), "fp6_e3m2", "bfloat16", 64),
    ),
    "scales in groups at 64 tokens and two CTAs a multiprocessor: a block decoded ahead, 72 bytes spilled": (
        Traits(sm90.Tile(64, 1, 1, 1, 2), "fp6_e2m3", "float16", 128),
        Traits(sm90.Tile(128, 1, 1, 1, 2), "fp6_e2m3", "bfloat16", 128),
    ),
    "zero points with scales in groups": (
        Traits(sm90.Tile(128, 2, 1, 1, 1), "uint4", "float16", 128),
        Traits(sm90.Tile(8, 2, 1, 1, 2), "uint4", "bfloat16", 128),
        Traits(sm90.Tile(64, 2, 1, 1, 1), "uint8", "bfloat16", 32),
    ),
    "decode groups of 16 registers from 128 tokens on: products one after the other (C7513)": (
        Traits(sm90.Tile(256, 2, 1, 2, 1), "fp7_e3m3"),
        Traits(sm90.Tile(256, 2, 1, 2, 1), "fp5_e2m2", "bfloat16"),
        Traits(sm90.Tile(256, 2, 1, 2, 1), "int3"),
        Traits(sm90.Tile(128, 3, 1, 1, 1), "int3"),
        Traits(sm90.Tile(128, 2, 1, 1, 1), "fp7_e2m4", "bfloat16", 128),
    ),
    "whole blocks of activations in a slot, 80 or 96 tokens, 192 rows: a register or three spilled": (
        Traits(sm90.Tile(80, 3, 1, 1, 1), "fp5_e2m2", "bfloat16"),
        Traits(sm90.Tile(96, 3, 1, 1, 1), "int3", gated=1),
        Traits(sm90.Tile(96, 3, 1, 1, 1), "fp7_e3m3"),
    ),
    "codes of 8 bits at 64 tokens, two CTAs of 384 threads: spills": (
        Traits(sm90.Tile(64, 1, 1, 1, 2), "int8"),
        Traits(sm90.Tile(64, 1, 1, 1, 2), "fp8_e5m2"),
        Traits(sm90.Tile(64, 1, 1, 1, 2), "fp8_e4m3", "bfloat16"),
        Traits(sm90.Tile(256, 2, 1, 2, 1), "uint8", "bfloat16", gated=1),
        Traits(sm90.Tile(256, 2, 1, 2, 1), "fp8_e5m2"),
    ),
    "8-bit activations, the widest tile: two decode buffers and an odd block more spilled for fp4": (
        Traits(sm90.Tile(256, 2, 1, 1, 1, Activations.E4M3), "fp4_e2m1"),
        Traits(sm90.Tile(256, 2, 1, 1, 1, Activations.E4M3), "fp6_e3m2", "bfloat16"),
    ),
    "8-bit activations with scales in groups: sums set to zero made products wait for each other (C7515)": (
        Traits(sm90.Tile(128, 2, 1, 1, 1, Activations.E4M3), "fp6_e3m2", "float16", 128),
        Traits(sm90.Tile(112, 1, 1, 1, 2, Activations.E4M3), "fp5_e2m2", "float16", 32),
    ),
    "registers not given from warps that copy to those that multiply: products one after the other (C7512)": (
        Traits(sm90.Tile(128, 2, 1, 1, 1), "fp6_e3m2", "bfloat16"),
        Traits(sm90.Tile(256, 2, 1, 2, 1), "fp6_e3m2"),
    ),
    "many scales and many tokens in the sm80 schedule: loads taken ahead": (
        Traits(64, "fp6_e3m2", "float16", 16),
        Traits(64, "fp5_e2m2", "bfloat16", 32),
        Traits(32, "int4", "float16", 16),
    ),
    "batch-invariant: few tokens through wgmma": tuple(
        Traits(sm90.Tile(tokens, 2, 1, 1, 2), "fp6_e3m2", "float16", group_size, gated=int(gated), few_tokens=0)
        for tokens, group_size, gated in ((8, None, False), (8, 128, True), (16, None, True), (16, 128, False))
    ),
}
"""What went wrong once (docs/log) -> the kernels that showed it, or would."""


def candidates(tile: sm90.Tile | int) -> Iterator[Traits]:
    """Yield kernels of a tile in their usual mode: all but dtypes of scales and gates, which come by turns."""
    dtypes, scale_dtypes = decode_groups.PAIR_TARGETS, tuple(SCALE_DTYPES)
    for (i, name), (j, dtype), (k, size), gated in itertools.product(
        *map(list, map(enumerate, (names(), dtypes, GROUP_SIZES))), (False, True)
    ):
        scale_dtype = scale_dtypes[(i + j + k) % len(scale_dtypes)] if size else "float16"
        gate = 1 + (i + j + k) % len(Gate) if gated else 0
        kernel = Traits(tile, name, dtype, size, scale_dtype, gate)
        if kernel.exists():
            yield kernel


@functools.cache
def fused() -> tuple[Traits, ...]:
    """Return the kernels in which all pairs meet: those with a fault, then one at a time what has most new pairs."""
    chosen = list(itertools.chain.from_iterable(FAULTS.values()))
    met = set[Pair]().union(*map(pairs, chosen))
    tiles = (*sm90.tiles(0), *sm90.tiles(0, Activations.E4M3), *sm80.TILES)
    options: dict[sm90.Tile | int, dict[Traits, frozenset[Pair]]] = defaultdict(dict)
    for tile in tiles:
        options[alike(tile)].update((kernel, pairs(kernel)) for kernel in candidates(tile))
    wanted = {like: set[Pair]().union(*kernels.values()) for like, kernels in options.items()}
    for like, kernels in options.items():  # what alike tiles meet by themselves comes first: most of the rest is met so
        own = (like, *(tile for tile in tiles if alike(tile) == like))
        chosen += choose(kernels, {pair for pair in wanted[like] if pair[0] in own}, met)
    for like, kernels in options.items():
        chosen += choose(kernels, wanted[like], met)
    return tuple(dict.fromkeys(chosen))


def _whole(tokens: int, row_groups: int, resident: int, groups: bool = False) -> sm90.Tile:
    return sm90.Tile(tokens, row_groups, 1, 1, resident, Activations.INT8_GROUPS if groups else Activations.INT8)


WHOLE = (
    Traits(_whole(16, 1, 2), "int8", "bfloat16"),
    Traits(_whole(32, 2, 1), "uint6", "float16", 64, gated=1),
    Traits(_whole(64, 1, 2), "uint4", "bfloat16", 128),
    Traits(_whole(112, 1, 2), "int7", "float16", gated=2),
    Traits(_whole(128, 2, 1), "int8", "float16"),
    Traits(_whole(128, 2, 1), "uint5", "bfloat16", 32, gated=3),
    Traits(_whole(144, 3, 1), "uint7", "float16", gated=4),
    Traits(_whole(256, 2, 1), "uint3", "bfloat16"),
    Traits(_whole(256, 2, 1), "int4", "float16"),
    Traits(_whole(16, 1, 2, True), "uint4", "float16", 128, gated=1),
    Traits(_whole(64, 1, 2, True), "uint7", "bfloat16", 32),
    Traits(_whole(128, 2, 1, True), "int8", "bfloat16"),
    Traits(_whole(160, 2, 1), "uint6", "bfloat16", 256, gated=3),
    Traits(_whole(256, 2, 1), "uint4", "float16", 128),
    Traits(_whole(256, 2, 1), "int8", "bfloat16", 128, gated=4),
    Traits(_whole(256, 2, 1, True), "uint4", "float16", 128, gated=2),
    Traits(_whole(256, 2, 1, True), "int8", "bfloat16"),
)
"""Kernels with int8 activations: they have the tiles of those with e4m3, so few meet what is new, decoders and sums."""


def all_sources(capability: tuple[int, int]) -> list[KernelSource]:
    """Return the kernels that are built for a compute capability, each once."""
    chip = CHIP_OF[capability]
    few = [kernel for kernel in fused() if isinstance(kernel.tile, int)]
    if capability == (8, 0):
        found = [kernel.source(chip) for kernel in few]
    else:
        usual = CHIP_OF[8, 0]
        found = [kernel.source(chip) for kernel in few if kernel.source(chip) != kernel.source(usual)]
        found = found[:: _SHARE if capability == (9, 0) else _LINEAR_SHARE]
    if capability == (9, 0):
        found += [kernel.source(chip) for kernel in fused() if not isinstance(kernel.tile, int)]
        found += [*(kernel.source(chip) for kernel in WHOLE), *around.quantizing()]
        found += mixtures.all_sources(chip)
        found += [*mixed.all_sources(chip), *sparse.all_sources(chip)]
        found += [*(kernel.source(chip) for kernel in normed()), *beside.all_sources(chip)]
    found += tabled.all_sources(chip)
    families = (_dequantizing(), _epilogues(), _routing(), attended.sources(chip, attended.HEADS))
    families += (around.products(), around.calibrating(), sparse.stored())
    found += attended.sources(chip, attended.USUAL_HEADS if capability in _HALVES else attended.LARGEST_HEADS)
    first, step = _HALVES.get(capability, (0, _SHARE))
    for family in families:
        of_headers = {} if capability == (9, 0) else {source.header: source for source in reversed(family)}
        found += [*of_headers.values(), *family[first::step]]
    return list(dict.fromkeys((*found, *_older_experts(capability))))


def normed() -> Iterator[Traits]:
    """Yield kernels with norms in them: every tile with one ahead and one behind, formats and dtypes by turns."""
    formats = itertools.cycle(
        (("fp6_e3m2", None), ("int4", 128), ("fp4_e2m1", None), ("fp5_e2m2", None), ("uint4", 64))
    )
    dtypes, gates = itertools.cycle(decode_groups.PAIR_TARGETS), itertools.cycle((True, True, False))
    for tile in sm90.tiles(0):
        if tile.tokens > MOST_NORMED:
            continue
        for norm in (dense.Norm.OUT, dense.Norm.IN):
            (name, size), dtype = next(formats), next(dtypes)
            gated = norm is dense.Norm.IN and next(gates)
            kernel = Traits(tile, name, dtype, size, gated=gated, norm=norm)
            yield kernel if kernel.exists() else replace(kernel, group_size=None)
        next(dtypes)


def _dequantizing() -> list[KernelSource]:
    """Return kernels that decode for cuBLAS: every format, with dtypes and group sizes by turns."""
    sizes, dtypes, found = itertools.cycle(GROUP_SIZES), decode_groups.PAIR_TARGETS, []
    for turn, name in enumerate(names()):
        scheme = Scheme(get(name), next(sizes))
        known = [dtype for dtype in dtypes if not unsupported_reason(scheme, dtype)]
        found += [dense.dequantize_source(Packing.of(scheme, dtype)) for dtype in known[turn % 2 :][:1] or known[:1]]
    return found


def _routing() -> list[KernelSource]:
    """Return kernels around products of experts: the most registers, every kind of score and choice, every dtype."""
    most = {"experts": routing.MOST_EXPERTS, "top_k": routing.MOST_TOP_K}
    deepseek = {"experts": 256, "top_k": 8, "groups": 8, "top_groups": 4}
    choices = [
        (routing.Choice(**most, biased=True), "float32"),
        (routing.Choice(**most, biased=True, sigmoid=True, groups=32, top_groups=8), "float32"),
        (routing.Choice(**most), "bfloat16"),
        (routing.Choice(**most, normalize=False), "float16"),
        (routing.Choice(experts=320, top_k=16, sigmoid=True, groups=32, top_groups=8), "float16"),  # 48 registers, once
        (routing.Choice(**deepseek, sigmoid=True, biased=True), "float32"),
        (routing.Choice(**deepseek, normalize=False), "float16"),
        (routing.Choice(experts=128, top_k=8), "bfloat16"),
        (routing.Choice(experts=1, top_k=1, sigmoid=True, normalize=False), "bfloat16"),
    ]
    tables = [routing.tables_source(routing.MOST_EXPERTS, index) for index in ("int32", "int64")]
    combining = [routing.combine_source(dtype) for dtype in decode_groups.PAIR_TARGETS]
    return [*(routing.route_source(*one) for one in choices), *tables, *combining, *routers(), *mixtures.deciders()]


def routers() -> list[KernelSource]:
    """Return kernels of routers' logits: the most registers of each kind, and one token, every dtype by turns."""
    kinds = [
        ("bfloat16", False, False, 7168),
        ("float16", True, True, 7168),
        ("float16", False, True, 2048),
        ("bfloat16", True, True, routing.MOST_ROUTER_CHANNELS),
    ]
    made = [routing.Router(target=name, float_weight=held, float_out=out, channels=h) for name, held, out, h in kinds]
    return [routing.router_source(router, tokens) for router in made for tokens in (routing.ROUTER_TOKENS, 1)]


def _epilogues() -> list[KernelSource]:
    """Return all kernels that end a product of cuBLAS."""
    kinds = itertools.product((("fp6_e3m2", None), ("uint4", None), ("fp6_e3m2", 128)), decode_groups.PAIR_TARGETS)
    packings = [Packing.of(Scheme(get(name), size), dtype) for (name, size), dtype in kinds]
    return [dense.epilogue_source(packing, gated) for gated in (False, True) for packing in packings]


_OLDER_EXPERTS = (
    *((8, "fp6_e3m2", "float16", None, 1), (8, "uint4", "bfloat16", 128, 0), (16, "int4", "float16", 64, 2)),
    *((16, "fp5_e2m2", "bfloat16", None, 0), (32, "uint8", "float16", None, 3), (32, "fp4_e2m1", "bfloat16", 32, 0)),
    *((64, "fp6_e3m2", "float16", 16, 4), (64, "fp5_e2m2", "bfloat16", 32, 0)),
)
"""Tokens of a tile, format, dtype, group size and gate: what the sm80 schedule's kernel of experts is built with."""


def _older_experts(capability: tuple[int, int]) -> list[KernelSource]:
    """Return kernels of experts of the sm80 schedule; those of newer chips have rings of other depths, two each."""
    if tune.schedule(CHIP_OF[capability]) == SM90:
        return []
    found = []
    for tokens, name, dtype, size, gate in _OLDER_EXPERTS if capability == (8, 0) else _OLDER_EXPERTS[::6]:
        packing = Packing.of(Scheme(get(name), size), dtype)
        problem = tune.ExpertsProblem.of(packing, (1, 128, 128), 1, 1)
        shapes = tune.shapes(problem, CHIP_OF[capability])
        chosen = next(config for config in shapes if config.block_tokens == tokens)
        found.append(experts.source(packing, dtype, chosen, gate, False))
    return found
