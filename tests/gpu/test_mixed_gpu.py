"""Mixed weights on a GPU: products within the tolerance of a float32 accumulation, in a graph and as a layer too."""

from __future__ import annotations

import pytest
import torch
from helpers.allowance import within
from helpers.mixes import IC, levels, matrix, mixed
from helpers.multiplied import multiplied

from tersor import formats, hardware, ops
from tersor.formats import Activations, Assignment, Mix, get_scheme
from tersor.kernels import jit
from tersor.kernels import mixed as kernels
from tersor.kernels.tune import mixed as tune_mixed
from tersor.kernels.tune import sm90
from tersor.layouts import MixedWeight
from tersor.layouts.gated import interleave
from tersor.nn import MixedLinear
from tersor.ops import Gate, mixed_launch
from tersor.ops import mixed as mixed_ops

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="row sets are one launch on compute capability 9.0",
)

OC = 300
DTYPES = (torch.float16, torch.bfloat16)
ACCUMULATED = {Activations.E4M3: 2.0**-11, Activations.INT8: 2.0**-20, Activations.INT8_GROUPS: 2.0**-20}
FLOATS = Mix(tuple(get_scheme(name) for name in ("fp4_e2m1", "fp5_e2m2", "fp6_e2m3", "int8")))
INTEGERS = Mix((get_scheme("uint4", 128), get_scheme("int8")))
ON_FP8 = Mix((get_scheme("uint4", 128), get_scheme("fp7_e3m3")))
MANY = Mix((get_scheme("uint5", 64), get_scheme("fp6_e2m3", 64), *FLOATS.levels[:2], get_scheme("uint6")))


def ready(weight: MixedWeight, dtype: torch.dtype, activations: Activations = Activations.NATIVE) -> MixedWeight:
    """Return a weight on the GPU, every row set in the layout for activations that come in a dtype."""
    device = torch.device("cuda")
    return weight.to(device).to_layout(lambda scheme: ops.preferred_layout(scheme, dtype, device, activations))


def shares(rows: int, mix: Mix, *percents: int) -> Assignment:
    """Return levels of so many output features in random order, a percentage of each."""
    counts = [rows * share // 100 for share in percents]
    counts[0] += rows - sum(counts)
    level = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return Assignment(mix, bytes(level[torch.randperm(rows, generator=torch.Generator().manual_seed(rows))].tolist()))


def wide(oc: int, ic: int, seed: int = 0) -> torch.Tensor:
    """Return a random weight, float32 [oc, ic], which no activations of `rows` look like."""
    return torch.randn(oc, ic, generator=torch.Generator().manual_seed(1000 + seed)) * ic**-0.5


def poison(*shape: int, dtype: torch.dtype) -> None:
    """Leave NaN where the next result of a shape will lie."""
    torch.full(shape, torch.nan, dtype=dtype, device="cuda")


def rows(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Return random activations on the GPU."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def check(
    y: torch.Tensor, exact: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, accumulated: float | None = None
) -> None:
    """Hold a product, with what was added before it was rounded once, against its exact numbers.

    `accumulated`: the error of sums of independent products (`helpers.e4m3_sums`), as a part of the sum of their sizes;
    else that of float32.
    """
    if accumulated is None:
        allowed = formats.product_tolerance(x.double(), weight, torch.float32)
    else:
        allowed = accumulated * (x.double().abs() @ weight.abs().T)
    info = torch.finfo(y.dtype)
    allowed = allowed + (exact.abs() + allowed) * info.eps / 2 * 1.001 + info.smallest_normal * info.eps
    within(y, exact, allowed, f"{len(x)} tokens")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ordered", [False, True])
def test_products_are_within_tolerance(dtype: torch.dtype, ordered: bool) -> None:
    form = levels(OC)
    form = Assignment(form.mix, bytes(sorted(form.level))) if ordered else form
    plain = mixed(matrix(OC), form)
    weight, decoded = ready(plain, dtype), plain.dequantize().double().cuda()
    for tokens in (1, 5, 16, 33, 64, 300):
        x, bias, residual = rows(tokens, IC, dtype=dtype), rows(OC, dtype=dtype), rows(tokens, OC, dtype=dtype, seed=1)
        check(ops.linear(x, weight), x.double() @ decoded.T, x, decoded)
        exact = x.double() @ decoded.T + bias.double() + residual.double()
        check(ops.linear(x, weight, bias, residual=residual), exact, x, decoded)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gate_and_up_are_one_product(dtype: torch.dtype) -> None:
    form = levels(200, 5)
    gate, up = (mixed(matrix(200, seed), form) for seed in (1, 2))
    both = ready(MixedWeight.gate_up(gate, up), dtype)
    for tokens in (1, 33, 200):
        x = rows(tokens, IC, dtype=dtype)
        wide = x.double().cpu()
        wanted = torch.nn.functional.silu(wide @ gate.dequantize().double().T) * (wide @ up.dequantize().double().T)
        close = 2e-2 if dtype is torch.bfloat16 else 3e-3
        torch.testing.assert_close(ops.gated_linear(x, both).double().cpu(), wanted, rtol=close, atol=close * 10)


def test_a_layer_moves_saves_and_is_captured() -> None:
    plain = mixed(matrix(OC), levels(OC))
    layer = MixedLinear.from_packed(plain, dtype=torch.float16)
    stored = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer = layer.cuda()
    x = rows(4, IC, dtype=torch.float16)
    wanted = layer(x)
    assert {one.layout for one in layer.packed_weight().sets} == {"tiles_float16"}
    again = layer.state_dict()
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[name].cpu(), tensor) for name, tensor in stored.items())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layer(x)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    y.zero_()
    graph.replay()
    assert torch.equal(y, wanted)


def exact_of(x: torch.Tensor, weight: torch.Tensor, activations: Activations) -> tuple[torch.Tensor, torch.Tensor]:
    """Return activations as they are multiplied, and the product with the decoded weight, float64."""
    if activations is not Activations.NATIVE:
        codes, scales = (one.cuda() for one in activations.quantize(x.float().cpu()))
        x = activations.dequantize(codes, scales.double())
    return x.double(), x.double() @ weight.T


@hopper
@pytest.mark.parametrize(
    ("mix", "percents", "activations", "dtype"),
    [
        (FLOATS, (25, 25, 25, 25), Activations.NATIVE, torch.float16),
        (FLOATS, (0, 98, 1, 1), Activations.NATIVE, torch.bfloat16),
        (MANY, (20, 20, 20, 20, 20), Activations.NATIVE, torch.float16),
        (INTEGERS, (90, 10), Activations.INT8, torch.float16),
        (INTEGERS, (90, 10), Activations.INT8, torch.bfloat16),
        (FLOATS, (25, 25, 50), Activations.E4M3, torch.float16),
        (INTEGERS, (90, 10), Activations.INT8_GROUPS, torch.float16),
        (ON_FP8, (90, 10), Activations.E4M3, torch.bfloat16),
    ],
)
def test_every_way_to_deal_out_tiles_gives_the_product(
    mix: Mix, percents: tuple[int, ...], activations: Activations, dtype: torch.dtype
) -> None:
    """Each tile, CTAs that take tiles in turn or have even shares, clusters that gather; the same bits every time."""
    if mix is FLOATS and activations is Activations.E4M3:
        mix = Mix(mix.levels[:3])  # int8 is not a float of 8 bits
    oc, ic, chip = 777, 1152 if mix in (INTEGERS, ON_FP8) else 1088, hardware.of_device(0)
    plain = mixed(wide(oc, ic), shares(oc, mix, *percents))
    weight, decoded = ready(plain, dtype, activations), multiplied(plain, activations).cuda()
    layout = mixed_launch.layout_of(weight)
    bias = rows(oc, dtype=dtype)
    packings, problem = mixed_launch.problem_of(weight, layout, 1)
    result = str(dtype).removeprefix("torch.")
    jit.compile_many([kernels.source(packings, result, tile, chip) for tile in tune_mixed.tiles(problem)], "sm_90a")
    seen = set()
    for tokens in (1, 7, 16, 33, 64, 100, 130, 513):
        x, residual = rows(tokens, ic, dtype=dtype), rows(tokens, oc, dtype=dtype, seed=1)
        read, exact = exact_of(x, decoded, activations)
        exact = exact + bias.double() + residual.double()
        _, problem = mixed_launch.problem_of(weight, layout, tokens)
        dealt = [
            tune_mixed.configured(problem, tile, ctas, 1, chip, deals=True)
            for tile in sm90.fitting(tune_mixed.tiles(problem), tokens)
            for ctas in (chip.sms, 13)
        ]
        for config in (*tune_mixed.candidates(problem, chip), *dealt):
            seen.add((config.splits > 1, config.dealt > 0, any(share.whole_tiles for share in config.shares)))
            with ops.using(mixed=config):
                poison(tokens, oc, dtype=dtype)
                y = ops.linear(x, weight, bias, residual=residual)
                check(y, exact, read, decoded, ACCUMULATED.get(activations))
                for _ in range(3):
                    poison(tokens, oc, dtype=dtype)
                    assert torch.equal(ops.linear(x, weight, bias, residual=residual), y), config
    assert {gathered for gathered, _, _ in seen} == {True, False}
    assert any(dealt for _, dealt, _ in seen) and any(whole for _, _, whole in seen)


@hopper
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("gate", [Gate.SILU, Gate.CLAMPED])
@pytest.mark.parametrize("activations", [Activations.NATIVE, Activations.INT8, Activations.INT8_GROUPS])
def test_gate_up_bias_and_residual_meet_in_their_features(ordered: bool, gate: Gate, activations: Activations) -> None:
    channels, ic, dtype = 397, 640, torch.float16
    form = shares(channels, INTEGERS, 80, 20)
    form = Assignment(form.mix, bytes(sorted(form.level))) if ordered else form
    gate_up = [mixed(wide(channels, ic, seed), form) for seed in (1, 2)]
    both = ready(MixedWeight.gate_up(*gate_up), dtype, activations)
    decoded = [multiplied(one, activations).cuda() for one in gate_up]
    halves = [rows(channels, dtype=dtype, seed=seed) for seed in (3, 4)]
    bias = interleave(*halves)
    for tokens in (1, 17, 40, 96, 300):
        x, residual = rows(tokens, ic, dtype=dtype), rows(tokens, channels, dtype=dtype, seed=5)
        products = [
            exact_of(x, weight, activations)[1] + half.double() for weight, half in zip(decoded, halves, strict=True)
        ]
        poison(tokens, channels, dtype=dtype)
        y = ops.gated_linear(x, both, bias, residual=residual, gate=gate)
        wanted = gate.combine(*products) + residual.double()
        torch.testing.assert_close(y.double(), wanted, rtol=3e-3, atol=3e-3)
        apart = mixed_ops.by_row_sets(x, both, bias, residual, int(gate))
        torch.testing.assert_close(apart, y, rtol=3e-3, atol=3e-3)


@hopper
@pytest.mark.parametrize(
    ("mix", "activations", "launches"),
    [(FLOATS, Activations.NATIVE, 1), (INTEGERS, Activations.INT8, 2), (INTEGERS, Activations.INT8_GROUPS, 2)],
)
def test_all_row_sets_are_one_launch_and_activations_are_quantised_once(
    mix: Mix, activations: Activations, launches: int, launched: list[str]
) -> None:
    plain = mixed(wide(512, 512), shares(512, mix, *([100 // len(mix.levels)] * len(mix.levels))))
    weight = ready(plain, torch.float16, activations)
    for tokens in (1, 64, 300):
        launched.clear()
        ops.linear(rows(tokens, 512, dtype=torch.float16), weight)
        assert len(launched) == launches and "tersor_mixed" in launched[-1], launched
    with ops.using(batch_invariant=True):
        launched.clear()
        ops.linear(rows(4, 512, dtype=torch.float16), weight)
        assert not any("tersor_mixed" in name for name in launched)


@hopper
def test_a_graph_of_many_launches_gives_the_same_bits_whenever_it_is_replayed() -> None:
    """Split sums leave their counters at zero, and launches overlap with programmatic dependence."""
    plain = mixed(wide(1024, 1024), shares(1024, INTEGERS, 90, 10))
    weight = ready(plain, torch.float16, Activations.INT8)
    x = rows(24, 1024, dtype=torch.float16)
    wanted = [x]
    for _ in range(8):
        wanted.append(ops.linear(wanted[-1], weight))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ops.linear(x, weight)
    stream.synchronize()
    graph, found = torch.cuda.CUDAGraph(), [x]
    with torch.cuda.graph(graph):
        for _ in range(8):
            found.append(ops.linear(found[-1], weight))
    for _ in range(20):
        for one in found[1:]:
            one.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


def test_rows_that_start_anywhere_and_strided_activations_are_served() -> None:
    plain = mixed(wide(130, 200), shares(130, FLOATS, 40, 30, 20, 10))
    weight, decoded = ready(plain, torch.float16), plain.dequantize().double().cuda()
    for x in (rows(9, 400, dtype=torch.float16)[:, 100:300], rows(9, 201, dtype=torch.float16)[:, 1:]):
        check(ops.linear(x, weight), x.double() @ decoded.T, x, decoded)
