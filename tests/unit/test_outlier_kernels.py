"""The kernels that sum up outliers, on a CPU as C++, against a plain product."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.emulated import COMPILER, HERE, Emulated

from tersor.formats import get_scheme, outlier_words
from tersor.hardware import CHIPS
from tersor.kernels import dense, outliers
from tersor.kernels.jit import KernelSource
from tersor.kernels.tune import sm90
from tersor.layouts.packing import Packing

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
H200 = CHIPS["NVIDIA H200"]
TILES = {
    "8 tokens, two warpgroups in turn": sm90.Tile(8, 1, 2, 1, 2),
    "16 tokens, four in turn": sm90.Tile(16, 2, 2, 1, 1),
    "32 tokens": sm90.Tile(32, 2, 2, 1, 1),
    "48 tokens, wgmma": sm90.Tile(48, 3, 1, 1, 1),
}


def _sums(
    folder: Path, x: torch.Tensor, words: torch.Tensor, kept: str, residual: torch.Tensor | None, stride: int
) -> torch.Tensor:
    """Return what the kernels make of x [n, ic], whose rows lie `stride` apart."""
    (n, ic), (oc, count), target = x.shape, words.shape, str(x.dtype).removeprefix("torch.")
    tokens = outliers.tile(n)
    address = x.data_ptr()
    turned = torch.full((ic, outliers.turned_stride(n)), torch.nan, dtype=x.dtype)
    if tokens == outliers.TURNED:
        turn = outliers.prepare_turn(Emulated(outliers.turn_source(), folder, 900), ic=ic, n=n)  # type: ignore[arg-type]
        turn(stream=0, x=address, stride=stride, turned=turned.data_ptr(), early=True)
        assert torch.equal(turned[:, :n], x.T) and not turned[:, n:].any()
        address, stride = turned.data_ptr(), turned.stride(0)
    function = Emulated(outliers.sums_source(target, kept, tokens), folder, 900)
    launch = outliers.prepare_sums(function, count=count, oc=oc, n=n)  # type: ignore[arg-type]
    out = torch.full((n, oc), torch.nan, dtype=x.dtype)
    added = 0 if residual is None else residual.data_ptr()
    launch(stream=0, x=address, stride=stride, words=words.data_ptr(), residual=added, out=out.data_ptr(), early=True)
    return out


@pytest.mark.parametrize(
    ("n", "oc", "ic", "count", "dtype", "kept", "added"),
    [
        (1, 70, 300, 2, "bfloat16", "bfloat16", False),
        (2, 64, 96, 33, "float16", "bfloat16", True),
        (3, 5, 1000, 40, "float16", "float16", True),
        (5, 130, 257, 1, "bfloat16", "float16", True),
        (19, 66, 64, 64, "float16", "float16", False),
    ],
)
def test_outliers_are_summed_up_with_the_residual_and_rounded_once(
    n: int, oc: int, ic: int, count: int, dtype: str, kept: str, added: bool, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(n)
    long = torch.randn(n, ic + 8, generator=generator).to(_DTYPES[dtype])
    x = long[:, :ic]  # rows are longer
    columns = torch.stack([torch.randperm(ic, generator=generator)[:count].sort().values for _ in range(oc)])
    values = torch.randn(oc, count, generator=generator).to(_DTYPES[kept])
    residual = torch.randn(n, oc, generator=generator).to(_DTYPES[dtype]) if added else None
    dense = torch.zeros(oc, ic, dtype=torch.float64).scatter_(1, columns, values.double())
    expected = x.double() @ dense.T + (0.0 if residual is None else residual.double())
    found = _sums(tmp_path, x, outlier_words(columns, values), kept, residual, long.stride(0))
    eps = torch.finfo(_DTYPES[dtype]).eps
    torch.testing.assert_close(found.double(), expected, rtol=eps / 2 + 1e-6, atol=1e-5)


def test_a_token_has_the_same_sums_whatever_the_number_of_tokens(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(9, 200, generator=generator).half()
    columns = torch.stack([torch.randperm(200, generator=generator)[:50] for _ in range(66)])
    words = outlier_words(columns, torch.randn(66, 50, generator=generator).half())
    many = _sums(tmp_path, x, words, "float16", None, 200)
    for n in (1, 2, 4):
        assert torch.equal(_sums(tmp_path, x[:n].contiguous(), words, "float16", None, 200), many[:n])


def test_what_is_not_finite_reaches_the_rows_whose_outliers_meet_it_and_no_others(tmp_path: Path) -> None:
    x = torch.ones(1, 64, dtype=torch.float16)
    x[0, 0] = torch.inf
    columns = torch.arange(1, 41).repeat(3, 1)
    columns[1, 0] = 0
    words = outlier_words(columns, torch.ones(3, 40, dtype=torch.float16))
    found = _sums(tmp_path, x, words, "float16", None, 64)
    assert found.tolist() == [[40.0, torch.inf, 40.0]]


def test_kernels_of_a_call_are_those_that_its_numbers_of_tokens_ask_for() -> None:
    assert [outliers.tile(n) for n in (1, 2, 3, 4, 5, 4096)] == [1, 2, 4, 4, 8, 8]
    names = [source.name for source in outliers.sources("float16", "bfloat16", 2)]
    assert names == ["tersor_outlier_sums_float16_bfloat16_1", "tersor_outlier_sums_float16_bfloat16_2"]
    assert outliers.turn_source() in outliers.sources("float16", "bfloat16", 64)
    assert len(outliers.sources("float16", "bfloat16", 64)) == 5


# Added by the dense kernel itself


@pytest.mark.parametrize(
    ("name", "n", "count", "dtype", "kept", "gated"),
    [
        ("8 tokens, two warpgroups in turn", 1, 20, "bfloat16", "bfloat16", False),
        ("8 tokens, two warpgroups in turn", 4, 3, "float16", "bfloat16", True),
        ("8 tokens, two warpgroups in turn", 7, 41, "bfloat16", "float16", True),
        ("16 tokens, four in turn", 11, 33, "float16", "float16", False),
        ("32 tokens", 20, 5, "bfloat16", "bfloat16", False),
        ("48 tokens, wgmma", 48, 17, "float16", "float16", True),
    ],
)
def test_the_end_of_a_dense_kernel_adds_outliers_to_its_sums_ahead_of_the_gate(
    name: str, n: int, count: int, dtype: str, kept: str, gated: bool, tmp_path: Path
) -> None:
    tile, native = TILES[name], _DTYPES[dtype]
    packing = Packing.of(get_scheme("fp6_e3m2"), dtype)
    slots, shared = tile.slots(6, packing.scale_row_bytes, H200), tile.shared_bytes(6, packing.scale_row_bytes, H200)
    source = dense.sm90_source(packing, dtype, tile, slots, shared, int(gated), outliers=kept)
    header = "emulated_store.cuh"
    texts = {header: (HERE / header).read_text()}
    store = KernelSource("store", header, source.parameters, "PPPPPPPPiiiffPPii", texts)
    function, generator = Emulated(store, tmp_path, 900), torch.Generator().manual_seed(n)
    for oc in (64, 328 if not gated else 336):
        ic, ctas = 200, -(-oc // tile.rows)
        given = torch.randn(ctas * tile.rows, tile.tokens, generator=generator)
        scales = torch.rand(ctas * tile.rows, generator=generator)
        bias = torch.randn(oc, generator=generator).to(native)
        outputs = oc // 2 if gated else oc
        residual = torch.randn(n, outputs, generator=generator).to(native)
        x = torch.randn(n, ic, generator=generator).to(native)
        columns = torch.stack([torch.randperm(ic, generator=generator)[:count] for _ in range(oc)])
        values = torch.randn(oc, count, generator=generator).to(_DTYPES[kept])
        words = outlier_words(columns, values)
        held = x
        if n > 4:
            held = torch.zeros(ic, outliers.turned_stride(n), dtype=native)
            held[:, :n] = x.T
        y = torch.full((n, outputs), torch.nan, dtype=native)
        places = (given, scales, bias, residual, y)
        addresses = (*(one.data_ptr() for one in places), 0, 0, 0)
        beside = (words.data_ptr(), held.data_ptr(), count, held.stride(0))
        function.launch((ctas, 1, 1), (128 * tile.row_groups, 1, 1), 0, 0, (*addresses, oc, 0, n, 0.0, 0.0, *beside))
        sparse = torch.zeros(oc, ic, dtype=torch.float64).scatter_(1, columns, values.double())
        exact = (given[:oc, :n] * scales[:oc, None]).T.double() + bias.double() + x.double() @ sparse.T
        if gated:
            gate, up = exact.unflatten(1, (-1, 2, 8)).unbind(2)
            exact = (torch.nn.functional.silu(gate) * up).flatten(1)
        exact = exact + residual.double()
        torch.testing.assert_close(y.double(), exact, rtol=torch.finfo(native).eps, atol=1e-5)


def test_kernels_of_few_tokens_are_known_by_their_outliers() -> None:
    packing, tile = Packing.of(get_scheme("int4", 128), "float16"), TILES["16 tokens, four in turn"]
    slots = tile.slots(4, packing.scale_row_bytes, H200)
    shared = tile.shared_bytes(4, packing.scale_row_bytes, H200)
    plain, beside = (
        dense.sm90_source(packing, "float16", tile, slots, shared, outliers=kept) for kept in ("", "bfloat16")
    )
    assert beside.name == f"{plain.name}_beside_bfloat16"
    assert (plain.parameters["OUTLIERS"], beside.parameters["OUTLIERS"]) == (0, 2)
