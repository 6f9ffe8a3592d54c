"""Tables of rows: what codes of `lut3` mean, which numbers a table has, and where there are none."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch

from tersor import formats, ops
from tersor.checkpoint.config import QuantizationConfig, parse_overrides
from tersor.compress import encode
from tersor.compress.hessian import INPUT_DAMPING, Hessian
from tersor.compress.statistics import HESSIAN, OUTPUT_HESSIAN, SHIFT
from tersor.compress.tables import fit_tables, nearest_codes, nearest_in, refit_tables
from tersor.errors import FormatError, NonFiniteError, UnsupportedError
from tersor.formats import Encoded, Mix, Outliers, ScaleError, Scheme, Sparse, get_scheme, outlier_columns
from tersor.layouts import PackedWeight
from tersor.layouts.packing import Packing
from tersor.layouts.shard import Part
from tersor.nn import PackedLinear

LUT3 = get_scheme("lut3")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return normal random numbers, the same for a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moments(ic: int, seed: int = 1) -> torch.Tensor:
    """Return second moments of inputs that are correlated, and of which some are loud."""
    x = random(4 * ic, ic, seed=seed) @ (torch.eye(ic) + 0.2 * random(ic, ic, seed=seed + 1) / ic**0.5)
    x *= 1 + 4 * (random(ic, seed=seed + 2) > 1)
    return x.T @ x / len(x)


def kept(scheme: Scheme = LUT3, percent: float = 5) -> Scheme:
    """Return a scheme with outliers."""
    return replace(scheme, outliers=Outliers(percent, "bfloat16"))


# What codes mean


def test_a_code_is_the_place_of_its_number_in_the_table_of_its_row() -> None:
    table = torch.tensor([[-4.0, -2, -1, -0.5, 0.25, 1, 2, 5], [0, 1, 2, 3, 4, 5, 6, 7]]).half()
    codes = torch.tensor([[7, 0, 3, 3], [5, 1, 0, 7]], dtype=torch.uint8)
    found = Encoded(LUT3, codes, table, None, 0.0, 0.0)
    assert found.dequantize().tolist() == [[5, -4, -0.5, -0.5], [5, 1, 0, 7]]
    assert torch.equal(PackedWeight.from_encoded(found).dequantize(), found.dequantize())


def test_a_scheme_counts_its_table_and_is_found_again_by_its_key() -> None:
    assert LUT3.key() == "lut3:row:float16" and Scheme.from_key(LUT3.key()) == LUT3
    assert LUT3.bits_per_weight(4096) == 3 + 8 * 16 / 4096 and LUT3.groups(4096) == 8
    assert kept(LUT3, 0.5).bits_per_weight(4096) == 3 + (8 * 16 + 20 * 32) / 4096
    assert "lut3" in formats.scheme_names() and "lut3" not in formats.names()  # its codes alone mean nothing
    with pytest.raises(FormatError, match="codes of lut3 have no values without the table"):
        LUT3.format.values()


@pytest.mark.parametrize(
    ("group_size", "scale_dtype", "message"),
    [
        (128, None, "lut3 has a table for each row, no groups of 128"),
        (None, "float32", "tables of lut3 are float16 or bfloat16, not float32"),
        (None, "e8m0", "tables of lut3 are float16 or bfloat16, not e8m0"),
    ],
)
def test_a_table_is_of_a_row_and_has_16_bit_floats(group_size: int, scale_dtype: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        get_scheme("lut3", group_size, scale_dtype)
    with pytest.raises(FormatError, match="a Microscaling block has no table"):
        get_scheme("mxlut3")
    with pytest.raises(FormatError, match="unknown format 'lut5', did you mean 'lut3'"):
        get_scheme("lut5")


def test_levels_and_pruned_weights_have_no_tables() -> None:
    with pytest.raises(FormatError, match="output features of a mix have no tables"):
        Mix((LUT3, get_scheme("int8")))
    with pytest.raises(FormatError, match="pruned weights have no tables"):
        Sparse(LUT3)


def test_a_configuration_with_tables_is_of_the_newest_version_and_read_back() -> None:
    config = QuantizationConfig(kept(), tuple(parse_overrides(["up_proj=lut3:row"], 128, None, "bfloat16")))
    raw = json.loads(json.dumps(config.to_dict()))
    assert raw["version"] == 5 and raw["overrides"]["up_proj"]["scale_dtype"] == "bfloat16"
    assert QuantizationConfig.from_dict(raw) == config
    assert QuantizationConfig(replace(get_scheme("int4"), outliers=Outliers(1, "float16"))).version == 4


# Which numbers a table has


def least_loss(row: list[float], weights: list[float], size: int) -> float:
    """Return the least weighted squared error of a row by so many numbers, over all ways to cut it once sorted."""
    pairs = sorted(zip(row, weights, strict=True))
    best = float("inf")
    for cuts in itertools.combinations(range(1, len(pairs)), size - 1):
        loss = 0.0
        for first, last in itertools.pairwise((0, *cuts, len(pairs))):
            part = pairs[first:last]
            mean = sum(w * x for x, w in part) / sum(w for _, w in part)
            loss += sum(w * (x - mean) ** 2 for x, w in part)
        best = min(best, loss)
    return best


@pytest.mark.parametrize("weighted", [False, True])
def test_a_short_row_has_the_table_of_the_least_loss(weighted: bool) -> None:
    rows = random(6, 12) * random(6, 12, seed=1).exp()
    weights = random(12, seed=2).exp() if weighted else None
    tables = fit_tables(rows, weights, 4)
    cost = torch.ones(12) if weights is None else weights
    loss = ((tables.gather(1, nearest_codes(rows, tables)) - rows).square() * cost).sum(dim=1)
    for row, found in zip(rows.tolist(), loss.tolist(), strict=True):
        assert found == pytest.approx(least_loss(row, cost.tolist(), 4), rel=1e-4)


@pytest.mark.parametrize("kind", ["normal", "heavy", "two humps"])
def test_a_long_row_is_within_a_percent_or_two_of_it(kind: str) -> None:
    rows = random(5, 600)
    if kind == "heavy":
        rows = rows * random(5, 600, seed=1).exp()
    if kind == "two humps":
        rows = 0.2 * rows + random(5, 600, seed=1).sign()
    tables = fit_tables(rows)
    found = (tables.gather(1, nearest_codes(rows, tables)) - rows).square().sum(dim=1)
    for row, loss in zip(rows.double().sort(dim=1).values, found.tolist(), strict=True):
        sums = torch.nn.functional.pad(torch.stack([row, row * row]).cumsum(1), (1, 0))
        count = torch.arange(601.0, dtype=torch.float64)
        parts = sums[:, None] - sums[:, :, None]
        cost = parts[1] - parts[0] ** 2 / (count - count[:, None]).clamp(min=1)
        cost[count < count[:, None]] = torch.inf
        best = cost[0]
        for _ in range(7):
            best = (best[:, None] + cost).amin(dim=0)
        assert loss <= 1.02 * float(best[-1])


def test_rows_of_few_different_weights_are_met_exactly() -> None:
    rows = torch.stack(
        [torch.arange(64) % 8 - 3.0, torch.full((64,), 0.5), torch.zeros(64), torch.arange(64) % 2 * 1.0]
    )
    found = encode(rows, LUT3)
    assert torch.equal(found.dequantize(), rows) and found.squared_error == 0
    assert torch.isfinite(found.scale).all() and bool((found.scale.diff(dim=1) >= 0).all())
    assert torch.equal(encode(torch.empty(0, 32), LUT3).codes, torch.empty(0, 32, dtype=torch.uint8))


def test_round_to_nearest_has_less_error_than_a_grid_of_as_many_bits() -> None:
    weight = random(32, 512)
    found = encode(weight, LUT3)
    assert found.squared_error == pytest.approx(float((found.dequantize() - weight).square().sum()), rel=1e-5)
    assert found.squared_error < 0.75 * encode(weight, get_scheme("uint3", 128)).squared_error
    assert found.squared_norm == pytest.approx(float(weight.square().sum()), rel=1e-5)


def test_what_is_not_finite_too_large_or_too_small_is_named() -> None:
    weight = random(4, 32)
    weight[2, 7] = torch.nan
    with pytest.raises(NonFiniteError) as caught:
        encode(weight, LUT3)
    assert caught.value.index == (2, 7)
    weight[2, 7] = 1e6
    with pytest.raises(ScaleError, match="row 2 is beyond float16's largest number, 65504: use bfloat16 tables"):
        encode(weight, LUT3)
    assert torch.isfinite(encode(weight, get_scheme("lut3", None, "bfloat16")).dequantize()).all()
    weight[2] = 1e-9
    assert encode(weight, LUT3).underflowed == (2,)


# Calibrated


def loss(weight: torch.Tensor, encoded: Encoded, hessian: torch.Tensor) -> float:
    """Return tr(E H E^T), H damped, by plain float64 products."""
    wide = hessian.double() + INPUT_DAMPING * float(hessian.diagonal().mean()) * torch.eye(len(hessian))
    error = weight.double() - encoded.dequantize().double()
    return float(((error @ wide) * error).sum())


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("others", [(), (SHIFT,), (SHIFT, OUTPUT_HESSIAN)])
def test_calibrated_codes_and_tables_lower_the_loss_of_a_layer(others: tuple[str, ...], outliers: bool) -> None:
    weight, hessian = random(40, 96), moments(96)
    statistics = {HESSIAN: hessian, SHIFT: 0.02 * hessian, OUTPUT_HESSIAN: moments(40, 2)}
    scheme = kept() if outliers else LUT3
    given = {name: statistics[name] for name in (HESSIAN, *others)}
    best, nearest = encode(weight, scheme, "gptq", given), encode(weight, scheme)
    assert best.objective is not None and best.objective.after <= best.objective.before
    assert best.scale.dtype == torch.float16 and bool((best.scale.diff(dim=1) >= 0).all())
    assert best.squared_error == pytest.approx(float((best.dequantize() - weight).square().sum()), rel=1e-4)
    if not others:
        assert loss(weight, best, hessian) < 0.6 * loss(weight, nearest, hessian)
        assert best.objective.after == pytest.approx(loss(weight, best, hessian), rel=1e-3)
        grid = get_scheme("uint3", 32)
        other = encode(weight, replace(grid, outliers=scheme.outliers), "gptq", given)
        assert loss(weight, best, hessian) < loss(weight, other, hessian)


def test_a_calibrated_code_alone_cannot_do_better_and_nor_can_a_table() -> None:
    """Of all codes with the table as it is, and of all tables with the codes as they are."""
    weight, matrix = random(6, 40), moments(40)
    hessian = Hessian.of(matrix, INPUT_DAMPING, HESSIAN)
    found = encode(weight, get_scheme("lut3", None, "bfloat16"), "gptq", {HESSIAN: matrix})
    error = weight - found.dequantize()
    least = ((error @ hessian.natural) * error).sum(dim=1)
    table = found.scale.float()
    for column, code in itertools.product(range(40), range(8)):
        changed = error.clone()
        changed[:, column] = weight[:, column] - table[:, code]
        assert bool((((changed @ hessian.natural) * changed).sum(dim=1) >= least * (1 - 1e-3)).all())
    values, gradient = found.dequantize().T, hessian.natural @ error.T
    fitted, places = refit_tables(values, table.T, gradient, hessian.natural)
    after = weight - fitted.gather(0, places).T
    better = ((after @ hessian.natural) * after).sum(dim=1)
    assert bool((better <= least * (1 + 1e-4)).all()) and bool((better >= 0.95 * least).all())


def test_the_equations_of_a_table_are_those_of_least_squares() -> None:
    weight, matrix = random(5, 30), moments(30).double()
    codes = torch.randint(0, 8, (5, 30), generator=torch.Generator().manual_seed(1))
    mask = (random(5, 30, seed=3) > -1).float()
    tables = random(5, 8, seed=4).sort(dim=1).values
    values = tables.gather(1, codes)
    error = weight - values * mask
    gradient = (matrix.float() @ error.T).contiguous()
    fitted, places = refit_tables(values.T, tables.T, gradient, matrix.float(), mask.T)
    for row in range(5):
        own = torch.nn.functional.one_hot(codes[row], 8).double() * mask[row].double()[:, None]
        used = own.sum(dim=0) > 0
        exact = tables[row].double()
        wanted = torch.linalg.solve(
            (own.T @ matrix @ own)[used][:, used], (own.T @ matrix @ weight[row].double())[used]
        )
        exact[used] = wanted
        torch.testing.assert_close(fitted[:, row], exact.sort().values.float(), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(fitted[:, row][places[:, row]], exact[codes[row]].float(), rtol=1e-3, atol=1e-3)


def test_the_numbers_nearest_to_a_column_are_those_of_each_row() -> None:
    tables, wanted = random(8, 50).sort(dim=0).values, random(50, seed=1)
    found = nearest_in(tables, wanted, torch.empty(50))
    expected = tables.gather(0, (tables - wanted).abs().argmin(dim=0, keepdim=True))[0]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("recipe", ["rtn", "gptq"])
def test_outliers_are_what_the_nearest_number_leaves(recipe: str) -> None:
    weight = random(20, 64)
    weight[:, 5] *= 9
    found = encode(weight, kept(), recipe, {HESSIAN: moments(64)})
    assert found.outliers is not None and found.outliers.shape == (20, 3)
    columns = outlier_columns(found.outliers)
    decoded = found.dequantize()
    torch.testing.assert_close(decoded.gather(1, columns), weight.gather(1, columns), rtol=2**-8, atol=2**-10)
    assert float((decoded - weight).square().sum()) == pytest.approx(found.squared_error, rel=1e-4)
    assert found.squared_error < encode(weight, LUT3, recipe, {HESSIAN: moments(64)}).squared_error


# Weights in memory


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_tiles_have_the_bytes_of_a_table_apart_and_give_it_back(dtype: str) -> None:
    weight = PackedWeight.from_encoded(encode(random(70, 200), get_scheme("lut3", None, dtype)))
    tiles = weight.to_layout(f"tiles_{dtype}")
    assert tiles.scale.shape == (128 * 16,) and tiles.data.numel() == 2 * 4 * 2 * 64 * 3
    first = weight.scale[0].view(torch.uint8)
    assert tiles.scale[:16].tolist() == [*first[::2].tolist(), *first[1::2].tolist()]
    back = tiles.to_layout("stream")
    assert torch.equal(back.data, weight.data) and torch.equal(back.scale, weight.scale)
    assert torch.equal(tiles.rows(0, 64).dequantize(), weight.dequantize()[:64])


def test_kernels_take_tables_of_the_dtype_of_activations_and_no_others() -> None:
    cuda, bf16 = torch.device("cuda"), get_scheme("lut3", None, "bfloat16")
    assert Packing.of(bf16, "bfloat16").factor == 1
    with pytest.raises(FormatError, match="tables of bfloat16 meet bfloat16 activations, not float16"):
        Packing.of(bf16, "float16")
    for activations in ("fp8", "int8", "int8:g128"):
        with pytest.raises(UnsupportedError, match="tables of lut3 have 16-bit floats, which meet no bytes"):
            ops.preferred_layout(bf16, torch.bfloat16, cuda, activations)


def test_weights_are_joined_taken_apart_and_cut_with_their_tables() -> None:
    first, second = (PackedWeight.from_encoded(encode(random(24, 64, seed=seed), LUT3)) for seed in (1, 2))
    whole = PackedWeight.stack([first, second])
    assert torch.equal(whole.dequantize(), torch.cat([first.dequantize(), second.dequantize()]))
    assert torch.equal(whole.split([24, 24])[1].dequantize(), second.dequantize())
    gate, up = PackedWeight.gate_up(first, second).split_gate_up()
    assert torch.equal(gate.dequantize(), first.dequantize()) and torch.equal(up.dequantize(), second.dequantize())
    part = whole.cut(Part(((3, 9), (30, 40)), (32, 64)))
    assert torch.equal(part.dequantize(), torch.cat([whole.dequantize()[3:9], whole.dequantize()[30:40]])[:, 32:])


def test_a_layer_multiplies_with_the_decoded_weight() -> None:
    weight = PackedWeight.from_encoded(encode(random(48, 64), kept()))
    layer, x = PackedLinear.from_packed(weight), random(5, 64, seed=9)
    torch.testing.assert_close(layer(x), x @ weight.dequantize().T, rtol=1e-5, atol=1e-5)
    assert layer.state_dict()["weight_scale"].shape == (48, 8)
