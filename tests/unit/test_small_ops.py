"""Norms and rows of tables, by what torch and plain loops say; the kernels are compared with these in tests/gpu."""

from __future__ import annotations

import math

import pytest
import torch

from tersor import ops
from tersor.errors import ShapeError
from tersor.ops import Gate, heads
from tersor.ops.attention_form import Rows
from tersor.ops.heads import LatentHeads

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """Half a unit in the last place, and what float32 sums in another order make of it."""
    return {"rtol": max(torch.finfo(dtype).eps, 1e-5), "atol": 1e-6}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 12, 520])
def test_rms_norm_is_torchs_with_an_offset_and_what_is_added(dtype: torch.dtype, channels: int) -> None:
    generator = torch.Generator().manual_seed(channels)
    x, residual = (torch.randn(2, 5, channels, generator=generator) * 3).to(dtype)
    weight = torch.randn(channels, generator=generator).to(dtype)
    wide = torch.nn.functional.rms_norm(x.double(), (channels,), None, 1e-6)
    y = ops.rms_norm(x, weight, 1e-6)
    torch.testing.assert_close(y, (wide * weight.double()).to(dtype), **tolerance(dtype))
    y = ops.rms_norm(x, weight, 1e-6, offset=1.0, residual=residual)
    expected = residual.double() + wide * (weight.double() + 1)
    torch.testing.assert_close(y, expected.to(dtype), rtol=tolerance(dtype)["rtol"], atol=1e-5)
    assert ops.rms_norm(x[:0], weight, 1e-6).shape == (0, channels)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm_is_torchs(dtype: torch.dtype) -> None:
    x = (torch.randn(3, 72, generator=torch.Generator().manual_seed(1)) * 2 + 5).to(dtype)
    weight, bias = torch.linspace(-1, 2, 72).to(dtype), torch.linspace(3, 1, 72).to(dtype)
    for added in (bias, None):
        shift = None if added is None else added.double()
        expected = torch.nn.functional.layer_norm(x.double(), (72,), weight.double(), shift, 1e-5)
        y = ops.layer_norm(x, weight, added, 1e-5)
        torch.testing.assert_close(y, expected.to(dtype), rtol=tolerance(dtype)["rtol"], atol=1e-5)


def rows_of(starts: list[int], lengths: list[int]) -> Rows:
    """Rows without pages."""
    pages = torch.zeros(len(lengths), 1, dtype=torch.int32)
    numbers = (torch.tensor(starts, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32))
    return Rows(*numbers, pages, max(lengths), max(lengths))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_a_lookup_scales_rows_and_adds_that_of_the_tokens_position(dtype: torch.dtype, index: torch.dtype) -> None:
    table, learned = torch.randn(2, 10, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    tokens = torch.tensor([0, 9, -1, 10, 4, 4, 5, 6], dtype=index)
    rows = rows_of([0, 3, 3, 5, 6, 6], [7, 0, 2, 9, 0])  # a padded row and two padded tokens
    positions = [4, 5, 6, 0, 1, 8, None, None]
    for scale in (1.0, 2.5):
        y = ops.lookup(tokens, table, scale=scale, positions=learned, first=2, rows=rows)
        plain = ops.lookup(tokens, table, scale=scale)
        for token, position, with_position, without in zip(tokens.tolist(), positions, y, plain, strict=True):
            row = table[token].float() * scale if 0 <= token < 10 else torch.zeros(24)
            assert torch.equal(without, row.to(dtype))
            if position is not None and position + 2 < 10:
                row = row + learned[position + 2].float()
            assert torch.equal(with_position, row.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_relu_and_soft_caps_are_rounded_once(dtype: torch.dtype) -> None:
    x = (torch.randn(4, 36, generator=torch.Generator().manual_seed(2)) * 6).to(dtype)
    gate, up = x.double().chunk(2, dim=1)
    for one in Gate:
        torch.testing.assert_close(ops.gated(x, one), one.combine(gate, up).to(dtype), **tolerance(dtype))
    torch.testing.assert_close(ops.softcap(x, 3.0), (3 * torch.tanh(x.double() / 3)).to(dtype), **tolerance(dtype))
    assert torch.equal(ops.relu(x), x.clamp(min=0)) and ops.relu(x[:0]).shape == (0, 36)
    for call, message in (
        (lambda: ops.gated(x[:, :5], Gate.SILU), r"^gated: x is \[4, 5\], expected \[T, 2 F\]"),
        (lambda: ops.relu(x[0]), r"^relu: x is \[36\] .*, expected two dimensions"),
        (lambda: ops.softcap(x.double(), 1.0), "^softcap: x is .* torch.float64"),
    ):
        with pytest.raises(ShapeError, match=message):
            call()


def test_heads_that_do_not_fit_are_one_line() -> None:
    of = LatentHeads(heads=2, fixed=8, turned=16, value=8, interleaved=True)
    queries, both, turning = torch.zeros(3, 48), torch.zeros(3, 32), torch.zeros(3, 16)
    assert heads.side_by_side(queries, both, turning, of).shape == (3, 3 * 48)
    with pytest.raises(ShapeError, match=r"^side_by_side: both is \[3, 30\] torch.float32, expected \[3, 32\]"):
        heads.side_by_side(queries, both[:, :30], turning, of)
    with pytest.raises(ShapeError, match=r"^side_by_side: turning is .* torch.float16, expected .* torch.float32"):
        heads.side_by_side(queries, both, turning.half(), of)
    with pytest.raises(ShapeError, match=r"^values_of: x is \[3, 16\], expected \[T, 48\]"):
        heads.values_of(turning, of)


def test_rows_are_gathered_by_an_index_and_zeros_where_it_names_none() -> None:
    x = torch.arange(12.0).view(4, 3)
    y = ops.gather_rows(x, torch.tensor([3, -1, 0, 4, 3]))
    assert y.tolist() == [[9, 10, 11], [0, 0, 0], [0, 1, 2], [0, 0, 0], [9, 10, 11]]
    assert ops.gather_rows(x[:0], torch.tensor([0])).tolist() == [[0, 0, 0]]


def test_gradients_go_through_norms_and_lookups() -> None:
    x, weight = torch.randn(2, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    ops.rms_norm(x, weight, 1e-6).square().sum().backward()
    assert x.grad is not None and weight.grad is not None and bool(weight.grad.abs().sum() > 0)


def test_what_does_not_fit_is_one_line_that_names_both_sides() -> None:
    x, weight = torch.zeros(2, 8), torch.zeros(8)
    with pytest.raises(
        ShapeError, match=r"^rms_norm: weight is \[8\] torch.float16 on cpu, expected \[8\] torch.float32"
    ):
        ops.rms_norm(x, weight.half(), 1e-6)
    with pytest.raises(ShapeError, match=r"^rms_norm: residual is \[1, 8\] torch.float32 on cpu, expected \[2, 8\]"):
        ops.rms_norm(x, weight, 1e-6, residual=x[:1])
    with pytest.raises(ShapeError, match=r"^layer_norm: x is \[8\] torch.float32, expected \[T, H\]"):
        ops.layer_norm(weight, weight, None, 1e-5)
    with pytest.raises(ShapeError, match=r"^lookup: tokens are \[2\] torch.float32 on cpu, expected \[T\] in int64"):
        ops.lookup(torch.zeros(2), x)
    with pytest.raises(ShapeError, match=r"^lookup: positions are \[2, 4\] torch.float32, expected \['P', 8\]"):
        ops.lookup(torch.tensor([0]), x, positions=torch.zeros(2, 4), rows=rows_of([0, 1], [1]))
    with pytest.raises(ShapeError, match=r"^lookup: positions are learned, and rows"):
        ops.lookup(torch.tensor([0]), x, positions=x)
    with pytest.raises(ShapeError, match=r"^gather_rows: the index is \[1, 1\] torch.int64 on cpu, expected \[S\]"):
        ops.gather_rows(x, torch.tensor([[0]]))


def test_a_scale_of_gemma_is_rounded_once() -> None:
    table = torch.full((1, 8), 1 / 3, dtype=torch.bfloat16)
    expected = (table.float() * math.sqrt(8)).bfloat16()
    assert torch.equal(ops.lookup(torch.tensor([0]), table, scale=math.sqrt(8)), expected)


def test_a_step_resolves_tokens_that_the_host_has_not_read_and_finds_the_texts_that_draw() -> None:
    newest = torch.tensor([70, 71, 72, 0])
    tokens = torch.tensor([5, -3, 6, 7, -1, 0, 0], dtype=torch.int32)
    starts, lengths = torch.tensor([0, 2, 2, 4, 5, 5]), torch.tensor([9, 0, 4, 8, 0])
    places = torch.tensor([1, 3, 4, 0, 6], dtype=torch.int32)
    found, drawn = ops.resolve(tokens, newest, starts.int(), lengths.int(), places)
    assert found.tolist() == [5, 72, 6, 7, 70, 0, 0] and found.dtype == torch.int64
    assert drawn.tolist() == [9, 4, 8, 9, 0] and drawn.dtype == torch.int32
    ops.keep(newest, torch.tensor([2, 0, 3], dtype=torch.int32), torch.tensor([11, -1, 12]))
    assert newest.tolist() == [0, 71, 11, 12]


def test_tokens_of_another_dtype_and_rows_without_starts_are_refused() -> None:
    newest, none = torch.zeros(3, dtype=torch.int64), torch.zeros(0, dtype=torch.int32)
    one = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ShapeError, match="resolve: tokens"):
        ops.resolve(one.long(), newest, one, none, one)
    with pytest.raises(ShapeError, match="resolve: 0 rows have 1 starts"):
        ops.resolve(one, newest, one, none, one)
    with pytest.raises(ShapeError, match="keep: slots"):
        ops.keep(newest, one, one)
