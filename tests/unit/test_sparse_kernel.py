"""The kernel of pruned weights on a CPU: masks, queues, rings and sums, every lane, copy and barrier emulated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.emulated import COMPILER, Emulated, tensor_map
from helpers.sparse_products import Case, random_mask, skewed_mask

from tersor import formats
from tersor.hardware import chip_named
from tersor.kernels import jit
from tersor.kernels.jit import nvrtc
from tersor.kernels.sparse import decompress_source, sparse_source
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
    kept: torch.Tensor, values: str, dtype: torch.dtype, n: int, runs: int, folder: Path, splits: int | None = None
) -> None:
    """Hold a product of few CTAs with short rings against float64."""
    case = Case.of(kept, values, dtype, runs)
    tile = tune.tile_for(next(t for t in tune.TOKENS if n <= t or t == 128), H200, layers=64)
    tile = replace(tile, masks=4, x_slots=5 if n <= 64 else 4)
    config = replace(tune.config(tile, len(kept), runs, H200, n, splits), gathered=False)
    config = replace(config, ctas=min(config.ctas, 3))
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
    check(random_mask(70, 360, 0.5), values, dtype, 5, 1, folder)


@pytest.mark.parametrize("limits", [(448.0, None), (None, 2.0**-5)])
def test_floats_are_converted_where_e4m3_has_them_or_their_halves(
    limits: tuple[float | None, float | None], folder: Path
) -> None:
    case = Case.of(random_mask(70, 360, 0.5), "fp8_e4m3", torch.float16, 1, *limits)
    assert case.packing.converts and case.packing.factor == (1.0 if limits[0] else 2.0)
    tile = tune.tile_for(8, H200)
    x, bias, residual = case.tensors(5, torch.float16)
    function = Emulated(sparse_source(case.packing, tile), folder, 900)
    y = case.launched(function, tune.config(tile, 70, 1, H200), x, bias, residual)
    case.check(y, x, bias, residual)


@pytest.mark.parametrize("values", ["bfloat16", "int4"])
def test_masks_of_real_skew_go_through_rings_that_turn_over(values: str, folder: Path) -> None:
    """Sums of runs, in two items of a CTA."""
    check(skewed_mask(256, 3072), values, torch.bfloat16, 16, 3, folder)


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_weights_without_zeros_and_without_anything_else_are_multiplied(density: float, folder: Path) -> None:
    check(random_mask(192, 1536, density), "fp6_e3m2", torch.float16, 32, 1, folder)


@pytest.mark.parametrize(("n", "splits"), [(90, 2), (190, 1)])
def test_many_tokens_are_multiplied_in_several_tiles(n: int, splits: int, folder: Path) -> None:
    """Runs of a tile are items of their own, or follow each other in one."""
    check(random_mask(130, 600, 0.5), "fp6_e3m2", torch.float16, n, 2, folder, splits)


def test_runs_that_one_item_has_are_added_up(folder: Path) -> None:
    check(skewed_mask(256, 2296), "bfloat16", torch.bfloat16, 9, 3, folder, 1)


@pytest.mark.parametrize(
    ("values", "dtype", "ic"),
    [("bfloat16", torch.bfloat16, 700), ("fp8_e4m3", torch.float16, 697), ("int8", torch.float16, 1536)],
)
def test_rows_are_decoded_for_a_product_of_somebody_else(
    values: str, dtype: torch.dtype, ic: int, folder: Path
) -> None:
    case = Case.of(skewed_mask(300, ic), values, dtype, 2)
    tile = replace(tune.decompress_tile(H200), masks=4)
    function = Emulated(decompress_source(case.packing, tile), folder, 900)
    for first, rows in ((0, 128), (128, 172)):
        config = replace(tune.config(tile, rows, 2, H200), ctas=3)
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
