"""Which kernels of experts do the compile tests build? As in `catalogue`, few: their traits meet two by two.

They multiply with the code of dense kernels, in which formats and scales meet tiles; here every tile meets the parts
that are of experts alone: which product of a layer it is, how its gate and up become one, how activations get there.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from compile.pairing import GROUP_SIZES, Pair, alike, choose, width

from tersor.formats import SCALE_DTYPES, Activations, Scheme, get, names
from tersor.hardware import Chip
from tersor.kernels import deciding, experts, routing
from tersor.kernels.jit import KernelSource
from tersor.kernels.tune import experts as tune
from tersor.kernels.tune import sm90
from tersor.layouts import decode_groups
from tersor.layouts.packing import BYTEWISE, Packing, unsupported_reason

GATES = (1, 2, 3, 4)
"""EPILOGUE of common/gate.cuh; the second product of a layer has none."""


@dataclass(frozen=True, slots=True)
class Traits:
    """A kernel of experts, by what can make ptxas fail.

    Attributes:
        tile: the compiled shape.
        format: name of the element format.
        dtype: of the result, `float16` or `bfloat16`.
        gate: how gate and up become one, or 0 in the second product.
        group_size, scale_dtype: of the scales.
        batch_invariant: whether wgmma multiplies few tokens, too.
    """

    tile: sm90.Tile
    format: str
    dtype: str = "float16"
    gate: int = 0
    group_size: int | None = None
    scale_dtype: str = "float16"
    batch_invariant: bool = False

    @property
    def target(self) -> str:
        """What codes are decoded to."""
        return BYTEWISE.get(self.tile.activations, self.dtype)

    @property
    def scheme(self) -> Scheme:
        """What the weights' codes and scales mean."""
        return Scheme(get(self.format), self.group_size, self.scale_dtype)

    @property
    def problem(self) -> tune.ExpertsProblem:
        """A problem that has these traits."""
        packing, kind = Packing.of(self.scheme, self.target), self.tile.activations
        return tune.ExpertsProblem.of(packing, (1, 128, 128), 1, 1, kind, self.batch_invariant)

    def exists(self) -> bool:
        """Whether an operator can ask for such a kernel, and it is another than in the usual mode."""
        scheme = self.scheme
        if unsupported_reason(scheme, self.target) or (scheme.has_zero_point and self.scale_dtype == "e8m0"):
            return False
        return (self.tile.few or not self.batch_invariant) and self.tile in tune.tiles(self.problem)

    def source(self, chip: Chip) -> KernelSource:
        """Return the kernel, with the rings that it has on a chip."""
        ready = self.gate == 0 and not self.tile.bytewise
        config = tune.config(self.problem, self.tile, chip)
        return experts.source(Packing.of(self.scheme, self.target), self.dtype, config, self.gate, ready)


def pairs(kernel: Traits) -> frozenset[Pair]:
    """Return the pairs of traits that meet in a kernel, of those that have to meet in some kernel."""
    tile, scheme, kind = kernel.tile, kernel.scheme, kernel.tile.activations
    product = "first" if kernel.gate else "second"
    registers = decode_groups.decode_group(scheme.format, kernel.target).registers
    few = ("few", kind) if tile.few else ("many", kind)
    return frozenset(
        {
            (alike(tile), "some kernel"),
            (kernel.format, "some kernel"),
            (("tokens", width(tile), kind), product),
            (("group size", kernel.group_size, kind), product),
            (("group size", kernel.group_size), few),
            (("registers", registers, kernel.target), product),
            (("zero points", scheme.has_zero_point), few),
            (("gate", kernel.gate, kind), few),
            (("gate", kernel.gate), kernel.dtype),
            (("batch-invariant", kernel.batch_invariant, kernel.tile.tokens if kernel.batch_invariant else 0), product),
        }
    )


def candidates(tile: sm90.Tile) -> Iterator[Traits]:
    """Yield kernels of a tile: formats, dtypes, group sizes and modes all, the other traits by turns."""
    scale_dtypes = tuple(SCALE_DTYPES)
    modes = itertools.product(names(), decode_groups.PAIR_TARGETS, GROUP_SIZES, (False, True), (False, True))
    for turn, (name, dtype, size, batch_invariant, first) in enumerate(modes):
        scale_dtype = scale_dtypes[turn // 4 % len(scale_dtypes)] if size else "float16"
        gate = GATES[(turn // 4 + turn // 40 + batch_invariant) % len(GATES)] if first else 0
        kernel = Traits(tile, name, dtype, gate, size, scale_dtype, batch_invariant)
        if kernel.exists():
            yield kernel


FAULTS: dict[str, tuple[Traits, ...]] = {
    "two scales of a row in a block, 32 tokens in turns of four warpgroups: spills; what is left of that tile": (
        Traits(sm90.Tile(32, 1, 4, 1, 1), "int7", "float16", 0, 128),
        Traits(sm90.Tile(32, 1, 4, 1, 1), "int7", "bfloat16", 1, 128),
    ),
}
"""What went wrong once (docs/log) -> the kernels that showed it, or would."""


@functools.cache
def chosen() -> tuple[Traits, ...]:
    """Return the kernels in which all pairs meet: those with a fault, then one at a time what has most new pairs."""
    found = list(itertools.chain.from_iterable(FAULTS.values()))
    met = set[Pair]().union(*map(pairs, found))
    every = (*sm90.tiles(0), *sm90.tiles(0, Activations.E4M3))
    options = {kernel: pairs(kernel) for tile in every for kernel in candidates(tile)}
    return (*found, *choose(options, set[Pair]().union(*options.values()), met))


def deciders() -> list[KernelSource]:
    """Return kernels around experts of few tokens: the most registers of each kind, and one token, dtypes by turns."""
    deepseek = routing.Choice(experts=256, top_k=8, sigmoid=True, biased=True, groups=8, top_groups=4)
    most = routing.Choice(experts=256, top_k=16, biased=True)
    kinds = [
        ("bfloat16", True, True, 4096, routing.Choice(experts=256, top_k=16, normalize=False), True),
        ("float16", False, False, 4096, routing.Choice(experts=128, top_k=8), True),
        ("bfloat16", False, False, 2048, routing.Choice(experts=128, top_k=8), True),
        ("float16", True, True, 7168, deepseek, False),
        ("bfloat16", False, True, deciding.MOST_CHANNELS, most, False),
    ]
    found = []
    for turn, (target, held, wide, channels, choice, norms) in enumerate(kinds):
        router = routing.Router(target=target, float_weight=held, float_out=wide, channels=channels)
        decider = deciding.Decider(router=router, choice=choice, norms=norms)
        found += [deciding.source(decider, tokens) for tokens in (deciding.MOST_TOKENS, turn + 1)]
    sizes = (4096, deciding.MOST_SUMMED_CHANNELS)
    found += [deciding.combine_source(target, size) for target in decode_groups.PAIR_TARGETS for size in sizes]
    return found


def all_sources(chip: Chip) -> list[KernelSource]:
    """Return the kernels of experts that are built, for a chip of compute capability 9.0."""
    return [*(kernel.source(chip) for kernel in chosen()), experts.gather_source()]
