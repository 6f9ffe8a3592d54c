"""How many requests a second does the engine answer, planned or not, and how much of what prompts share is computed?"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from tersor.bench import report, roofline
from tersor.bench.workloads import SHUFFLED, SORTED, Workload, sort_key
from tersor.engine import groups
from tersor.engine.batch_items import Item
from tersor.engine.core import Core, Launched
from tersor.engine.garbage import left_alone
from tersor.engine.limits import Limits
from tersor.engine.offline import OfflineEngine
from tersor.engine.outputs import Answer, RequestOutput
from tersor.engine.params import SamplingParams
from tersor.engine.request import Step
from tersor.engine.scheduler import Scheduler
from tersor.errors import InputError, TersorError, did_you_mean
from tersor.ops.attention_form import PAGE

KIND = "tersor bench throughput"
VERSION = 1
METHOD = (
    "requests a second of one run over all requests of a workload, from tokens to tokens: planning or sorting "
    "included, loading and a run of a few requests before it not; normal random weights in the format, random tokens, "
    "as many drawn as the workload says; reuse: prompt tokens found in pages, of all; optimum: what neighbours in "
    "sorted order have in common, the most that any sharing could save; high water: most pages that requests held, or "
    "pins kept; "
    f"{roofline.METHOD}"
)

VLLM_METHOD = (
    "vLLM in a process of its own, which loads a checkpoint of random weights of the same distribution and makes its "
    "format of them, the output head in 16 bits, the same tokens, requests handed over all at once, pages kept by its "
    "prefix cache; sorting included, loading and a run of a few requests before it not"
)

PLANNED = "planned"
ORDERS = (PLANNED, SORTED, SHUFFLED)
"""By the engine's plan; prompts sorted, and as they come, both with pages kept by least recent use."""

WARM = 8
"""Requests of the run that is not timed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """One run.

    Attributes:
        name, format: of the model.
        workload, order: what ran, and how.
        requests: that were answered, continuations not counted.
        prompt_tokens, output_tokens: of all of them, continuations counted.
        seconds: of the run, those of planning or sorting included.
        plan_seconds: of planning or sorting.
        reuse, optimum: part of the prompt tokens that was found, and that could have been. This and what follows is
            `None` where vLLM does not say it.
        preemptions: requests that lost their pages.
        steps: that were run.
        step_tokens: of a step, on average.
        high_water: pages in use, at most, of `pages`.
        pages: that there are.
        roofline_seconds: that such a run takes at least (`roofline.Speeds.seconds`); `None` on a CPU and of vLLM.
    """

    name: str
    format: str
    workload: str
    order: str
    requests: int
    prompt_tokens: int
    output_tokens: int
    seconds: float
    plan_seconds: float
    reuse: float | None
    optimum: float
    preemptions: int | None = None
    steps: int | None = None
    step_tokens: float | None = None
    high_water: int | None = None
    pages: int | None = None
    roofline_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """What was not measured.

    Attributes:
        name, format: of the model.
        why: the reason.
    """

    name: str
    format: str
    why: str


class Runner(Protocol):
    """What runs steps: `engine.runner.Runner`."""

    def launch(self, step: Step, masks: Mapping[int, Any]) -> Launched:
        """As `core.Runner`."""


class _Counted:
    """A runner whose steps are counted."""

    def __init__(self, runner: Runner, scheduler: Scheduler) -> None:
        self._runner, self._scheduler = runner, scheduler
        self.steps = self.tokens = self.high_water = 0

    def launch(self, step: Step, masks: Mapping[int, Any]) -> Launched:
        cache = self._scheduler.cache
        self.steps += 1
        self.tokens += step.tokens
        self.high_water = max(self.high_water, cache.pages.usable - cache.available)
        return self._runner.launch(step, masks)


def check_order(order: str) -> None:
    """Refuse an order that there is not.

    Raises:
        InputError: it is none of `ORDERS`.
    """
    if order not in ORDERS:
        raise InputError(f"order {order!r}{did_you_mean(order, ORDERS)}: use {', '.join(ORDERS)}")


def context_of(workload: Workload) -> int:
    """Return the tokens of the longest text of a workload, in whole pages."""
    lengths = np.array([prompt.size for prompt in workload.prompts]) + workload.outputs
    return -(-int(lengths.max()) // PAGE) * PAGE


def optimum(workload: Workload, page: int = PAGE) -> float:
    """Return which part of all prompt tokens need not be computed.

    Args:
        workload: what is asked.
        page: tokens of a page.
    """
    shared = groups.plan(workload.prompts, page=page).optimum
    return (shared + (workload.samples - 1) * workload.tokens) / (workload.samples * workload.tokens)


def measure(
    runner: Runner,
    limits: Limits,
    workload: Workload,
    order: str,
    name: str,
    format: str,
    roofline_seconds: float | None = None,
) -> Throughput:
    """Answer a workload once.

    Args:
        runner: with its pages.
        limits: of the engine; each run begins with empty pages.
        workload: what is asked.
        order: one of `ORDERS`.
        name, format: of the model.
        roofline_seconds: of the workload, where they are known.

    Raises:
        InputError: there is no such order.
        TersorError: a request has no answer of its length.
    """
    check_order(order)
    items = [
        Item(
            str(index),
            prompt,
            SamplingParams(n=workload.samples, max_tokens=int(output), temperature=0, ignore_eos=True),
        )
        for index, (prompt, output) in enumerate(zip(workload.prompts, workload.outputs, strict=True))
    ]
    best = optimum(workload, limits.page_size)
    core = Core(Scheduler(limits), runner)
    list(_queued(core, items[:WARM]))
    scheduler = Scheduler(limits)
    counted = _Counted(runner, scheduler)
    core = Core(scheduler, counted)
    begun = time.perf_counter()
    planning = 0.0
    if order == PLANNED:
        engine = OfflineEngine(core)
        drawn = sum(_drawn(output) for output in engine.run(items, lambda: False))
        planning = engine.plan_seconds
    else:
        if order == SORTED:
            items = sorted(items, key=lambda item: sort_key(item.tokens))
            planning = time.perf_counter() - begun
        drawn = sum(_drawn(output) for output in _queued(core, items))
    seconds = time.perf_counter() - begun
    expected = workload.samples * int(workload.outputs.sum())
    if drawn != expected:
        raise TersorError(f"{workload.name}, {order}: {drawn} tokens were drawn, expected {expected}")
    total = workload.samples * workload.tokens
    return Throughput(
        name=name,
        format=format,
        workload=workload.name,
        order=order,
        requests=len(items),
        prompt_tokens=total,
        output_tokens=drawn,
        seconds=seconds,
        plan_seconds=planning,
        reuse=scheduler.cached_tokens / total,
        optimum=best,
        preemptions=scheduler.preemptions,
        steps=counted.steps,
        step_tokens=counted.tokens / counted.steps,
        high_water=counted.high_water,
        pages=scheduler.cache.pages.usable,
        roofline_seconds=roofline_seconds,
    )


def _queued(core: Core, items: Sequence[Item]) -> Iterator[RequestOutput]:
    """Answer items in the order in which they are handed over, all at once."""
    for item in items:
        assert item.params is not None
        core.add(item.key, item.tokens.tolist(), item.params)
    with left_alone():
        while core.unfinished:
            yield from core.step(partial=False)


def _drawn(output: Answer) -> int:
    assert isinstance(output, RequestOutput)
    if output.error is not None:
        raise TersorError(f"request {output.request_id} failed: {output.error}")
    return sum(len(one.token_ids) for one in output.outputs)


def result(
    found: Sequence[Throughput | Skipped], versions: Mapping[str, str] | None = None, **facts: Any
) -> dict[str, Any]:
    """Return what the verb writes as JSON.

    Args:
        found: runs and what did not run, in order.
        versions: of rivals.
        facts: what else holds for all rows.
    """
    rows = [row for row in found if isinstance(row, Throughput)]
    skipped = [row for row in found if isinstance(row, Skipped)]
    method = f"{METHOD}; {VLLM_METHOD}" if versions else METHOD
    return report.result(KIND, VERSION, method, facts, rows, skipped, versions)


def rate(row: dict[str, Any]) -> float:
    """Return requests a second of a row."""
    return row["requests"] / row["seconds"]


def roof(row: dict[str, Any]) -> float | None:
    """Return the most requests a second that a row could have; `None` where its roofline is not known.

    Results that were written before there were rooflines have none.
    """
    least = row.get("roofline_seconds")
    return row["requests"] / least if least else None


def columns(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return headings, some of two lines, and cells of the table."""
    cells = [
        [
            row["workload"],
            row["format"],
            row["order"],
            f"{rate(row):.2f}",
            "-" if (most := roof(row)) is None else f"{most:.2f}",
            _percent(rate(row), most, 0),
            f"{(row['prompt_tokens'] + row['output_tokens']) / row['seconds']:.0f}",
            f"{row['output_tokens'] / row['seconds']:.0f}",
            _percent(row["reuse"], 1, 1),
            _percent(row["reuse"], row["optimum"], 1),
            "-" if row["preemptions"] is None else str(row["preemptions"]),
            "-" if row["step_tokens"] is None else f"{row['step_tokens']:.0f}",
            _percent(row["high_water"], row["pages"], 0),
            f"{row['plan_seconds']:.2f}",
        ]
        for row in found["rows"]
    ]
    heads = ["workload", "format", "order", "requests/s", "roofline\nrequests/s", "of\nroofline", "tokens/s", "drawn/s"]
    return [*heads, "reuse", "of\noptimum", "preempted", "tokens\na step", "pages", "plan s"], cells


def _percent(part: float | None, whole: float | None, digits: int) -> str:
    return f"{100 * part / whole:.{digits}f} %" if part is not None and whole else "-"
