"""The kernel of pruned weights on a CPU: masks, queues, rings and sums, every lane, copy and barrier emulated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.emulated import COMPILER, Emulated, tensor_map

from tersor import formats
from tersor.hardware import chip_named
from tersor.kernels import jit
from tersor.kernels.jit import nvrtc
from tersor.kernels.sparse import prepare_sparse, sparse_source
from tersor.kernels.tune import sparse as tune
from tersor.layouts import sparse_tiles
from tersor.layouts.sparse_packing import SparsePacking

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
H200 = chip_named("H200")


class OnCpu:
    """Stands for a loaded kernel: `Emulated`, without clusters."""

    def __init__(self, emulated: Emulated) -> None:
        self.emulated = emulated

    def launch(self, grid: Any, block: Any, shared: int, stream: int, args: Any, early: bool, cluster: Any) -> None:
        assert cluster is None
        self.emulated.launch(grid, block, shared, stream, args, early)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sparse")


def product(
    kept: torch.Tensor, values: str, dtype: torch.dtype, n: int, runs: int, folder: Path, ctas: int = 3
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a product with random numbers where weights are left, and the same in float64."""
    oc, ic = kept.shape
    target, generator = str(dtype).removeprefix("torch."), torch.Generator().manual_seed(oc + n)
    packing = SparsePacking.of(values if values == target else formats.get_scheme(values), target)
    if packing.bits == 16:
        numbers = torch.randint(-8, 9, kept.shape, generator=generator).to(dtype) / 4
        weight = numbers.double()
    else:
        fmt = formats.get_scheme(values).format
        numbers = torch.randint(0, 1 << fmt.bits, kept.shape, generator=generator).to(torch.uint8)
        weight = fmt.decode(numbers).double()
    tiles = sparse_tiles.pack(kept, packing.pack(numbers), runs)
    tile = replace(tune.tile_for(next(t for t in tune.TOKENS if n <= t), H200), masks=4, x_slots=5)
    config = replace(tune.config(tile, oc, runs, H200), gathered=False, ctas=min(ctas, -(-oc // tile.rows) * runs))
    function: Any = OnCpu(Emulated(sparse_source(packing, tile), folder, 900))
    launch = prepare_sparse(function, config, bf16=dtype == torch.bfloat16, oc=oc, ic=ic, n=n, factor=packing.factor)
    x = torch.randint(-4, 5, (n, ic), generator=generator).to(dtype)
    scale = torch.rand(oc, generator=generator) + 0.5
    bias, residual = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((oc,), (n, oc)))
    y = torch.full((n, oc), float("nan"), dtype=dtype)
    floats, counters = config.floats(oc)
    partial, arrived = torch.full((max(floats, 1),), float("nan")), torch.zeros(max(counters, 1), dtype=torch.int32)
    launch(
        stream=0,
        mask=tiles.mask.data_ptr(),
        layers=tiles.layers.data_ptr(),
        starts=tiles.starts.data_ptr(),
        marks=tiles.marks.data_ptr(),
        scale=scale.data_ptr(),
        x=x.data_ptr(),
        x_stride=ic,
        bias=bias.data_ptr(),
        residual=residual.data_ptr(),
        y=y.data_ptr(),
        partial=partial.data_ptr(),
        arrived=arrived.data_ptr(),
        early=True,
    )
    assert not arrived.any()
    weight = torch.where(kept, weight, 0.0)
    exact = (x.double() @ weight.T) * scale.double() + bias.double() + residual.double()
    magnitude = (x.double().abs() @ weight.abs().T) * scale.double() + bias.double().abs() + residual.double().abs()
    allowed = exact.abs() * torch.finfo(dtype).eps / 2 * 1.001 + magnitude * 2.0**-20
    assert bool(((y.double() - exact).abs() <= allowed).all())
    return y, exact


def random(oc: int, ic: int, density: float) -> torch.Tensor:
    return torch.rand(oc, ic, generator=torch.Generator().manual_seed(ic)) < density


@pytest.fixture(autouse=True)
def maps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit.tensor_map, "rows", tensor_map)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ("float16", torch.float16),
        ("bfloat16", torch.bfloat16),
        ("fp8_e4m3", torch.float16),
        ("fp6_e3m2", torch.bfloat16),
        ("int8", torch.float16),
        ("int8", torch.bfloat16),
        ("int4", torch.float16),
    ],
)
def test_values_of_every_kind_are_expanded(values: str, dtype: torch.dtype, folder: Path) -> None:
    product(random(70, 360, 0.5), values, dtype, 5, 1, folder)


def test_masks_of_real_skew_go_through_rings_that_turn_over(folder: Path) -> None:
    """Rows, columns and blocks with all weights, others with none; sums of runs, in two items of a CTA."""
    kept = random(256, 3072, 0.1)
    kept[3], kept[:, 200], kept[128:192] = True, True, True
    kept[:, 512:640], kept[64:128] = True, False
    kept[200:216, ::4] = True
    product(kept, "float16", torch.float16, 16, 3, folder)


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_weights_without_zeros_and_without_anything_else_are_multiplied(density: float, folder: Path) -> None:
    product(random(192, 1536, density), "fp6_e3m2", torch.float16, 32, 1, folder)


def test_a_kernel_of_every_number_of_tokens_compiles_without_spills() -> None:
    for tokens, values in ((8, "fp8_e4m3"), (16, "bfloat16"), (32, "int8"), (64, "fp6_e3m2")):
        for row_groups, resident, layers in ((2, 1, 128), (4, 1, 64)):
            tile = tune.tile_for(tokens, H200, row_groups=row_groups, resident=resident, layers=layers)
            packing = SparsePacking.of(values if values == "bfloat16" else formats.get_scheme(values), "bfloat16")
            used = nvrtc.compile_source(sparse_source(packing, tile, gate=tokens == 8), "sm_90a").resources
            assert used is not None and used.fits_registers and not used.warnings, tile
