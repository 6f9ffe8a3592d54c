"""What does the scheduler know of a request, and which of its tokens does a step compute?

The text of a request is its prompt and what was drawn after it. Its length runs ahead of the tokens that the host has
read: a row that draws makes the text longer by one when it is planned; the token is known when its step is finished.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from tersor.engine.params import SamplingParams
from tersor.errors import InputError

WAITING, DELAYED, PREEMPTED = "waiting", "delayed", "preempted"
"""Without pages: never begun; until another has computed what both begin with; begun, and to be computed again."""

RUNNING, LEAVING, GONE = "running", "leaving", "gone"
"""With pages: gets rows; gets no more rows but has some in steps that are not finished. And after all."""

NEVER = 1 << 62
"""More tokens than there are."""


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """One continuation of a prompt, from its arrival to its last token.

    Attributes:
        id: as it was given; continuations of one prompt share it.
        prompt: its tokens, at least one; continuations share the array.
        params: of these the scheduler reads `max_tokens` and `prompt_logprobs`.
        index: of the continuation, 0 to n - 1.
        stop_tokens: a token that ends the text when it is drawn.
        salt: only requests with the same salt share pages.
        priority: less is sooner.
        embeds: whether its prompt's last state is asked for; the one token that is drawn then is dropped.
        ahead: whether a token may be drawn before the host has read the one before it; not so where the host has to
            say what may come next (a grammar).
        expected_tokens: tokens that it is predicted to draw, for which room is kept when others are admitted; 0 where
            nothing is known.
        output: tokens drawn that the host has read.
        computed: leading tokens of the text whose keys and values are in pages when all planned steps have run.
        length: tokens of the text when all planned steps have run.
        limit: tokens that the text has at most.
        pages: of its text, in order.
        room: tokens that fit into them.
        slot: place below `max_rows` that is its alone while it has pages; -1 without.
        in_flight: its rows in steps that are not finished.
        state: one of the words above.
        finish_reason: why it ended, one of `outputs.STOP`, `LENGTH`, `ABORT` and `ERROR`, or `None`.
        num_cached: tokens of the prompt whose pages were there when it first began.
        order: what it is sorted by among those that wait and those that run.
        digests: of its leading full pages, as far as somebody has asked (`prefix.py`).
        root: what the first of them goes on from.
        publish_at: the next page is full, and can be shown to others, when so many tokens are computed.
        announced: digests of pages that it is computing and that others may wait for.
        logits_from: first token of the prompt, its last one left out, whose logits are still to be given, or `None`.
        turn: the last step that it had a row in, by the number of those before it.
        waited_for: pages that it has waited for another to compute.
        most_pages: that it can ever need.
        expected_pages: that it needs for the expected tokens.
    """

    id: str
    prompt: array[int]
    params: SamplingParams
    index: int = 0
    stop_tokens: frozenset[int] = frozenset()
    salt: str | None = None
    priority: int = 0
    embeds: bool = False
    ahead: bool = True
    expected_tokens: int = 0
    output: list[int] = field(default_factory=list)
    computed: int = 0
    length: int = 0
    limit: int = 0
    pages: list[int] = field(default_factory=list)
    room: int = 0
    slot: int = -1
    in_flight: int = 0
    state: str = WAITING
    finish_reason: str | None = None
    num_cached: int = 0
    order: tuple[object, int] = (0, 0)
    digests: list[bytes] = field(default_factory=list)
    root: bytes = b""
    publish_at: int = NEVER
    announced: list[bytes] = field(default_factory=list)
    logits_from: int | None = None
    turn: int = 0
    waited_for: int = 0
    most_pages: int = 0
    expected_pages: int = 0

    @property
    def most_tokens(self) -> int | None:
        """Tokens that it may draw and keep; `None` is what there is room for."""
        return 0 if self.embeds else self.params.max_tokens

    @property
    def known(self) -> int:
        """Tokens of the text that the host has read; one after them is on the device alone."""
        return len(self.prompt) + len(self.output)

    def tokens(self, start: int, end: int) -> array[int]:
        """Return tokens `start` to `end`, the last left out, of what the host has read."""
        prompt, found = len(self.prompt), self.prompt[start:end]
        if end > prompt:
            found.extend(self.output[max(start - prompt, 0) : end - prompt])
        return found


def continuations(
    id: str,
    prompt: Sequence[int],
    params: SamplingParams,
    *,
    stop_tokens: frozenset[int] = frozenset(),
    salt: str | None = None,
    priority: int = 0,
    embeds: bool = False,
    ahead: bool = True,
    expected_tokens: int = 0,
) -> list[Request]:
    """Return the `params.n` requests that a prompt becomes.

    They share the full pages of the prompt as any requests with one beginning do: the first computes them while the
    others wait. Each computes the rest, at most a page, by itself.

    Raises:
        InputError: a token of the prompt is no unsigned number of 32 bits.
    """
    try:
        tokens = array("I", prompt)
    except (OverflowError, TypeError):
        raise InputError(f"{id}: a token of the prompt is not a number from 0 to 2^32 - 1") from None
    return [
        Request(
            id=id,
            prompt=tokens,
            params=params,
            index=index,
            stop_tokens=stop_tokens,
            salt=salt,
            priority=priority,
            embeds=embeds,
            ahead=ahead,
            expected_tokens=expected_tokens,
        )
        for index in range(params.n)
    ]


@dataclass(slots=True, eq=False)
class Row:
    """Some tokens of one request in one step.

    Attributes:
        request: whose.
        start: the first of them in its text.
        count: how many, at least 1.
        logits: so many of them, the last ones, have logits that somebody wants: 1 where only a token is drawn, 0 in the
            middle of a prompt, `count` where log probabilities of the prompt are asked for.
        draws: whether a token is drawn after the last of them.
    """

    request: Request
    start: int
    count: int
    logits: int
    draws: bool


@dataclass(slots=True, eq=False)
class Step:
    """What is computed at once. Steps run on the device in the order in which they were scheduled.

    Attributes:
        rows: those of decoding first, then those of prompts.
        decodes: how many leading rows have one token and draw one.
        tokens: of all rows.
        prompt_logits: tokens of rows whose requests want log probabilities of their prompt.
        drawing: the rows that draw a token, in order.
        preempted: requests that lost their pages and their slot since the last step; they may be in `grown` as well,
            after that.
        grown: requests whose `pages` became more since the last step: one that begins has a slot, and all its pages
            are news; one that goes on has one more page.
    """

    rows: list[Row] = field(default_factory=list)
    decodes: int = 0
    tokens: int = 0
    prompt_logits: int = 0
    drawing: list[Row] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)
    grown: list[Request] = field(default_factory=list)

    @property
    def embedding(self) -> list[int]:
        """Places in `drawing` of rows whose requests ask for their last state."""
        return [place for place, row in enumerate(self.drawing) if row.request.embeds]


def prompt_targets(row: Row) -> range:
    """Return the places in a prompt of tokens whose log probabilities follow from a row, where they are asked for."""
    request, end = row.request, row.start + row.count
    if request.params.prompt_logprobs is None or row.logits < 1:
        return range(0)
    return range(end - row.logits + 1, min(end + 1, len(request.prompt)))
