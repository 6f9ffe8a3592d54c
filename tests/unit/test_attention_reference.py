"""ops/attention_reference.py, the definition of attention over pages, against attention written as sums."""

from __future__ import annotations

import math

import pytest
import torch

from tersor.ops import attention_reference as reference
from tersor.ops.attention_form import PAGE, AttentionForm, PagedCache, Rows

FORM = AttentionForm(heads=4, kv_heads=2, head_dim=16, scale=0.25, rotary_dim=8)
TURNS = torch.cat(
    [one(torch.outer(torch.arange(400.0), 0.1 ** torch.arange(4.0))) for one in (torch.cos, torch.sin)], 1
)
LENGTHS = (1, 63, 64, 65, 200)


def rows_of(counts: list[int], lengths: list[int], pages: torch.Tensor) -> Rows:
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    return Rows(starts, torch.tensor(lengths, dtype=torch.int32), pages, max(counts), pages.shape[1] * PAGE)


def shuffled_pages(rows: int, each: int) -> torch.Tensor:
    return (torch.randperm(rows * each) + 1).int().view(rows, each)


def by_hand(qkv: torch.Tensor, form: AttentionForm, sinks: torch.Tensor | None = None) -> torch.Tensor:
    """Attention of one text [n, channels] as sums over tokens, in float64."""
    q, k, v = reference.heads(qkv.float(), torch.arange(len(qkv)), form, TURNS, None)
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros(len(qkv), form.heads, form.head_dim, dtype=torch.float64)
    for i in range(len(qkv)):
        for h in range(form.heads):
            kv = h // (form.heads // form.kv_heads)
            first = 0 if form.window is None else max(0, i - form.window + 1)
            scores = [float(q[i, h] @ k[j, kv]) * form.scale for j in range(first, i + 1)]
            if form.softcap is not None:
                scores = [form.softcap * math.tanh(score / form.softcap) for score in scores]
            weights = [math.exp(score) for score in scores]
            total = sum(weights) + (math.exp(float(sinks[h])) if sinks is not None else 0.0)
            for j, weight in zip(range(first, i + 1), weights, strict=True):
                out[i, h] += weight / total * v[j, kv]
    return out.flatten(1)


@pytest.mark.parametrize("options", [{}, {"window": 5}, {"softcap": 2.0}, {"window": 70, "sinks": True}])
def test_texts_read_in_one_step_and_token_by_token_are_sums_over_tokens(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    options = dict(options)
    sinks = torch.randn(4) if options.pop("sinks", False) else None
    form = AttentionForm(heads=4, kv_heads=2, head_dim=16, scale=0.25, rotary_dim=8, **options)  # type: ignore[arg-type]
    texts = [torch.randn(length, form.qkv_channels) for length in (3, 70)]
    expected = [by_hand(text, form, sinks) for text in texts]
    pages = shuffled_pages(2, 2)
    cache = PagedCache.empty(5, form, torch.float32)
    cache.pages[0] = torch.nan
    whole = reference.attend(torch.cat(texts), cache, rows_of([3, 70], [3, 70], pages), form, TURNS, None, sinks)
    torch.testing.assert_close(whole.double(), torch.cat(expected), rtol=1e-5, atol=1e-6)
    cache = PagedCache.empty(5, form, torch.float32)
    chunks = [(0, 60), (60, 69), (69, 70)]
    got = []
    for first, end in chunks:
        step = torch.cat([texts[1][first:end], texts[0][:1]]) if first == 0 else texts[1][first:end]
        rows = rows_of([60, 1], [60, 1], pages.flip(0)) if first == 0 else rows_of([end - first], [end], pages[1:])
        got.append(reference.attend(step, cache, rows, form, TURNS, None, sinks)[: end - first])
    torch.testing.assert_close(torch.cat(got).double(), expected[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_rows_of_one_token_at_once_are_what_each_is_alone(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    lengths = [*LENGTHS, 0]
    pages = shuffled_pages(len(lengths), 4)
    caches = [PagedCache.empty(25, FORM, dtype) for _ in range(2)]
    for cache in caches:
        torch.manual_seed(2)
        cache.pages.copy_(torch.randn(cache.pages.shape).to(dtype))
        cache.pages.view(torch.uint8 if dtype != torch.float32 else dtype)[0] = (
            0x7F if dtype != torch.float32 else torch.nan
        )
    qkv = torch.randn(len(lengths) + 1, FORM.qkv_channels)
    rows = rows_of([1] * len(lengths), lengths, pages)
    before = caches[0].pages.view(torch.uint8)[0].clone()
    together = reference.attend(qkv, caches[0], rows, FORM, TURNS, None, None)
    assert torch.equal(caches[0].pages.view(torch.uint8)[0], before), "padding writes nothing"
    rows.most_queries = 2
    alone = reference.attend(qkv, caches[1], rows, FORM, TURNS, None, None)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    assert (together[len(LENGTHS) :] == 0).all()
    for row, length in enumerate(LENGTHS):
        page, slot = int(pages[row, (length - 1) // PAGE]), (length - 1) % PAGE
        assert torch.equal(*(one.pages[page, :, :, slot].float() for one in caches))


def test_e4m3_keeps_numbers_within_a_sixteenth_of_the_largest_of_a_head() -> None:
    torch.manual_seed(3)
    keys, values = torch.randn(2, 10, 2, 16).unbind()
    cache = PagedCache.empty(2, FORM, torch.float8_e4m3fn)
    reference.store(cache, keys * 1000, values, torch.ones(10, dtype=torch.long), torch.arange(10))
    got, also = reference.stored(cache, torch.tensor([1]))
    for have, want in ((got, keys * 1000), (also, values)):
        have, want = have[:, :10].transpose(0, 1), want
        assert bool(((have - want).abs() <= want.abs() / 16 + want.abs().amax(-1, keepdim=True) * 2**-16).all())


def test_queries_and_keys_are_normed_before_they_are_rotated() -> None:
    form = AttentionForm(heads=2, kv_heads=1, head_dim=4, scale=1.0, rotary_dim=4, norm_eps=0.0, norm_offset=1.0)
    weights = (torch.tensor([0.0, 1.0, 0.0, 0.0]), torch.zeros(4))
    qkv = torch.tensor([[3.0, 3.0, 3.0, 3.0] * 4])
    q, k, v = reference.heads(qkv, torch.tensor([0]), form, TURNS[:, [0, 1, 4, 5]], weights)
    assert q[0].tolist() == [[1.0, 2.0, 1.0, 1.0]] * 2 and k[0].tolist() == [[1.0] * 4] and v[0].tolist() == [[3.0] * 4]


def test_a_step_of_padding_alone_writes_nothing() -> None:
    cache = PagedCache.empty(3, FORM, torch.float32)
    rows = rows_of([1, 1], [0, 0], torch.tensor([[1], [2]], dtype=torch.int32))
    out = reference.attend(torch.randn(2, FORM.qkv_channels), cache, rows, FORM, TURNS, None, None)
    assert not out.any() and not cache.pages.any()
