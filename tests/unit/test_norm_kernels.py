"""What a product does of the norms around it, dense/sm90_norm.cuh, on a CPU: results of given sums."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.emulated import COMPILER, HERE, Emulated

from tersor import formats
from tersor.hardware import CHIPS
from tersor.kernels import dense
from tersor.kernels.dense import Norm
from tersor.kernels.jit import KernelSource
from tersor.kernels.tune import sm90
from tersor.layouts.packing import Packing
from tersor.ops import FoldedNorm

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
H200 = CHIPS["NVIDIA H200"]
TILES = {
    "8 tokens, two warpgroups in turn": sm90.Tile(8, 1, 2, 1, 2),
    "16 tokens, four in turn": sm90.Tile(16, 2, 2, 1, 1),
    "48 tokens, wgmma": sm90.Tile(48, 3, 1, 1, 1),
}


def kernel(tile: sm90.Tile, dtype: torch.dtype, norm: Norm, gated: bool, folder: Path) -> Emulated:
    """The end of a kernel of a tile."""
    target = str(dtype).removeprefix("torch.")
    packing = Packing.of(formats.get_scheme("fp6_e3m2"), target)
    slots, shared = tile.slots(6, packing.scale_row_bytes, H200), tile.shared_bytes(6, packing.scale_row_bytes, H200)
    source = dense.sm90_source(packing, target, tile, slots, shared, gated, norm=norm)
    header = "emulated_store.cuh"
    texts = {header: (HERE / header).read_text()}
    return Emulated(KernelSource("store", header, source.parameters, "PPPPPPPPiiiff", texts), folder, 900)


def address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


@pytest.mark.parametrize(
    ("name", "dtype"), [("16 tokens, four in turn", torch.float16), ("48 tokens, wgmma", torch.bfloat16)]
)
def test_a_result_comes_with_what_the_norm_behind_needs(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tile = TILES[name]
    function = kernel(tile, dtype, Norm.OUT, False, tmp_path)
    generator = torch.Generator().manual_seed(1)
    for oc, n in ((64, 1), (328, tile.tokens), (392, tile.tokens - 3)):
        ctas = -(-oc // tile.rows)
        sums = torch.randn(ctas * tile.rows, tile.tokens, generator=generator)
        scales = torch.rand(ctas * tile.rows, generator=generator)
        bias, residual = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((oc,), (n, oc)))
        norm = FoldedNorm.of(torch.randn(oc, generator=generator).to(dtype), 1e-5)
        y, scaled = poisoned(n, oc, dtype=dtype), poisoned(n, oc, dtype=dtype)
        squares = poisoned(n, dense.squares_stride(oc), dtype=torch.float32)
        for added in (None, residual):
            places = (sums, scales, bias, added, y, norm.weight, scaled, squares)
            function.launch(
                (ctas, 1, 1),
                (128 * tile.row_groups, 1, 1),
                0,
                0,
                (*map(address, places), oc, 0, n, 0.0, 0.0),
            )
            exact = (sums[:oc, :n] * scales[:oc, None]).T + bias.float()
            expected = (exact if added is None else exact + added.float()).to(dtype)
            torch.testing.assert_close(y, expected, rtol=torch.finfo(dtype).eps, atol=1e-6)
            assert torch.equal(scaled, (y.float() * norm.weight).to(dtype))
            count = -(-oc // 64)
            of_units = torch.nn.functional.pad(y.double().square(), (0, -oc % 64)).unflatten(1, (count, 64)).sum(-1)
            torch.testing.assert_close(squares[:, :count].double(), of_units, rtol=1e-6, atol=0)
            assert squares[:, count:].isnan().all()


@pytest.mark.parametrize(("name", "gated"), [("8 tokens, two warpgroups in turn", True), ("48 tokens, wgmma", False)])
def test_sums_are_multiplied_by_what_the_norm_ahead_divides_by(name: str, gated: bool, tmp_path: Path) -> None:
    tile, dtype = TILES[name], torch.bfloat16
    function = kernel(tile, dtype, Norm.IN, gated, tmp_path)
    generator = torch.Generator().manual_seed(2)
    for oc, ic, n in ((64, 64, 1), (320, 2888, tile.tokens), (64, 4096, tile.tokens - 3)):
        ctas, outputs, count = -(-oc // tile.rows), oc // 2 if gated else oc, -(-ic // 64)
        sums, scales = torch.randn(ctas * tile.rows, tile.tokens, generator=generator), torch.ones(ctas * tile.rows)
        squares = poisoned(n, dense.squares_stride(ic), dtype=torch.float32)
        squares[:, :count] = torch.rand(n, count, generator=generator) * 64
        y = poisoned(n, outputs, dtype=dtype)
        places = (sums, scales, None, None, y, None, None, squares)
        function.launch(
            (ctas, 1, 1),
            (128 * tile.row_groups, 1, 1),
            0,
            0,
            (*map(address, places), oc, ic, n, 1 / ic, 0.5),
        )
        factors = torch.rsqrt(squares[:, :count].double().sum(-1, keepdim=True) / ic + 0.5)
        exact = sums[:oc, :n].T.double() * factors
        if gated:
            gate, up = exact.unflatten(1, (-1, 2, 8)).unbind(2)
            exact = (torch.nn.functional.silu(gate) * up).flatten(1)
        torch.testing.assert_close(y, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
