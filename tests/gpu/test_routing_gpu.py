"""Routing on a GPU: choice, weights, tables and sums of the kernels against the reference, over what was poisoned."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.chains import check_chain

from tersor import ops
from tersor.kernels import jit
from tersor.kernels import routing as family
from tersor.kernels.routing import Choice, Router
from tersor.ops import current, routing, routing_reference, serve_routing
from tersor.ops.tables import Tables

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

EXPERTS = (1, 2, 7, 8, 32, 60, 64, 128, 256, 384, 512)
TOP_K = (1, 2, 4, 6, 8, 10, 16)
TOKENS = (1, 2, 3, 5, 31, 33, 64, 65, 200)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MODES: tuple[dict[str, Any], ...] = (
    {},
    {"normalize": False, "scale": 16.0},
    {"biased": True},
    {"biased": True, "normalize": False},
    {"scoring": "sigmoid"},
    {"scoring": "sigmoid", "normalize": False},
    {"scoring": "sigmoid", "biased": True, "scale": 2.5},
)
GROUPED: tuple[dict[str, Any], ...] = (
    {"groups": 4, "top_groups": 2, "normalize": False},
    {"groups": 8, "top_groups": 4, "scoring": "sigmoid", "biased": True, "scale": 2.5},
    {"groups": 32, "top_groups": 9, "scoring": "sigmoid"},
    {"groups": 2, "top_groups": 1, "biased": True},
)
POISON = -7
ROUTERS = ((1, 8), (8, 4096), (60, 2048), (128, 2048), (127, 2880), (256, 7168), (513, 16384))
"""Experts and channels of routers whose logits are made."""
KINDS = ((False, False), (False, True), (True, True))
"""Whether weights are float32, and whether logits are."""


def cases() -> Iterator[tuple[int, int, torch.dtype, dict[str, Any]]]:
    """Every number of experts with every number of a token's; modes and dtypes by turns, so that all of them meet."""
    turns = itertools.cycle(itertools.product(MODES, DTYPES))
    for experts, top_k in itertools.product(EXPERTS, TOP_K):
        if top_k <= experts:
            mode, dtype = next(turns)
            yield experts, top_k, dtype, mode
    for (experts, top_k), mode, dtype in itertools.product(((64, 6), (160, 6), (256, 8)), GROUPED, DTYPES):
        if top_k <= experts // mode["groups"] * mode["top_groups"]:
            yield experts, top_k, dtype, mode


CASES = list(cases())


def choice_of(experts: int, top_k: int, mode: dict[str, Any]) -> Choice:
    """What `ops.route` makes of a mode."""
    return serve_routing.choice_of(
        experts,
        top_k,
        mode.get("scoring", "softmax"),
        mode.get("normalize", True),
        mode.get("biased", False),
        mode.get("groups", 1),
        mode.get("top_groups", 1),
    )


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """Compile side by side what the tests below would compile one after the other."""
    sources = {
        family.route_source(choice_of(experts, top_k, mode), str(dtype).removeprefix("torch."))
        for experts, top_k, dtype, mode in CASES
    }
    sources |= {family.tables_source(experts, index) for experts in EXPERTS for index in ("int32", "int64")}
    sources |= {family.combine_source("float16"), family.combine_source("bfloat16")}
    sources |= {
        family.router_source(Router(target=name, float_weight=held, float_out=wide, channels=channels), tokens)
        for (_, channels), (held, wide), name in itertools.product(ROUTERS, KINDS, ("float16", "bfloat16"))
        for tokens in TOKENS
        if tokens <= family.ROUTER_TOKENS
    }
    jit.compile_many(list(sources), jit.arch_for(torch.cuda.get_device_capability()), os.cpu_count())


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results and tables lie in memory full of `POISON`."""

    def full(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.full(size, POISON, dtype=dtype, device="cuda").as_strided(size, stride)

    monkeypatch.setattr(current, "empty", full)


def logits_of(tokens: int, experts: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Logits [T, E] in rows that are longer, a few NaN or -inf; many are equal, and the others so far apart that no
    rounding changes their order: sigmoid(x) + sigmoid(-x), which is always 1, is never the score of a group."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(-20, 20, (tokens, experts + 5), generator=generator) / 4 + 1 / 32
    rare = torch.randint(0, 50, found.shape, generator=generator)
    found[rare == 0] = torch.nan
    found[rare == 1] = -torch.inf
    return found.to("cuda", dtype)[:, :experts]


def check_tables(found: Tables, index: torch.Tensor) -> None:
    """Assert that tables are those of the reference, and that nothing else was written."""
    memory = routing_reference.tables(index, found.experts, found.block_tokens)
    expected = Tables(memory, found.pairs, found.experts, found.block_tokens)
    assert torch.equal(found.order, expected.order)
    assert torch.equal(found.position, expected.position)
    count = int(expected.blocks[0, 0])
    assert torch.equal(found.blocks[: count + 1], expected.blocks[: count + 1])
    assert (found.blocks[count + 1 :] == POISON).all()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("experts", "top_k", "dtype", "mode"), CASES, ids=[f"{e}-{k}-{d}-{list(m.items())}" for e, k, d, m in CASES]
)
def test_choice_weights_and_tables_are_those_of_the_reference(
    experts: int, top_k: int, dtype: torch.dtype, mode: dict[str, Any]
) -> None:
    options = {name: value for name, value in mode.items() if name != "biased"}
    bias = (torch.arange(experts, device="cuda") * 5 % 8) / 16 if mode.get("biased") else None
    choice, scale = choice_of(experts, top_k, mode), mode.get("scale", 1.0)
    for tokens in TOKENS:
        logits = logits_of(tokens, experts, dtype, tokens)
        expected_index, expected = routing_reference.route(logits, bias, choice, scale)
        index, weights, found = routing.route_tables(logits, top_k, 8, bias=bias, **options)
        assert torch.equal(index, expected_index), tokens
        torch.testing.assert_close(weights, expected, rtol=2e-6, atol=1e-12, equal_nan=True)
        check_tables(found, index)
        again, same = ops.route(logits, top_k, bias=bias, **options)
        assert torch.equal(again, index)
        assert torch.equal(same.view(torch.int32), weights.view(torch.int32))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("experts", EXPERTS)
def test_tables_of_an_index_are_those_of_the_reference(experts: int) -> None:
    generator = torch.Generator(device="cuda").manual_seed(experts)
    for (tokens, top_k), dtype in itertools.product(
        ((1, 1), (1, 16), (4, 8), (11, 3), (40, 16), (1111, 3)), (torch.int32, torch.int64)
    ):
        some = torch.randint(-2, experts + 2, (tokens, top_k), device="cuda", generator=generator).to(dtype)
        far = some.clone()
        far[0, 0] = torch.iinfo(dtype).min
        for index in (some, far, torch.full_like(some, experts - 1), torch.full_like(some, -1), some.t()):
            for block_tokens in (1, 8, 48):
                check_tables(routing.tables(index, experts, block_tokens), index)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("experts", [8, 128, 512])
def test_many_tokens_are_sorted_the_same_way_every_time(experts: int) -> None:
    logits = logits_of(8192, experts, torch.bfloat16)
    first = routing.route_tables(logits, 8, 64)
    check_tables(first[2], first[0])
    assert torch.equal(first[0], routing_reference.route(logits, None, choice_of(experts, 8, {}), 1.0)[0])
    for _ in range(20):
        again = routing.route_tables(logits, 8, 64)
        assert torch.equal(again[0], first[0]) and torch.equal(again[2].memory, first[2].memory)
        assert torch.equal(again[1].view(torch.int32), first[1].view(torch.int32))
    index = torch.randint(-1, experts + 1, (65536, 16), device="cuda")
    check_tables(routing.tables(index, experts, 128), index)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "top_k", "channels"), [(1, 8, 2048), (3, 10, 520), (5, 1, 37), (300, 16, 1032)])
def test_sums_over_experts_are_those_of_the_reference(
    tokens: int, top_k: int, channels: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator(device="cuda").manual_seed(channels)
    index = torch.randint(-1, 9, (tokens, top_k), device="cuda", generator=generator)
    found = routing.tables(index, 8, 16)
    y = torch.randn(tokens * top_k, channels, device="cuda", generator=generator).to(dtype)
    weights = torch.randn(tokens, top_k, device="cuda", generator=generator)
    addend = torch.randn(tokens, channels, device="cuda", generator=generator).to(dtype)
    y[int(found.blocks[0, 1]) :] = torch.nan
    shifted = torch.empty(y.numel() + 1, dtype=dtype, device="cuda")[1:].view_as(y).copy_(y)  # it starts on 2 bytes
    for rows, added in ((y, None), (y, addend), (shifted, addend)):
        expected = routing_reference.combine(rows, weights, found, added)
        out = routing.combine(rows, weights, found, added)
        torch.testing.assert_close(out, expected, rtol=torch.finfo(dtype).eps, atol=1e-5)
        assert torch.equal(out, routing.combine(rows, weights, found, added))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("held_wide", "wide"), KINDS)
@pytest.mark.parametrize(("experts", "channels"), ROUTERS)
def test_logits_are_those_of_a_float64_product_and_have_the_same_bits_beside_any_others(
    experts: int, channels: int, held_wide: bool, wide: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(size: tuple[int, ...], stride: tuple[int, ...], of: torch.dtype) -> torch.Tensor:
        return torch.full(size, torch.nan, dtype=of, device="cuda").as_strided(size, stride)

    monkeypatch.setattr(current, "empty", full)
    generator = torch.Generator(device="cuda").manual_seed(channels)
    x = torch.randn(family.ROUTER_TOKENS, channels, device="cuda", generator=generator).to(dtype)
    held = torch.float32 if held_wide else dtype
    weight = (torch.randn(experts, channels, device="cuda", generator=generator) / channels**0.5).to(held)
    for bias in (None, torch.randn(experts, device="cuda", generator=generator).to(held)):
        together = ops.router_logits(x, weight, bias, wide=wide)
        expected = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
        tolerance = {"rtol": 2e-5, "atol": 2e-5} if wide else {"rtol": torch.finfo(dtype).eps, "atol": 2e-5}
        torch.testing.assert_close(together.double(), expected, **tolerance)
        for tokens in [count for count in TOKENS if count <= len(x)]:
            some = ops.router_logits(x[:tokens], weight, bias, wide=wide)
            assert torch.equal(some, together[:tokens]), tokens
            assert torch.equal(some, ops.router_logits(x[:tokens], weight, bias, wide=wide))
        with ops.using(batch_invariant=True):
            assert torch.equal(
                ops.router_logits(x.repeat(3, 1), weight, bias, wide=wide)[len(x) :], together.repeat(2, 1)
            )
    with ops.using(reference=True):
        expected = ops.router_logits(x, weight, wide=wide)
    torch.testing.assert_close(ops.router_logits(x, weight, wide=wide), expected, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_a_router_in_a_chain_reads_what_the_kernel_ahead_wrote(tokens: int) -> None:
    """The weights of the second router are settled and read early; x never is."""
    generator = torch.Generator(device="cuda").manual_seed(tokens)
    start = torch.randn(tokens, 2048, device="cuda", generator=generator).bfloat16()
    first, back = (torch.randn(shape, device="cuda", generator=generator).bfloat16() for shape in ((128, 2048), 2048))
    wide = (torch.randn(2048, 128, device="cuda", generator=generator) / 16).bfloat16()

    def chain() -> torch.Tensor:
        x = start
        for _ in range(8):
            logits = ops.router_logits(ops.rms_norm(x, back, 1e-6), first)
            x = ops.rms_norm(ops.router_logits(logits, wide), back, 1e-6, residual=x)
        return x

    graph, result = check_chain(chain)
    before = result.clone()
    start.neg_()
    graph.replay()
    assert torch.equal(result, chain()) and not torch.equal(result, before)


def test_a_weight_that_was_just_written_is_not_read_early() -> None:
    x, weight = torch.ones(1, 4096, device="cuda").half(), torch.zeros(64, 4096, device="cuda").half()
    for turn in range(1, 40):
        weight.fill_(turn / 4096)
        assert (ops.router_logits(x, weight).float() - turn).abs().max() < 0.01 * turn


@pytest.mark.parametrize("tokens", [1, 7, 150])
def test_a_chain_that_is_replayed_as_a_graph_is_that_of_launches_that_wait(tokens: int) -> None:
    """Each step reads what the kernel just ahead wrote: a launch that does not wait would show."""
    generator = torch.Generator(device="cuda").manual_seed(tokens)
    y = torch.randn(tokens * 8, 64, device="cuda", generator=generator).half()
    start = torch.randn(tokens, 64, device="cuda", generator=generator).half()

    def chain() -> torch.Tensor:
        logits = start
        for _ in range(12):
            index, weights, found = routing.route_tables(logits, 8, 8)
            logits = routing.combine(y, weights, found, logits)
            logits = routing.combine(y, weights, routing.tables(index, 64, 8), logits)
        return logits

    check_chain(chain)
