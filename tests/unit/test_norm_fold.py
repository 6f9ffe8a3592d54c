"""Norms in the products around them: what they mean, how exact they are, when a decoder has them, what is launched."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from helpers import decoders, packed_models, tiny_lm
from helpers.fakes import FakeGpu, pretended

from tersor import formats, models, ops
from tersor.compress import quantize_rtn
from tersor.errors import ShapeError
from tersor.hardware import CHIPS
from tersor.kernels import dense, tune
from tersor.kernels.dense import Norm
from tersor.layouts import PackedWeight
from tersor.layouts.gated import separate
from tersor.models import norm as model_norm
from tersor.ops import prepared

HALF = torch.float16
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
gpu = pretended("NVIDIA H200")


def packed(oc: int, ic: int, seed: int = 0, layout: str = "stream") -> PackedWeight:
    values = torch.randn(oc, ic, generator=torch.Generator().manual_seed(seed)) * ic**-0.5
    return PackedWeight.from_encoded(quantize_rtn(values, formats.get_scheme("fp6_e3m2"))).to_layout(layout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
def test_a_folded_norm_is_the_norm_between_two_products(dtype: torch.dtype, gated: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    first, second = packed(200, 96), packed(48, 200, 1)
    x, residual = torch.randn(5, 96, generator=generator).to(dtype), torch.randn(5, 200, generator=generator).to(dtype)
    bias, last = (torch.randn(size, generator=generator).to(dtype) for size in (200, 48))
    weight = (torch.randn(200, generator=generator) * 4).to(dtype)
    rows = ops.linear_norm_out(x, first, ops.FoldedNorm.of(weight, 1e-5, 1.0), bias, residual=residual)
    assert torch.equal(rows.x, ops.linear(x, first, bias, residual=residual))
    assert rows.squares.shape == (5, 4) and rows.norm.weight.abs().max() < 1
    sums = [part.square().sum(-1) for part in rows.x.double().split(64, dim=-1)]
    torch.testing.assert_close(rows.squares.double(), torch.stack(sums, -1), rtol=1e-5, atol=0)
    y = ops.linear_norm_in(rows, second, last, gate=int(gated))
    wide = torch.nn.functional.rms_norm(rows.x.double(), (200,), None, 1e-5) * (weight.double() + 1)
    exact = wide @ second.dequantize().double().T + last.double()
    if gated:
        gate, up = separate(exact.T)
        exact = (torch.nn.functional.silu(gate) * up).T
    assert y.dtype == dtype and y.shape == exact.shape
    assert (y.double() - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()


SIZES = ((1e-3, 0.5), (0.01, 0.05), (2.0, 0.02), (500.0, 30.0), (12000.0, 8.0))
"""Of x and of the norm's weights, as models have them and beyond."""


@pytest.mark.parametrize(("of_x", "of_weight"), SIZES)
def test_a_folded_norm_in_float16_is_as_exact_as_one_that_is_rounded(of_x: float, of_weight: float) -> None:
    """A few channels are fifty times as large, if they can be; the product is float64."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(200, 512, generator=generator) * of_x
    x[:, ::100] *= 50
    x, weight = x.clamp(-65504, 65504).to(HALF), (torch.randn(512, generator=generator) * of_weight).to(HALF)
    matrix = torch.randn(512, 256, generator=generator, dtype=torch.float64)
    norm = ops.FoldedNorm.of(weight, 1e-6)
    nothing = packed(512, 16)
    rows = ops.linear_norm_out(torch.zeros(200, 16, dtype=HALF), nothing, norm, residual=x)
    assert torch.equal(rows.x, x) and torch.isfinite(rows.scaled).all()
    wide = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    folded = (rows.scaled.double() * rows.factors.double() - wide) @ matrix
    rounded = (ops.rms_norm(x, weight, 1e-6).double() - wide) @ matrix
    assert folded.square().mean().sqrt() <= 1.1 * rounded.square().mean().sqrt()


def test_a_norm_of_zeros_or_of_other_channels() -> None:
    norm = ops.FoldedNorm.of(torch.zeros(16, dtype=HALF), 1e-6)
    rows = ops.linear_norm_out(torch.zeros(2, 32, dtype=HALF), packed(16, 32), norm)
    assert torch.equal(ops.linear_norm_in(rows, packed(8, 16)), torch.zeros(2, 8, dtype=HALF))
    with pytest.raises(ShapeError, match=r"linear_norm_out: the norm is of \[16\] channels on cpu, expected \[24\]"):
        ops.linear_norm_out(torch.zeros(2, 32, dtype=HALF), packed(24, 32), norm)
    with pytest.raises(ShapeError, match=r"linear_norm_in: the norm is of \[16\] channels on cpu, expected \[32\]"):
        ops.linear_norm_in(rows, packed(8, 32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decoder_with_folded_norms_has_the_same_logits(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = packed_models.compressed(tiny_lm.TINY, tmp_path / "packed", overrides=["1.mlp.up_proj=int8"])
    decoder = models.load(path, "cpu", dtype)
    text = decoders.texts(decoder.config.vocabulary)[0]
    usual, asked = decoders.whole(decoder, text).float(), []
    serves = lambda x, first, second, gated: asked.append((first, second, gated)) or True  # noqa: E731
    monkeypatch.setattr(model_norm.ops, "folds_norm", serves)
    folded = decoders.whole(decoder, text).float()
    count = len(decoder.layers)
    assert len(asked) == 2 * count - 1 - 1  # none before the head, nor where gate and up are two products
    assert {gated for _, _, gated in asked} == {False, True}
    largest = float(usual.abs().max())
    assert float((folded - usual).abs().max()) <= (1e-5 if dtype is torch.float32 else 0.05) * largest
    assert not torch.equal(folded, usual)


def test_norms_are_folded_where_kernels_of_few_tokens_are_on_both_sides(gpu: FakeGpu) -> None:
    first, second = packed(512, 1024, layout="tiles_float16"), packed(768, 512, layout="tiles_float16")
    few, many = torch.zeros(3, 1024, dtype=HALF), torch.zeros(65, 1024, dtype=HALF)
    assert ops.folds_norm(few, first, second) and ops.folds_norm(few, first, second, gate=ops.Gate.SILU)
    assert [re.sub(r".*c\dr\d_", "", name) for name in gpu.asked] == ["norm_out", "norm_in", "gated_norm_in"]
    made = len(gpu.asked)
    assert not ops.folds_norm(many, first, second)
    assert not ops.folds_norm(few.bfloat16(), first, second)
    assert not ops.folds_norm(few, first, packed(768, 512))
    assert not ops.folds_norm(few[:, :516], packed(512, 516, layout="tiles_float16"), second)
    for changes in ({"fold_norms": False}, {"batch_invariant": True}, {"reference": True}):
        with ops.using(**changes):
            assert not ops.folds_norm(few, first, second)
    assert len(gpu.asked) == made


@pytest.mark.parametrize("group_size", [None, 128, 16])
def test_a_call_of_few_tokens_has_a_tile_that_takes_norms(group_size: int | None) -> None:
    chip, scheme = CHIPS["NVIDIA H200"], formats.get_scheme("fp6_e3m2", group_size)
    for shape in ((6144, 4096), (28672, 4096), (4096, 14336), (1024, 1024)):
        for n in range(1, 66):
            problem = dense.problem_of(scheme, shape, n)
            found, usual = tune.choose_normed(problem, chip), tune.choose(problem, chip)
            if n > tune.MOST_NORMED:
                assert found is None
            else:
                assert found is not None and tune.takes_norms(found)
                assert found == usual or usual.n_tile > tune.MOST_NORMED
            assert tune.choose_normed(problem, CHIPS["NVIDIA A100"]) is None


@pytest.mark.parametrize("gpu", ["NVIDIA A100"], indirect=True)
def test_the_sm80_schedule_folds_nothing(gpu: FakeGpu) -> None:
    first, second = packed(512, 1024, layout="tiles_float16"), packed(768, 512, layout="tiles_float16")
    assert not ops.folds_norm(torch.zeros(3, 1024, dtype=HALF), first, second)
    assert not gpu.asked


def test_what_products_hand_to_each_other_reaches_the_kernels(gpu: FakeGpu) -> None:
    first, second = packed(520, 1024, layout="tiles_float16"), packed(768, 520, layout="tiles_float16")
    x, residual = torch.zeros(3, 1024, dtype=HALF), torch.zeros(3, 520, dtype=HALF)
    norm = ops.FoldedNorm.of(torch.full((520,), 3.0, dtype=HALF), 1e-5)
    assert (norm.scale, norm.eps) == (1 / 520 / 16, 1e-5 / 16) and norm.weight.eq(0.75).all()
    rows = ops.linear_norm_out(x, first, norm, residual=residual)
    expected = {"norm_weight": norm.weight, "scaled": rows.scaled, "squares": rows.squares, "y": rows.x}
    assert {name: gpu.last[name] for name in expected} == {name: one.data_ptr() for name, one in expected.items()}
    assert gpu.last["residual"] == residual.data_ptr() and gpu.last["n"] == 3
    assert rows.squares.shape == (3, 9) and rows.squares.stride() == (12, 1)
    bias = torch.zeros(768, dtype=HALF)
    assert ops.linear_norm_in(rows, second, bias, gate=ops.Gate.SILU).shape == (3, 384)
    assert gpu.last["x_map"].address == rows.scaled.data_ptr() and gpu.last["bias"] == bias.data_ptr()
    assert gpu.last["squares"] == rows.squares.data_ptr()
    assert gpu.last["norm_scale"] == pytest.approx(norm.scale) and gpu.last["norm_eps"] == pytest.approx(norm.eps)
    assert {key[-1] for key in prepared.type_of(second)._few} == {4 * Norm.IN}
    assert ops.linear(rows.x, second).shape == (3, 768)
    assert not gpu.asked[-1].endswith("norm_in") and gpu.last["squares"] == 0
