"""Which kernels do the compile tests build?"""

from __future__ import annotations

from collections.abc import Iterator

from tersor.formats import Scheme, get, get_scheme, names
from tersor.hardware import CHIPS
from tersor.kernels import dense
from tersor.kernels.jit import KernelSource
from tersor.kernels.tune import sm80, sm90
from tersor.layouts import decode_groups
from tersor.layouts.packing import Packing, scales_in_block, unsupported_reason

COMPILED_FORMATS = ("fp6_e3m2", "fp6_e2m3", "fp5_e2m2", "fp5_e3m1", "fp4_e2m1", "int4", "int8")
"""The formats in most use; the others come after them in `compiled_schemes`."""
_EVERY_TILE = ("fp6_e3m2", "fp5_e2m2", "int4")
"""Of these the compile tests build every tile: a decode group of 8 registers, one of 16, and integers."""


def compiled_schemes() -> Iterator[tuple[Scheme, bool]]:
    """Yield what the compile tests build, and whether in every tile or only in those that need the most registers.

    Every format and every kind of scale is among them, not each format with each kind of scale.
    """
    for name in COMPILED_FORMATS:
        for group_size in (None, 128):
            yield Scheme(get(name), group_size), name in _EVERY_TILE
    for group_size in (64, 32, 16):
        yield Scheme(get("fp6_e3m2"), group_size), True
    yield Scheme(get("uint4"), 128), True
    for index, name in enumerate(name for name in names() if name not in COMPILED_FORMATS):
        yield Scheme(get(name)), False
        yield Scheme(get(name), (128, 64, 32, 16)[index % 4], ("float16", "bfloat16", "float32")[index % 3]), False
    for name in ("mxfp6_e3m2", "mxfp4_e2m1", "mxint8"):
        yield get_scheme(name), False


def all_sources(capability: tuple[int, int]) -> Iterator[KernelSource]:
    """Yield the kernel configurations of `compiled_schemes` for the chips of one compute capability, each once.

    Schemes that are not built in every tile take float16 and bfloat16 by turns.
    """
    seen = set()
    for chip in CHIPS.values():
        if chip.capability != capability:
            continue
        for index, (scheme, every_tile) in enumerate(compiled_schemes()):
            fast = sm90.tiles(scales_in_block(scheme.group_size))
            widest = (None, max(sm80.TILES), max(tile.tokens for tile in fast))
            for target in (
                decode_groups.PAIR_TARGETS if every_tile else decode_groups.PAIR_TARGETS[(index + index // 2) % 2 :][:1]
            ):
                for source in dense.sources(Packing.of(scheme, target), chip):
                    if source not in seen and (every_tile or source.parameters.get("N_TILE") in widest):
                        seen.add(source)
                        yield source
            if every_tile and not unsupported_reason(scheme, decode_groups.FP8):
                for source in dense.quantized_sources(Packing.of(scheme, decode_groups.FP8), "float16", chip):
                    if source not in seen:
                        seen.add(source)
                        yield source
