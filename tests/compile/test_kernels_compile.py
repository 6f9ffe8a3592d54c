"""Kernels of every kind compile for every architecture, and keep to their registers.

NVRTC needs no GPU; where it is not installed these tests fail, since nothing else holds the kernels on such a machine.
Binaries are kept under pytest's cache by a hash of all that can change them, so a second run compiles what changed.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from compile import beside, catalogue, mixed, mixtures, proven, sparse, tabled
from compile.pairing import alike, width

from tersor.formats import Activations, names
from tersor.hardware import CHIPS
from tersor.kernels import dense, experts, jit, tune
from tersor.kernels.jit import arch_for, cache, compile_many
from tersor.kernels.tune import MOST_NORMED, sm80, sm90
from tersor.kernels.tune import sparse as tune_sparse
from tersor.layouts import decode_groups
from tersor.layouts.packing import SCALE_TYPES, Packing, scales_in_block

CAPABILITIES = tuple(sorted(catalogue.CHIP_OF))

MOST_KERNELS = 880
"""Kernels that a fresh clone may have to compile, on average 0.4 CPU seconds each: some 150 in all."""
MOST_SECONDS = 300.0
"""CPU seconds that those of one architecture may take; sm_90's take a third on a core of their own, and more beside a
busy neighbour."""

CUDA = Path(jit.__file__).parents[1] / "cuda"
OF_BYTES_AND_MAPS = {"dense/quantize_activations.cuh", "small/norm_rows.cuh", "experts/gather.cuh"}
"""Headers around the sm90 schedule: what makes bytes, and rows that lie as the copy engine wants them."""


@pytest.fixture
def kept(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = request.config.cache.mkdir("kernels")
    monkeypatch.setenv("TERSOR_CACHE_DIR", str(folder))
    return folder


def macros(capability: tuple[int, int], header: str, family: str = "dense") -> list[dict[str, int]]:
    """The integer parameters of the kernels of a capability that begin with one header of a family."""
    return [
        {key: int(value) for key, value in source.parameters.items() if isinstance(value, int)}
        for source in catalogue.all_sources(capability)
        if source.header == f"{family}/{header}.cuh"
    ]


def met(kernels: Iterable[dict[str, int]], *keys: str) -> set[tuple[int, ...]]:
    """Which values of some parameters meet in a kernel."""
    return {tuple(kernel[key] for key in keys) for kernel in kernels}


def of_tile(tile: sm90.Tile) -> dict[str, int]:
    """The parameters that tell a tile from others."""
    return {
        "N_TILE": tile.tokens,
        "ROW_GROUPS": tile.row_groups,
        "K_GROUPS": tile.channel_groups,
        "CLUSTER": tile.cluster,
        "RESIDENT": tile.resident,
    }


def multiplied(kernel: dict[str, int]) -> Activations:
    """What a kernel of the sm90 schedule multiplies weights with."""
    if not kernel["BYTES"]:
        return Activations.NATIVE
    if kernel["BYTE_WEIGHT"] != 8:
        return Activations.E4M3
    return Activations.INT8_GROUPS if kernel["X_GROUPS"] else Activations.INT8


def has_tile(kernel: dict[str, int], tile: sm90.Tile) -> bool:
    """Whether a kernel of the sm90 schedule has that tile."""
    return of_tile(tile).items() <= kernel.items() and multiplied(kernel) is tile.activations


def grouped(tile: sm90.Tile) -> set[int]:
    """How many scales of a row in a block a tile can have."""
    counts = (0, 1, 2, 4) if tile.bytewise else (0, 1, 2, 4, 8)
    return {count for count in counts if tile in sm90.tiles(count, tile.activations)}


@pytest.mark.timeout(900)
@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda pair: f"sm_{pair[0]}{pair[1]}")
def test_kernels_compile_without_spills(capability: tuple[int, int]) -> None:
    """No spill and no local memory (`proven.is_clean`), no warning, and shared memory as large as the chip has."""
    sources, chip, arch = catalogue.all_sources(capability), catalogue.CHIP_OF[capability], arch_for(capability)
    static = proven.known()
    built = proven.to_build(sources, capability, static)
    start = time.process_time()
    binaries = compile_many(built, arch)
    seconds = time.process_time() - start
    offenders = []
    for source, binary in zip(built, binaries, strict=True):
        used, key = binary.resources, cache.key(source, arch)
        assert used is not None and used.registers > 0
        if not proven.is_clean(used, capability):
            offenders.append(f"{source.name} {dict(source.parameters)}: {used}")
        if static.setdefault(key, used.static_shared_bytes) != used.static_shared_bytes:
            offenders.append(
                f"{source.name}: {used.static_shared_bytes} bytes static, {static[key]} in {proven.FILE.name}"
            )
    for source in sources:
        parameters = source.parameters
        dynamic = [int(value) for name, value in parameters.items() if name.startswith("SHARED_BYTES")]
        rings = int(parameters.get("RING_LAYERS", -2)) + 2  # of pruned weights, behind what SHARED_BYTES counts
        shared = static[cache.key(source, arch)] + max(dynamic, default=0) + 1024  # kept by the driver
        shared += rings * 512 * int(parameters.get("ROW_GROUPS", 0))
        if shared * int(parameters.get("RESIDENT", 1)) > chip.shared_bytes + 1024:
            offenders.append(f"{source.name} {dict(parameters)}: {shared} bytes of shared memory")
    assert not offenders, "\n".join(offenders)
    print(f"{arch}: {len(built)} of {len(sources)} kernels in {seconds:.1f} CPU seconds")
    assert seconds <= MOST_SECONDS, f"{len(built)} kernels took {seconds:.0f} CPU seconds to compile"


def test_every_tile_of_mixed_weights_is_built() -> None:
    assert mixed.tiles_built() == mixed.tiles_there()


def test_every_tile_of_pruned_weights_is_built() -> None:
    chip = catalogue.CHIP_OF[9, 0]
    ways = ((tokens, way) for tokens in tune_sparse.TOKENS for way in (False, True))
    there = {str(tile) for tokens, way in ways for tile in tune_sparse.tiles(tokens, 8, chip, way)}
    assert sparse.tiles_built(chip) == there


def test_a_fresh_clone_compiles_few_kernels() -> None:
    assert sum(len(catalogue.all_sources(capability)) for capability in CAPABILITIES) <= MOST_KERNELS


def test_the_list_of_proven_kernels_is_that_of_the_catalogue() -> None:
    """With the compiler that wrote it; with another one every kernel is built."""
    keys = {
        cache.key(source, arch_for(capability))
        for capability in CAPABILITIES
        for source in catalogue.all_sources(capability)
    }
    assert not proven.known() or proven.known().keys() == keys, f"write it again: {proven.FILE.with_suffix('.py')}"


def test_a_kernel_that_changed_or_had_a_fault_is_built_and_few_others() -> None:
    chip, arch = catalogue.CHIP_OF[9, 0], arch_for((9, 0))
    sources = catalogue.all_sources((9, 0))
    every = {cache.key(source, arch): 0 for source in sources}
    assert proven.to_build(sources, (9, 0), {}) == sources
    few = proven.to_build(sources, (9, 0), every)
    kernels = itertools.chain.from_iterable(catalogue.FAULTS.values())
    assert {kernel.source(chip) for kernel in kernels if not isinstance(kernel.tile, int)} <= set(few)
    assert len(few) < len(sources) / 2
    changed = next(source for source in sources if source not in few)
    assert changed in proven.to_build(sources, (9, 0), {key: 0 for key in every if key != cache.key(changed, arch)})


def test_chips_of_one_capability_have_the_kernels_that_are_built_for_it() -> None:
    assert {(chip.capability, chip.shared_bytes) for chip in CHIPS.values()} == {
        (capability, chip.shared_bytes) for capability, chip in catalogue.CHIP_OF.items()
    }


@pytest.mark.parametrize("capability", [one for one in CAPABILITIES if one != (9, 0)], ids=str)
def test_every_kernel_that_is_not_of_sm_90_alone_is_built_for_every_architecture(capability: tuple[int, int]) -> None:
    entries = {str(path.relative_to(CUDA)) for path in CUDA.rglob("*.cuh") if "TERSOR_ENTRY" in path.read_text("utf-8")}
    alone = {name for name in entries if "sm90" in name} | OF_BYTES_AND_MAPS
    built = catalogue.all_sources(capability)
    assert {source.header for source in built} == entries - alone
    assert {source.parameters.get("E4M3") for source in built if source.header.startswith("attention/")} == {0, 1}


def test_kernels_that_had_a_fault_are_built() -> None:
    for kernel in itertools.chain.from_iterable(catalogue.FAULTS.values()):
        assert kernel.exists(), kernel
        capability = (8, 0) if isinstance(kernel.tile, int) else (9, 0)
        assert kernel.source(catalogue.CHIP_OF[capability]) in catalogue.all_sources(capability), kernel


TILES = [*sm90.tiles(0), *sm90.tiles(0, Activations.E4M3)]


@pytest.mark.parametrize(
    "tile",
    dict.fromkeys(map(alike, TILES)),
    ids=lambda tile: f"{tile.rows}x{tile.tokens}k{tile.channel_groups}r{tile.resident}{tile.activations}",
)
def test_tiles_of_the_sm90_schedule_meet_every_group_size_dtype_and_size_of_decode_group(tile: sm90.Tile) -> None:
    """Those that differ in tokens alone, up to a power of two, meet them together, and every tile meets something."""
    like = [one for one in TILES if alike(one) == tile]
    of_each = [[kernel for kernel in macros((9, 0), "sm90_linear") if has_tile(kernel, one)] for one in like]
    assert all(of_each)
    kernels = list(itertools.chain.from_iterable(of_each))
    if not tile.bytewise or tile.tokens >= 128:
        assert met(kernels, "SCALE_GROUPS") == {(count,) for one in like for count in grouped(one)}
    assert met(kernels, "BF16") == {(0,), (1,)}
    assert {kernel["EPILOGUE"] > 0 for kernel in kernels} == {False, True}
    assert met(kernels, "ZERO_POINTS") == {(0,), (1,)}
    assert met(kernels, "DECODE_REGISTERS") == ({(4,), (8,)} if tile.bytewise else {(8,), (16,)})
    bits = {kernel["BITS"] for kernel in kernels}
    assert min(bits) < 5 and bits & {5, 6} and max(bits) > 6


@pytest.mark.parametrize("tokens", sm80.TILES)
def test_every_tile_of_the_sm80_schedule_meets_every_kind_of_scale_and_size_of_decode_group(tokens: int) -> None:
    kernels = [one for one in macros((8, 0), "sm80_linear") if one["N_TILE"] == tokens]
    assert met(kernels, "SCALE_GROUPS") == {(0,), (1,), (2,), (4,), (8,)}
    assert met(kernels, "BF16") == met(kernels, "ZERO_POINTS") == {(0,), (1,)}
    assert {kernel["EPILOGUE"] > 0 for kernel in kernels} == {False, True}
    assert met(kernels, "DECODE_REGISTERS") == {(8,), (16,)}
    assert met([kernel for kernel in kernels if kernel["SCALE_GROUPS"]], "SCALE_TYPE") == {(0,), (1,), (2,), (3,)}
    if tokens == max(sm80.TILES):
        assert met(kernels, "BF16", "DECODE_REGISTERS", "DECODE_FINISH") == DECODERS


def test_every_tile_of_experts_in_the_sm80_schedule_is_built_in_both_products() -> None:
    kernels = [source.parameters for source in catalogue.all_sources((8, 0)) if source.header.endswith("0_experts.cuh")]
    assert {(one["N_TILE"], one["GATHERS_TOKENS"]) for one in kernels} == set(
        itertools.product(sm80.TILES, (False, True))
    )
    assert {one["EPILOGUE"] for one in kernels} == set(range(5))
    assert {one["SCALE_GROUPS"] for one in kernels} == {0, 1, 2, 4, 8}
    assert {one["BF16"] for one in kernels} == {one["ZERO_POINTS"] for one in kernels} == {False, True}


def test_gated_linears_are_built_with_every_gate() -> None:
    assert met(macros((9, 0), "sm90_linear"), "EPILOGUE") == {(gate,) for gate in range(5)}
    assert {kernel["EPILOGUE"] for kernel in macros((8, 0), "sm80_linear")} > {0}


DECODERS = {
    (int(target == "bfloat16"), group.registers * group.spread, int(group.finish))
    for target, name in itertools.product(decode_groups.PAIR_TARGETS, (*names(), tabled.FORMAT))
    if not decode_groups.unsupported_reason(catalogue.get(name), target)
    for group in [decode_groups.decode_group(catalogue.get(name), target)]
}
"""Every way to decode to 16-bit floats: of bfloat16, registers of a decode group, how bits become numbers."""


def of_width(tokens: int, activations: Activations) -> list[dict[str, int]]:
    """The kernels with as many tokens in a tile, up to a power of two."""
    kernels = [one for one in macros((9, 0), "sm90_linear") if multiplied(one) is activations]
    return [one for one in kernels if tokens // 2 < one["N_TILE"] <= tokens]


@pytest.mark.parametrize("tokens", sorted({width(tile) for tile in sm90.tiles(0, Activations.E4M3)}))
def test_8_bit_activations_of_every_number_of_tokens_meet_every_group_size(tokens: int) -> None:
    tiles = [tile for tile in sm90.tiles(0, Activations.E4M3) if width(tile) == tokens]
    assert met(of_width(tokens, Activations.E4M3), "SCALE_GROUPS") == {
        (count,) for tile in tiles for count in grouped(tile)
    }


def test_int8_activations_meet_every_decoder_scale_and_gate_in_narrow_and_wide_tiles() -> None:
    kernels = [one for one in macros((9, 0), "sm90_linear") if multiplied(one) is Activations.INT8]
    groups = [decode_groups.decode_group(catalogue.get(name), "int8") for name in names() if name[:2] != "fp"][:-1]
    finishes = {(group.registers, int(group.finish)) for group in groups if group.words > 1}
    assert met(kernels, "DECODE_REGISTERS", "DECODE_FINISH") >= finishes
    for least, most in ((1, 64), (65, 128), (129, 256)):
        some = [kernel for kernel in kernels if least <= kernel["N_TILE"] <= most]
        assert met(some, "ZERO_POINTS") == met(some, "BF16") == {(0,), (1,)}
        assert {kernel["EPILOGUE"] > 0 for kernel in some} == {False, True}
        assert met(some, "ROW_GROUPS") > {(2,)} and met(some, "SCALE_GROUPS") >= {(0,)}
    assert met(kernels, "SCALE_GROUPS") == {(0,), (1,), (2,), (4,)}


@pytest.mark.parametrize("tokens", sorted({width(tile) for tile in sm90.tiles(1)}))
def test_every_decoder_and_scale_dtype_meets_every_number_of_tokens(tokens: int) -> None:
    kernels = of_width(tokens, Activations.NATIVE)
    assert met(kernels, "BF16", "DECODE_REGISTERS", "DECODE_FINISH") == DECODERS
    scaled = [kernel for kernel in kernels if kernel["SCALE_GROUPS"]]
    assert met(scaled, "SCALE_TYPE") == {(value,) for value in SCALE_TYPES.values()}


def test_every_format_is_decoded_beside_floats() -> None:
    built = {source.name for capability in CAPABILITIES for source in catalogue.all_sources(capability)}
    for name, target in itertools.product(names(), (*decode_groups.PAIR_TARGETS, decode_groups.FP8)):
        if decode_groups.unsupported_reason(catalogue.get(name), target):
            continue
        assert any(f"linear_sm90_{name}_{target}" in one or f"linear_sm80_{name}_{target}" in one for one in built), (
            name
        )
        assert any(one.startswith(f"tersor_dequantize_{name}_") for one in built)


def test_batch_invariant_kernels_are_those_that_the_mode_asks_for() -> None:
    """Few tokens through wgmma; what the mode takes for more tokens is built in the usual mode, too."""
    chip, asked = catalogue.CHIP_OF[9, 0], set()
    for (group_size, gated), n in itertools.product(((None, False), (128, True), (None, True), (128, False)), (8, 16)):
        scheme = catalogue.Scheme(catalogue.get("fp6_e3m2"), group_size)
        problem = dense.problem_of(scheme, (8192, 8192), n, batch_invariant=True)
        packing = Packing.of(scheme, "float16")
        asked.add(dense.fused_source(packing, "float16", tune.choose(problem, chip), gated))
    built = {source for source in catalogue.all_sources((9, 0)) if source.parameters.get("FEW_TOKENS") == 0}
    assert {source.parameters["N_TILE"] for source in built & asked} == {8, 16}
    assert {source.parameters["SCALE_GROUPS"] for source in built & asked} == {0, scales_in_block(128)}
    assert {source.parameters["EPILOGUE"] for source in built & asked} == {0, 1}


def test_every_tile_of_few_tokens_is_built_with_a_norm_ahead_and_with_one_behind() -> None:
    kernels = [one for one in macros((9, 0), "sm90_linear") if one["NORM"]]
    for tile in (tile for tile in sm90.tiles(0) if tile.tokens <= MOST_NORMED):
        assert {one["NORM"] for one in kernels if has_tile(one, tile)} == {1, 2}, tile
    assert met(kernels, "NORM", "BF16") == set(itertools.product((1, 2), (0, 1)))
    assert met(kernels, "NORM", "EPILOGUE") == {(1, 0), (1, 1), (2, 0)}
    assert len(met(kernels, "SCALE_GROUPS")) > 2


def test_tiles_that_can_have_outliers_are_built_with_them() -> None:
    kernels = [one for one in macros((9, 0), "sm90_linear") if one["OUTLIERS"]]
    for tile in beside.tiles():
        assert any(has_tile(one, tile) for one in kernels), tile
    assert met(kernels, "OUTLIERS") == {(1,), (2,), (8,)} and met(kernels, "BF16") == {(0,), (1,)}
    assert not any(kernel["NORM"] or kernel["EPILOGUE"] for kernel in kernels)
    assert len(met(kernels, "SCALE_GROUPS")) > 2


def test_experts_kernels_meet_every_tile_gate_and_format_in_both_products() -> None:
    kernels = macros((9, 0), "sm90_experts", "experts")
    alone = [tile for tile in TILES if tile.cluster == 1]
    for like in dict.fromkeys(map(alike, alone)):
        tiles = [tile for tile in alone if alike(tile) == like]
        assert any(has_tile(kernel, tile) for tile in tiles for kernel in kernels), like
    assert met(kernels, "EPILOGUE", "BF16") == set(itertools.product(range(5), (0, 1)))
    for fp8 in (0, 1):
        of_kind = [kernel for kernel in kernels if kernel["BYTES"] == fp8]
        for tokens in {width(tile) for tile in alone if tile.bytewise == fp8}:
            products = {bool(kernel["EPILOGUE"]) for kernel in of_kind if tokens // 2 < kernel["N_TILE"] <= tokens}
            assert products == {True, False}, tokens
        assert met(of_kind, "EPILOGUE") == {(gate,) for gate in range(5)}
        assert met(of_kind, "SCALE_GROUPS") == {(count,) for count in ((0, 1, 2, 4) if fp8 else (0, 1, 2, 4, 8))}
    assert {(kernel["N_TILE"], kernel["EPILOGUE"] > 0) for kernel in kernels if kernel["GATHERS_TOKENS"]} >= {(8, True)}
    assert {kernel.format for kernel in mixtures.chosen()} == set(names())


def test_experts_kernels_are_those_that_their_family_asks_for() -> None:
    chip, invariant = catalogue.CHIP_OF[9, 0], set()
    for kernel in mixtures.chosen():
        if kernel.batch_invariant:
            invariant.add((kernel.tile.tokens, kernel.gate > 0, kernel.source(chip).parameters["FEW_TOKENS"]))
        else:
            packing = Packing.of(kernel.scheme, kernel.target)
            assert kernel.source(chip) in set(experts.sources(packing, kernel.dtype, chip, kernel.gate or 1))
    assert invariant == {(tokens, first, 0) for tokens in (8, 16) for first in (False, True)}
    assert experts.gather_source() in catalogue.all_sources((9, 0))
