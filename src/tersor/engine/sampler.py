"""How does the device know how tokens are drawn? Every request in a step has a slot there, with its options.

The host keeps the same arrays. What changed is sent before a step, in one copy, and where nothing changed none:
requests that go on without penalties cost the host nothing. Tokens of those with penalties are in regions of one list,
of which the few that changed are sent. Tokens drawn need not be known to the host: what a slot drew last stays on the
device, where penalties count it (`ops.Listed`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from tersor import ops
from tersor.engine.options import ListedTokens, seed_of
from tersor.engine.params import MOST_LOGPROBS, SamplingParams
from tersor.errors import TersorError

MOST_LISTED = 1 << 23
"""Room for listed tokens, at most: 96 MB, and 8,000 tokens for each of 1,000 requests."""
_SPARE = 256
"""Tokens that a region may grow by before it has to move."""

_COPIES = 3
"""Buffers for copies: one for each step that may be under way."""
_FLOATS = ("temperature", "top_p", "min_p", "repetition", "presence", "frequency")
_WORDS = ("top_k", "starts", "ends", "pending", "allowed_rows", "asks")


class Text(Protocol):
    """What is read of a request: `engine.request.Request`, with `params` that are resolved."""

    prompt: list[int]
    params: SamplingParams
    index: int
    output: list[int]
    slot: int
    stop_tokens: frozenset[int]


class Drawing(Protocol):
    """A row of a step that draws a token after tokens start to start + count of its request's text."""

    request: Any
    start: int
    count: int


@dataclass(slots=True)
class _Changes:
    """What the device does not have of the list: whole regions, and single tokens of others.

    Attributes:
        whole: where regions start, and their tokens.
        places: in the list, of single tokens.
        tokens, counts, biases: what belongs there.
    """

    whole: list[tuple[int, ListedTokens]] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    biases: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.places) + sum(len(listed.tokens) for _, listed in self.whole)

    def add(self, start: int, listed: ListedTokens, places: Sequence[int]) -> None:
        """Take single tokens of a region."""
        for place in places:
            self.places.append(start + place)
            self.tokens.append(listed.tokens[place])
            self.counts.append(listed.counts[place])
            self.biases.append(listed.biases[place])

    def write(self, into: NDArray[np.int32]) -> None:
        """Write places, tokens, counts and biases, int32 [4, len(self)]."""
        at = len(self.places)
        into[0, :at], into[1, :at], into[2, :at] = self.places, self.tokens, self.counts
        biases = into[3].view(np.float32)
        biases[:at] = self.biases
        for start, listed in self.whole:
            end = at + len(listed.tokens)
            into[0, at:end] = np.arange(start, start + end - at)
            into[1, at:end], into[2, at:end] = listed.tokens, listed.counts
            biases[at:end] = listed.biases
            at = end


class Sampler:
    """Draws the tokens of steps.

    Attributes:
        slots: how many there are; the last one is of padding.
        vocabulary: tokens that there are logits for.
    """

    def __init__(self, slots: int, vocabulary: int, device: torch.device | str, *, most_length: int = 1 << 16) -> None:
        """Make a sampler whose slots are all padding.

        Args:
            slots: requests in a step at most, and one for padding.
            vocabulary: tokens that there are logits for.
            device: where they are.
            most_length: tokens of a text at most.
        """
        self.slots, self.vocabulary, self.device = slots, vocabulary, torch.device(device)
        self._room = min(slots * (min(vocabulary, most_length) + _SPARE), MOST_LISTED)
        self._host = np.zeros(slots * (2 + len(_FLOATS) + len(_WORDS)), dtype=np.int32)
        self._there = torch.zeros(len(self._host), dtype=torch.int32, device=self.device)
        self._on_host: dict[str, NDArray[Any]] = self._views(self._host, np.float32, np.int64)
        self._on_device: dict[str, torch.Tensor] = self._views(self._there, torch.float32, torch.int64)
        self._on_host["temperature"][:] = -1
        self._on_host["allowed_rows"][:] = self._on_host["asks"][:] = -1
        self._list = torch.zeros(3, self._room, dtype=torch.int32, device=self.device)
        """Tokens, counts and biases."""
        self._newest = torch.full((slots,), -1, dtype=torch.int64, device=self.device)
        self._bits = torch.zeros(slots, -(-vocabulary // 32), dtype=torch.int32, device=self.device)
        self._owners: list[Any] = [None] * slots
        self._lists: list[ListedTokens | None] = [None] * slots
        self._regions: list[tuple[int, int]] = [(0, 0)] * slots
        """Where the tokens of a slot are in the list, and room for how many."""
        self._used = 0
        self._masked: set[int] = set()
        """Slots whose rows may not draw every token."""
        self._staging: list[tuple[torch.Tensor, torch.cuda.Event]] = []
        self._turn = 0
        self._filters = self._masks = self._penalties = True
        """What a step may need; all of it before the first step is known, as when graphs are captured."""
        self._send(_Changes())

    def _views(self, memory: Any, floats: Any, longs: Any) -> dict[str, Any]:
        """Return name -> view of the arrays in one piece of memory, an array or a tensor of int32."""
        n, at = self.slots, 2 * self.slots
        views = {"seeds": memory[:at].view(longs)}
        for name in (*_FLOATS, *_WORDS):
            views[name] = memory[at : at + n].view(floats) if name in _FLOATS else memory[at : at + n]
            at += n
        return views

    def prepare(self, step: Any, masks: Mapping[int, torch.Tensor] | None = None) -> None:
        """Send what the device does not know of the rows that draw in a step.

        Args:
            step: its `drawing` are the rows that draw (`Drawing`), each of a request with a slot.
            masks: slot -> the tokens that its grammar allows, int32 [ceil(V / 32)], for this step.

        Raises:
            TersorError: penalties of all rows list more tokens than there is room for.
        """
        rows: Sequence[Drawing] = step.drawing
        changed = False
        for row in rows:
            if self._owners[row.request.slot] is not row.request:
                self._admit(row.request)
                changed = True
        changed |= self._allow(rows, masks or {})
        listing = [row for row in rows if self._lists[row.request.slot] is not None]
        changes = self._update(listing)
        slots = [row.request.slot for row in rows]
        view = self._on_host
        some_k, some_p = view["top_k"][slots] > 0, view["top_p"][slots] < 1
        self._filters = bool((some_k | some_p | (view["min_p"][slots] > 0)).any())
        self._masks, self._penalties = bool(masks), bool(listing)
        if changed or listing:
            self._send(changes)

    def draw(self, logits: torch.Tensor, slots: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Return tokens int64 [S]; -1 of padding and where logits are not finite.

        Nothing is read by the host, and a CUDA graph of it serves all steps that were prepared.

        Args:
            logits: [S, V]; undefined afterwards.
            slots: int32 [S].
            lengths: int32 [S]: tokens of each text so far.
        """
        return ops.draw(logits, self._rows(slots, lengths))

    def draw_with_logprobs(
        self, logits: torch.Tensor, slots: torch.Tensor, lengths: torch.Tensor, most: int = MOST_LOGPROBS
    ) -> tuple[torch.Tensor, ops.Logprobs]:
        """Return what `draw` returns, and log probabilities for rows whose requests ask for them."""
        return ops.draw_with_logprobs(logits, self._rows(slots, lengths), self._on_device["asks"], most)

    def _rows(self, slots: torch.Tensor, lengths: torch.Tensor) -> ops.SamplingRows:
        captured = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        view, listed, allowed = self._on_device, None, None
        if captured or self._penalties:
            room = self._room if self.device.type == "cuda" else self._used
            listed = ops.Listed(
                **{name: view[name] for name in ("starts", "ends", "pending", "repetition", "presence", "frequency")},
                tokens=self._list[0, :room],
                counts=self._list[1, :room],
                biases=self._list[2, :room].view(torch.float32),
                newest=self._newest,
            )
        if captured or self._masks:
            allowed = ops.Allowed(bits=self._bits, rows=view["allowed_rows"])
        options = {name: view[name] for name in ("temperature", "top_k", "top_p", "min_p", "seeds")}
        return ops.SamplingRows(
            **options,
            positions=lengths,
            slots=slots,
            listed=listed,
            allowed=allowed,
            filters=captured or self._filters,
        )

    def _admit(self, request: Text) -> None:
        slot, params, view = request.slot, request.params, self._on_host
        self._owners[slot] = request
        assert params.temperature is not None and params.top_k is not None and params.top_p is not None
        assert params.min_p is not None and params.repetition_penalty is not None
        view["temperature"][slot], view["top_k"][slot] = params.temperature, min(params.top_k, self.vocabulary)
        view["top_p"][slot], view["min_p"][slot] = params.top_p, params.min_p
        view["repetition"][slot] = params.repetition_penalty
        view["presence"][slot], view["frequency"][slot] = params.presence_penalty, params.frequency_penalty
        view["seeds"][slot] = seed_of(params.seed, request.index)
        view["asks"][slot] = -1 if params.logprobs is None else params.logprobs
        wanted = ListedTokens.wanted(params)
        self._lists[slot] = ListedTokens(params, request.prompt, request.stop_tokens) if wanted else None
        self._regions[slot] = (0, 0)
        view["starts"][slot] = view["ends"][slot] = view["pending"][slot] = 0

    def _allow(self, rows: Sequence[Drawing], masks: Mapping[int, torch.Tensor]) -> bool:
        """Send bits, and tell whether the rows that have some are others than before."""
        view, changed = self._on_host["allowed_rows"], False
        for slot in [row.request.slot for row in rows] if masks or self._masked else ():
            mask = masks.get(slot)
            if mask is not None:
                self._allow_some(slot, mask)
            if (slot in self._masked) != (mask is not None):
                view[slot], changed = -1 if mask is None else slot, True
                self._masked ^= {slot}
        return changed

    def _allow_some(self, slot: int, mask: torch.Tensor) -> None:
        self._bits[slot].copy_(mask, non_blocking=True)

    def _update(self, rows: Sequence[Drawing]) -> _Changes:
        """Bring the lists of rows up to date, and return what the device does not have of them."""
        found, slots, ends, pending = _Changes(), [], [], []
        for row in rows:
            request = row.request
            slot, output = request.slot, request.output
            listed, (start, room) = self._lists[slot], self._regions[slot]
            assert listed is not None
            drawn = row.start + row.count - len(request.prompt)
            changed = listed.update(output, drawn)
            size = len(listed.tokens)
            if size > room:
                if self._used + size + _SPARE > self._room:
                    return self._pack(rows)
                start = self._settle(slot, size)
                found.whole.append((start, listed))
            else:
                found.add(start, listed, changed)
            slots.append(slot)
            ends.append(start + size)
            pending.append(listed.counting and drawn > len(output))
        self._on_host["ends"][slots], self._on_host["pending"][slots] = ends, pending
        return found

    def _settle(self, slot: int, size: int) -> int:
        """Give a slot a region at the end of the list, and return where it starts."""
        start = self._used
        self._regions[slot] = (start, size + _SPARE)
        self._on_host["starts"][slot] = start
        self._used += size + _SPARE
        return start

    def _pack(self, rows: Sequence[Drawing]) -> _Changes:
        """Put the regions of rows side by side; all others are forgotten, and come back when they are needed."""
        total = sum(len(listed.tokens) + _SPARE for listed in (self._lists[row.request.slot] for row in rows) if listed)
        if total > self._room:
            raise TersorError(
                f"{len(rows)} requests with penalties list {total} tokens, more than {self._room}: run fewer at a time"
            )
        self._used, self._regions = 0, [(0, 0)] * self.slots
        self._on_host["starts"][:] = self._on_host["ends"][:] = 0
        return self._update(rows)

    def _send(self, changes: _Changes) -> None:
        """Copy options, and what changed in lists, to the device: in one piece, from memory that no copy reads."""
        head, count = len(self._host), len(changes)
        memory, event = self._stage(head + 4 * count)
        staged = memory.numpy()
        staged[:head] = self._host
        changes.write(staged[head:].reshape(4, count))
        self._take(memory, event)

    def _take(self, memory: torch.Tensor, event: torch.cuda.Event | None) -> None:
        """Copy what `_send` made to the device."""
        head = len(self._host)
        if len(memory) == head:
            self._there.copy_(memory, non_blocking=True)
        else:
            sent = memory.to(self.device, non_blocking=True)
            self._there.copy_(sent[:head])
            numbers = sent[head:].view(4, -1)
            self._list.index_copy_(1, numbers[0].long(), numbers[1:])
        if event is not None:
            event.record(torch.cuda.current_stream(self.device))

    def read(self, news: torch.Tensor) -> None:
        """Take what a `sampler_news.Teller` says ahead of a step, as `prepare` would.

        Args:
            news: int32 [N], on the host.
        """
        self._filters, self._masks, self._penalties = (bool(one) for one in news[:3].tolist())
        self._used, masks = news[3:5].tolist()
        words, at = self._bits.shape[1], 5
        for _ in range(masks):
            self._allow_some(int(news[at]), news[at + 1 : at + 1 + words])
            at += 1 + words
        if len(news) > at:
            memory, event = self._stage(len(news) - at)
            self._take(memory.copy_(news[at:]), event)

    def _stage(self, size: int) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """Return memory of the host that no copy reads any more, and what says when one has read it."""
        if self.device.type != "cuda":
            return torch.empty(size, dtype=torch.int32), None
        self._turn = (self._turn + 1) % _COPIES
        while len(self._staging) < _COPIES:
            self._staging.append((torch.empty(0, dtype=torch.int32), torch.cuda.Event()))
        memory, event = self._staging[self._turn]
        event.synchronize()
        if len(memory) < size:
            memory = torch.empty(2 * size, dtype=torch.int32, pin_memory=True)
            self._staging[self._turn] = (memory, event)
        return memory[:size], event
