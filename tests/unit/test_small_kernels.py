"""small/resolve.cuh, small/keep.cuh and small/pointwise.cuh on a CPU, as C++."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.emulated import COMPILER, Emulated

from tersor import ops
from tersor.kernels import small
from tersor.ops import Gate

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
