"""The kernel of pruned weights on a GPU: every density, value format, number of tokens and tile, against float64."""

from __future__ import annotations

import pytest
import torch
from helpers.e4m3_sums import e4m3_dropped
from helpers.sparse_products import Case, random_mask, skewed_mask

from tersor.hardware import chip_named
from tersor.kernels.jit import arch_for, compile_many, module
from tersor.kernels.sparse import sparse_source
from tersor.kernels.tune import sparse as tune

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs compute capability 9.0"
)
H200 = chip_named("H200")
TILES = ((2, 1, 128), (2, 1, 64), (4, 1, 64), (2, 2, 64), (1, 4, 64))


FLOAT16 = ("float16", "fp8_e4m3", "fp6_e3m2", "fp6_e2m3", "int8", "int4", "fp4_e2m1")
BFLOAT16 = ("bfloat16", *FLOAT16[1:])


@pytest.fixture(autouse=True, scope="module")
def compiled() -> None:
    """Kernels of all tests are compiled at once."""
    empty, wanted = torch.zeros(64, 128, dtype=torch.bool), set()
    for dtype, names in ((torch.float16, FLOAT16), (torch.bfloat16, BFLOAT16)):
        for name in names:
            case = Case.of(empty, name, dtype, 0)
            wanted |= {
                sparse_source(case.packing, tile) for tile in (tile_or_none(n, TILES[0]) for n in tune.TOKENS) if tile
            }
    for which in TILES:
        for name in ("float16", "fp8_e4m3"):
            case = Case.of(empty, name, torch.float16, 0)
            wanted |= {sparse_source(case.packing, tile) for tile in (tile_or_none(n, which) for n in (16, 64)) if tile}
    compile_many(list(wanted), arch_for((9, 0)))


def check(case: Case, n: int, dtype: torch.dtype, tile: tune.SparseTile, times: int = 1) -> None:
    """Hold a product against float64, and repetitions against the first of them, bit for bit."""
    config = tune.config(tile, case.tiles.shape[0], case.tiles.places, H200)
    function = module.get(sparse_source(case.packing, tile), 0)
    x, bias, residual = case.tensors(n, dtype)
    y = case.launched(function, config, x, bias, residual)
    case.check(y, x, bias, residual)
    for _ in range(times - 1):
        assert torch.equal(case.launched(function, config, x, bias, residual), y)


def tile_of(n: int, which: tuple[int, int, int] = TILES[0]) -> tune.SparseTile:
    """Return a tile for n tokens."""
    tokens = next(t for t in tune.TOKENS if n <= t)
    return tune.tile_for(tokens, H200, row_groups=which[0], resident=which[1], layers=which[2])


def tile_or_none(n: int, which: tuple[int, int, int]) -> tune.SparseTile | None:
    """Return a tile for n tokens, or nothing where shared memory has no room for it."""
    try:
        return tile_of(n, which)
    except ValueError:
        return None


@pytest.mark.parametrize("values", FLOAT16)
@pytest.mark.parametrize("density", [0, 0.01, 0.1, 0.5, 0.94, 1])
def test_every_density_is_within_tolerance(values: str, density: float) -> None:
    case = Case.of(random_mask(300, 1400, density).cuda(), values, torch.float16, 7)
    for n in (1, 16, 40):
        check(case, n, torch.float16, tile_of(n))


@pytest.mark.parametrize(("values", "largest", "smallest"), [("fp8_e4m3", 448.0, None), ("fp8_e4m3", None, 2.0**-5)])
def test_converted_floats_are_within_tolerance(values: str, largest: float | None, smallest: float | None) -> None:
    case = Case.of(random_mask(300, 1400, 0.5).cuda(), values, torch.float16, 7, largest, smallest)
    assert case.packing.converts
    for n in (8, 16, 40):
        check(case, n, torch.float16, tile_of(n))


@pytest.mark.parametrize("values", BFLOAT16)
def test_bfloat16_is_within_tolerance(values: str) -> None:
    case = Case.of(skewed_mask(300, 1400).cuda(), values, torch.bfloat16, 9)
    for n in (7, 64):
        check(case, n, torch.bfloat16, tile_of(n))


@pytest.mark.parametrize("result", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("values", ["fp6_e3m2", "int4", "fp8_e4m3"])
def test_activations_in_e4m3_are_within_tolerance(values: str, result: torch.dtype) -> None:
    """Sums of whole numbers are exact; again and again all have the same bits."""
    case = Case.of(skewed_mask(700, 3000).cuda(), values, result, 23, 448.0, bytewise=True)
    for n in (3, 16, 32, 64, 100):
        tokens = next(t for t in tune.TOKENS if n <= t)
        x, bias, residual = case.tensors(n, result)
        dropped = 0.0 if values == "int4" else e4m3_dropped(x.double(), case.weight)
        for tile in tune.tiles(tokens, 8, H200, bytewise=True):
            function = module.get(sparse_source(case.packing, tile, 0, str(result)[6:]), 0)
            for places in (0, 23):
                config = tune.config(tile, 700, places, H200, n)
                y = case.launched(function, config, x, bias, residual)
                case.check(y, x, bias, residual, dropped)
                assert all(torch.equal(case.launched(function, config, x, bias, residual), y) for _ in range(10))


@pytest.mark.parametrize("which", TILES, ids=str)
@pytest.mark.parametrize("values", ["float16", "fp8_e4m3"])
def test_every_tile_gives_the_same_bits_again_and_again(which: tuple[int, int, int], values: str) -> None:
    """Weights lie in L2 and many CTAs run: where a slot or a layer was overwritten too soon, some launch differs."""
    kept = random_mask(4096, 4096, 0.5)
    kept[1000:1016], kept[:, 77], kept[2048:2112] = True, True, False
    case = Case.of(kept.cuda(), values, torch.float16, H200.sms)
    for n in (16, 64):
        tile = tile_or_none(n, which)
        if tile is not None:
            check(case, n, torch.float16, tile, times=30)


@pytest.mark.parametrize("shape", [(1, 8), (64, 128), (65, 136), (200, 264), (130, 5000)])
def test_odd_shapes_and_numbers_of_tokens_are_within_tolerance(shape: tuple[int, int]) -> None:
    case = Case.of(random_mask(*shape, 0.5).cuda(), "fp6_e3m2", torch.float16, 1)
    for n in (1, 2, 3, 8, 9, 17, 33, 63, 64):
        check(case, n, torch.float16, tile_of(n))


def test_pruned_weights_are_zeros_beside_what_is_not_finite() -> None:
    """A NaN or an infinity makes NaN of its token, as in a dense product, and of no other."""
    case = Case.of(random_mask(128, 512, 0.5).cuda(), "fp6_e3m2", torch.float16, 1)
    x, bias, residual = case.tensors(8, torch.float16)
    clean = x.clone()
    x[2, 100], x[5, 7], x[6, 300] = float("nan"), float("inf"), -0.0
    clean[6, 300] = 0
    tile = tile_of(8)
    function, config = module.get(sparse_source(case.packing, tile), 0), tune.config(tile, 128, 1, H200)
    y = case.launched(function, config, x, bias, residual)
    expected = case.launched(function, config, clean, bias, residual)
    assert bool(y[2].isnan().all())
    others = [0, 1, 3, 4, 6, 7]
    assert torch.equal(y[others], expected[others])
    dense = x[5].double() @ case.weight.T
    assert torch.equal(y[5].isnan(), dense.isnan())
