"""Residuals, gated linears, stacked weights and the batch-invariant mode on a CPU: meaning and choices."""

from __future__ import annotations

import pytest
import torch

from tersor import formats, hardware, ops
from tersor.compress import quantize_rtn
from tersor.errors import InputError, ShapeError
from tersor.hardware import CHIPS, Chip
from tersor.kernels import dense as family
from tersor.kernels import tune
from tersor.kernels.tune import sm90
from tersor.layouts import PackedWeight, gated
from tersor.ops import Gate, dispatch, mode, reference

SCHEMES = (("fp6_e3m2", None), ("int4", 32), ("uint4", 32), ("mxfp6_e2m3", None))
TOKENS = (1, 7, 16, 17, 64, 65, 129, 1000, 5000)


def packed(name: str, oc: int, ic: int, group: int | None = None, seed: int = 0) -> PackedWeight:
    scheme = formats.get_scheme(name, group)
    weight = torch.randn(oc, ic, generator=torch.Generator().manual_seed(seed))
    return PackedWeight.from_encoded(quantize_rtn(weight, scheme))


def same(one: PackedWeight, other: PackedWeight) -> bool:
    pairs = ((one.data, other.data), (one.scale, other.scale), (one.zero_point, other.zero_point))
    equal = all((a is None) == (b is None) and (a is None or torch.equal(a, b)) for a, b in pairs)
    return equal and (one.scheme, one.shape, one.layout) == (other.scheme, other.shape, other.layout)


@pytest.mark.parametrize("channels", [1, 7, 8, 9, 15, 16, 24, 35])
def test_gate_and_up_are_interleaved_by_eights_and_undone(channels: int) -> None:
    gate, up = torch.arange(1, channels + 1)[:, None], -torch.arange(1, channels + 1)[:, None]
    both = gated.interleave(gate, up)
    assert both.shape == (gated.gated_rows(channels), 1)
    assert gated.gated_channels(both.shape[0]) == channels
    for channel in range(channels):
        row = channel // 8 * 16 + channel % 8
        assert (int(both[row]), int(both[row + 8])) == (channel + 1, -channel - 1)
    assert all(torch.equal(a, b) for a, b in zip(gated.separate(both), (gate, up), strict=True))


def test_rows_that_no_gated_weight_has() -> None:
    for count in (1, 8, 17, 24):
        with pytest.raises(ShapeError, match="no gated one"):
            gated.gated_channels(count)
    with pytest.raises(ShapeError, match="no gated one"):
        ops.gated_linear(torch.randn(1, 64), packed("fp6_e3m2", 24, 64))


@pytest.mark.parametrize(("name", "group"), SCHEMES)
def test_joined_weights_come_apart_exactly_from_any_layout(name: str, group: int | None) -> None:
    gate, up = (packed(name, 37, 96, group, seed) for seed in (1, 2))
    both = PackedWeight.gate_up(gate, up.to_layout("tiles_float16"))
    assert both.shape == (4 * 16 + 8 + 5, 96)
    for layout in ("stream", "tiles_bfloat16"):
        found = both.to_layout(layout).split_gate_up()
        assert same(found[0], gate) and same(found[1], up)
    parts = [packed(name, oc, 96, group, oc) for oc in (5, 64, 17)]
    stacked = PackedWeight.stack(parts)
    assert torch.equal(stacked.dequantize(), torch.cat([part.dequantize() for part in parts]))
    for layout in ("stream", "tiles_float16"):
        assert all(map(same, stacked.to_layout(layout).split([5, 64, 17]), parts))


def test_weights_that_do_not_fit_together() -> None:
    one = packed("fp6_e3m2", 16, 64)
    for other in (packed("fp6_e2m3", 16, 64), packed("fp6_e3m2", 16, 32), packed("fp6_e3m2", 16, 64, 32)):
        with pytest.raises(ShapeError, match=r"one scheme and IC|one shape"):
            PackedWeight.stack([one, other])
        with pytest.raises(ShapeError, match=r"one scheme and IC|one shape"):
            PackedWeight.gate_up(one, other)
    with pytest.raises(ShapeError, match=r"gate is \[16, 64\], up \[8, 64\]"):
        PackedWeight.gate_up(one, packed("fp6_e3m2", 8, 64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["stream", "tiles_float16"])
def test_residual_is_added_before_the_one_rounding(
    dtype: torch.dtype, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(reference.BLOCK_ELEMENTS, "cpu", 1000)
    weight = packed("fp6_e3m2", 70, 96).to_layout(layout)
    for shape in ((96,), (4, 96), (2, 3, 96)):
        x, bias = torch.randn(shape).to(dtype), torch.randn(70).to(dtype)
        residual = torch.randn(*shape[:-1], 70).to(dtype)
        exact = x.double() @ weight.dequantize().double().T + bias.double() + residual.double()
        y = ops.linear(x, weight, bias, residual=residual)
        assert y.shape == residual.shape and y.dtype == dtype
        rounded = torch.finfo(dtype).eps * exact.abs() / 2
        assert ((y.double() - exact).abs() <= rounded + 2e-4).all()


@pytest.mark.parametrize("channels", [8, 37, 64])
@pytest.mark.parametrize(("name", "group"), SCHEMES)
def test_gated_linear_is_silu_of_the_gate_times_up(
    name: str, group: int | None, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(reference.BLOCK_ELEMENTS, "cpu", 16 * 96)
    gate, up = (packed(name, channels, 96, group, seed) for seed in (3, 4))
    both = PackedWeight.gate_up(gate, up)
    biases = torch.randn(2, channels)
    residual = torch.randn(2, 5, channels)
    x = torch.randn(2, 5, 96) / 8
    g = x.double() @ gate.dequantize().double().T + biases[0]
    u = x.double() @ up.dequantize().double().T + biases[1]
    exact = torch.nn.functional.silu(g) * u
    bias = gated.interleave(*biases)
    for layout in ("stream", "tiles_float16"):
        y = ops.gated_linear(x, both.to_layout(layout), bias)
        assert torch.allclose(y.double(), exact, rtol=1e-5, atol=1e-4)
        y = ops.gated_linear(x, both.to_layout(layout), bias, residual=residual)
        assert torch.allclose(y.double(), exact + residual, rtol=1e-5, atol=1e-4)
    assert torch.equal(ops.gated_linear(x[:, :0], both, residual=residual[:, :0]), torch.zeros(2, 0, channels))


@pytest.mark.parametrize("gate", [Gate.GELU_TANH, Gate.GELU, Gate.CLAMPED])
def test_other_gates_are_rounded_once_and_have_gradients(gate: Gate) -> None:
    one, other = (packed("fp6_e3m2", 24, 96, None, seed) for seed in (3, 4))
    generator = torch.Generator().manual_seed(int(gate))
    x, residual, bias = (torch.randn(*shape, generator=generator) for shape in ((5, 96), (5, 24), (16,)))
    x, both = x / 4, PackedWeight.gate_up(one, other)
    exact = gate.combine(*(x.double() @ part.dequantize().double().T for part in (one, other)))
    y = ops.gated_linear(x.bfloat16(), both, gate=gate)
    wide = x.bfloat16().double()
    rounded = gate.combine(*(wide @ part.dequantize().double().T for part in (one, other))).bfloat16()
    torch.testing.assert_close(y, rounded, rtol=2.0**-7, atol=1e-5)
    assert torch.allclose(ops.gated_linear(x, both, residual=residual, gate=gate).double(), exact + residual, atol=1e-4)
    for given in (x.clone().requires_grad_(), x.double().requires_grad_()):
        ops.gated_linear(given, both, residual=residual.to(given.dtype), gate=gate).sum().backward()
        plain = x.double().requires_grad_()
        gate.combine(*(plain @ part.dequantize().double().T for part in (one, other))).sum().backward()
        assert given.grad is not None and plain.grad is not None
        assert torch.allclose(given.grad.double(), plain.grad, atol=1e-3)
    empty = torch.zeros(3, 0)
    nothing = PackedWeight(one.scheme, (16, 0), torch.zeros(16, 0, dtype=torch.int32), torch.ones(16, 1))
    y = ops.gated_linear(empty, nothing, bias, gate=gate)[0]
    assert torch.allclose(y, gate.combine(bias[:8], bias[8:]), atol=1e-6)


def test_nothing_to_multiply_leaves_bias_and_residual() -> None:
    empty = PackedWeight(
        formats.get_scheme("fp6_e3m2"), (16, 0), torch.zeros(16, 0, dtype=torch.int32), torch.ones(16, 1)
    )
    x, bias, residual = torch.zeros(3, 0), torch.randn(16), torch.randn(3, 8)
    y = ops.gated_linear(x, empty, bias, residual=residual)
    assert torch.allclose(y, torch.nn.functional.silu(bias[:8]) * bias[8:] + residual)
    wide = torch.randn(3, 16)
    assert torch.allclose(ops.linear(x, empty, bias, residual=wide), bias + wide)


def test_bad_residuals_are_refused_with_both_sides() -> None:
    weight = packed("fp6_e3m2", 16, 64)
    x = torch.randn(3, 64)
    for residual in (torch.randn(16), torch.randn(3, 15), torch.randn(3, 16).half()):
        with pytest.raises(ShapeError, match=r"residual is .* expected \[3, 16\] torch.float32"):
            ops.linear(x, weight, residual=residual)
    with pytest.raises(ShapeError, match=r"residual is \[3, 16\] .* expected \[3, 8\]"):
        ops.gated_linear(x, weight, residual=torch.randn(3, 16))


def test_meta_twin_and_compile() -> None:
    weight = PackedWeight.gate_up(packed("fp6_e3m2", 12, 64), packed("fp6_e3m2", 12, 64, seed=1))
    x, residual = torch.randn(2, 5, 64), torch.randn(2, 5, 12)
    oc, ic = weight.shape
    arguments = (x, weight.data, weight.scale, None, None, weight.scheme.key(), oc, ic, "stream", residual, True)
    torch.library.opcheck(torch.ops.tersor.linear.default, arguments, test_utils=("test_schema", "test_faketensor"))

    def both(x: torch.Tensor) -> torch.Tensor:
        return ops.gated_linear(x, weight, residual=residual) * 2

    assert torch.equal(torch.compile(both, fullgraph=True, backend="aot_eager")(x), both(x))


def test_a_batch_invariant_reference_takes_tokens_one_by_one() -> None:
    weight = packed("fp6_e3m2", 70, 512)
    x = torch.randn(40, 512)
    ops.set_batch_invariant(True)
    assert ops.batch_invariant()
    whole = ops.linear(x, weight)
    for first, last in ((0, 1), (3, 10), (5, 40), (39, 40)):
        assert torch.equal(ops.linear(x[first:last], weight), whole[first:last])
    ops.set_batch_invariant(False)
    assert torch.allclose(ops.linear(x, weight), whole, rtol=1e-4, atol=1e-4)


def test_the_mode_is_read_once_and_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERSOR_BATCH_INVARIANT", "1")
    assert ops.batch_invariant()
    monkeypatch.setenv("TERSOR_BATCH_INVARIANT", "yes")
    assert ops.batch_invariant()
    mode.forget()
    with pytest.raises(InputError, match="TERSOR_BATCH_INVARIANT is 'yes': expected 0 or 1"):
        ops.batch_invariant()
    ops.set_batch_invariant(False)
    assert not ops.batch_invariant()


@pytest.mark.parametrize("name", ["NVIDIA H200", "NVIDIA A100"])
@pytest.mark.parametrize(("oc", "ic"), [(8192, 8192), (57344, 8192), (1024, 4096), (4096, 14336), (100, 129), (64, 64)])
@pytest.mark.parametrize("groups", [0, 1, 4])
def test_invariant_choices_sum_in_one_order(name: str, oc: int, ic: int, groups: int) -> None:
    chip = CHIPS[name]
    orders, widths = set(), set()
    for n in TOKENS:
        for aligned in (True, False):
            asked = tune.LinearProblem(
                oc=oc,
                ic=ic,
                n=n,
                bits=6,
                scale_groups=groups,
                scale_bytes=2 * groups,
                aligned=aligned,
                batch_invariant=True,
            )
            problem = tune.launched(asked, chip)
            assert tune.fused(problem, chip)
            config = tune.choose(problem, chip)
            orders.add((config.schedule, config.splits, config.channel_groups, config.whole_tiles, config.few_tokens))
            widths.add(config.n_tile)
            assert config.n_tile * config.token_tiles >= problem.n
            sums, _ = family.parts(config, problem.n)
            assert config.splits == 1 or sums <= max(1 << 24, config.splits * 256 * (oc + 255))
    assert len(orders) == 1 and len(widths) > 2
    ((schedule, splits, channel_groups, whole_tiles, few_tokens),) = orders
    assert (channel_groups, whole_tiles) == (1, 0) and 1 <= splits <= -(-ic // 128)
    assert (schedule, few_tokens) == (("sm90", 0) if chip.capability == (9, 0) else ("sm80", 16))


def test_invariant_decisions_take_several_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_device_reason", lambda index: "")
    gpu, scheme = torch.device("cuda", 0), formats.get_scheme("fp6_e3m2")

    def decide(chip: Chip, shape: tuple[int, int], n: int) -> dispatch.Decision:
        monkeypatch.setattr(hardware, "of_device", lambda index: chip)
        with ops.using(batch_invariant=True):
            return dispatch.decide(scheme, "tiles_float16", shape, n, torch.float16, gpu, False)

    few, many = (decide(CHIPS["NVIDIA A100"], (256, 1024), n) for n in (64, 200))
    assert (few.kernel, few.tokens, many.kernel, many.tokens) == ("fused", 0, "fused", 64)
    assert "one order of sums" in many.why
    found = decide(CHIPS["NVIDIA H200"], (4096, 4096), 100_000)
    problem = tune.LinearProblem(oc=4096, ic=4096, n=1, bits=6)
    splits = sm90.invariant_splits(problem, CHIPS["NVIDIA H200"])
    assert splits > 1 and found.tokens == ((1 << 24) // (splits * (4096 + 256) * 256) - 1) * 256
