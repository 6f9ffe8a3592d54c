"""What one launch decides ahead of experts, and the sum behind them, on a GPU: the bits of single launches."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.chains import check_chain

from tersor import ops
from tersor.kernels import deciding, jit, norms, routing
from tersor.kernels.deciding import Decider
from tersor.ops import current, grouped, serve_routing
from tersor.ops.deciding import Gain, _combined
from tersor.ops.router import router_of
from tersor.ops.routing import combine, route_tables

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

TOKENS = (1, 2, 3, 7, 8, 13, 16)
BLOCK = 8
SIGMOID: dict[str, Any] = {"scoring": "sigmoid", "groups": 8, "top_groups": 4, "scale": 2.5}
CASES: tuple[tuple[int, int, int, torch.dtype, bool, bool, dict[str, Any]], ...] = (
    (128, 2048, 8, torch.bfloat16, False, True, {}),
    (8, 4096, 2, torch.float16, False, True, {}),
    (32, 2880, 4, torch.bfloat16, False, True, {"router bias": True}),
    (128, 2880, 4, torch.float16, False, True, {"router bias": True, "normalize": False}),
    (256, 7168, 8, torch.bfloat16, True, False, {**SIGMOID, "choice bias": True}),
    (64, 2048, 6, torch.float16, True, True, {"normalize": False, "scale": 16.0}),
    (255, 4096, 16, torch.bfloat16, True, True, {"choice bias": True}),
    (1, 8, 1, torch.float16, False, True, {}),
    (61, 72, 3, torch.float16, False, False, {"scoring": "sigmoid"}),
)
"""Experts, channels, a token's experts, dtype, whether logits are wide, whether rows are normed, how is chosen."""


def options_of(mode: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in mode.items() if " " not in name}


def decider_of(case: int) -> Decider:
    experts, channels, top_k, dtype, wide, norms, mode = CASES[case]
    options = {"scoring": "softmax", "normalize": True, "groups": 1, "top_groups": 1, **options_of(mode)}
    chosen = (options["scoring"], options["normalize"], "choice bias" in mode, options["groups"], options["top_groups"])
    choice = serve_routing.choice_of(experts, top_k, *chosen)
    held = torch.float32 if wide else dtype
    return Decider(router=router_of(dtype, held, wide, channels), choice=choice, norms=norms)


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """Compile side by side what the tests below would compile one after the other."""
    sources = set()
    for case, (_, channels, _, dtype, _, _, _) in enumerate(CASES):
        decider, name = decider_of(case), str(dtype).removeprefix("torch.")
        sources.add(routing.route_source(decider.choice, decider.logits))
        sources |= {deciding.source(decider, n) for n in TOKENS} | {norms.norm_source(name, False, channels)}
        sources |= {routing.router_source(decider.router, n) for n in TOKENS}
        sources |= {routing.combine_source(name), deciding.combine_source(name, channels)}
    jit.compile_many(list(sources), jit.arch_for(torch.cuda.get_device_capability()), os.cpu_count())


@pytest.fixture(autouse=True)
def served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of experts are not launched here; results lie in memory full of -7."""
    monkeypatch.setattr(grouped, "prepared", lambda *_: SimpleNamespace(block_tokens=BLOCK))

    def full(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.full(size, -7, dtype=dtype, device="cuda").as_strided(size, stride)

    monkeypatch.setattr(current, "empty", full)


def inputs(case: int, tokens: int) -> tuple[torch.Tensor, dict[str, Any], Gain | None]:
    """Rows, what `ops.decide` gets beside them, and their norm; some experts have equal logits."""
    experts, channels, top_k, dtype, wide, norms, mode = CASES[case]
    generator = torch.Generator(device="cuda").manual_seed(case * 100 + tokens)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=generator)

    held = torch.float32 if wide else dtype
    weight = (normal(experts, channels) / channels**0.5).to(held)
    weight[experts // 2 :: 3] = weight[0].clone()
    x = (3 * normal(tokens, channels)).to(dtype)
    x[-1, 0] = torch.nan if tokens == 7 else -0.0
    gain = Gain(normal(channels).to(dtype), 1e-6, 0.5) if norms else None
    return (
        x,
        {
            "router": (weight, normal(experts).to(held) if "router bias" in mode else None),
            "experts": (None, None),
            "top_k": top_k,
            "wide": wide,
            "bias": normal(experts) if "choice bias" in mode else None,
            **options_of(mode),
        },
        gain,
    )


def one_by_one(x: torch.Tensor, given: dict[str, Any], gain: Gain | None) -> tuple[torch.Tensor, ...]:
    """Rows, index, weights and tables of a launch each."""
    options = {name: one for name, one in given.items() if name not in ("router", "experts", "wide", "top_k")}
    rows = x if gain is None else ops.rms_norm(x, gain.weight, gain.eps, offset=gain.offset)
    logits = ops.router_logits(rows, *given["router"], wide=given["wide"])
    index, weights, tables = route_tables(logits, given["top_k"], BLOCK, **options)
    return rows, index, weights, tables.memory


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int16)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_one_launch_gives_the_bits_of_three(case: int) -> None:
    for tokens, turn in itertools.product(TOKENS, range(3)):
        x, given, gain = inputs(case, tokens)
        expected = one_by_one(x, given, gain)
        found = ops.decide(x, norm=gain, **given)
        assert found is not None
        for one, other in zip((found.x, found.index, found.weights, found.tables.memory), expected, strict=True):
            assert torch.equal(bits(one), bits(other)), (tokens, turn)


def steps(case: int, tokens: int) -> Iterator[Any]:
    """Yield a chain in which each step reads what the kernel just ahead wrote."""
    x, given, gain = inputs(case, tokens)
    assert gain is not None
    x[-1, 0] = 0.5
    generator = torch.Generator(device="cuda").manual_seed(tokens)
    y = torch.randn(tokens * given["top_k"], x.shape[1], device="cuda", generator=generator).to(x.dtype)

    def once() -> torch.Tensor:
        rows = x
        for _ in range(12):
            found = ops.decide(rows, norm=gain, **given)
            assert found is not None
            summed = _combined(y, found, rows, gain)
            rows = summed.x + 0 * summed.y if tokens == 2 else summed.y
        return rows

    def apart() -> torch.Tensor:
        rows = x
        for _ in range(12):
            _, index, weights, memory = one_by_one(rows, given, gain)
            sorted_by = ops.routing.Tables(memory, index.numel(), len(given["router"][0]), BLOCK)
            added = combine(y, weights, sorted_by, rows)
            normed = ops.rms_norm(added, gain.weight, gain.eps, offset=gain.offset)
            rows = added + 0 * normed if tokens == 2 else normed
        return rows

    yield from (once, apart)


@pytest.mark.parametrize("case", [0, 1, 2])
@pytest.mark.parametrize("tokens", [1, 2, 16])
def test_a_chain_that_is_replayed_as_a_graph_is_that_of_launches_that_wait(case: int, tokens: int) -> None:
    once, apart = steps(case, tokens)
    with ops.using(early=False):
        expected = apart()
        assert torch.equal(bits(once()), bits(expected))
    check_chain(once, lambda one, other: torch.equal(bits(one), bits(other)), times=20)
