"""How long does a decode step of a whole model take, by rows and context, and how long do its bytes take to read?"""

from __future__ import annotations

import statistics
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from tersor.bench import report
from tersor.engine.options import resolved
from tersor.engine.params import SamplingParams
from tersor.engine.request import Request, Row, Step
from tersor.engine.runner import Runner
from tersor.engine.workers import Team
from tersor.models import Decoder
from tersor.models.mixture import Mixture
from tersor.models.weights import tensors_of
from tersor.ops.attention_form import PAGE, AttentionForm, PagedCache

KIND = "tersor bench latency"
VERSION = 1
METHOD = (
    "milliseconds a decode step, median of the runs of a loop in which a step is launched while the one before it "
    "runs, as the engine does, its tokens drawn greedily and read by the host; normal random weights in the format, "
    "every row with a text of `context` tokens, pages of normal random numbers in random order; roofline: bytes of the "
    "weights that a step reads (of experts those expected to be hit by uniform routing) and of the keys and values of "
    "its rows, over the bandwidth of a large read in the same run; link: bytes that stream in a step over its time, as "
    "a share of what plain copies of pinned memory as large as a layer, or plain reads of the same file, reach in the "
    "same run"
)
VLLM_METHOD = (
    "vLLM in a process of its own, which makes its format of random weights of the same distribution, the output head "
    "in 16 bits: the time that so many more tokens of every row take, by the steps, the texts being of `context` "
    "tokens in the middle; median of the runs; prefill: tokens of prompts that are asked at once and draw one token "
    "each, over the time until all have"
)
RANKS_METHOD = (
    "of several ranks bytes are those of the first; of several stages as many steps of `batch` rows are under way, and "
    "the time is that from one step to the next"
)
RUNS, STEPS = 3, 32
_FILLED = 512
"""Pages of a layer that are written at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """One time.

    Attributes:
        name: of the geometry.
        format: of the weights; that of the head after a slash, where it is another.
        batch: rows of the step.
        context: tokens of each text.
        milliseconds: of a step.
        weight_bytes: that a step reads; `None` of vLLM.
        kv_bytes: of the keys and values that it reads, likewise.
        cuda_graph: whether the step was a CUDA graph.
        streamed_bytes: of the weights that come from memory of the host or a disk in every step.
        link_bandwidth: bytes per second that they come at with nothing beside, or `None`.
    """

    name: str
    format: str
    batch: int
    context: int
    milliseconds: float
    weight_bytes: int | None
    kv_bytes: int | None
    cuda_graph: bool
    streamed_bytes: int = 0
    link_bandwidth: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefill:
    """How fast vLLM reads prompts.

    Attributes:
        name, format: of the model.
        prompts, prompt_tokens: how many were asked at once, and tokens of each.
        tokens_per_second: of all.
    """

    name: str
    format: str
    prompts: int
    prompt_tokens: int
    tokens_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """What was not timed.

    Attributes:
        name, format: of the model.
        what: of the rows, such as `32 rows of 512 tokens`; empty for all of them.
        why: the reason.
    """

    name: str
    format: str
    what: str
    why: str


def measure(
    runner: Runner,
    name: str,
    format: str,
    batches: Sequence[int],
    contexts: Sequence[int],
    steps: int = STEPS,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Latency]:
    """Time decode steps of a runner that has pages for the most rows of the longest texts.

    Args:
        runner: with its graphs, where steps are to be graphs.
        name, format: of the model, for the rows.
        batches, contexts: every pair is timed.
        steps: of a run.
        progress: told how many pairs are done, of how many.
    """
    fill(runner.caches)
    streamed = runner.decoder.streamed
    link = None if streamed is None else streamed.bandwidth()
    cells = [(batch, context) for context in contexts for batch in batches]
    for done, (batch, context) in enumerate(cells):
        if progress is not None:
            progress(done, len(cells))
        step = decoding(batch, context, PAGE)
        times = [_timed(runner, step, steps) for _ in range(RUNS + 1)][1:]
        yield Latency(
            name=name,
            format=format,
            batch=batch,
            context=context,
            milliseconds=statistics.median(times) * 1e3,
            weight_bytes=step_bytes(runner.decoder, batch),
            kv_bytes=kv_bytes(runner, batch, context),
            cuda_graph=bool(runner.graphs) and not runner.repeats,
            streamed_bytes=0 if streamed is None else streamed.nbytes,
            link_bandwidth=link,
        )


def fill(caches: Sequence[PagedCache]) -> None:
    """Write normal numbers to all pages, as texts leave them: a GPU at its power limit is faster with zeros."""
    for cache in caches:
        for part in cache.pages.split(_FILLED):
            part.copy_(torch.randn(part.shape, device=part.device))
        if cache.scales is not None:
            cache.scales.fill_(1.0)


def let_go(runner: Runner, team: Team) -> None:
    """End a runner on all ranks: the first tells the others, which run its steps until then."""
    if not team.first:
        fill(runner.caches)
        runner.follow()
    elif team.seat.line is not None:
        team.seat.line.end()
    runner.release()


def pages_for(batches: Sequence[int], contexts: Sequence[int]) -> int:
    """Return how many pages the largest of the steps has, page 0 included."""
    return max(batches) * -(-max(contexts) // PAGE) + 1


def decoding(batch: int, context: int, page: int) -> Step:
    """Return a step of `batch` rows that each draw the token after a text of `context` tokens."""
    each = -(-context // page)
    order = torch.randperm(batch * each, generator=torch.Generator().manual_seed(0)) + 1
    pages = order.view(batch, each).tolist()
    params = resolved(SamplingParams(temperature=0), {})
    requests = [
        Request(id=str(slot), prompt=array("I", [slot + 1] * context), params=params, pages=pages[slot], slot=slot)
        for slot in range(batch)
    ]
    rows = [Row(request, context - 1, 1, 1, True) for request in requests]
    return Step(rows, decodes=batch, tokens=batch, drawing=rows, grown=requests)


def _timed(runner: Runner, step: Step, steps: int) -> float:
    """Return seconds a step, each launched before the one ahead is read: from the end of one to that of the last.

    Of a pipeline as many are under way as it has stages.
    """
    under_way = deque(runner.launch(step) for _ in range(runner.stages.count + 1))
    under_way.popleft().tokens()
    started = time.perf_counter()
    for _ in range(steps):
        under_way.append(runner.launch(step))
        under_way.popleft().tokens()
    seconds = (time.perf_counter() - started) / steps
    for launched in under_way:
        launched.tokens()
    return seconds


def step_bytes(decoder: Decoder, batch: int) -> int:
    """Return the bytes of weights that a step of `batch` rows reads.

    Of E experts, K for each row, E (1 - (1 - K / E)^batch) are expected to be hit where routing is uniform.
    """
    behind = [part for part in (decoder.head, decoder.norm) if part is not None]
    total = sum(tensor.nbytes for part in behind for tensor in part.tensors())
    for layer in decoder.layers:
        parts = sum(tensor.nbytes for tensor in layer.tensors())
        if isinstance(layer.ffn, Mixture):
            form = layer.ffn.form
            share = 1 - (1 - form.top_k / form.count) ** batch
            experts = sum(tensor.nbytes for tensor in tensors_of(layer.ffn.gate_up, layer.ffn.down))
            parts -= round((1 - share) * experts)
        total += parts
    return total


def kv_bytes(runner: Runner, batch: int, context: int) -> int:
    """Return the bytes of keys and values that a step reads, what a window hides left out."""
    total = 0
    for layer, cache in zip(runner.decoder.layers, runner.caches, strict=True):
        form = layer.attention.form
        total += batch * min(context, form.window or context) * token_bytes(form, cache)
    return total


def token_bytes(form: AttentionForm, cache: PagedCache) -> int:
    """Return the bytes of keys and values that a token has in the pages of a layer."""
    return 2 * form.kv_heads * (form.head_dim * cache.pages.element_size() + (0 if cache.scales is None else 4))


def result(
    found: Sequence[Latency | Prefill | Skipped], versions: Mapping[str, str] | None = None, **facts: Any
) -> dict[str, Any]:
    """Return what the verb writes as JSON.

    Args:
        found: times and what was not timed, in order.
        versions: of rivals.
        facts: what else holds for all rows.
    """
    rows = [row for row in found if isinstance(row, Latency)]
    skipped = [row for row in found if isinstance(row, Skipped)]
    prefills = [asdict(row) for row in found if isinstance(row, Prefill)]
    if prefills:
        facts["prefills"] = prefills
    parts = ((METHOD, True), (VLLM_METHOD, versions), (RANKS_METHOD, "placement" in facts))
    method = "; ".join(part for part, there in parts if there)
    return report.result(KIND, VERSION, method, facts, rows, skipped, versions)


def roof(row: dict[str, Any], bandwidth: float | None) -> float | None:
    """Return the milliseconds that the bytes of a row take to read, or `None` where one or the other is not known."""
    known = bandwidth is not None and row["weight_bytes"] is not None
    return (row["weight_bytes"] + row["kv_bytes"]) / bandwidth * 1e3 if known else None


def link_share(row: dict[str, Any]) -> float | None:
    """Return the share of the link's bandwidth that a row reached, or `None` where nothing streamed."""
    link, nbytes = row.get("link_bandwidth"), row.get("streamed_bytes")
    return nbytes / row["milliseconds"] * 1e3 / link if link and nbytes else None


def columns(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return headings and cells of the table; those of the link where weights stream."""
    headings = ["model", "format", "context", "rows", "ms a step", "roofline ms", "of roofline", "tokens/s"]
    streams = any(link_share(row) is not None for row in found["rows"])
    cells = []
    for row in found["rows"]:
        least = roof(row, found["read_bandwidth"])
        cells.append(
            [
                row["name"],
                row["format"],
                str(row["context"]),
                str(row["batch"]),
                f"{row['milliseconds']:.3f}",
                "-" if least is None else f"{least:.3f}",
                "-" if least is None else f"{100 * least / row['milliseconds']:.0f} %",
                f"{row['batch'] / row['milliseconds'] * 1e3:.{1 if streams else 0}f}",
            ]
        )
        if streams:
            share = link_share(row)
            cells[-1] += (
                ["-"] * 3
                if share is None
                else [
                    f"{row['streamed_bytes'] / 1e9:.2f}",
                    f"{row['link_bandwidth'] / 1e9:.1f}",
                    f"{100 * share:.0f} %",
                ]
            )
    return headings + (["streamed GB", "link GB/s", "of link"] if streams else []), cells
