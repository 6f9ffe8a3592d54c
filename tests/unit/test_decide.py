"""What one launch decides ahead of experts: experts/decide.cuh on a CPU as C++, and what a GPU is handed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.emulated import COMPILER, Emulated
from helpers.fakes import FakeGpu, pretended

from tersor import ops
from tersor.compress.rtn import quantize_rtn
from tersor.formats import get_scheme
from tersor.kernels import deciding, routing, small
from tersor.kernels.deciding import Decider
from tersor.kernels.routing import Choice, Router
from tersor.layouts import PackedWeight, StackedWeight
from tersor.ops import serve_routing
from tersor.ops.tables import Tables, elements

BLOCK = 8

gpu = pretended("NVIDIA H200")
"""Tensors of the CPU pass for those of an H200, or of the chip a test names."""

GROUPED = Choice(experts=24, top_k=3, sigmoid=True, biased=True, groups=4, top_groups=2)
CASES: dict[str, tuple[Decider, torch.dtype, tuple[int, ...]]] = {
    "normed": (
        Decider(
            router=Router(target="bfloat16", float_weight=False, float_out=False, channels=2120),
            choice=Choice(experts=33, top_k=4),
            norms=True,
        ),
        torch.bfloat16,
        (1, 3, 11),
    ),
    "wide, in groups": (
        Decider(
            router=Router(target="float16", float_weight=True, float_out=True, channels=72), choice=GROUPED, norms=False
        ),
        torch.float16,
        (2, 19),
    ),
}


def addresses(**tensors: torch.Tensor | None) -> dict[str, int]:
    return {name: 0 if one is None else one.data_ptr() for name, one in tensors.items()}


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("name", CASES)
def test_one_launch_gives_the_bits_of_three_and_leaves_its_words_zero(name: str, tmp_path: Path) -> None:
    decider, dtype, counts = CASES[name]
    router, choice = decider.router, decider.choice
    generator = torch.Generator().manual_seed(1)
    held = torch.float32 if router.float_weight else dtype
    made = torch.float32 if router.float_out else dtype
    weight = (torch.randn(choice.experts, router.channels, generator=generator) / router.channels**0.5).to(held)
    weight[choice.experts // 2] = weight[3]  # equal logits
    bias = torch.randn(choice.experts, generator=generator).to(held) if decider.norms else None
    preferred = torch.randn(choice.experts, generator=generator) if choice.biased else None
    gain = torch.randn(router.channels, generator=generator).to(dtype) if decider.norms else None
    words = torch.zeros(19 * choice.experts, dtype=torch.int32)
    for tokens in counts:
        x = 3 * torch.randn(tokens, router.channels, generator=generator).to(dtype)
        x[-1, 0] = torch.nan if tokens == 3 else -0.0
        numbers: dict[str, Any] = {"tokens": tokens, "block_tokens": BLOCK, "scale": 2.5}
        found = results(tokens, choice, dtype, router.channels)
        launch = deciding.prepare(
            Emulated(deciding.source(decider, tokens), tmp_path, 900),  # type: ignore[arg-type]
            decider,
            **numbers,
            eps=1e-5,
            offset=1.0,
        )
        normed, chosen, factors, memory = found
        order, position, blocks = Tables(memory, tokens * choice.top_k, choice.experts, BLOCK).addresses
        tables = {"order": order, "position": position, "blocks": blocks}
        given = addresses(x=x, weight=weight, bias=bias, preferred=preferred, gain=gain, normed=normed, index=chosen)
        launch(stream=0, **given, **addresses(weights=factors, logits=words), **tables, ready=True, early=True)
        expected = results(tokens, choice, dtype, router.channels)
        rows = x
        if gain is not None:
            norm = Emulated(small.norm_source(router.target, False, router.channels), tmp_path, 900)
            run = small.prepare_norm(norm, rows=tokens, channels=router.channels, eps=1e-5, offset=1.0)  # type: ignore[arg-type]
            rows = expected[0]
            beside = addresses(weight=gain, bias=None, residual=None, out=rows)
            run(stream=0, x=x.data_ptr(), stride=router.channels, **beside, ready=True, early=True)
        logits = torch.full((tokens, choice.experts), torch.nan, dtype=made)
        product = Emulated(routing.router_source(router, tokens), tmp_path, 900)
        run = routing.prepare_router(product, router, tokens=tokens, experts=choice.experts)  # type: ignore[arg-type]
        run(stream=0, **addresses(x=rows, weight=weight, bias=bias, out=logits), ready=True, early=True)
        index, weights, sorted_by = serve_routing.route(logits, preferred, choice, 2.5, BLOCK)
        assert sorted_by is not None
        assert torch.equal(normed.view(torch.int16), expected[0].view(torch.int16))
        assert torch.equal(chosen, index)
        torch.testing.assert_close(factors, weights, rtol=2e-6, atol=1e-12, equal_nan=True)
        count = int(Tables(sorted_by, tokens * choice.top_k, choice.experts, BLOCK).blocks[0, 0])
        end = len(memory) - len(Tables(memory, tokens * choice.top_k, choice.experts, BLOCK).blocks.view(-1))
        written = end + 4 * (count + 1)
        pairs = 2 * tokens * choice.top_k
        assert torch.equal(memory[:pairs], sorted_by[:pairs]) and (memory[written:] == -7).all()
        assert torch.equal(memory[end:written], sorted_by[end:written])
        assert not words.any()


def results(
    tokens: int, choice: Choice, dtype: torch.dtype, channels: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Poisoned memory for normed rows, index, weights and tables."""
    memory = torch.full((elements(tokens * choice.top_k, choice.experts, BLOCK),), -7, dtype=torch.int32)
    index = torch.full((tokens, choice.top_k), -7, dtype=torch.int32)
    return torch.full((tokens, channels), 7.0, dtype=dtype), index, torch.full(index.shape, torch.nan), memory
