"""Refined GPTQ: never worse than round to nearest, equal to a plain loop, at a minimum of each code and scale alone."""

from __future__ import annotations

import itertools

import pytest
import torch

from tersor import formats
from tersor.compress import encode
from tersor.compress.gptq import quantize_gptq
from tersor.compress.grid import Grid
from tersor.compress.hessian import INPUT_DAMPING, Hessian, exact_products
from tersor.compress.refine import Layer
from tersor.compress.sweeps import BLOCK, Choice, round_columns
from tersor.errors import InputError, NonFiniteError
from tersor.formats import Encoded, Scheme

SCHEMES = [
    formats.get_scheme("uint4", 8),
    formats.get_scheme("int3", 8),
    formats.get_scheme("uint2"),
    formats.get_scheme("fp4_e2m1"),
    formats.get_scheme("fp6_e2m3", 16, "bfloat16"),
    formats.get_scheme("fp3_e2m0", 8, "float32"),
    formats.get_scheme("mxfp4_e2m1"),
    formats.get_scheme("mxint8"),
]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return normal random numbers, the same for a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(tokens: int, channels: int, seed: int = 0) -> torch.Tensor:
    """Return inputs [tokens, channels] whose channels depend on each other and differ in size."""
    mixing = random(channels, channels, seed=seed + 1) * torch.linspace(0.1, 2, channels)
    return random(tokens, channels, seed=seed) @ mixing / channels**0.5


def moments(x: torch.Tensor) -> torch.Tensor:
    """Return the mean of x x^T."""
    return x.T @ x / len(x)


def damped(matrix: torch.Tensor, damping: float = INPUT_DAMPING) -> torch.Tensor:
    """Return the matrix that the loss is measured by, float64."""
    wide = matrix.double()
    return wide + damping * float(wide.diagonal().mean()) * torch.eye(len(wide), dtype=torch.float64)


def loss(weight: torch.Tensor, encoded: Encoded, hessian: torch.Tensor) -> float:
    """Return tr(E H E^T), H damped, by plain float64 products."""
    error = weight.double() - encoded.dequantize().double()
    return float(((error @ damped(hessian)) * error).sum())


def layer_of(scheme: Scheme, hessian: torch.Tensor) -> Layer:
    """Return what rows of float32 weights share."""
    grid = Grid.of(scheme, len(hessian), torch.float32, torch.device("cpu"))
    return Layer.of(grid, Hessian.of(hessian, INPUT_DAMPING, "hessian"))


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.key())
def test_the_loss_falls_well_below_that_of_round_to_nearest_and_is_what_the_result_says(scheme: Scheme) -> None:
    weight, hessian = random(24, 64), moments(correlated(256, 64))
    nearest, best = encode(weight, scheme), encode(weight, scheme, "gptq", {"hessian": hessian})
    before, after = loss(weight, nearest, hessian), loss(weight, best, hessian)
    assert after < 0.7 * before
    assert best.objective is not None
    assert best.objective.before == pytest.approx(before, rel=1e-3)
    assert best.objective.after == pytest.approx(after, rel=1e-3)
    assert best.scale.dtype == nearest.scale.dtype
    error = (best.dequantize().double() - weight.double()).square().sum()
    assert best.squared_error == pytest.approx(float(error), rel=1e-5)


@pytest.mark.parametrize("name", ["uint3", "fp5_e2m2"])
def test_columns_are_rounded_as_a_plain_loop_rounds_them(name: str) -> None:
    channels, rows = BLOCK + 32, 6
    hessian = moments(correlated(400, channels))
    layer = layer_of(formats.get_scheme(name, 32), hessian)
    weight = random(rows, channels)
    scale, zero_point = layer.grid.search(weight, layer.hessian.weights())
    values = round_columns(layer.columns(weight), scale.T, zero_point.T, layer.grid, layer.hessian, layer.groups)

    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    inverse = torch.linalg.inv(damped(hessian)[order][:, order])
    rest = weight.double()[:, order]
    expected = torch.empty(rows, channels)
    fmt = layer.grid.scheme.format
    for column in range(channels):
        group = int(order[column]) // 32
        steps, zeros = scale[:, group].double(), zero_point[:, group].double()
        code = fmt.encode((rest[:, column] / steps).round() + zeros if name == "uint3" else rest[:, column] / steps)
        expected[:, column] = fmt.decode(code) - zeros
        lost = (rest[:, column] - expected[:, column] * steps) / inverse[column, column]
        rest -= lost.unsqueeze(1) * inverse[column]
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    assert torch.equal(values.T, expected)


@pytest.mark.parametrize("name", ["uint2", "int2", "fp3_e2m0"])
def test_a_tiny_layer_comes_near_the_best_of_all_codes(name: str) -> None:
    scheme, channels = formats.get_scheme(name, scale_dtype="float32"), 4
    hessian = moments(correlated(64, channels))
    weight = random(12, channels)
    best = encode(weight, scheme, "gptq", {"hessian": hessian})
    values = torch.tensor(list(itertools.product(scheme.format.values().unique().tolist(), repeat=channels)))
    matrix = damped(hessian)
    total = 0.0
    for row in range(len(weight)):
        zero = float(best.zero_point[row, 0]) if best.zero_point is not None else 0.0
        error = weight[row].double() - (values.double() - zero) * float(best.scale[row, 0])
        total += float(((error @ matrix) * error).sum(dim=1).min())
    assert total * (1 - 1e-6) <= loss(weight, best, hessian) <= 1.15 * total


def test_no_code_alone_and_no_scale_alone_can_do_better() -> None:
    scheme = formats.get_scheme("fp4_e2m1", 8, "float32")
    hessian = moments(correlated(256, 32))
    layer = layer_of(scheme, hessian)
    target = layer.columns(random(4, 32))
    best = layer.refine(target)
    for _ in range(20):
        best = layer.polish(target, best)
    matrix, error = layer.hessian.ordered.double(), (target - best.choice.decoded(layer.groups)).double()
    lost = ((matrix @ error) * error).sum(dim=0)
    for column, value in itertools.product(range(32), scheme.format.values().tolist()):
        moved = error.clone()
        moved[column] += (best.choice.values[column] - value) * best.choice.scale[layer.groups[column]]
        assert bool((((matrix @ moved) * moved).sum(dim=0) >= lost * (1 - 1e-5)).all())
    for group, factor in itertools.product(range(4), (0.98, 1.02)):
        scale = best.choice.scale.clone()
        scale[group] *= factor
        other = layer.judge(target, Choice(best.choice.values, scale, best.choice.zero_point))
        assert bool((other.loss >= best.loss * (1 - 1e-5)).all())


def test_channels_that_do_not_depend_on_each_other_are_rounded_to_the_nearest_value_of_their_scale() -> None:
    scheme = formats.get_scheme("int4", 16, "float32")
    weight = random(8, 32)
    best = encode(weight, scheme, "gptq", {"hessian": torch.diag(torch.linspace(3, 0.1, 32))})
    scaled = weight.view(8, 2, 16) / best.scale.unsqueeze(2)
    assert torch.equal(best.codes, scheme.format.encode(scaled.view(8, 32)))


def hostile(kind: str, channels: int) -> torch.Tensor:
    """Return a second-moment matrix of the kind."""
    x = correlated(3 if kind == "singular" else 4 * channels, channels, seed=len(kind))
    if kind == "dead channels":
        x[:, ::3] = 0
    elif kind == "outlier channel":
        x[:, 5] *= 1e4
    elif kind == "twins":
        x[:, 1::2] = x[:, ::2]
    elif kind == "heavy tails":
        x = x * torch.exp(3 * random(len(x), 1, seed=9))
    elif kind == "one direction":
        x = x[:, :1] * torch.linspace(-1, 1, channels)
    elif kind == "nothing":
        x = torch.zeros_like(x)
    elif kind == "tiny":
        x = x * 1e-15
    elif kind == "huge":
        x = x * 1e15
    return moments(x)


KINDS = "singular;dead channels;outlier channel;twins;heavy tails;one direction;nothing;tiny;huge"


@pytest.mark.parametrize("kind", KINDS.split(";"))
@pytest.mark.parametrize("both", [False, True], ids=["inputs", "both sides"])
def test_no_statistics_make_a_layer_worse_than_round_to_nearest(kind: str, both: bool) -> None:
    statistics = {"hessian": hostile(kind, 32)}
    if both:
        statistics["output_hessian"] = hostile(kind, 20)
    for scheme in (SCHEMES[0], SCHEMES[3], SCHEMES[6]):
        weight = random(20, 32, seed=3) * torch.exp(2 * random(20, 1, seed=4))
        weight[7] = 0
        best = encode(weight, scheme, "gptq", statistics)
        assert best.objective is not None
        assert 0 <= best.objective.after <= best.objective.before < float("inf")
        decoded = best.dequantize()
        assert bool(torch.isfinite(decoded).all())
        assert float(decoded.abs().max()) < 3 * float(weight.abs().max())


def test_a_layer_without_tokens_loses_least_in_its_weights() -> None:
    scheme, weight = formats.get_scheme("uint4", 16), random(16, 64)
    best = encode(weight, scheme, "gptq", {"hessian": torch.zeros(64, 64)})
    assert best.squared_error < 0.95 * encode(weight, scheme).squared_error


def test_a_dead_channel_changes_nothing_for_the_others() -> None:
    weight, x = random(16, 32), correlated(256, 32)
    x[:, 10] = 0
    other = weight.clone()
    other[:, 10] = 0.01
    scheme = formats.get_scheme("fp6_e3m2", scale_dtype="float32")
    codes = [encode(w, scheme, "gptq", {"hessian": moments(x)}).dequantize() for w in (weight, other)]
    alive = torch.arange(32) != 10
    far = (codes[0] - codes[1])[:, alive].abs().max()
    assert float(far) < 0.2 * float(weight.abs().max())


def test_the_shift_brings_outputs_nearer_to_the_original_models() -> None:
    scheme, weight = formats.get_scheme("int4", 16), random(32, 48)
    x = correlated(1024, 48)
    original = x + 0.3 * torch.roll(x, 1, dims=1)
    statistics = {"hessian": moments(x), "shift": (original - x).T @ x / len(x)}
    outputs = original @ weight.T
    errors = [
        float((x @ encode(weight, scheme, "gptq", given).dequantize().T - outputs).square().sum())
        for given in ({"hessian": statistics["hessian"]}, statistics)
    ]
    assert errors[1] < 0.6 * errors[0]


def test_a_shift_that_belongs_to_other_tokens_cannot_blow_a_weight_up() -> None:
    weight, hessian = random(16, 32), moments(correlated(256, 32))
    shift = 1e6 * random(32, 32, seed=5)
    best = encode(weight, formats.get_scheme("uint4", 16), "gptq", {"hessian": hessian, "shift": shift})
    change = best.dequantize() - weight
    own, moved = (float(((part @ damped(hessian).float()) * part).sum()) for part in (weight, change))
    assert moved < 0.5 * own


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_largest_weights_of_a_dtype_stay_within_it(dtype: torch.dtype) -> None:
    weight = (random(8, 32).sign() * torch.finfo(dtype).max * 0.99).to(dtype)
    best = encode(weight, formats.get_scheme("fp6_e2m3", scale_dtype="float32"), "gptq", {"hessian": torch.eye(32)})
    assert bool(best.dequantize().to(dtype).isfinite().all())


def test_wrong_statistics_are_named() -> None:
    scheme, weight = formats.get_scheme("int4"), random(8, 16)
    good = moments(correlated(64, 16))
    bad = good.clone()
    bad[2, 3] = float("nan")
    with pytest.raises(InputError, match=r"'hessian' hold nan at \[2, 3\]"):
        encode(weight, scheme, "gptq", {"hessian": bad})
    with pytest.raises(InputError, match=r"'shift' hold nan"):
        encode(weight, scheme, "gptq", {"hessian": good, "shift": bad})
    with pytest.raises(InputError, match=r"'output_hessian' hold inf"):
        encode(weight, scheme, "gptq", {"hessian": good, "output_hessian": torch.full((8, 8), float("inf"))})
    with pytest.raises(InputError, match=r"'hessian' have shape \[16, 15\], and the weight needs \[16, 16\]"):
        encode(weight, scheme, "gptq", {"hessian": good[:, :15]})
    with pytest.raises(InputError, match=r"'output_hessian' have shape \[9, 9\], and the weight has 8 output features"):
        encode(weight, scheme, "gptq", {"hessian": good, "output_hessian": torch.eye(9)})
    with pytest.raises(InputError, match="sum of squares"):
        encode(weight, scheme, "gptq", {"hessian": -good})
    with pytest.raises(InputError, match="no hessian"):
        encode(weight, scheme, "gptq")
    weight[3, 4] = float("inf")
    with pytest.raises(NonFiniteError, match=r"inf at \[3, 4\]"):
        quantize_gptq(weight, scheme, {"hessian": good})


def test_an_indefinite_matrix_is_damped_until_it_has_a_factor() -> None:
    matrix = torch.eye(16) + 0.5 * (random(16, 16) + random(16, 16).T)
    assert float(torch.linalg.eigvalsh(matrix).min()) < -1
    factored = Hessian.of(matrix, INPUT_DAMPING, "hessian")
    product = factored.factor.double().T @ factored.factor.double() @ factored.ordered.double()
    assert torch.allclose(product, torch.eye(16, dtype=torch.float64), atol=1e-4)


def test_products_are_float32_while_codes_are_chosen_and_the_process_keeps_its_setting() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with exact_products():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
