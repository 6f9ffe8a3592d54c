"""Attention on a GPU: kernels against the reference, with NaN in unused parts of pages and in memory of results."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from helpers.attention_cases import NAN, Case, Step, same_pages, tolerance
from helpers.sharing import share

from tersor import hardware, ops
from tersor.kernels import attention as family
from tersor.kernels import attention_sm90, decode_attention, jit, shared_attention
from tersor.ops import current, serve_attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

LENGTHS = (1, 63, 64, 65, 200, 0, 2049)
RATIOS = ((1, 1), (2, 1), (3, 1), (8, 2), (20, 4), (16, 2), (16, 1), (32, 1), (40, 1), (32, 8))
DIMS = (64, 80, 96, 128, 192, 256)
FORMS: tuple[Case, ...] = (
    Case(),
    Case(dtype=torch.bfloat16, norms=True),
    Case(e4m3=True, sinks=True),
    Case(dtype=torch.bfloat16, e4m3=True, form={"window": 100}),
    Case(form={"window": 128, "softcap": 5.0}, rotary_dim=32),
    Case(dtype=torch.bfloat16, form={"softcap": 3.0}, norms=True, sinks=True),
)


def cases() -> Iterator[Case]:
    """Every head size and ratio with one new token a row, forms by turns; then more tokens, few and many."""
    turn = 0
    for dim in DIMS:
        for heads, kv_heads in RATIOS if dim == 128 else RATIOS[3:7]:
            for _ in range(2):
                form = FORMS[turn % len(FORMS)]
                turn += 1
                ones = (1,) * len(LENGTHS)
                yield replace(
                    form, head_dim=dim, heads=heads, kv_heads=kv_heads, lengths=LENGTHS, counts=ones, tail=3, seed=turn
                )
        for form in FORMS:
            turn += 1
            some = replace(form, head_dim=dim, heads=8, kv_heads=2, seed=turn, tail=turn % 3)
            yield replace(some, lengths=(8, 65, 200, 130, 3), counts=(8, 2, 7, 3, 1))
            yield replace(some, lengths=(500, 129, 0, 300, 64, 1), counts=(300, 1, 20, 150, 64, 1))


CASES = list(cases())
PREFILLS = (
    Case(head_dim=128, heads=8, kv_heads=2, lengths=(3000,), counts=(3000,)),
    Case(head_dim=128, heads=8, lengths=(2500, 1100), counts=(1500, 1100), dtype=torch.bfloat16, form={"window": 300}),
    Case(head_dim=64, heads=40, kv_heads=1, lengths=(5000, 70), counts=(9, 70), sinks=True),
    Case(head_dim=128, heads=32, kv_heads=8, lengths=(*range(40, 140), 900), counts=(*(1, 30) * 50, 700)),
    Case(head_dim=128, heads=32, kv_heads=8, lengths=(9000,), counts=(20,), dtype=torch.bfloat16, sinks=True),
    Case(head_dim=80, heads=6, kv_heads=2, lengths=(1000, 9), counts=(513, 9), norms=True, form={"softcap": 5.0}),
    Case(head_dim=128, heads=8, kv_heads=2, lengths=(3000, 70), counts=(1000, 70), dtype=torch.bfloat16, e4m3=True),
    Case(head_dim=256, heads=4, kv_heads=2, lengths=(1000,), counts=(700,), e4m3=True, form={"window": 300}),
    Case(head_dim=192, heads=6, kv_heads=6, lengths=(1000, 200), counts=(700, 11), dtype=torch.bfloat16),
    Case(head_dim=256, heads=8, kv_heads=4, lengths=(1000, 640), counts=(700, 640), form={"window": 129}),
)
"""Steps of many new tokens: long rows, windows, many rows of which most have few, heads that fill tiles together."""


def sharing() -> Iterator[Case]:
    """Rows in groups of two to 37, some of them within others, beside rows of their own, and padding; every form."""
    groups = (((*range(20), *range(40, 57)), 3), (tuple(range(4, 11)), 33), ((20, 21), 1), ((22, 23, 24), 2))
    lengths = [200 + 7 * row for row in range(60)]
    lengths[4:11] = [33 * 64 + 1, 33 * 64 + 64, 33 * 64 + 65, 2500, 2200, 3000, 2300]
    lengths[20:25], lengths[30] = [65, 128, 129, 130, 200], 0
    for turn, form in enumerate(FORMS):
        for dim, heads, kv_heads in ((128, 16, 4), (64, 3, 1), (80, 16, 1), (256, 16, 2), (96, 5, 5)):
            counts = [1] * 60
            if turn % 2:
                counts[50:] = [8, 2, 1, 40, 1, 1, 170, 1, 1, 3]
            some = replace(form, head_dim=dim, heads=heads, kv_heads=kv_heads, seed=turn, tail=turn)
            if turn == 4:  # a window that hides nothing; that of turn 3 does
                some = replace(some, form={**some.form, "window": 5000})
            yield replace(some, lengths=tuple(lengths), counts=tuple(counts), prefixes=groups)


SHARING = list(sharing())


def kind_of(case: Case) -> family.Kind:
    """What a case's kernels are compiled for."""
    return family.Kind(head_dim=case.head_dim, dtype=str(case.dtype).removeprefix("torch."), e4m3=case.e4m3)


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """Compile side by side what the tests below would compile one after the other."""
    chip = hardware.of_device(0)
    sources = set()
    for case in (*CASES, *PREFILLS):
        kind, most = kind_of(case), max(case.counts)
        queries = min(most, family.FEW_QUERIES) * (case.heads // case.kv_heads)
        sources.add(decode_attention.decode_source(kind, kind.query_tiles(queries), chip))
        if most > family.FEW_QUERIES:
            sources |= {family.append_source(kind), family.prefill_source(kind, chip)}
            if attention_sm90.takes(kind, chip):
                sources.add(attention_sm90.prefill_source(kind, chip))
    for case in SHARING:
        kind, queries = kind_of(case), min(max(case.counts), family.FEW_QUERIES) * (case.heads // case.kv_heads)
        sources |= {decode_attention.decode_source(kind, kind.query_tiles(queries), chip, True)}
        sources |= {shared_attention.shared_source(kind, chip), family.append_source(kind)}
        sources |= {family.prefill_source(kind, chip)}
        if attention_sm90.takes(kind, chip):
            sources.add(attention_sm90.prefill_source(kind, chip))
    jit.compile_many(list(sources), jit.arch_for(torch.cuda.get_device_capability()), os.cpu_count())


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results lie in memory full of NaN."""

    def full(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.full(size, NAN, dtype=dtype, device="cuda").as_strided(size, stride)

    monkeypatch.setattr(current, "empty", full)


def check(step: Step) -> torch.Tensor:
    """Assert that a step gives what the reference gives, pages too, and gives it again bit by bit."""
    expected, pages = step.expected()
    assert not ops.attention_obstacle(step.qkv, step.cache, step.form, step.rotary, step.norms, step.sinks)
    cache = step.copy_of_cache()
    found = ops.attend(*step.arguments(cache))
    error = (found.float() - expected).abs()
    assert (error <= tolerance(step, expected)).all(), f"{error.max().item()} {tolerance(step, expected).max().item()}"
    assert same_pages(cache, pages) > 0.999  # sums of a norm round in another order
    again = step.copy_of_cache()
    for _ in range(3):
        assert torch.equal(ops.attend(*step.arguments(again)), found)
    assert same_pages(cache, again) == 1
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_is_that_of_the_reference(case: Case) -> None:
    check(Step(case, "cuda"))


@pytest.mark.parametrize("case", PREFILLS, ids=lambda case: f"{case.head_dim}-{case.heads}-{len(case.counts)}")
@pytest.mark.parametrize("warpgroups", [True, False])
def test_many_new_tokens_are_those_of_the_reference(
    warpgroups: bool, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not warpgroups:
        monkeypatch.setattr(attention_sm90, "takes", lambda kind, chip: False)
    serve_attention._prepared.cache_clear()
    check(Step(case, "cuda"))
    serve_attention._prepared.cache_clear()


@pytest.mark.parametrize("case", SHARING, ids=lambda case: str(case)[:50])
def test_rows_that_read_pages_together_are_those_of_the_reference(case: Case) -> None:
    step = Step(case, "cuda")
    assert share(step.rows, step.form) is not None
    found = check(step)
    step.rows.settled = True
    assert torch.equal(check(step), found)


@pytest.mark.parametrize("e4m3", [False, True])
@pytest.mark.parametrize("shares", [False, True])
def test_many_rows_of_one_token_stand_beside_a_prompt(shares: bool, e4m3: bool) -> None:
    """The host knows that rows of few have one new token; CTAs of e4m3 pages are a crowd."""
    lengths, counts = (*(641 + 3 * row for row in range(80)), 900), (*(1,) * 80, 360)
    prefixes = (((*range(30), *range(40, 80)), 10),)
    case = Case(head_dim=128, heads=32, kv_heads=8, lengths=lengths, counts=counts, e4m3=e4m3, prefixes=prefixes)
    step = Step(case, "cuda")
    step.rows.most_few = 1
    assert not shares or share(step.rows, step.form) is not None
    found = check(step)
    step.rows.settled = True
    assert torch.equal(check(step), found)


@pytest.mark.parametrize("splits", [1, 2, 33])
def test_texts_in_any_number_of_splits_are_the_same_within_rounding(
    splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid_of = decode_attention.Grid.of
    monkeypatch.setattr(decode_attention, "grid_of", lambda kind, problem, sms: grid_of(kind, problem, splits))
    serve_attention._prepared.cache_clear()
    check(Step(Case(head_dim=128, heads=8, lengths=LENGTHS, counts=(1,) * len(LENGTHS)), "cuda"))
    serve_attention._prepared.cache_clear()


def test_a_row_has_the_same_bits_in_any_batch_where_that_is_asked_for() -> None:
    lengths = (700, 3, 65, 2049, 300)
    with ops.using(batch_invariant=True):
        step = Step(Case(head_dim=128, heads=8, lengths=lengths, counts=(1, 2, 1, 1, 250)), "cuda")
        together, rows, qkv = check(step), step.rows, step.qkv
        for row, (first, end) in enumerate(((0, 1), (1, 3), (3, 4), (4, 5), (5, 255))):
            starts = torch.tensor([0, end - first], dtype=torch.int32, device="cuda")
            alone = slice(row, row + 1)
            step.rows = ops.Rows(starts, rows.lengths[alone], rows.pages[alone], end - first, lengths[row])
            step.qkv = qkv[first:end]
            assert torch.equal(ops.attend(*step.arguments(step.copy_of_cache())), together[first:end])


@pytest.mark.parametrize("e4m3", [False, True])
def test_a_graph_follows_texts_that_grow(e4m3: bool) -> None:
    """Lengths, tables and queries change between replays; the host told of the most there will be."""
    case = Case(head_dim=128, heads=8, lengths=(60, 690, 127, 0), counts=(1, 1, 1, 1), e4m3=e4m3)
    step = Step(case, "cuda")
    used = set(step.rows.pages.flatten().tolist())
    free = [page for page in range(1, step.cache.pages.shape[0]) if page not in used]
    step.rows.pages[0, 1], step.rows.pages[2, 2] = free[0], free[1]
    angles = torch.randn(1024, 64, device="cuda")
    step.rotary = torch.cat([angles.cos(), angles.sin()], 1)
    step.rows.most_length, step.rows.settled = step.rows.pages.shape[1] * ops.PAGE, True
    cache = step.copy_of_cache()
    ops.attend(*step.arguments(step.copy_of_cache()))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = ops.attend(*step.arguments(cache))
    for turn in range(7):
        step.qkv.copy_(torch.randn(step.qkv.shape, generator=torch.Generator().manual_seed(turn)))
        step.cache = ops.PagedCache(cache.pages.clone(), None if cache.scales is None else cache.scales.clone())
        expected, pages = step.expected()
        found.fill_(NAN)
        graph.replay()
        assert ((found.float() - expected).abs() <= tolerance(step, expected)).all()
        assert same_pages(cache, pages) > 0.999
        step.rows.lengths[:3] += 1


@pytest.mark.parametrize("e4m3", [False, True])
def test_a_graph_follows_rows_that_share_other_pages(e4m3: bool) -> None:
    """Rows change places and grow between replays, and read together more or less of what they share, or nothing."""
    prefixes = ((tuple(range(40)), 5), (tuple(range(7, 30)), 12), ((20, 21), 14))
    lengths = (*(970 + row % 40 for row in range(46)), 0, 0)
    case = Case(head_dim=128, heads=8, lengths=lengths, counts=(1,) * 48, prefixes=prefixes, e4m3=e4m3)
    step = Step(case, "cuda")
    angles = torch.randn(2048, 64, device="cuda")
    step.rotary = torch.cat([angles.cos(), angles.sin()], 1)
    step.rows.most_length, step.rows.settled = step.rows.pages.shape[1] * ops.PAGE, True
    share(step.rows, step.form)
    graph, cache, told = torch.cuda.CUDAGraph(), step.copy_of_cache(), step.rows.shared
    assert told is not None
    ops.attend(*step.arguments(step.copy_of_cache()))
    with torch.cuda.graph(graph):
        found = ops.attend(*step.arguments(cache))
    generator = torch.Generator().manual_seed(0)
    for turn, (ctas, most) in enumerate(((264, 64), (1, 2), (8, 1), (600, 5), (264, 64), (30, 16))):
        order = torch.randperm(48, generator=generator).cuda()
        step.rows.pages.copy_(step.rows.pages[order])
        step.rows.lengths.copy_(step.rows.lengths[order])
        share(step.rows, step.form, ctas, most)
        assert step.rows.shared is not None and bool(step.rows.shared[0]) == (most > 1)
        told.copy_(step.rows.shared)
        step.qkv.copy_(torch.randn(step.qkv.shape, generator=torch.Generator().manual_seed(turn)))
        step.cache = ops.PagedCache(cache.pages.clone(), None if cache.scales is None else cache.scales.clone())
        expected, pages = step.expected()
        found.fill_(NAN)
        graph.replay()
        assert ((found.float() - expected).abs() <= tolerance(step, expected)).all()
        assert same_pages(cache, pages) > 0.999
        step.rows.lengths += (step.rows.lengths > 0).int()


@pytest.mark.parametrize("e4m3", [False, True])
@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("counts", [(1,) * 6, (4, 1, 8, 1, 1, 2), (40, 1, 70, 1, 9, 1)])
def test_launches_that_start_early_wait_for_what_they_read(
    counts: tuple[int, ...], shares: bool, e4m3: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chain of steps with nothing between them, each of which reads what the one ahead of it wrote to pages."""
    lengths, prefixes = (300, 129, 1100, 70, 65, 2), (((1, 2, 3), 1),) if shares else ()
    case = Case(head_dim=128, heads=8, lengths=lengths, counts=counts, e4m3=e4m3, prefixes=prefixes)
    step = Step(case, "cuda")
    assert not shares or share(step.rows, step.form) is not None
    step.rotary = torch.ones(2000, 128, device="cuda")
    rows = [
        replace(step.rows, lengths=step.rows.lengths + turn, most_length=step.rows.most_length + turn)
        for turn in range(20)
    ]
    found, caches = {}, {}
    for early in (False, True):
        cache = caches[early] = step.copy_of_cache()
        results = [torch.full((len(step.qkv), 8 * 128), NAN, dtype=case.dtype, device="cuda") for _ in rows]
        taken = iter(results)
        monkeypatch.setattr(current, "empty", lambda size, stride, dtype, taken=taken: next(taken))
        with ops.using(early=early):
            for one in rows:
                ops.attend(step.qkv, cache, one, step.form, step.rotary)
        torch.cuda.synchronize()
        found[early] = results
    assert all(torch.equal(one, other) for one, other in zip(found[False], found[True], strict=True))
    assert not any(one.isnan().any() for one in found[True])
    assert same_pages(caches[False], caches[True]) == 1


def test_rows_on_several_streams_do_not_share_what_splits_exchange() -> None:
    step = Step(Case(head_dim=128, heads=8, lengths=(2049,), counts=(1,)), "cuda")
    expected = check(step)
    streams, results = [torch.cuda.Stream() for _ in range(4)], []
    torch.cuda.synchronize()
    for _ in range(10):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(ops.attend(*step.arguments(step.copy_of_cache())))
    torch.cuda.synchronize()
    assert all(torch.equal(one, expected) for one in results)
