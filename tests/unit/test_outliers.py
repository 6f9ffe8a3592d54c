"""Outliers beside codes: which weights they are, how they are written, and what a product with them is."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import nn

from tersor import formats, ops
from tersor.checkpoint.config import Override, QuantizationConfig
from tersor.compress import encode
from tersor.compress.gptq import quantize_gptq
from tersor.compress.statistics import HESSIAN, OUTPUT_HESSIAN, SHIFT
from tersor.errors import CheckpointError, FormatError, NonFiniteError, ShapeError
from tersor.formats import (
    Encoded,
    Mix,
    Outliers,
    ScaleError,
    Scheme,
    Sparse,
    cut_outliers,
    get_scheme,
    outlier_columns,
    outlier_values,
    outlier_words,
)
from tersor.layouts import PackedWeight
from tersor.layouts.shard import Part
from tersor.nn import PackedEmbedding, PackedLinear
from tersor.ops import Gate
from tersor.ops.outliers import sums


def scheme(name: str, group_size: int | None = None, percent: float = 5, dtype: str = "bfloat16") -> Scheme:
    """Return a scheme with outliers."""
    plain = get_scheme(name, group_size)
    return Scheme(plain.format, plain.group_size, plain.scale_dtype, Outliers(percent, dtype))


def random(oc: int, ic: int, seed: int = 0) -> torch.Tensor:
    """Return a weight in bfloat16 with a few large numbers in it."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(oc, ic, generator=generator)
    return torch.where(torch.rand(oc, ic, generator=generator) < 0.02, 8 * weight, weight).bfloat16()


def moments(ic: int, seed: int = 1) -> torch.Tensor:
    """Return second moments of inputs that are correlated, and of which some are loud."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * ic, ic, generator=generator) @ (
        torch.eye(ic) + 0.2 * torch.randn(ic, ic, generator=generator) / math.sqrt(ic)
    )
    x *= 1 + 4 * (torch.rand(ic, generator=generator) < 0.1)
    return x.T @ x / len(x)


def packed(name: str = "int4", oc: int = 24, ic: int = 64, group_size: int | None = 32, seed: int = 0) -> PackedWeight:
    """Return a packed weight with outliers."""
    return PackedWeight.from_encoded(encode(random(oc, ic, seed), scheme(name, group_size)))


# How they are written


def test_a_word_has_the_column_in_its_lower_half_and_the_weight_in_its_upper() -> None:
    words = outlier_words(torch.tensor([[3, 65535]]), torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16))
    assert [word & 0xFFFFFFFF for word in words[0].tolist()] == [0x3FC00003, 0xC000FFFF]
    assert outlier_columns(words).tolist() == [[3, 65535]]
    assert outlier_values(words, "bfloat16").tolist() == [[1.5, -2.0]]


def test_a_scheme_says_its_outliers_counts_them_and_is_found_again_by_its_key() -> None:
    found = scheme("fp6_e2m3", None, 0.5, "float16")
    assert found.key() == "fp6_e2m3:row:float16:0.5%:float16" and Scheme.from_key(found.key()) == found
    assert found.dense == get_scheme("fp6_e2m3") and found.dense.dense == found.dense
    outliers = found.outliers
    assert outliers is not None and [outliers.per_row(ic) for ic in (16, 100, 300, 4096)] == [1, 1, 2, 20]
    assert found.bits_per_weight(4096) == 6 + (16 + 20 * 32) / 4096


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("60%", "outliers of 60 % are not more than 0 and at most 10 %"),
        ("0%", "outliers of 0 % are not more than 0"),
        ("0.5", "outliers '0.5' are not a share of the weights such as '0.5%'"),
        ("-1%", "are not a share"),
        ("half", "are not a share"),
    ],
)
def test_what_is_no_share_is_refused_with_a_line(text: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        Outliers.parse(text, "float16")
    assert Outliers.parse(" 0.5 %", "float16") == Outliers(0.5, "float16")


def test_rows_beyond_what_a_column_counts_mixes_and_sparse_values_have_none() -> None:
    with pytest.raises(FormatError, match="16 bits for their column, and rows have 65537"):
        Outliers(1, "float16").per_row(65537)
    with pytest.raises(FormatError, match="keep no outliers"):
        Mix((scheme("int4"), get_scheme("int8")))
    with pytest.raises(FormatError, match="pruned weights keep no outliers"):
        Sparse(scheme("int4"))
    with pytest.raises(FormatError, match="float16 or bfloat16, not 'float32'"):
        Outliers(1, "float32")


def test_a_configuration_says_them_as_version_4_and_reads_them_strictly() -> None:
    config = QuantizationConfig(scheme("int4", 32, 0.5), (Override("down_proj", get_scheme("int8")),))
    raw = json.loads(json.dumps(config.to_dict()))
    assert raw["version"] == 4 and raw["outliers"] == {"percent": 0.5, "dtype": "bfloat16"}
    assert "outliers" not in raw["overrides"]["down_proj"]
    assert QuantizationConfig.from_dict(raw) == config
    assert QuantizationConfig(get_scheme("int4")).to_dict()["version"] == 1
    wrong: list[tuple[Any, str]] = [
        ("0.5%", "not an object"),
        ({"percent": 0.5}, "outliers: dtype missing"),
        ({"percent": "0.5", "dtype": "float16"}, "expected a number percent"),
        ({"percent": 0.5, "dtype": "float16", "rows": 1}, "outliers: unknown key 'rows'"),
        ({"percent": 60, "dtype": "float16"}, "outliers of 60 %"),
    ]
    for value, message in wrong:
        with pytest.raises((CheckpointError, FormatError), match=message):
            QuantizationConfig.from_dict({**raw, "outliers": value})


# Which weights they are


def nearest_without(weight: list[float], count: int, group: int) -> tuple[list[int], list[float]]:
    """Return the columns of the `count` largest of a row, and its int4 weights with scales of what is left."""
    kept = sorted(sorted(range(len(weight)), key=lambda at: -abs(weight[at]))[:count])
    found = []
    for first in range(0, len(weight), group):
        own = [0.0 if at in kept else weight[at] for at in range(first, first + group)]
        scale = float(torch.tensor(max(map(abs, own)) / 7).half())
        found += [scale * max(-8, min(7, round(value / scale))) if value else 0.0 for value in own]
    return kept, [weight[at] if at in kept else value for at, value in enumerate(found)]


def test_without_statistics_the_largest_are_kept_and_scales_are_those_of_the_others() -> None:
    weight = random(6, 64)
    found = encode(weight, scheme("int4", 16, 5))
    assert found.outliers is not None and found.outliers.shape == (6, 3)
    for row, own in enumerate(weight.float().tolist()):
        kept, decoded = nearest_without(own, 3, 16)
        assert outlier_columns(found.outliers[row]).tolist() == kept
        assert found.dequantize()[row].tolist() == pytest.approx(decoded, abs=1e-6)
    error = (found.dequantize() - weight.float()).square().sum()
    assert found.squared_error == pytest.approx(float(error), rel=1e-5)
    assert found.squared_norm == pytest.approx(float(weight.double().square().sum()), rel=1e-6)
    assert found.squared_error < 0.6 * encode(weight, get_scheme("int4", 16)).squared_error


@pytest.mark.parametrize("name", sorted(set(formats.scheme_names()) - set(formats.LUTS)))  # test_tables.py has those
@pytest.mark.parametrize("recipe", ["rtn", "gptq"])
def test_outliers_keep_their_bits_and_codes_are_zero_there(name: str, recipe: str) -> None:
    weight = random(20, 64)
    found = encode(weight, scheme(name, None), recipe, {HESSIAN: moments(64)})
    assert found.outliers is not None
    columns = outlier_columns(found.outliers)
    values = outlier_values(found.outliers, "bfloat16")
    assert torch.equal(values.view(torch.int16), weight.gather(1, columns).view(torch.int16))
    assert torch.equal(found.dequantize().gather(1, columns), values.float())
    dense = Encoded(found.scheme.dense, found.codes, found.scale, found.zero_point, 0.0, 0.0).dequantize()
    assert not dense.gather(1, columns).any()
    assert (columns.diff(dim=1) > 0).all()


def lost(row: torch.Tensor, without: list[int], energy: torch.Tensor) -> list[float]:
    """Return what every weight of a row loses on int4 codes, with the scale that is best for all but some."""
    rest = row.clone()
    rest[without] = 0.0
    best = (math.inf, 0.0)
    for percent in range(100, 39, -2):
        scale = float((rest.abs().max() / 7 * (percent / 100)).half())
        own = (rest - scale * (rest / scale).round().clamp(-8, 7)).square() * energy
        best = min(best, (float(own.sum()), scale), key=lambda pair: pair[0])
    values: list[float] = ((row - best[1] * (row / best[1]).round().clamp(-8, 7)).square() * energy).tolist()
    return values


def test_with_statistics_those_are_kept_on_which_the_outputs_lose_most() -> None:
    weight, hessian = random(8, 48), moments(48)
    found = quantize_gptq(weight, scheme("int4", None, 5), {HESSIAN: hessian})
    energy = hessian.diagonal() / hessian.diagonal().mean() + 0.01
    assert found.outliers is not None
    others = 0
    for row, own in enumerate(weight.float()):
        kept = largest = sorted(range(48), key=lambda at: -abs(float(own[at])))[:2]
        best = (math.inf, kept)
        for _ in range(4):
            values = lost(own, kept, energy)
            best = min(best, (sum(values) - sum(values[at] for at in kept), kept), key=lambda pair: pair[0])
            kept = sorted(range(48), key=lambda at: -values[at])[:2]
        assert outlier_columns(found.outliers[row]).tolist() == sorted(best[1])
        others += sorted(best[1]) != sorted(largest)
    assert others  # where inputs are loud, smaller weights matter more


@pytest.mark.parametrize("others", [(), (SHIFT,), (SHIFT, OUTPUT_HESSIAN)])
def test_calibrated_outliers_lower_the_loss_of_a_layer(others: tuple[str, ...]) -> None:
    weight, hessian = random(40, 64), moments(64)
    statistics = {HESSIAN: hessian, SHIFT: 0.02 * hessian, OUTPUT_HESSIAN: moments(40, 2)}
    given = {name: statistics[name] for name in (HESSIAN, *others)}

    def loss(found: Encoded) -> float:
        error = (found.dequantize() - weight.float()).double()
        return float(((error @ hessian.double()) * error).sum())

    kept = encode(weight, scheme("int4", 32, 3), "gptq", given)
    assert loss(kept) < 0.85 * loss(encode(weight, get_scheme("int4", 32), "gptq", given))
    assert kept.objective is not None and kept.objective.after <= kept.objective.before
    if not others:
        rounded = encode(weight, scheme("int4", 32, 3))
        assert loss(kept) < 0.8 * loss(rounded)
        assert kept.objective.after == pytest.approx(loss(kept), rel=0.1)  # the objective is damped


def test_what_is_not_finite_or_no_outlier_of_the_dtype_is_named_by_its_place() -> None:
    weight = random(4, 32)
    weight[2, 7] = torch.inf
    with pytest.raises(NonFiniteError) as caught:
        encode(weight, scheme("int4"))
    assert caught.value.index == (2, 7)
    weight[2, 7] = 1e6
    with pytest.raises(ScaleError, match="an outlier in row 2 is beyond float16's largest"):
        encode(weight, scheme("int4", dtype="float16"))


def test_rows_of_zeros_and_rows_shorter_than_a_share_keep_one_weight() -> None:
    weight = torch.zeros(3, 32, dtype=torch.bfloat16)
    weight[1, 5] = 2.0
    found = encode(weight, scheme("uint4", None, 0.5))
    assert found.outliers is not None and found.outliers.shape == (3, 1)
    assert torch.equal(found.dequantize(), weight.float())


# Weights in memory


def test_weights_are_joined_taken_apart_and_laid_out_with_their_outliers() -> None:
    first, second = packed("uint4"), packed("uint4", oc=16, seed=1)
    whole = PackedWeight.stack([first, second])
    assert torch.equal(whole.dequantize(), torch.cat([first.dequantize(), second.dequantize()]))
    parts = whole.split([24, 16])
    assert torch.equal(parts[1].dequantize(), second.dequantize())
    assert torch.equal(whole.rows(8, 32).dequantize(), whole.dequantize()[8:32])
    up = packed("uint4", seed=2)
    gate, again = PackedWeight.gate_up(first, up).split_gate_up()
    assert torch.equal(gate.dequantize(), first.dequantize()) and torch.equal(again.dequantize(), up.dequantize())
    tiles = whole.to_layout("tiles_float16")
    assert tiles.outliers is whole.outliers and torch.equal(tiles.dequantize(), whole.dequantize())
    back = tiles.to_layout("stream")
    assert torch.equal(back.data, whole.data) and torch.equal(back.scale, whole.scale)
    assert whole.nbytes == whole.dense.nbytes + 4 * 40 * 3
    with pytest.raises(ShapeError, match="comes with no outliers"):
        PackedWeight(first.scheme, first.shape, first.data, first.scale, first.zero_point)
    with pytest.raises(ShapeError, match="comes with outliers"):
        PackedWeight(
            first.scheme.dense, first.shape, first.data, first.scale, first.zero_point, outliers=first.outliers
        )


def test_outliers_of_some_columns_are_those_in_them() -> None:
    words = outlier_words(
        torch.tensor([[1, 40, 41], [0, 2, 3], [33, 50, 63]]), torch.arange(1.0, 10).view(3, 3).bfloat16()
    )
    left, right = cut_outliers(words, (0, 32)), cut_outliers(words, (32, 64))
    assert outlier_columns(left).tolist() == [[1, 0, 0], [0, 2, 3], [0, 0, 0]]
    assert outlier_values(left, "bfloat16").tolist() == [[1, 0, 0], [4, 5, 6], [0, 0, 0]]
    assert outlier_columns(right).tolist() == [[8, 9, 0], [0, 0, 0], [1, 18, 31]]
    assert cut_outliers(words, (4, 8)).tolist() == [[0], [0], [0]]


def test_cuts_whose_rows_keep_different_numbers_of_outliers_are_joined() -> None:
    parts = [packed(oc=2, seed=seed).cut(Part(columns=(0, 32))) for seed in (0, 2)]
    kept = [part.outliers.shape[1] for part in parts if part.outliers is not None]
    assert len(set(kept)) == 2
    decoded = [part.dequantize() for part in parts]
    assert torch.equal(PackedWeight.stack(parts).dequantize(), torch.cat(decoded))
    gate, up = PackedWeight.gate_up(*parts).split_gate_up()
    assert torch.equal(gate.dequantize(), decoded[0]) and torch.equal(up.dequantize(), decoded[1])


# Products


@pytest.mark.parametrize("layout", ["stream", "tiles_float16"])
def test_a_product_is_that_of_the_decoded_weight(layout: str) -> None:
    weight = packed("uint4", oc=40, ic=96).to_layout(layout)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 3, 96, generator=generator)
    bias, residual = torch.randn(40, generator=generator), torch.randn(2, 3, 40, generator=generator)
    expected = x.double() @ weight.dequantize().double().T + bias + residual
    torch.testing.assert_close(ops.linear(x, weight, bias, residual=residual).double(), expected, rtol=1e-5, atol=1e-5)
    half = ops.linear(x.half(), weight, bias.half(), residual=residual.half())
    wide = x.half().double() @ weight.dequantize().double().T + bias.half() + residual.half()
    assert half.dtype == torch.float16 and torch.equal(
        half, ops.linear(x.half(), weight, bias.half(), residual=residual.half())
    )
    torch.testing.assert_close(half.double(), wide, rtol=2**-10, atol=1e-3)
    assert torch.allclose(
        sums(x, weight).double(),
        expected - bias - residual - x.double() @ weight.dense.dequantize().double().T,
        atol=1e-4,
    )
    assert ops.linear(x[:, :0], weight).shape == (2, 0, 40)


def test_gate_and_up_become_one_after_their_outliers() -> None:
    gate, up = packed("fp4_e2m1", group_size=None), packed("fp4_e2m1", group_size=None, seed=1)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(2))
    found = ops.gated_linear(x, PackedWeight.gate_up(gate, up), gate=Gate.SILU)
    expected = nn.functional.silu(x @ gate.dequantize().T) * (x @ up.dequantize().T)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_gradients_autocast_and_traces_see_the_outliers() -> None:
    layer = PackedLinear.from_packed(packed(), torch.ones(24))
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    y = layer(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, layer.weight.sum(0).expand_as(x), rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        cast = layer(x)
    assert cast.dtype == torch.bfloat16
    torch.testing.assert_close(cast.float(), y, rtol=2**-6, atol=0.1)
    traced = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(traced(x), y, rtol=1e-5, atol=1e-5)


def test_a_state_dict_has_them_and_an_embedding_does_not() -> None:
    layer = PackedLinear.from_packed(packed().to_layout("tiles_float16"))
    state = layer.state_dict()
    assert set(state) == {"weight_packed", "weight_scale", "weight_outliers"}
    other = PackedLinear(64, 24, layer.scheme)
    other.load_state_dict(state)
    assert torch.equal(other.weight, layer.weight)
    assert other.half().weight_outliers is not None and other.weight_outliers.dtype == torch.int32
    assert other.stored_bits == 8 * sum(tensor.nbytes for tensor in state.values())
    with pytest.raises(RuntimeError, match=r"weight_outliers is torch\.int32"):
        other.load_state_dict({**state, "weight_outliers": state["weight_outliers"][:, :1]})
    with pytest.raises(FormatError, match="a PackedEmbedding keeps no outliers"):
        PackedEmbedding(24, 64, layer.scheme)
