"""Tables of rows in kernels, on a CPU as C++: every code of every table, and products of the sm90 schedule."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.emulated import COMPILER, tensor_map
from helpers.emulated_dense import product

from tersor.compress import encode
from tersor.formats import get_scheme
from tersor.hardware import CHIPS
from tersor.kernels import dense
from tersor.kernels.jit import tensor_map as maps
from tersor.kernels.tune import sm90
from tersor.layouts import PackedWeight

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")

H200 = CHIPS["NVIDIA H200"]
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.fixture(autouse=True)
def _maps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maps, "rows", tensor_map)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


def tabled(oc: int, ic: int, dtype: str) -> PackedWeight:
    """Return a weight of random codes and tables in the layout for activations of their dtype."""
    generator = torch.Generator().manual_seed(oc)
    plain = torch.randn(oc, ic, generator=generator) * (1 + torch.rand(oc, 1, generator=generator))
    weight = PackedWeight.from_encoded(encode(plain, get_scheme("lut3", None, dtype)))
    return weight.to_layout(f"tiles_{dtype}")


@pytest.mark.parametrize(
    ("tile", "n", "oc", "dtype", "splits"),
    [
        (sm90.Tile(16, 2, 2, 1, 1), 11, 128, "bfloat16", 2),
        (sm90.Tile(64, 1, 1, 1, 2), 50, 90, "float16", 1),
    ],
)
def test_products_with_tables_are_those_of_the_decoded_weight(
    tile: sm90.Tile, n: int, oc: int, dtype: str, splits: int, folder: Path
) -> None:
    ic, native = 352, DTYPES[dtype]
    weight = tabled(oc, ic, dtype)
    problem = dense.problem_of(weight.scheme, (oc, ic), n)
    items = -(-oc // tile.rows) * splits
    config = sm90.config(problem, tile, 0, splits, items, H200)
    generator = torch.Generator().manual_seed(n)
    x, bias = (torch.randn(*shape, generator=generator).to(native) for shape in ((n, ic), (oc,)))
    y = product(weight, config, x, bias, None, folder, 900)
    exact = x.double() @ weight.dequantize().double().T + bias.double()
    eps = torch.finfo(native).eps
    torch.testing.assert_close(y.double(), exact, rtol=eps / 2, atol=2e-5 * float(exact.abs().max()))
