"""From a step to tokens: its tensors, the forward, and a CUDA graph for every padded number of few rows that decode.

Where several ranks compute a model, the first tells the others what it launches (`orders`), and they launch the same;
it alone draws, since it alone has a sampler, and tokens go to the others on the device. Nothing here waits for the
device but `Launched.tokens`: a step is launched while the host has not read the one before, and takes the tokens that
it drew from where the device keeps them, a slot a request.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tersor import ops
from tersor.engine.captured import Captured, Repeated, capture, repeated
from tersor.engine.orders import END, Line, Order
from tersor.engine.request import Step
from tersor.engine.sampler import Sampler
from tersor.engine.shared_pages import SharedPages, shared_pages
from tersor.engine.step_buffer import Layout, fill, most_tokens, prompt_places, rows_on
from tersor.errors import TersorError
from tersor.kernels.tune.shared_pages import LEAST_ROWS
from tersor.models import Decoder
from tersor.ops.attention_form import PAGE, PagedCache
from tersor.ops.collective import ALONE, Ranks
from tersor.ops.serve_attention import sharing_costs

IN_FLIGHT = 3
"""Steps whose buffers the host does not touch: one runs, one waits, one is being written."""
GRAPH_ROWS = 256
"""Rows of the largest captured step. Larger ones run without a graph: the device is busy with one of them for longer
than the host needs for the launches of the next, and each graph would cost start-up time and memory."""


def padded_rows(most: int) -> list[int]:
    """Return the numbers of rows that have a graph: 1, 2, 4, then steps of 8, 16 and 32, up to `most` or GRAPH_ROWS."""
    most = min(most, GRAPH_ROWS)
    sizes = [1, 2, 4, *range(8, 33, 8), *range(48, 129, 16), *range(160, GRAPH_ROWS, 32)]
    return [*(size for size in sizes if size < most), most]


@dataclass(slots=True)
class Launched:
    """A step that is under way.

    Attributes:
        step: which.
        drawn: int64 [rows that draw], on the host once `event` has come.
        logprobs: of the tokens drawn, where a row asks for them.
        prompt_logprobs: of tokens of prompts, in the order of rows and of their tokens, where a row asks for them.
        states: float32 [rows of `step.embedding`, H]: their last states, where there are such rows.
        event: `None` on a CPU.
        ranks: that computed it.
    """

    step: Step
    drawn: torch.Tensor
    logprobs: ops.Logprobs | None
    prompt_logprobs: ops.Logprobs | None
    states: torch.Tensor | None
    event: torch.cuda.Event | None
    ranks: Ranks

    def tokens(self) -> list[int]:
        """Wait for the step and return the tokens of its rows that draw; -1 where logits were not finite.

        Raises:
            LostError: a rank is gone.
        """
        if self.event is not None:
            self.event.synchronize()
        self.ranks.check()
        found: list[int] = self.drawn.tolist()
        return found


class Runner:
    """Runs the steps of a scheduler on one device.

    Attributes:
        caches: keys and values of every layer, once `allocate` has made them.
        graphs: padded number of rows -> captured step, or one that is `repeated`.
        sharing: the same of steps in which rows read pages together.
        costs: of a layer, by which that is chosen; `None` where it never is.
        capture_seconds: what capturing all of them took.
        eager_reason: why there are none, or an empty string.
        repeats: whether what would be graphs is launched anew every time: the host brings weights in a step.
        workspace: memory of split products.
    """

    def __init__(
        self,
        decoder: Decoder,
        sampler: Sampler | None,
        *,
        max_rows: int,
        max_length: int,
        kv_dtype: torch.dtype | None = None,
        ranks: Ranks = ALONE,
        line: Line | None = None,
    ) -> None:
        """Make a runner without pages.

        Args:
            decoder: the model.
            sampler: with `max_rows + 1` slots; `None` but on the first rank.
            max_rows: requests of a step at most.
            max_length: tokens of a text at most.
            kv_dtype: of pages; that of the model's activations unless given.
            ranks: that compute the model together.
            line: from the first of them to the others, where there are several.
        """
        self.decoder, self.sampler, self.device = decoder, sampler, decoder.device
        self.max_rows, self.max_length = max_rows, max_length
        self.ranks, self._line = ranks, line
        self.kv_dtype = kv_dtype or decoder.dtype
        self.workspace = ops.Workspace()
        self.caches: list[PagedCache] = []
        self.graphs: dict[int, Captured | Repeated] = {}
        self.sharing: dict[int, Captured | Repeated] = {}
        self.capture_seconds, self.eager_reason = 0.0, ""
        self.repeats = decoder.streamed is not None and not decoder.streamed.graphs
        self._pages = -(-max_length // PAGE)
        forms = [layer.attention.form for layer in decoder.layers]
        self.costs = sharing_costs(forms, self._pages * PAGE, decoder.dtype, self.kv_dtype, decoder.device)
        self._lines = np.zeros((max_rows, self._pages), dtype=np.int32)
        self._newest = torch.zeros(max_rows + 1, dtype=torch.int64, device=self.device)
        self._staging: list[torch.Tensor] = []
        self._turn = 0
        self._side: torch.cuda.Stream | None = None
        self._pool: Any = None

    def page_bytes(self) -> int:
        """Return bytes of a page, of all layers together."""
        caches = self.decoder.caches(1, self.kv_dtype)
        return sum(one.pages.nbytes + (0 if one.scales is None else one.scales.nbytes) for one in caches)

    def allocate(self, pages: int) -> None:
        """Make `pages` pages, of which page 0 is for padding; those there were go, and graphs with them."""
        self.release()
        self.caches = self.decoder.caches(pages, self.kv_dtype)

    def release(self) -> None:
        """Let go of graphs and pages: no step can be launched any more. NCCL waits for graphs that hold its calls."""
        self.graphs, self.sharing, self.caches, self._pool = {}, {}, [], None

    def sizes(self) -> list[int]:
        """Return the numbers of rows that have a graph, the largest first."""
        return padded_rows(self.max_rows)[::-1]

    @torch.inference_mode()
    def rehearse(self, tokens: int) -> None:
        """Read prompts of so many tokens together, all of them padding: what a step takes can be measured by it.

        A step of the most rows follows, all of which draw, and could read pages together where rows can.
        """
        shares, most = self.costs is not None and not ops.batch_invariant(), min(tokens, self.max_length)
        few = min(-(-tokens // self.max_length), self.max_rows)
        for layout in (Layout(tokens, few, self._pages), Layout(1, self.max_rows, self._pages, shares)):
            views = layout.split(torch.zeros(layout.size, dtype=torch.int32, device=self.device))
            views["slots"].fill_(self.max_rows)
            logits, _, lengths = self._logits(views, layout.rows, (most, most, self._pages * PAGE))
            self._draw(logits, views, lengths, False)

    @torch.inference_mode()
    def launch(self, step: Step, masks: Mapping[int, torch.Tensor] | None = None) -> Launched:
        """Begin a step and return without waiting for it.

        Args:
            step: what is computed.
            masks: slot -> the tokens that may be drawn there, int32 [ceil(V / 32)]; all where there is none.

        Raises:
            TersorError: it was released.
            LostError: a rank is gone.
        """
        if not self.caches:
            raise TersorError("the model is closed")
        for request in step.grown:
            if request.pages:
                self._lines[request.slot, : len(request.pages)] = request.pages
        assert self.sampler is not None, "the first rank alone launches steps"
        self.sampler.prepare(step, masks)
        size, most = self._graph_size(step), (1, 1)
        shared = self._shared(step, size or len(step.rows))
        captured = None if size is None else (self.graphs if shared is None else self.sharing)[size]
        places, targets, asks = ([], [], []) if captured else prompt_places(step)
        if captured is not None:
            layout = captured.layout
        else:
            longest = max(row.start + row.count for row in step.rows)
            most = most_tokens(step)
            layout = Layout(step.tokens, len(step.rows), -(-longest // PAGE), shared is not None)
        order = Order(
            graph=layout.rows if captured else 0,
            tokens=layout.tokens,
            rows=layout.rows,
            pages=layout.pages,
            shares=int(layout.shares),
            draws=len(step.drawing),
            more=len(places),
            most_queries=most[0],
            most_few=most[1],
            most_length=layout.pages * PAGE,
        )
        staged = self._stage(order.size)
        fill(staged.numpy()[: layout.size], layout, step, self._lines, self.max_rows, shared)
        staged.numpy()[layout.size :] = places
        if self._line is not None:
            self._line.tell(order, staged)
        if captured is not None:
            return self._publish(step, captured.replay(staged)[: order.draws])
        return self._publish(step, *self._eager(step, order, staged, targets, asks))

    @torch.inference_mode()
    def follow(self) -> None:
        """Launch what the first rank launches, until it says that it was the last; for every other rank.

        Raises:
            LostError: the first rank is gone.
        """
        assert self._line is not None, "one rank follows nobody"
        while (order := self._line.order()) != END:
            staged = self._stage(order.size)
            self._line.read(staged)
            if order.graph:
                (self.sharing if order.shares else self.graphs)[order.graph].replay(staged)
                continue
            logits, _, views, lengths = self._wanted(order, staged)
            if order.draws:
                self._draw(logits[: order.draws], views, lengths[: order.draws], False)

    def _graph_size(self, step: Step) -> int | None:
        """Return the rows of the captured step that serves one, if it only decodes and there is one."""
        if not self.graphs or step.decodes != len(step.rows):
            return None
        if any(row.request.embeds or row.request.params.logprobs is not None for row in step.drawing):
            return None
        return next((size for size in self.graphs if size >= len(step.rows)), None)

    def _shared(self, step: Step, rows: int) -> SharedPages | None:
        """Return what decoding rows read together in a step padded to `rows` rows, where that is predicted to pay."""
        if self.costs is None or step.decodes < LEAST_ROWS or ops.batch_invariant():
            return None
        decoding = step.rows[: step.decodes]
        full = np.fromiter((row.start // PAGE for row in decoding), np.int32, len(decoding))
        return shared_pages(self._lines[[row.request.slot for row in decoding]], full, rows, self.costs)

    def _eager(
        self, step: Step, order: Order, staged: torch.Tensor, targets: list[int], asks: list[int]
    ) -> tuple[torch.Tensor, ops.Logprobs | None, ops.Logprobs | None, torch.Tensor | None]:
        """Run a step that is no graph; return tokens, their log probabilities, those of prompts, and last states."""
        draws = order.draws
        logits, states, views, lengths = self._wanted(order, staged)
        read = None
        if targets:
            of_targets, of_asks = (
                torch.tensor(numbers, dtype=dtype).to(self.device, non_blocking=True)
                for numbers, dtype in ((targets, torch.int64), (asks, torch.int32))
            )
            read = ops.logprobs(logits[draws:], of_targets, of_asks)
        if not draws:
            return torch.empty(0, dtype=torch.int64, device=self.device), None, read, None
        asked = any(row.request.params.logprobs is not None for row in step.drawing)
        drawn, logprobs = self._draw(logits[:draws], views, lengths[:draws], asked)
        embedding = step.embedding
        if not embedding:
            return drawn, logprobs, read, None
        wanted = torch.tensor(embedding).to(self.device, non_blocking=True)
        return drawn, logprobs, read, states.index_select(0, wanted).float()

    def _wanted(
        self, order: Order, staged: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
        """Run the model on a step that is no graph; return logits and states where wanted, its arrays, lengths."""
        numbers = staged.to(self.device, non_blocking=True)
        views = order.layout.split(numbers)
        if order.more:
            views["places"] = torch.cat([views["places"][: order.draws], numbers[order.layout.size :]])
        logits, states, lengths = self._logits(views, order.draws + order.more, order.most)
        return logits, states, views, lengths

    def _stage(self, size: int) -> torch.Tensor:
        """Return memory of the host for a step's buffer that no copy reads any more."""
        self._turn = (self._turn + 1) % IN_FLIGHT
        while len(self._staging) < IN_FLIGHT:
            self._staging.append(torch.empty(0, dtype=torch.int32))
        if self._staging[self._turn].numel() < size:
            pinned = self.device.type == "cuda"
            self._staging[self._turn] = torch.empty(2 * size, dtype=torch.int32, pin_memory=pinned)
        return self._staging[self._turn][:size]

    def _logits(
        self,
        views: dict[str, torch.Tensor],
        count: int,
        most: tuple[int, int, int],
        everywhere: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Run the model; return logits [count, V], last states [count, H] and lengths of texts, int32 [count].

        All are of the first places; of all tokens in their order where they are wanted `everywhere`.
        `most` is that of `Order`.
        """
        places = views["places"][:count]
        tokens, lengths = ops.resolve(views["tokens"], self._newest, views["starts"], views["lengths"], places)
        rows = rows_on(views, *most)
        with ops.using(workspace=self.workspace):
            states = self.decoder.states(tokens, rows, self.caches, None if everywhere else places)
            return self.decoder.logits(states), states, lengths

    def _draw(
        self, logits: torch.Tensor, views: dict[str, torch.Tensor], lengths: torch.Tensor, logprobs: bool
    ) -> tuple[torch.Tensor, ops.Logprobs | None]:
        """Draw the tokens of rows of so many tokens by logits [S, V], and keep them for the next step."""
        count = len(logits)
        slots, found = views["slots"][:count], None
        if self.sampler is None:
            drawn = torch.empty(count, dtype=torch.int64, device=self.device)
        elif logprobs:
            drawn, found = self.sampler.draw_with_logprobs(logits, slots, lengths)
        else:
            drawn = self.sampler.draw(logits, slots, lengths)
        drawn = self.ranks.from_first(drawn)
        ops.keep(self._newest, slots, drawn)
        return drawn, found

    def _decode(self, views: dict[str, torch.Tensor], count: int) -> torch.Tensor:
        """Run a step of `count` rows of one token each, as a graph holds it; return the tokens drawn."""
        logits, _, lengths = self._logits(views, count, (1, 1, self._pages * PAGE), everywhere=True)
        return self._draw(logits, views, lengths, False)[0]

    def _publish(
        self,
        step: Step,
        drawn: torch.Tensor,
        logprobs: ops.Logprobs | None = None,
        prompt_logprobs: ops.Logprobs | None = None,
        states: torch.Tensor | None = None,
    ) -> Launched:
        """Begin to copy what a step gave to the host."""
        if self.device.type != "cuda":
            return Launched(step, drawn.clone(), logprobs, prompt_logprobs, states, None, self.ranks)

        def copied(tensor: torch.Tensor) -> torch.Tensor:
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            return host.copy_(tensor, non_blocking=True)

        of_drawn, of_prompts = (
            None if one is None else ops.Logprobs(*map(copied, one)) for one in (logprobs, prompt_logprobs)
        )
        host, of_states, event = copied(drawn), None if states is None else copied(states), torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return Launched(step, host, of_drawn, of_prompts, of_states, event, self.ranks)

    @torch.inference_mode()
    def capture(self, sizes: Sequence[int] = ()) -> None:
        """Capture a step for numbers of rows, the largest first, in the memory pool of those captured before.

        A forward goes ahead of each: libraries load and allocate what a capture must not. All of them take one stream,
        since a stream keeps memory for split sums. Where rows may read pages together, there is one more for that.

        Args:
            sizes: numbers of rows; unless given, `sizes`.

        Raises:
            TersorError: the model does what a capture forbids, or memory ran out.
        """
        started = time.perf_counter()
        if self.repeats:
            make: Callable[[Layout], Captured | Repeated] = functools.partial(
                repeated, decode=self._decode, device=self.device
            )
        else:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            self._side = self._side or torch.cuda.Stream(self.device)
            make = functools.partial(
                capture,
                decode=self._decode,
                spare=self.max_rows,
                side=self._side,
                pool=self._pool,
                # The thread in which NCCL watches its calls may ask for their events meanwhile.
                mode="global" if self.ranks.count == 1 else "thread_local",
                streamed=self.decoder.streamed,
            )
        for size in sorted(sizes or self.sizes(), reverse=True):
            self.graphs[size] = make(Layout(size, size, self._pages))
            if self.costs is not None and size >= LEAST_ROWS and not ops.batch_invariant():
                self.sharing[size] = make(Layout(size, size, self._pages, shares=True))
        self.graphs = dict(sorted(self.graphs.items()))
        self.capture_seconds += time.perf_counter() - started
