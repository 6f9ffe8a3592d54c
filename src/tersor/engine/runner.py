"""From a step to tokens: its tensors, the forward, and a CUDA graph for every padded number of few rows that decode.

Where several ranks compute a model, the first tells the others what it launches (`orders`), and they launch the same.
One of them draws, the first of the last stage, since it alone has a sampler, and tokens go to the others on the device.
Nothing here waits for the device but `Launched.tokens`: a step is launched while the host has not read the one before,
and takes the tokens that it drew from where the device keeps them, a slot a request. With several stages as many steps
are under way: each begins when those ahead of it are in later stages (`returns`).
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from tersor import ops
from tersor.engine.captured import Captured, Repeated, capture, repeated
from tersor.engine.launched import Drawn, Launched
from tersor.engine.orders import END, Line, Order
from tersor.engine.request import Step
from tersor.engine.returns import Returns
from tersor.engine.sampler import Sampler
from tersor.engine.sampler_news import Teller
from tersor.engine.shared_pages import SharedPages, shared_pages
from tersor.engine.step_buffer import Layout, fill, most_tokens, prompt_places, rows_on
from tersor.errors import TersorError
from tersor.kernels.tune.shared_pages import LEAST_ROWS
from tersor.models import Decoder
from tersor.ops.attention_form import PAGE, PagedCache
from tersor.ops.collective import ALONE, Ranks
from tersor.ops.serve_attention import sharing_costs
from tersor.ops.stages import ONE, Stages

IN_FLIGHT = 3
"""Steps whose buffers the host does not touch: one runs, one waits, one is being written; and one more a stage."""


GRAPH_ROWS = 256
"""Rows of the largest captured step. Larger ones run without a graph: the device is busy with one of them for longer
than the host needs for the launches of the next, and each graph would cost start-up time and memory."""


def padded_rows(most: int) -> list[int]:
    """Return the numbers of rows that have a graph: 1, 2, 4, then steps of 8, 16 and 32, up to `most` or GRAPH_ROWS."""
    most = min(most, GRAPH_ROWS)
    sizes = [1, 2, 4, *range(8, 33, 8), *range(48, 129, 16), *range(160, GRAPH_ROWS, 32)]
    return [*(size for size in sizes if size < most), most]


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
        workspace: memory of split products, given back when the runner goes, and its graphs with it.
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
        stages: Stages = ONE,
    ) -> None:
        """Make a runner without pages.

        Args:
            decoder: the model, or a stage of it.
            sampler: with `max_rows + 1` slots, on the rank that draws; on the first rank a `Teller` where another one
                draws; else `None`.
            max_rows: requests of a step at most.
            max_length: tokens of a text at most.
            kv_dtype: of pages; that of the model's activations unless given.
            ranks: that compute the stage together.
            line: from the first of all ranks to the others, where there are several.
            stages: of the model.
        """
        self.decoder, self.sampler, self.device = decoder, sampler, decoder.device
        self.max_rows, self.max_length = max_rows, max_length
        self.ranks, self.stages, self._line = ranks, stages, line
        self.kv_dtype = kv_dtype or decoder.dtype
        self.workspace = ops.Workspace()
        weakref.finalize(self, self.workspace.close).atexit = False  # a process that ends frees everything anyway
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
        away = stages.first and not stages.last
        self._returns = Returns(stages, ranks, self._newest, decoder.config.hidden) if away else None
        self._staging: list[torch.Tensor] = []
        self._turn = 0
        self._side: torch.cuda.Stream | None = None
        self._pool: Any = None
        self._slots = self._newest.new_empty(0, dtype=torch.int32)  # of the step that was run last

    @property
    def everyone(self) -> Ranks:
        """All ranks of the model: what they have to agree on."""
        return self.ranks if self.stages.count == 1 else self.stages.everyone

    def page_bytes(self) -> int:
        """Return bytes of a page, of all layers together."""
        caches = self.decoder.caches(1, self.kv_dtype)
        return sum(one.pages.nbytes + (0 if one.scales is None else one.scales.nbytes) for one in caches)

    def passed_bytes(self, tokens: int) -> int:
        """Return bytes of states on their way to the next stage, of steps of so many tokens, beside those of a step."""
        steps = 0 if self.stages.last else self.stages.count + 1
        return steps * tokens * self.decoder.config.hidden * self.decoder.dtype.itemsize

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
            given = None if self.stages.first else self._given(layout.tokens).zero_()
            made, _, lengths = self._made(views, layout.rows, (most, most, self._pages * PAGE), given=given)
            if self.stages.last:
                self._draw(made, views, lengths, False)

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
        news = self.sampler.news() if isinstance(self.sampler, Teller) else None
        size, most = self._graph_size(step), (1, 1)
        shared = self._shared(step, size or len(step.rows))
        behind: list[list[int]] = [[], [], [], []]
        if size is not None:
            layout = (self.graphs if shared is None else self.sharing)[size].layout
        else:
            behind = [*prompt_places(step), step.embedding]
            longest = max(row.start + row.count for row in step.rows)
            most = most_tokens(step)
            layout = Layout(step.tokens, len(step.rows), -(-longest // PAGE), shared is not None)
        order = Order(
            graph=layout.rows if size is not None else 0,
            tokens=layout.tokens,
            rows=layout.rows,
            pages=layout.pages,
            shares=int(layout.shares),
            draws=len(step.drawing),
            more=len(behind[0]),
            embeds=len(behind[3]),
            news=0 if news is None else len(news),
            logprobs=int(size is None and any(row.request.params.logprobs is not None for row in step.drawing)),
            kept=0,
            most_queries=most[0],
            most_few=most[1],
            most_length=layout.pages * PAGE,
        )
        staged = self._stage(order.size)
        numbers = staged.numpy()
        fill(numbers[: layout.size], layout, step, self._lines, self.max_rows, shared)
        if size is None:
            numbers[layout.size : order.size - order.news] = [number for part in behind for number in part]
        if news is not None:
            staged[order.size - order.news :] = news
        if self._returns is not None:
            order = order._replace(kept=self._returns.needed(layout.split(numbers[: layout.size])["tokens"]))
        if self._line is not None:
            self._line.tell(order, staged)
        drawn = self._run(order, staged)
        if self._returns is not None:
            launched = self._returns.begin(order, self._slots[: order.draws], step)
            assert launched is not None
            return launched
        assert drawn is not None, "who draws is the first rank"
        launched = Launched(step, self.ranks)
        launched.publish(drawn)
        return launched

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
            drawn = self._run(order, staged)
            if self._returns is not None:
                self._returns.begin(order, self._slots[: order.draws])
            elif drawn is not None:
                for tensor in drawn.tensors():
                    self.stages.give_back(tensor.clone() if order.graph else tensor)

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

    def _run(self, order: Order, staged: torch.Tensor) -> Drawn | None:
        """Run a step on this rank, and pass on what is for the next stage; return what was drawn, if that is here."""
        if self._returns is not None:
            self._returns.keep(order.kept)
        if order.news and self.sampler is not None and self.stages.last:
            self.sampler.read(order.split(staged)["news"])
        if order.graph:
            captured = (self.sharing if order.shares else self.graphs)[order.graph]
            if captured.given is not None:
                self.stages.take(captured.given)
            made = captured.replay(staged[: captured.layout.size])
            if self._returns is not None:
                self._slots = captured.slots
            if self.stages.last:
                return None if self.sampler is None else Drawn(made[: order.draws])
            self.stages.pass_on(made.clone())  # the next replay writes there
            return None
        numbers = staged.to(self.device, non_blocking=True)
        views, behind = order.layout.split(numbers[: order.layout.size]), order.split(numbers)
        self._slots = views["slots"]
        if order.more:
            views["places"] = torch.cat([views["places"][: order.draws], behind["places"]])
        given = None if self.stages.first else self.stages.take(self._given(order.tokens))
        made, states, lengths = self._made(views, order.draws + order.more, order.most, given=given)
        if self.stages.last:
            return self._drawn(order, made, states, views, lengths, behind)
        self.stages.pass_on(made)
        return None

    def _drawn(
        self,
        order: Order,
        logits: torch.Tensor,
        states: torch.Tensor,
        views: dict[str, torch.Tensor],
        lengths: torch.Tensor,
        behind: dict[str, torch.Tensor],
    ) -> Drawn | None:
        """Draw the tokens of a step that is no graph; return them with what was asked beside, where they are drawn."""
        draws, here, read = order.draws, self.sampler is not None, None
        if here and order.more:
            read = ops.logprobs(logits[draws:], behind["targets"].long(), behind["asks"])
        if not draws:
            tokens = torch.empty(0, dtype=torch.int64, device=self.device)
            return Drawn(tokens, None, read) if here else None
        tokens, logprobs = self._draw(logits[:draws], views, lengths[:draws], here and bool(order.logprobs))
        last = states.index_select(0, behind["embeds"]).float() if here and order.embeds else None
        return Drawn(tokens, logprobs, read, last) if here else None

    def _given(self, tokens: int) -> torch.Tensor:
        """Return memory for the states that the stage ahead passes on."""
        return torch.empty(tokens, self.decoder.config.hidden, dtype=self.decoder.dtype, device=self.device)

    def _stage(self, size: int) -> torch.Tensor:
        """Return memory of the host for a step's buffer that no copy reads any more."""
        several = IN_FLIGHT + self.stages.count - 1
        self._turn = (self._turn + 1) % several
        while len(self._staging) < several:
            self._staging.append(torch.empty(0, dtype=torch.int32))
        if self._staging[self._turn].numel() < size:
            pinned = self.device.type == "cuda"
            self._staging[self._turn] = torch.empty(2 * size, dtype=torch.int32, pin_memory=pinned)
        return self._staging[self._turn][:size]

    def _made(
        self,
        views: dict[str, torch.Tensor],
        count: int,
        most: tuple[int, int, int],
        everywhere: bool = False,
        given: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Run the model; return logits [count, V], last states [count, H] and lengths of texts, int32 [count].

        All are of the first places; of all tokens in their order where they are wanted `everywhere`. A stage that is
        not the last returns the states of all tokens twice. `most` is that of `Order`, `given` what was passed on.
        """
        places = views["places"][:count]
        tokens, lengths = ops.resolve(views["tokens"], self._newest, views["starts"], views["lengths"], places)
        rows = rows_on(views, *most)
        with ops.using(workspace=self.workspace):
            before = tokens if given is None else given
            states = self.decoder.states(before, rows, self.caches, None if everywhere else places)
            return self.decoder.logits(states) if self.stages.last else states, states, lengths

    def _draw(
        self, logits: torch.Tensor, views: dict[str, torch.Tensor], lengths: torch.Tensor, logprobs: bool
    ) -> tuple[torch.Tensor, ops.Logprobs | None]:
        """Draw the tokens of rows of so many tokens by logits [S, V]; of one stage, keep them for the next step."""
        count = len(logits)
        slots, found = views["slots"][:count], None
        if self.sampler is None:
            drawn = torch.empty(count, dtype=torch.int64, device=self.device)
        elif logprobs:
            drawn, found = self.sampler.draw_with_logprobs(logits, slots, lengths)
        else:
            drawn = self.sampler.draw(logits, slots, lengths)
        if self.stages.count == 1:
            drawn = self.ranks.from_first(drawn)
            ops.keep(self._newest, slots, drawn)
        return drawn, found

    def _decode(self, views: dict[str, torch.Tensor], count: int, given: torch.Tensor | None = None) -> torch.Tensor:
        """Run a step of `count` rows of one token each, as a graph holds it; return tokens drawn, or what is passed."""
        made, _, lengths = self._made(views, count, (1, 1, self._pages * PAGE), everywhere=True, given=given)
        return self._draw(made, views, lengths, False)[0] if self.stages.last else made

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
        for size in sorted(sizes or self.sizes(), reverse=True):
            self.graphs[size] = self._replayed(Layout(size, size, self._pages))
            if self.costs is not None and size >= LEAST_ROWS and not ops.batch_invariant():
                self.sharing[size] = self._replayed(Layout(size, size, self._pages, shares=True))
        self.graphs = dict(sorted(self.graphs.items()))
        self.capture_seconds += time.perf_counter() - started

    def _replayed(self, layout: Layout) -> Captured | Repeated:
        """Return a step as a graph, or one that is launched anew where the host brings weights in it."""
        if self.repeats:
            return repeated(layout, self._decode, self.device)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        side = self._side = self._side or torch.cuda.Stream(self.device)
        given, streamed = None if self.stages.first else self._given(layout.tokens).zero_(), self.decoder.streamed
        return capture(layout, self._decode, given, streamed, spare=self.max_rows, side=side, pool=self._pool)
