"""The kernel of pruned weights on a CPU: masks, queues, rings and sums, every lane, copy and barrier emulated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import pruned
from helpers.emulated import COMPILER, Emulated, tensor_map
from helpers.sparse_products import NAN, Case, random_mask, skewed_mask

from tersor import formats
from tersor.hardware import chip_named
from tersor.kernels import jit
from tersor.kernels.jit import nvrtc
from tersor.kernels.sparse import decompress_source, launch_stored, sparse_source, stored_source
from tersor.kernels.tune import sparse as tune
from tersor.layouts.sparse_packing import SparsePacking

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
H200 = chip_named("H200")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sparse")


@pytest.fixture(autouse=True)
def maps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit.tensor_map, "rows", tensor_map)


def check(
    kept: torch.Tensor, values: str, dtype: torch.dtype, n: int, places: int, folder: Path, cut: bool = True
) -> None:
    """Hold a product of few CTAs with short rings against float64; `cut`: with the places of the layout."""
    case = Case.of(kept, values, dtype, places)
    tile = tune.tile_for(next(t for t in tune.TOKENS if n <= t or t == 128), H200, layers=64)
    tile = replace(tile, masks=4, x_slots=5 if n <= 64 else 4)
    config = tune.config(tile, len(kept), places if cut else 0, H200, n)
    config = config if config.places else replace(config, ctas=min(config.ctas, 3))
    x, bias, residual = case.tensors(n, dtype)
    y = case.launched(Emulated(sparse_source(case.packing, tile), folder, 900), config, x, bias, residual)
    case.check(y, x, bias, residual)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ("float16", torch.float16),
        ("fp8_e4m3", torch.float16),
        ("fp6_e3m2", torch.bfloat16),
        ("int8", torch.float16),
        ("int8", torch.bfloat16),
        ("int4", torch.float16),
    ],
)
def test_values_of_every_kind_are_expanded(values: str, dtype: torch.dtype, folder: Path) -> None:
    check(random_mask(70, 360, 0.5), values, dtype, 5, 0, folder)


@pytest.mark.parametrize("limits", [(448.0, None), (None, 2.0**-5)])
def test_floats_are_converted_where_e4m3_has_them_or_their_halves(
    limits: tuple[float | None, float | None], folder: Path
) -> None:
    case = Case.of(random_mask(70, 360, 0.5), "fp8_e4m3", torch.float16, 0, *limits)
    assert case.packing.converts and case.packing.factor == (1.0 if limits[0] else 2.0)
    tile = tune.tile_for(8, H200)
    x, bias, residual = case.tensors(5, torch.float16)
    function = Emulated(sparse_source(case.packing, tile), folder, 900)
    y = case.launched(function, tune.config(tile, 70, 0, H200), x, bias, residual)
    case.check(y, x, bias, residual)


@pytest.mark.parametrize("values", ["bfloat16", "int4"])
def test_masks_of_real_skew_go_through_rings_that_turn_over(values: str, folder: Path) -> None:
    """Parts of two tiles, in four items of a CTA."""
    check(skewed_mask(290, 3072), values, torch.bfloat16, 16, 5, folder)


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_weights_without_zeros_and_without_anything_else_are_multiplied(density: float, folder: Path) -> None:
    check(random_mask(192, 1536, density), "fp6_e3m2", torch.float16, 32, 2, folder)


def test_a_ring_has_what_queues_of_few_values_are_behind_the_longest(folder: Path) -> None:
    """And what is read behind values: all weights of some rows are left, few of the sixteen of a warp."""
    kept = random_mask(80, 1664, 1.0)
    kept[16:32] = random_mask(16, 1664, 0.05)
    check(kept, "int8", torch.bfloat16, 8, 0, folder)


@pytest.mark.parametrize(("n", "cut"), [(90, True), (190, False), (190, True)])
def test_many_tokens_are_multiplied_in_several_tiles(n: int, cut: bool, folder: Path) -> None:
    """Places have blocks of tiles of few rows and few tokens, or tiles are whole, and go on where queues begin anew."""
    check(random_mask(300, 600, 0.5), "fp6_e3m2", torch.float16, n, 3, folder, cut)


def test_whole_tiles_go_on_where_queues_begin_anew(folder: Path) -> None:
    check(skewed_mask(256, 2296), "bfloat16", torch.bfloat16, 9, 5, folder, False)


@pytest.mark.parametrize("row_groups", [1, 4])
def test_every_number_of_rows_has_the_blocks_of_its_place(row_groups: int, folder: Path) -> None:
    """CTAs of a place have row tiles of their own, or one has all; whoever comes last adds, and bits are the same."""
    case = Case.of(skewed_mask(600, 640), "fp6_e3m2", torch.float16, 7)
    tile = tune.tile_for(8, H200, row_groups=row_groups, resident=4 // row_groups, layers=64)
    config = tune.config(tile, 600, 7, H200)
    assert config.place_ctas == 4 // row_groups
    x, bias, residual = case.tensors(5, torch.float16)
    function = Emulated(sparse_source(case.packing, tile), folder, 900)
    found = [
        case.launched(function, config, x, bias, residual) for _ in range(3)
    ]  # CTAs come in another order each time
    case.check(found[0], x, bias, residual)
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize(
    ("values", "dtype", "ic"),
    [("bfloat16", torch.bfloat16, 700), ("fp8_e4m3", torch.float16, 697), ("int8", torch.float16, 1536)],
)
def test_rows_are_decoded_for_a_product_of_somebody_else(
    values: str, dtype: torch.dtype, ic: int, folder: Path
) -> None:
    case = Case.of(skewed_mask(600, ic), values, dtype, 5)
    tile = replace(tune.decompress_tile(H200), masks=4)
    function = Emulated(decompress_source(case.packing, tile), folder, 900)
    for first, rows, cut in ((0, 256, True), (256, 344, True), (256, 344, False)):
        config = tune.config(tile, rows, 5 if cut else 0, H200)
        config = config if cut else replace(config, ctas=3)
        found = case.decompressed(function, config, first, rows)
        assert torch.equal(found, case.weight[first : first + rows].float().to(dtype))


def test_a_kernel_of_every_number_of_tokens_compiles_without_spills() -> None:
    for tokens, values in (
        (8, "fp8_e4m3"),
        (16, "bfloat16"),
        (32, "int8"),
        (64, "fp6_e3m2"),
        (128, "int8"),
        (256, "bfloat16"),
    ):
        packing = SparsePacking.of(values if values == "bfloat16" else formats.get_scheme(values), "bfloat16")
        sources = [sparse_source(packing, tile, gate=tokens == 8) for tile in tune.tiles(tokens, packing.bits, H200)]
        for source in (*sources, decompress_source(packing, tune.decompress_tile(H200))):
            used = nvrtc.compile_source(source, "sm_90a").resources
            assert used is not None and used.fits_registers and not used.warnings, source.name


@pytest.mark.parametrize(
    ("values", "dtype", "ic"),
    [
        (formats.Plain("float32"), torch.bfloat16, 1100),
        (formats.Plain("bfloat16"), torch.float16, 96),
        (formats.get_scheme("fp6"), torch.float16, 2080),
        (formats.get_scheme("uint3", 32), torch.bfloat16, 1120),
        (formats.get_scheme("mxfp4"), torch.float16, 64),
        (formats.get_scheme("int8"), torch.float16, 1037),
    ],
    ids=str,
)
def test_a_stored_weight_of_any_format_is_decoded(
    values: formats.Scheme | formats.Plain, dtype: torch.dtype, ic: int, folder: Path
) -> None:
    for density in (0.5, 0.0, 1.0):
        weight, _ = pruned.sparse(pruned.random(11, ic), pruned.kept(11, ic, density), values)
        function = Emulated(stored_source(weight.sparse, str(dtype)[6:]), folder, 900)
        for first, rows in ((0, 6), (6, 5)):
            dense = torch.full((rows, ic), NAN, dtype=dtype)
            launch_stored(
                function,
                0,
                mask=weight.mask.data_ptr(),
                values=weight.values.data_ptr(),
                starts=weight.starts.data_ptr(),
                scale=0 if weight.scale is None else weight.scale.data_ptr(),
                zero_point=0 if weight.zero_point is None else weight.zero_point.data_ptr(),
                dense=dense.data_ptr(),
                first_row=first,
                rows=rows,
                ic=ic,
                groups=1 if weight.scale is None else weight.scale.shape[1],
                words=len(weight.values),
            )
            assert torch.equal(dense, weight.dequantize(dtype, (first, first + rows)))


@pytest.mark.parametrize(
    ("values", "result", "n"), [("fp6_e3m2", "float16", 5), ("int4", "bfloat16", 90), ("fp8_e4m3", "float16", 16)]
)
def test_values_meet_activations_in_e4m3(values: str, result: str, n: int, folder: Path) -> None:
    """Whole tiles and cut ones: every block settles its sums, four at a time, or alone behind the last four."""
    dtype = getattr(torch, result)
    case = Case.of(skewed_mask(300, 1400), values, dtype, 7, largest=448.0, bytewise=True)
    tile = tune.tile_for(next(t for t in tune.TOKENS if n <= t), H200, layers=64, bytewise=True)
    x, bias, residual = case.tensors(n, dtype)
    function = Emulated(sparse_source(case.packing, tile, 0, result), folder, 900)
    for places in (0, 7):
        config = tune.config(tile, 300, places, H200, n)
        config = config if places else replace(config, ctas=min(config.ctas, 3))
        case.check(case.launched(function, config, x, bias, residual), x, bias, residual)
