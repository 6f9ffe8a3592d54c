"""The sm80 schedule on a CPU, as C++: what GPUs other than Hopper multiply with, with the rings that they have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.emulated import COMPILER, Emulated
from helpers.emulated_dense import product

from tersor.compress import encode
from tersor.formats import get_scheme
from tersor.hardware import CHIPS
from tersor.kernels import dense, experts
from tersor.kernels.tune import experts as tune
from tersor.kernels.tune import experts_sm80, sm80
from tersor.kernels.tune.experts_problem import most_blocks
from tersor.layouts import PackedWeight, StackedWeight
from tersor.ops import Gate, routing

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
ARCHS = {"NVIDIA A100": 800, "NVIDIA GeForce RTX 3090": 860, "NVIDIA B200": 1000, "NVIDIA GeForce RTX 5090": 1200}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


def packed(oc: int, ic: int, name: str, group_size: int | None, dtype: str, seed: int = 0) -> PackedWeight:
    scheme = get_scheme(name, group_size, "bfloat16" if name == "lut3" and dtype == "bfloat16" else None)
    plain = torch.randn(oc, ic, generator=torch.Generator().manual_seed(seed))
    return PackedWeight.from_encoded(encode(plain, scheme)).to_layout(f"tiles_{dtype}")


@pytest.mark.parametrize(
    ("chip", "name", "group_size", "dtype", "n", "oc", "ic", "splits"),
    [
        ("NVIDIA A100", "fp6_e3m2", None, "float16", 5, 200, 640, 2),
        ("NVIDIA GeForce RTX 3090", "uint4", 64, "bfloat16", 50, 136, 640, 3),
        ("NVIDIA B200", "int8", 16, "float16", 33, 130, 528, 1),
        ("NVIDIA GeForce RTX 5090", "lut3", None, "bfloat16", 16, 256, 1280, 4),
        ("NVIDIA GeForce RTX 3090", "fp5_e2m2", None, "float16", 64, 128, 516, 1),  # rows not on 16 bytes
    ],
)
def test_products_are_those_of_the_decoded_weight(
    chip: str, name: str, group_size: int | None, dtype: str, n: int, oc: int, ic: int, splits: int, folder: Path
) -> None:
    weight, native = packed(oc, ic, name, group_size, dtype), DTYPES[dtype]
    problem = dense.problem_of(weight.scheme, (oc, ic), n)
    config = next(one for one in sm80.candidates(problem, CHIPS[chip]) if one.splits == splits)
    generator = torch.Generator().manual_seed(n)
    x, bias, residual = (torch.randn(*size, generator=generator).to(native) for size in ((n, ic), (oc,), (n, oc)))
    y = product(weight, config, x, bias, residual, folder, ARCHS[chip])
    exact = x.double() @ weight.dequantize().double().T + bias.double() + residual.double()
    eps = torch.finfo(native).eps
    torch.testing.assert_close(y.double(), exact, rtol=eps / 2, atol=2e-5 * float(exact.abs().max()))


EXPERTS, TOP_K, IC = 4, 2, 352
INDEX = torch.tensor([[0, 2], [2, 0], [2, 9], [0, 2], [2, 3], [2, 0], [3, 2], [2, 0], [2, 3], [2, 0], [0, 2]])
"""Of eleven tokens: expert 1 has none, expert 2 more than a block of eight, and one number is no expert."""


@pytest.mark.parametrize(
    ("chip", "name", "group_size", "tile", "splits", "gated"),
    [
        ("NVIDIA A100", "fp6_e3m2", None, 8, 2, True),
        ("NVIDIA GeForce RTX 5090", "uint4", 32, 16, 3, False),
        ("NVIDIA B200", "int4", 16, 64, 1, True),
    ],
)
def test_products_of_experts_are_those_of_the_decoded_weights(
    chip: str, name: str, group_size: int | None, tile: int, splits: int, gated: bool, folder: Path
) -> None:
    """A first product fetches the rows of tokens, a second one has those of pairs in their order."""
    rows, half = 144, torch.float16
    each = [packed(rows, IC, name, group_size, "float16", seed) for seed in range(EXPERTS)]
    weight = StackedWeight.stack(each).to_layout("tiles_float16")
    packing, gate = weight.packing, Gate.SILU if gated else None
    problem = tune.ExpertsProblem.of(packing, weight.shape, len(INDEX), TOP_K)
    config = experts_sm80.config(problem, tile, splits, CHIPS[chip])
    pairs, tables = INDEX.numel(), routing.tables(INDEX, EXPERTS, tile)
    order, _, blocks = tables.addresses
    x = torch.randn(len(INDEX), IC, generator=torch.Generator().manual_seed(1)).to(half)
    of_pairs = x[tables.order.long() // TOP_K]
    read = x if gated else of_pairs
    bias = torch.randn(EXPERTS, rows, generator=torch.Generator().manual_seed(2)).to(half)
    outputs = rows // 2 if gated else rows
    y = torch.full((pairs, outputs), torch.nan, dtype=half)
    partial = torch.full((max(1, config.floats),), torch.nan)
    arrived = torch.zeros(max(1, config.counters), dtype=torch.int32)
    source = experts.source(packing, "float16", config, int(gate or 0), False)
    launch = experts.prepare(
        Emulated(source, folder, ARCHS[chip]),  # type: ignore[arg-type]
        config,
        bf16=False,
        oc=rows,
        ic=IC,
        tokens=len(INDEX),
        top_k=TOP_K,
        gathers=gated,
        most_blocks=most_blocks(pairs, EXPERTS, tile),
        factor=packing.factor,
    )
    addresses = {"weight": weight.data, "scale": weight.scale, "bias": bias, "x": read, "y": y}
    addresses |= {"partial": partial, "arrived": arrived}
    given = {key: tensor.data_ptr() for key, tensor in addresses.items()}
    launch(stream=0, x_stride=IC, x_scale=0, order=order, blocks=blocks, early=True, **given)
    assert not arrived.any()
    numbers = INDEX.reshape(-1)[tables.order.long()]
    known = torch.nonzero(numbers < EXPERTS)[:, 0]
    products = torch.stack(
        [
            of_pairs[at].double() @ each[numbers[at]].dequantize().double().T + bias[numbers[at]].double()
            for at in known.tolist()
        ]
    )
    exact = Gate.SILU.of_rows(products) if gated else products
    assert len(known) == pairs - 1
    eps = torch.finfo(half).eps
    torch.testing.assert_close(y[known].double(), exact, rtol=eps, atol=4e-5 * float(exact.abs().max()))
