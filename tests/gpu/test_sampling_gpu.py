"""Drawing tokens on a GPU: every token is that of the reference, whatever options rows have, over what was poisoned."""

from __future__ import annotations

import os

import pytest
import torch
from helpers.sampling_rows import logits_of, moved, plain, random_rows

from tersor import ops
from tersor.engine.options import resolved
from tersor.engine.params import SamplingParams
from tersor.engine.sampler import Sampler
from tersor.kernels import jit, sampling
from tersor.ops import SamplingRows, current, sampling_reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

POISON = -7
CASES = (
    (40, 1000, torch.bfloat16, 3.0),
    (30, 40, torch.float16, 2.0),
    (24, 7, torch.float32, 2.0),
    (16, 3001, torch.float16, 1.0),
    (64, 32000, torch.bfloat16, 1.0),
    (64, 32003, torch.float32, 0.5),
    (48, 128256, torch.bfloat16, 3.5),
    (48, 151936, torch.float16, 1.0),
    (20, 262144, torch.float32, 2.0),
    (20, 9000, torch.bfloat16, 0.0),
    (300, 5000, torch.bfloat16, 2.0),
)
"""Rows, vocabulary, dtype, and spread of the logits: 0.5 makes all tokens probable, 0 makes them equal."""


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """Compile side by side what the tests below would compile one after the other."""
    sources = [source for dtype in sampling.INPUTS for source in sampling.sources(dtype)]
    jit.compile_many(sources, jit.arch_for(torch.cuda.get_device_capability()), os.cpu_count())


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results and scratch lie in memory full of `POISON`."""

    def full(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.full(size, POISON, dtype=dtype, device="cuda").as_strided(size, stride)

    monkeypatch.setattr(current, "empty", full)


def check_logprobs(found: ops.Logprobs, expected: ops.Logprobs) -> None:
    """Assert that tokens and ranks are equal, and log probabilities within what a sum in float32 loses."""
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.ranks, expected.ranks)
    torch.testing.assert_close(found.chosen, expected.chosen, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("count", "vocabulary", "dtype", "spread"), CASES)
@pytest.mark.parametrize(("lists", "masks"), [(True, True), (False, False), (True, False)])
def test_tokens_and_logprobs_are_those_of_the_reference(
    count: int, vocabulary: int, dtype: torch.dtype, spread: float, lists: bool, masks: bool
) -> None:
    for seed in range(3):
        logits = logits_of(count, vocabulary, dtype, spread, seed).cuda()
        rows = moved(random_rows(count, vocabulary, seed, lists=lists, masks=masks), "cuda")
        asks = torch.randint(-1, 21, (count,), generator=torch.Generator().manual_seed(seed)).int().cuda()
        with ops.using(reference=True):
            wanted = moved(rows, "cuda")
            expected, of_them = ops.draw_with_logprobs(logits, wanted, asks)
        wide = torch.empty(count, vocabulary + 8 * (seed == 2), dtype=dtype, device="cuda")[:, :vocabulary]
        again = moved(rows, "cuda")
        tokens, found = ops.draw_with_logprobs(wide.copy_(logits), rows, asks)
        assert torch.equal(tokens, expected)
        check_logprobs(found, of_them)
        assert torch.equal(ops.draw(wide.copy_(logits), again), tokens)
        if rows.listed is not None and wanted.listed is not None:
            assert torch.equal(rows.listed.newest, wanted.listed.newest)


def test_the_reference_gives_on_a_gpu_what_it_gives_on_a_cpu() -> None:
    logits, rows = logits_of(64, 20000, torch.bfloat16, 2.0, 0), random_rows(64, 20000, 0)
    noise = sampling_reference.noise(rows.seeds, rows.positions, 20000)
    assert torch.equal(sampling_reference.noise(rows.seeds.cuda(), rows.positions.cuda(), 20000).cpu(), noise)
    there = sampling_reference.draw(logits.cuda(), moved(rows, "cuda"))
    assert torch.equal(there.cpu(), sampling_reference.draw(logits, rows))


@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_a_row_draws_the_same_token_alone_and_among_others(spread: float) -> None:
    logits = logits_of(64, 32000, torch.bfloat16, spread, 1).cuda()
    rows = moved(random_rows(64, 32000, 1), "cuda")
    together = ops.draw(logits.clone(), moved(rows, "cuda"))
    for row in range(64):
        alone = moved(rows, "cuda")
        alone.slots, alone.positions = torch.tensor([row], dtype=torch.int32).cuda(), rows.positions[row : row + 1]
        assert torch.equal(ops.draw(logits[row : row + 1].clone(), alone), together[row : row + 1])


def test_many_launches_one_after_the_other_draw_the_same_tokens() -> None:
    logits = logits_of(200, 50000, torch.float16, 1.0, 2).cuda()
    rows = moved(random_rows(200, 50000, 2, lists=False), "cuda")
    first = ops.draw(logits, rows)
    for _ in range(50):
        assert torch.equal(ops.draw(logits, rows), first)
    with ops.using(early=False):
        assert torch.equal(ops.draw(logits, rows), first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("count", [1, 32, 150])
def test_flat_rows_are_drawn_by_all_their_ctas(count: int, dtype: torch.dtype) -> None:
    """Logits by spread: flat ones; very flat ones; few values of bfloat16; all equal; at 3.5 most are far below few."""
    cases = ((1.0, 0.9, 0.0), (0.05, 0.999, 0.3), (0.01, 0.5, 0.0), (0.0, 0.7, 0.0), (3.5, 0.9, 0.0))
    for spread, top_p, min_p in cases:
        rows = moved(plain(count, temperature=0.8, top_p=top_p, min_p=min_p), "cuda")
        generator = torch.Generator("cuda").manual_seed(count)
        logits = torch.randn(count, 128256, device="cuda", generator=generator) * spread + 9.0
        if spread == 3.5:
            logits = torch.where(torch.arange(128256, device="cuda") % 16 == 0, 9.0 + logits * 1e-6, logits * 0.1 - 1.0)
        logits = logits.to(dtype)
        with ops.using(reference=True):
            expected = ops.draw(logits, rows)
        for _ in range(10):
            assert torch.equal(ops.draw(logits, rows), expected), spread


def test_prompt_logprobs_are_those_of_given_tokens() -> None:
    logits = logits_of(500, 32000, torch.bfloat16, 3.0, 4).cuda()
    targets = torch.randint(-1, 32001, (500,), device="cuda")
    asks = (torch.arange(500, device="cuda") % 7 - 1).int()
    with ops.using(reference=True):
        expected = ops.logprobs(logits, targets, asks, 5)
    check_logprobs(ops.logprobs(logits, targets, asks, 5), expected)


def replaced(rows: SamplingRows, by: SamplingRows) -> None:
    """Write other rows into the tensors of rows."""
    for name in ("temperature", "top_k", "top_p", "min_p", "seeds", "positions"):
        getattr(rows, name).copy_(getattr(by, name))
    assert rows.allowed is not None and by.allowed is not None and rows.listed is not None and by.listed is not None
    rows.allowed.bits.copy_(by.allowed.bits)
    rows.allowed.rows.copy_(by.allowed.rows)
    for name in rows.listed.__slots__:
        there, new = getattr(rows.listed, name), getattr(by.listed, name)
        there[: len(new)].copy_(new)


def test_one_graph_serves_every_mixture_of_rows() -> None:
    count, vocabulary = 32, 32000
    rows, given = moved(random_rows(count, vocabulary, 0), "cuda"), torch.empty(count, vocabulary, device="cuda").half()
    assert rows.listed is not None
    for name in ("tokens", "counts", "biases"):
        whole = torch.zeros(5000, dtype=getattr(rows.listed, name).dtype, device="cuda")
        setattr(rows.listed, name, whole)
    replaced(rows, random_rows(count, vocabulary, 0))
    asks = torch.full((count,), 3, dtype=torch.int32, device="cuda")
    logits = logits_of(count, vocabulary, torch.float16, 1.0, 0).cuda()

    def step() -> tuple[torch.Tensor, ops.Logprobs]:
        return ops.draw_with_logprobs(given.copy_(logits), rows, asks, 3)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens, found = step()
    for seed in range(12):
        other = random_rows(count, vocabulary, seed)
        replaced(rows, other)
        logits.copy_(logits_of(count, vocabulary, torch.float16, (0.3, 1.0, 4.0)[seed % 3], seed))
        with ops.using(reference=True):
            expected, of_them = ops.draw_with_logprobs(logits, moved(rows, "cuda"), asks, 3)
        tokens.fill_(POISON)
        graph.replay()
        assert torch.equal(tokens, expected), seed
        check_logprobs(found, of_them)


def test_padding_costs_no_token_and_touches_no_other_row() -> None:
    rows = plain(8, temperature=0.9)
    rows.temperature[1::2] = -1
    logits = logits_of(8, 1000, torch.float32, 1.0, 0)[:3].repeat(3, 1)[:8].contiguous()
    logits[1::2] = torch.nan
    rows = moved(rows, "cuda")
    tokens = ops.draw(logits.cuda(), rows)
    assert (tokens[1::2] == -1).all() and (tokens[::2] >= 0).all()


class Request:
    """What a sampler reads of a request."""

    def __init__(self, slot: int, **options: object) -> None:
        self.prompt, self.index, self.output, self.slot = [3, 4, slot], 0, list[int](), slot
        self.params = resolved(SamplingParams(**options), {})  # type: ignore[arg-type]
        self.stop_tokens = frozenset({2})


class Row:
    """A row that draws."""

    def __init__(self, request: Request, start: int) -> None:
        self.request, self.start, self.count = request, start, 1


class Step:
    """What a sampler reads of a step."""

    def __init__(self, rows: list[Row]) -> None:
        self.drawing = rows


def test_a_captured_sampler_draws_what_one_on_the_cpu_draws_while_the_host_is_a_step_behind() -> None:
    kinds: list[dict[str, object]] = [
        {"temperature": 0.0},
        {"temperature": 0.8, "seed": 3},
        {"temperature": 0.0, "repetition_penalty": 1.4},
        {"temperature": 0.7, "top_p": 0.8, "presence_penalty": 1.0, "frequency_penalty": 0.2, "seed": 5},
        {"top_k": 4, "logit_bias": {9: 3.0, 2: 9.0}, "min_tokens": 6, "seed": 7},
    ]
    there, here = Sampler(7, 3000, "cuda", most_length=100), Sampler(7, 3000, "cpu", most_length=100)
    given = torch.zeros(6, 3000, device="cuda").half()
    slots = torch.tensor([0, 1, 2, 3, 4, 6], dtype=torch.int32, device="cuda")  # the last row is padding
    lengths = torch.zeros(6, dtype=torch.int32, device="cuda")
    there.draw(given.clone(), slots, lengths)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = there.draw(given.clone(), slots, lengths)
    drawn: list[list[int]] = [[] for _ in kinds]
    requests = [Request(slot, **kind) for slot, kind in enumerate(kinds)]
    for turn in range(20):
        logits = logits_of(6, 3000, torch.float16, 1.0, turn)[[0, 1, 2, 0, 1, 2]]
        step = Step([Row(one, 2 + turn) for one in requests])
        lengths.fill_(3 + turn)
        for sampler in (there, here):
            sampler.prepare(step)
        expected = here.draw(logits[:5].clone(), slots[:5].cpu(), lengths[:5].cpu())
        given.copy_(logits)
        graph.replay()
        assert torch.equal(tokens[:5].cpu(), expected) and tokens[5] == -1, turn
        for one, known, token in zip(requests, drawn, expected.tolist(), strict=True):
            one.output[:] = known
            known.append(token)
