"""Attention over pages: what the definition gives beside torch's own, the operator, its checks, and how kernels run."""

from __future__ import annotations

import itertools
from array import array
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.attention_cases import Case, Step

from tersor import ops
from tersor.engine import request
from tersor.engine.params import SamplingParams
from tersor.engine.step_buffer import most_tokens
from tersor.errors import ShapeError
from tersor.hardware import CHIPS, Chip, chip_named
from tersor.kernels import attention, attention_sm90, decode_attention, shared_attention
from tersor.ops import needed
from tersor.ops.attention_form import PAGE, AttentionForm

H200 = chip_named("H200")
CASE = Case(dtype=torch.float32, lengths=(130, 70, 5), counts=(4, 1, 5), tail=2)


def problem(**changes: Any) -> attention.Problem:
    """What the host knows of a step of 32 texts of up to 2048 tokens."""
    known: dict[str, Any] = {
        "rows": 32,
        "tokens": 32,
        "heads": 32,
        "kv_heads": 8,
        "rotary_dim": 128,
        "window": None,
        "softcap": None,
        "scale": 0.1,
        "eps": 0.0,
        "offset": 0.0,
        "most_queries": 1,
        "most_pages": 32,
        "table_stride": 32,
        "invariant": False,
    }
    return attention.Problem(**known | changes)


def test_what_pages_give_is_the_attention_of_torch_over_the_whole_text() -> None:
    step = Step(replace(CASE, rotary_dim=0))
    cache = step.copy_of_cache()
    found = ops.attend(step.qkv, cache, step.rows, step.form)
    assert not found[-2:].any()
    for row, (first, end) in enumerate(itertools.pairwise(step.rows.starts.tolist())):
        length = CASE.lengths[row]
        pages = cache.pages[step.rows.pages[row, : -(-length // PAGE)].long()]
        keys, values = pages.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length].repeat_interleave(2, dim=1)
        q = step.qkv[first:end, : 4 * 64].unflatten(1, (4, 64)).transpose(0, 1)
        mask = torch.ones(end - first, length, dtype=torch.bool).tril(length - (end - first))
        expected = torch.nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        assert torch.allclose(found[first:end], expected.transpose(0, 1).flatten(1), atol=1e-5)


def test_the_operator_declares_what_it_writes() -> None:
    for case in (CASE, replace(CASE, dtype=torch.float16, e4m3=True, norms=True, sinks=True)):
        step = Step(case)
        norms = step.norms or (None, None)
        form, rows = step.form, step.rows
        # fmt: off
        arguments = (
            step.qkv, step.cache.pages.nan_to_num(0) if step.cache.scales is None else step.cache.pages,
            None if step.cache.scales is None else step.cache.scales.nan_to_num(0), rows.starts, rows.lengths,
            rows.pages, rows.most_queries, rows.most_length, rows.settled, None, rows.most_few, step.rotary, *norms,
            step.sinks, form.heads, form.kv_heads, form.head_dim, form.scale, form.rotary_dim, form.window,
            form.softcap, form.norm_eps, form.norm_offset,
        )
        # fmt: on
        tests = ("test_schema", "test_faketensor") if step.cache.scales is None else ("test_faketensor",)
        torch.library.opcheck(torch.ops.tersor.attend.default, arguments, test_utils=tests)


def test_who_looks_on_sees_the_same() -> None:
    step = Step(CASE)
    one, other = step.copy_of_cache(), step.copy_of_cache()
    expected = ops.attend(*step.arguments(one))
    with torch.autograd.profiler.profile() as profile:
        found = ops.attend(*step.arguments(other))
    assert any("attend" in event.name for event in profile.function_events)
    assert torch.equal(found, expected)
    assert torch.equal(one.pages.nan_to_num(7), other.pages.nan_to_num(7))


def test_a_form_a_page_or_a_row_that_does_not_fit_is_refused() -> None:
    step = Step(CASE)

    def attend(form: dict[str, Any] | None = None, **changes: Any) -> None:
        names = ("qkv", "cache", "rows", "form", "rotary", "norms", "sinks")
        given = dict(zip(names, step.arguments(), strict=True)) | changes
        given["form"] = replace(step.form, **(form or {}))
        ops.attend(**given)

    rows = step.rows
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"qkv": step.qkv[:, 1:]}, "expected .tokens, 512."),
        ({"qkv": step.qkv.double()}, "float64"),
        ({"form": {"kv_heads": 3}}, "4 heads of 64 channels cannot share 3 heads of keys"),
        ({"form": {"rotary_dim": 66}}, "rotary_dim is 66"),
        ({"form": {"window": 0}}, "window is 0"),
        ({"form": {"softcap": 0.0}}, "softcap 0.0"),
        ({"form": {"norm_eps": 1e-6}}, "norm_eps is 1e-06, and there are no weights"),
        ({"norms": (step.qkv[0, :64], step.qkv[0, :64])}, "norm_eps is None, and there are 2 weights"),
        ({"cache": ops.PagedCache(step.cache.pages[:, :1])}, "pages are"),
        ({"cache": ops.PagedCache(step.cache.pages, torch.ones(1))}, "come with scales"),
        ({"cache": ops.PagedCache(step.cache.pages.to(torch.float8_e4m3fn))}, "come without scales"),
        ({"rotary": None}, "64 channels are rotated"),
        ({"rotary": torch.ones(129, 64)}, "129 positions, texts have up to 130 tokens"),
        ({"rotary": torch.ones(200, 32)}, "positions, 64"),
        ({"sinks": torch.ones(3)}, r"sinks are \[3\]"),
        ({"rows": replace(rows, starts=rows.starts[1:])}, "starts of rows"),
        ({"rows": replace(rows, lengths=rows.lengths.long())}, "int64, expected int32"),
        ({"rows": replace(rows, shared=torch.zeros(10 + 5 * 3 + 1, dtype=torch.int32))}, r"1 \+ 3 x 3 \+ 5 C"),
        ({"rows": replace(rows, shared=torch.zeros(10 + 5 * 3))}, r"shared pages of rows are \[25\] torch.float32"),
        ({"rows": replace(rows, most_few=-1)}, "few: -1"),
        ({"rows": replace(rows, most_length=1000)}, "of 1000, their tables hold 4 pages of 64"),
        ({"sinks": torch.ones(4, device="meta")}, "on cpu, another tensor of the call on meta"),
    ]
    for changes, words in wrong:
        with pytest.raises(ShapeError, match=words) as raised:
            attend(**changes)
        assert "\n" not in str(raised.value)


def test_why_no_kernel_serves_can_be_asked() -> None:
    step = Step(CASE)
    assert "CUDA" in ops.attention_obstacle(step.qkv, step.cache, step.form)
    with ops.using(reference=True):
        assert "TERSOR_KERNEL" in ops.attention_obstacle(step.qkv, step.cache, step.form)


@pytest.mark.parametrize("kind", ["pages", "head_dim", "rotary_dim", "norms", "sinks", "rotary", "strides"])
def test_what_kernels_do_not_take_has_a_reason(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tersor.ops.dispatch.environment_reason", lambda dtype, device: "")
    step = Step(Case(norms=True, sinks=True))
    given: dict[str, Any] = {
        "qkv": step.qkv,
        "cache": step.cache,
        "form": step.form,
        "rotary": step.rotary,
        "norms": step.norms,
        "sinks": step.sinks,
    }
    assert not ops.attention_obstacle(**given)
    pages, norms = step.cache.pages, step.norms
    assert norms is not None and step.rotary is not None and step.sinks is not None
    changes: dict[str, tuple[dict[str, Any], str]] = {
        "pages": ({"cache": ops.PagedCache(pages.bfloat16())}, "bfloat16"),
        "head_dim": ({"form": replace(step.form, head_dim=72)}, "not of 72"),
        "rotary_dim": ({"form": replace(step.form, rotary_dim=6)}, "not 6"),
        "norms": ({"norms": (norms[0].float(), norms[1].float())}, "float32"),
        "sinks": ({"sinks": step.sinks.double()}, "float64"),
        "rotary": ({"rotary": step.rotary.half()}, "float16"),
        "strides": ({"cache": ops.PagedCache(pages.transpose(3, 4).contiguous().transpose(3, 4))}, "not contiguous"),
    }
    change, words = changes[kind]
    assert words in ops.attention_obstacle(**given | change)


def test_splits_fill_the_gpu_and_are_few_where_rows_are_many() -> None:
    kind = attention.Kind(head_dim=128, dtype="float16")
    splits = {rows: decode_attention.grid_of(kind, problem(rows=rows), 132).splits for rows in (1, 2, 8, 16, 32, 256)}
    assert splits == {1: 32, 2: 16, 8: 4, 16: 2, 32: 1, 256: 1}
    assert decode_attention.grid_of(kind, problem(rows=1, most_pages=3), 132).splits == 3
    assert decode_attention.grid_of(kind, problem(), 132).counters == 0
    grid = decode_attention.grid_of(kind, problem(rows=2), 132)
    assert grid.counters == 16 and grid.part_queries == 4 and grid.floats == 16 * 16 * 4 * 130


def test_rows_that_share_pages_have_room_for_the_parts_that_others_read() -> None:
    kind = attention.Kind(head_dim=128, dtype="float16")
    assert [attention.most_parts(rows) for rows in (1, 16, 32, 64, 256, 512)] == [32, 32, 32, 16, 4, 4]
    grid = decode_attention.grid_of(kind, problem(rows=256, shares=True), 132)
    assert grid.splits == 1 and grid.slots == 5 and grid.counters == 256 * 8
    assert grid.floats == 256 * 8 * 5 * 4 * 130
    mixed = decode_attention.grid_of(kind, problem(rows=20, shares=True, most_queries=500), 132)
    assert mixed.splits == 1 and mixed.part_queries == 4  # rows of more tokens have no parts


def test_rows_of_one_token_are_served_as_such_beside_long_prompts_where_the_host_says_so() -> None:
    kind = attention.Kind(head_dim=128, dtype="float16")
    alone, beside = problem(rows=20, shares=True), problem(rows=20, shares=True, most_queries=500, most_few=1)
    grids = [decode_attention.grid_of(kind, one, 132) for one in (alone, beside)]
    assert beside.query_tiles(kind) == 1 and grids[0] == grids[1]
    assert [problem(most_queries=500, most_few=few).query_tiles(kind) for few in (2, 4, 8, 500)] == [1, 2, 4, 4]
    one = request.Request(id="", prompt=array("i", [1]), params=SamplingParams())
    rows = [request.Row(one, 0, count, 0, False) for count in (1, 2, 9, 300)]
    assert most_tokens(request.Step(rows)) == (300, 2) and most_tokens(request.Step(rows[2:])) == (300, 1)


def test_short_ctas_are_three_on_an_sm_where_as_many_pages_are_under_way() -> None:
    def ring(tiles: int = 1, dim: int = 128, chip: Chip = H200, e4m3: bool = False, **how: bool) -> tuple[Any, Any]:
        kind = attention.Kind(head_dim=dim, dtype="float16", e4m3=e4m3)
        parameters = decode_attention.decode_source(kind, tiles, chip, **how).parameters
        assert int(parameters["CTAS"]) * (int(parameters["SHARED_BYTES"]) + 1024) <= chip.shared_bytes + 1024
        return parameters["CTAS"], parameters["STAGES"]

    assert ring() == ring(tiles=2, shares=True) == (2, 3) and ring(shares=True) == (3, 2)
    assert ring(e4m3=True) == (2, 4) and ring(e4m3=True, shares=True) == ring(e4m3=True, crowded=True) == (3, 3)
    assert ring(dim=96, shares=True) == ring(dim=96) == (2, 4)
    assert ring(shares=True, chip=chip_named("A100")) == (2, 2)


def test_a_crowd_of_ctas_of_e4m3_pages_has_a_kernel_that_is_compiled_ahead() -> None:
    form = AttentionForm(heads=32, kv_heads=8, head_dim=128, scale=0.1, rotary_dim=128)

    def crowded(rows: int, pages: torch.dtype = torch.float8_e4m3fn, queries: int = 1) -> bool:
        sources = list(needed.attention(form, torch.float16, pages, rows, queries, 512, H200))
        names = [source.name for source in sources if "_decode_" in source.name]
        assert len(set(names)) == len(names) and names[0].startswith("tersor_attention_decode_1_128")
        return any("_1_crowded_" in name for name in names)

    assert [crowded(rows) for rows in (1, 66, 67, 256)] == [False, False, True, True]
    assert crowded(256, queries=500) and not crowded(256, torch.float16)
    with ops.using(batch_invariant=True):
        assert not any(
            "crowded" in one.name
            for one in needed.attention(form, torch.float16, torch.float8_e4m3fn, 256, 1, 512, H200)
        )


def test_a_split_is_as_long_in_any_batch_where_that_is_asked_for() -> None:
    kind = attention.Kind(head_dim=128, dtype="float16")
    for rows in (1, 32):
        assert decode_attention.grid_of(kind, problem(rows=rows, invariant=True), 132).splits == 4
    tiles = {problem(most_queries=most, invariant=True).query_tiles(kind) for most in (1, 2, 8, 500)}
    assert tiles == {4}
    windowed = decode_attention.grid_of(kind, problem(invariant=True, window=100), 132)
    assert windowed.splits * attention.INVARIANT_PAGES * PAGE >= 100 + attention.FEW_QUERIES + 2 * (PAGE - 1)


def test_queries_that_share_keys_go_together_as_far_as_registers_allow() -> None:
    small, large = (attention.Kind(head_dim=dim, dtype="float16") for dim in (128, 256))
    assert [small.query_tiles(count) for count in (1, 8, 9, 16, 17, 64)] == [1, 1, 2, 2, 4, 4]
    assert [large.query_tiles(count) for count in (8, 9, 64)] == [1, 2, 2]
    assert decode_attention.grid_of(small, problem(most_queries=8), 132).items == 1
    assert decode_attention.grid_of(small, problem(most_queries=8, kv_heads=1), 132).items == 8
    assert decode_attention.grid_of(small, problem(most_queries=500), 132).items == 1


def test_what_a_tile_sees_is_dealt_out_where_tiles_leave_multiprocessors_idle() -> None:
    kind = attention.Kind(head_dim=128, dtype="float16")

    def splits(**changes: Any) -> int:
        known = {"rows": 1, "tokens": 64, "most_queries": 64, "most_pages": 128}
        return attention_sm90.grid_of(kind, problem(**known | changes), 132).splits

    assert splits() == 132 // (2 * 8)
    assert splits(most_pages=32) == 32 // 2 // 4
    assert splits(rows=16, tokens=8192, most_queries=512) == splits(window=256) == splits(invariant=True) == 1
    mixed = attention_sm90.grid_of(kind, problem(rows=200, tokens=210, most_queries=11, most_pages=128), 132)
    assert mixed.ctas == 132 and mixed.splits == 1 and mixed.counters == 1 + 2 * 8 * (210 * 4 // 128 + 210 // 9)


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
@pytest.mark.parametrize("e4m3", [False, True])
def test_rings_fit_every_chip(chip: Any, e4m3: bool) -> None:
    for dim, tiles in itertools.product(range(16, 257, 16), (1, 2, 4)):
        kind = attention.Kind(head_dim=dim, dtype="float16", e4m3=e4m3)
        sources = [attention.prefill_source(kind, chip), shared_attention.shared_source(kind, chip)]
        if attention_sm90.takes(kind, chip):
            sources.append(attention_sm90.prefill_source(kind, chip))
            assert int(sources[-1].parameters["SLOTS"]) >= 4, sources[-1].name
        if tiles <= kind.query_tiles(64):
            sources.append(decode_attention.decode_source(kind, tiles, chip))
        for source in sources:
            assert int(source.parameters["SHARED_BYTES"]) <= chip.shared_bytes, (source.name, chip.name)


def test_scores_are_scaled_for_powers_of_two() -> None:
    assert problem().scores == (2**31 - 1, pytest.approx(0.1 * 1.4426950408889634), 0.0)
    assert problem(softcap=5.0, window=7).scores == (7, pytest.approx(0.02), pytest.approx(5 * 1.4426950408889634))


def test_a_cache_has_scales_where_its_numbers_have_eight_bits() -> None:
    form = AttentionForm(heads=2, kv_heads=1, head_dim=16, scale=1.0)
    assert ops.PagedCache.empty(2, form, torch.float16).scales is None
    scales = ops.PagedCache.empty(2, form, torch.float8_e4m3fn).scales
    assert scales is not None and scales.shape == (2, 2, 1, PAGE)
