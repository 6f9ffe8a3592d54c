"""engine/shared_pages.py and its bench: what rows read together is in their tables, is chosen by costs, and is told."""

from __future__ import annotations

import importlib.util
import random
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import tiny_lm
from helpers.fake_steps import Loop, scheduler
from helpers.sharing import audit, eager_costs
from numpy.typing import NDArray

from tersor import LLM, SamplingParams, ops
from tersor.bench import latency
from tersor.engine import runner as runners
from tersor.engine.captured import Captured
from tersor.engine.request import Step, continuations
from tersor.engine.runner import Runner
from tersor.engine.sampler import Sampler
from tersor.engine.shared_pages import most_items, shared_pages, shared_size
from tersor.engine.step_buffer import Layout
from tersor.formats import get_scheme
from tersor.hardware import chip_named
from tersor.kernels.attention import Kind, most_parts
from tersor.kernels.tune.shared_pages import LEAST_ROWS, shared_costs
from tersor.models import DecoderConfig
from tersor.models.random import random_decoder
from tersor.ops import dispatch, serve_attention
from tersor.ops.attention_form import PAGE, AttentionForm, Rows

H200 = shared_costs(Kind(head_dim=128, dtype="float16"), 32, 8, chip_named("H200"))
BENCH = Path(__file__).resolve().parents[2] / "bench"
FORM = AttentionForm(heads=32, kv_heads=8, head_dim=128, scale=1.0)


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # where dataclasses look for their types
    spec.loader.exec_module(module)
    return module


def tables_of(prefixes: list[list[int]], own: int) -> NDArray[np.int32]:
    """Pages of rows that begin with some pages of others and have `own` of themselves."""
    width = max(map(len, prefixes)) + own
    table = np.zeros((len(prefixes), width), np.int32)
    for row, prefix in enumerate(prefixes):
        pages = [*prefix, *range(10_000 + row * own, 10_000 + (row + 1) * own)]
        table[row, : len(pages)] = pages
    return table


def full_of(prefixes: list[list[int]], own: int) -> NDArray[np.int32]:
    return np.array([len(prefix) + own - 1 for prefix in prefixes], np.int32)


def test_every_page_of_a_row_is_read_once_whatever_its_rows_share_and_whatever_that_costs() -> None:
    draw, found = random.Random(1), 0
    for _ in range(400):
        nodes: list[list[int]] = [[]]
        for number in range(1, draw.randrange(2, 12)):
            nodes.append([*draw.choice(nodes), *range(100 * number, 100 * number + draw.randrange(1, 9))])
        prefixes = [draw.choice(nodes) for _ in range(draw.randrange(2, 60))]
        tables, full = tables_of(prefixes, 2), full_of(prefixes, 2)
        full -= np.array([draw.choice((0, 0, 1, 3)) for _ in full], np.int32)
        full = full.clip(0)
        costs = eager_costs(draw.choice((2, 5, 16)), draw.choice((1, 8)), draw.choice((2, 264)), draw.choice((0, 0.2)))
        rows = len(tables) + draw.randrange(40)
        plan = shared_pages(tables, full, rows, costs)
        if plan is None:
            continue
        found += 1
        assert 0 < len(plan.items) <= most_items(rows) and (plan.own[:, 1] <= most_parts(rows)).all()
        audit(plan.items, plan.order, plan.own, tables, full, costs.rows)
        numbers = np.full(shared_size(rows), -7, np.int32)
        plan.write(numbers, rows)
        items = numbers[1 + 3 * rows :].reshape(-1, 5)[: numbers[0]]
        assert [tuple(item) for item in items.tolist()] == plan.items
        assert (numbers[1 + rows : 1 + 3 * rows].reshape(-1, 2)[: len(tables)] == plan.own).all()
    assert found > 250


def test_prefixes_of_a_batch_are_read_once_for_as_many_rows_as_a_cta_takes() -> None:
    prefixes = [list(range(100 * (row % 16), 100 * (row % 16) + 31)) for row in range(256)]
    plan = shared_pages(tables_of(prefixes, 4), full_of(prefixes, 4), 256, H200)
    assert plan is not None and {item[1] for item in plan.items} == {16}
    assert len(plan.items) * 8 <= H200.ctas and (plan.own[:, 0] == 31).all()
    assert plan.saved(H200) > 16 * 31 * 15 * H200.again / 2
    one = shared_pages(tables_of(prefixes[::16], 4), full_of(prefixes[::16], 4), 16, H200)
    assert one is not None and len(one.items) > 4  # few CTAs would take longer than many


def test_few_rows_or_few_pages_are_read_by_every_row_for_itself() -> None:
    for count, pages in ((16, 2), (2, 4), (256, 0)):
        prefixes = [list(range(1, 1 + pages))] * count
        assert shared_pages(tables_of(prefixes, 4), full_of(prefixes, 4), count, H200) is None


def test_rows_share_at_several_levels_where_that_reads_less() -> None:
    system = list(range(1, 31))
    prefixes = [[*system, *range(100 * (row // 2), 100 * (row // 2) + 20)] for row in range(1, 17)]
    plan = shared_pages(tables_of(prefixes, 3), full_of(prefixes, 3), 16, H200)
    assert plan is not None
    assert {item[1] for item in plan.items if item[3] <= 30} == {16}
    assert {item[1] for item in plan.items if item[2] >= 30} == {2}
    level = [[*system, *range(100 * (row // 16), 100 * (row // 16) + 21)] for row in range(16, 64)]
    plan = shared_pages(tables_of(level, 3), full_of(level, 3), 48, H200)
    assert plan is not None and {item[1] for item in plan.items} == {16}
    assert any(item[2] < 30 < item[3] for item in plan.items)  # a CTA of 16 rows gains nothing by a level above


def test_steps_of_random_schedules_read_together_only_what_nobody_writes() -> None:
    draw, found = random.Random(4), 0
    for _ in range(60):
        pages, size = draw.choice((16, 40)), 4
        loop = Loop(scheduler(pages=pages, max_step_tokens=draw.choice((9, 40)), context=pages * size // 2))
        prefixes = [[draw.randrange(1, 6) for _ in range(draw.randrange(4, pages))] for _ in range(2)]
        for number in range(8):
            prompt = [*draw.choice(prefixes)[: draw.randrange(3, 40)], draw.randrange(1, 6)]
            for one in continuations(f"r{number}", prompt, SamplingParams(max_tokens=9, n=draw.choice((1, 1, 3)))):
                loop.scheduler.add(one)
        lines = np.full((8, pages), -1, np.int32)
        launch = loop.device.launch

        def checked(step: Step, lines: NDArray[np.int32] = lines, launch: Any = launch) -> list[int]:
            nonlocal found
            for request in step.grown:
                lines[request.slot, : len(request.pages)] = request.pages
            decoding = step.rows[: step.decodes]
            written = {
                row.request.pages[at // 4] for row in step.rows for at in range(row.start, row.start + row.count)
            }
            tables = lines[[row.request.slot for row in decoding]]
            full = np.array([row.start // 4 for row in decoding], np.int32)
            plan = shared_pages(tables, full, 8, eager_costs(16)) if decoding else None
            if plan is not None:
                found += 1
                audit(plan.items, plan.order, plan.own, tables, full, 16)
                for first, _, begin, end, _ in plan.items:
                    assert not written & set(decoding[plan.order[first]].request.pages[begin:end])
            return launch(step)

        loop.device.launch = checked  # type: ignore[method-assign]
        loop.run()
    assert found > 300


def seen(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Audit what every call of attention is told; return whether something was shared, a call each."""
    told: list[bool] = []
    attend = serve_attention.attend

    def watched(qkv: torch.Tensor, cache: ops.PagedCache, rows: Rows, *others: Any) -> torch.Tensor:
        if rows.shared is not None:
            numbers, count = rows.shared.numpy(), len(rows.lengths)
            items = [tuple(item) for item in numbers[1 + 3 * count :].reshape(-1, 5)[: numbers[0]].tolist()]
            own, lengths = numbers[1 + count : 1 + 3 * count].reshape(-1, 2), rows.lengths.numpy()
            members = sorted({int(numbers[1 + place]) for item in items for place in range(item[0], sum(item[:2]))})
            order = numbers[1 : 1 + len(set(numbers[1 : 1 + count].tolist()))] if items else numbers[:0]
            assert all(rows.starts[row + 1] - rows.starts[row] == 1 for row in members)
            audit(items, order, own, rows.pages.numpy(), (lengths - 1) // PAGE, 32)
        told.append(rows.shared is not None and bool(rows.shared[0]))
        return attend(qkv, cache, rows, *others)

    monkeypatch.setattr(serve_attention, "attend", watched)
    return told


def test_answers_are_the_same_where_rows_share_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runners, "LEAST_ROWS", 2)
    prefix = [40 + place % 99 for place in range(140)]
    prompts = [[*prefix[: 70 * (1 + number % 2)], number] for number in range(5)] + [[7]]
    params = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
    found = []
    for costs in (None, eager_costs(4)):
        model = LLM(tiny_lm.TINY, device="cpu", kv_bytes=1 << 22, max_length=256)
        assert model.core.runner.costs is None  # type: ignore[attr-defined]
        model.core.runner.costs = costs  # type: ignore[attr-defined]
        with monkeypatch.context() as patch:
            told = seen(patch)
            found.append([output.outputs[0].token_ids for output in model.generate(prompts, params)])
        assert any(told) == (costs is not None)
    assert found[0] == found[1]


def test_a_step_takes_the_graph_in_which_rows_share_where_they_do(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    config = DecoderConfig.from_dict({"architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5, **sizes})
    decoder = random_decoder(config, get_scheme("fp6_e3m2"), "cpu", torch.float32)
    runner = Runner(decoder, Sampler(21, 96, "cpu"), max_rows=20, max_length=300)
    runner.costs = eager_costs(16)
    runner.allocate(latency.pages_for([20], [300]))
    replayed: list[bool] = []

    def captured(shares: bool) -> Captured:
        layout = Layout(20, 20, 5, shares)
        buffer, drawn = torch.zeros(layout.size, dtype=torch.int32), torch.zeros(20, dtype=torch.int64)

        def replay() -> None:
            replayed.append(shares)
            drawn.copy_(runner._decode(layout.split(buffer), 20))

        return Captured(SimpleNamespace(replay=replay), buffer, layout, drawn)  # type: ignore[arg-type]

    runner.graphs, runner.sharing = {20: captured(False)}, {20: captured(True)}
    step = latency.decoding(LEAST_ROWS + 1, 260, PAGE)
    apart = runner.launch(step).tokens()
    told = seen(monkeypatch)
    for row in step.rows[3:9]:
        row.request.pages[:2] = step.rows[2].request.pages[:2]
    together = runner.launch(step).tokens()
    assert replayed == [False, True] and told == [True] and together[:3] == apart[:3]
    with ops.using(batch_invariant=True):
        assert runner.launch(step).tokens() == together
    few = latency.decoding(LEAST_ROWS - 1, 260, PAGE)
    for row in few.rows:
        row.request.pages[:2] = few.rows[0].request.pages[:2]
    runner.launch(few)
    assert replayed == [False, True, False, False]


def test_layers_share_where_kernels_serve_and_no_window_hides_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    def costs(*windows: int | None, heads: int = 32) -> Any:
        forms = [AttentionForm(heads=heads, kv_heads=8, head_dim=64, scale=1.0, window=window) for window in windows]
        forms.append(AttentionForm(heads=heads, kv_heads=heads, head_dim=64, scale=1.0, window=1))
        return serve_attention.sharing_costs(forms, 1000, torch.float16, torch.float16, torch.device("cuda", 0))

    assert serve_attention.sharing_costs([FORM], 1000, torch.float16, torch.float16, torch.device("cpu")) is None
    monkeypatch.setattr(dispatch, "kernel_chip", lambda device: chip_named("H200"))
    assert costs(999) is None
    assert costs(999, 1000).rows == costs(None).rows == 16
    assert costs(None, heads=8 * 33) is None


def test_a_fit_finds_the_costs_by_which_times_were_made(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = script("shared_pages", monkeypatch)
    true = replace(H200, page=60e-9, again=45e-9, tile=80e-9, part=15e-9, launch=2e-6, turn=9e-7)
    rows = []
    for case in list(bench.cases())[::3]:
        plan = case.plan(H200)
        apart = case.apart(true)
        together = max(plan.tiles * true.tile, plan.turns(H200) * true.turn)
        both = (
            apart - plan.pages * true.page - plan.again * true.again + together + plan.parts * true.part + true.launch
        )
        rows.append(bench.entry(case, plan, H200, apart * 1e6, both * 1e6))
        assert f"{case.rows:4} rows by" in bench.line(rows[-1]) and rows[-1]["loss"] >= 0
    found = bench.fitted(rows)
    assert found.pop("start") == pytest.approx(bench.START, rel=0.02)
    assert found == pytest.approx({name: getattr(true, name) for name in found}, rel=0.02)
