"""Kernels of small/ that are no norms on a CPU, as C++."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.emulated import COMPILER, Emulated

from tersor import ops
from tersor.kernels import small
from tersor.ops import Gate, heads
from tersor.ops.heads import LatentHeads

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


def test_a_step_of_many_rows_begins_and_ends_as_the_torch_code_says(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    counts = torch.randint(0, 4, (90,), generator=generator)
    counts[40] = 300
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()
    total = int(counts.sum()) + 2
    tokens = torch.randint(-90, 1000, (total,), dtype=torch.int32, generator=generator)
    newest = torch.randint(0, 9999, (91,), generator=generator)
    lengths = torch.randint(1, 5000, (90,), dtype=torch.int32, generator=generator)
    places = torch.randint(0, total, (95,), dtype=torch.int32, generator=generator)
    resolve = Emulated(small.resolve_source(), tmp_path, 900)
    launch = small.prepare_resolve(resolve, tokens=total, texts=90, draws=95)  # type: ignore[arg-type]
    found, drawn = torch.full((total,), -7), torch.full((95,), -7, dtype=torch.int32)
    arrays = {"tokens_of_step": tokens, "newest": newest, "starts": starts, "lengths": lengths, "places": places}
    addresses = {name: one.data_ptr() for name, one in arrays.items()}
    launch(stream=0, **addresses, found=found.data_ptr(), drawn_lengths=drawn.data_ptr(), early=True)
    expected = ops.resolve(tokens, newest, starts, lengths, places)
    assert torch.equal(found, expected[0]) and torch.equal(drawn, expected[1])
    slots = torch.randperm(91, generator=generator)[:90].int()
    results = torch.randint(-1, 9999, (90,), generator=generator)
    kept = newest.clone()
    keep = small.prepare_keep(Emulated(small.keep_source(), tmp_path, 900), draws=90)  # type: ignore[arg-type]
    keep(stream=0, drawn=results.data_ptr(), slots=slots.data_ptr(), newest=kept.data_ptr(), early=True)
    ops.keep(newest, slots, results)
    assert torch.equal(kept, newest)


@pytest.mark.parametrize(("gate", "cap"), [(Gate.GELU_TANH, None), (Gate.CLAMPED, None), (None, 5.0), (None, None)])
def test_numbers_become_what_the_torch_code_says(gate: Gate | None, cap: float | None, tmp_path: Path) -> None:
    x = (torch.randn(3, 2 * 24 * 8, generator=torch.Generator().manual_seed(1)) * 9).bfloat16()
    x[1, 3] = torch.nan
    expected = ops.gated(x, gate) if gate is not None else ops.relu(x) if cap is None else ops.softcap(x, cap)
    out = torch.full(expected.shape, -7.0, dtype=torch.bfloat16)
    function = Emulated(small.pointwise_source("bfloat16", int(gate or 0), cap is not None), tmp_path, 900)
    launch = small.prepare_pointwise(function, rows=3, channels=out.shape[1], cap=cap or 0.0)  # type: ignore[arg-type]
    launch(stream=0, x=x.data_ptr(), out=out.data_ptr(), early=True)
    torch.testing.assert_close(out, expected, rtol=2.0**-7, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize(("interleaved", "value"), [(True, 24), (False, 40), (True, 16)])
def test_heads_are_put_side_by_side_and_values_come_out_again(interleaved: bool, value: int, tmp_path: Path) -> None:
    of = LatentHeads(heads=3, fixed=8, turned=32, value=value, interleaved=interleaved)
    generator = torch.Generator().manual_seed(value)
    down = torch.randn(5, 3 * 40 + 32 + 8, generator=generator).half()
    queries, turning = down[:, :120], down[:, 120:152]  # rows are longer
    both = torch.randn(5, 3 * (8 + value), generator=generator).half()
    out = torch.full((5, 3 * 3 * 40), torch.nan, dtype=torch.float16)
    sizes = {"heads": 3, "fixed": 8, "turned": 32, "value": value}
    launch = small.prepare_heads(Emulated(small.heads_source(interleaved), tmp_path, 900), tokens=5, **sizes)  # type: ignore[arg-type]
    addresses = {"queries": queries.data_ptr(), "both": both.data_ptr(), "turning": turning.data_ptr()}
    strides = (queries.stride(0), both.stride(0), turning.stride(0))
    launch(stream=0, **addresses, out=out.data_ptr(), strides=strides, early=True)
    assert torch.equal(out, heads.side_by_side(queries, both, turning, of))
    mixed = out[:, 240:].contiguous()  # the values of all heads
    kept = torch.full((5, 3 * value), torch.nan, dtype=torch.float16)
    trim = small.prepare_trim(Emulated(small.trim_source(), tmp_path, 900), heads=15, width=40, kept=value)  # type: ignore[arg-type]
    trim(stream=0, x=mixed.data_ptr(), out=kept.data_ptr(), early=True)
    assert torch.equal(kept, heads.values_of(mixed, of))
    assert torch.equal(kept.view(5, 3, value), both.view(5, 3, -1)[..., 8:])
