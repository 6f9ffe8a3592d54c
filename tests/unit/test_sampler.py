"""From requests to arrays on the device: defaults of the model, seeds, lists that grow, and slots that change hands."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from helpers.sampling_rows import logits_of

from tersor.engine.options import ListedTokens, resolved, seed_of
from tersor.engine.params import SamplingParams
from tersor.engine.sampler import Sampler
from tersor.engine.sampler_news import Teller
from tersor.errors import TersorError

VOCABULARY = 50


@dataclass(eq=False)
class Request:
    """What a sampler reads of a request."""

    prompt: list[int]
    params: SamplingParams
    slot: int
    index: int = 0
    output: list[int] = field(default_factory=list)
    stop_tokens: frozenset[int] = frozenset({2})


@dataclass
class Row:
    """A row that draws."""

    request: Request
    start: int
    count: int


@dataclass
class Step:
    """What a sampler reads of a step."""

    drawing: list[Row]


def request(slot: int, prompt: list[int] | None = None, **options: Any) -> Request:
    """A request with resolved options."""
    params = resolved(SamplingParams(**options), {})
    return Request([1, 2, 3] if prompt is None else prompt, params, slot)


class Loop:
    """Steps in which every request draws a token, which the host gets to know a step later."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self.drawn: dict[Request, list[int]] = {}

    def step(
        self, requests: list[Request], logits: torch.Tensor, masks: dict[int, torch.Tensor] | None = None
    ) -> list[int]:
        """Draw one token for each, and tell the host of those drawn in the step before."""
        rows = [Row(one, len(one.prompt) + len(self.all(one)) - 1, 1) for one in requests]
        self.sampler.prepare(Step(rows), masks)
        slots = torch.tensor([one.slot for one in requests], dtype=torch.int32)
        lengths = torch.tensor([row.start + row.count for row in rows], dtype=torch.int32)
        tokens: list[int] = self.sampler.draw(logits.clone(), slots, lengths).tolist()
        for one, token in zip(requests, tokens, strict=True):
            one.output[:] = self.all(one)
            self.all(one).append(token)
        return tokens

    def all(self, one: Request) -> list[int]:
        """Tokens drawn, the one that the host does not know included."""
        return self.drawn.setdefault(one, [])


def penalised(logits: torch.Tensor, one: Request, drawn: list[int]) -> torch.Tensor:
    """Logits of one row after its penalties, token by token."""
    values, params = logits.float().clone(), one.params
    for token in set(one.prompt) | set(drawn):
        value, count = float(values[token]), drawn.count(token)
        if params.repetition_penalty != 1:
            assert params.repetition_penalty is not None
            value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        if count:
            value -= params.presence_penalty + params.frequency_penalty * count
        values[token] = value
    for token, bias in params.logit_bias.items():
        values[token] += bias
    if len(drawn) < params.min_tokens:
        values[2] = -math.inf
    return values


KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"repetition_penalty": 1.3},
    {"presence_penalty": 0.7, "frequency_penalty": 0.4},
    {"logit_bias": {5: 3.0, 2: 8.0}, "min_tokens": 4},
    {"repetition_penalty": 0.9, "frequency_penalty": -0.3, "min_tokens": 2, "logit_bias": {2: 9.0}},
)


def test_penalties_count_every_token_though_the_host_knows_the_last_one_a_step_late() -> None:
    loop = Loop(Sampler(8, VOCABULARY, "cpu", most_length=40))
    requests = [request(slot, prompt=[4, slot, 4], temperature=0.0, **kind) for slot, kind in enumerate(KINDS)]
    for turn in range(30):
        logits = logits_of(5, VOCABULARY, torch.float32, 1.0, turn)
        expected = [int(penalised(row, one, loop.all(one)).argmax()) for row, one in zip(logits, requests, strict=True)]
        assert loop.step(requests, logits) == expected, turn


def test_rows_come_go_and_change_places_without_changing_what_a_request_draws() -> None:
    """Each request gets the tokens that it gets alone, in slots that others had, with lists that had to move."""
    options = [{**kind, "temperature": 0.9, "top_p": 0.9, "seed": 5 + turn} for turn, kind in enumerate(KINDS * 3)]
    logits = {place: logits_of(1, VOCABULARY, torch.float32, 1.0, place)[0] for place in range(100)}

    def logits_for(requests: list[Request], loop: Loop) -> torch.Tensor:
        return torch.stack([logits[len(loop.all(one)) + one.prompt[0]] for one in requests])

    alone = []
    for turn, kind in enumerate(options):
        loop, one = Loop(Sampler(2, VOCABULARY, "cpu")), request(0, prompt=[turn, 7], **kind)
        for _ in range(8):
            loop.step([one], logits_for([one], loop))
        alone.append(loop.all(one))
    sampler = Sampler(5, VOCABULARY, "cpu", most_length=20)  # room for few lists
    loop = Loop(sampler)
    waiting = [request(-1, prompt=[turn, 7], **kind) for turn, kind in enumerate(options)]
    finished: dict[int, list[int]] = {}
    running: list[Request] = []
    for turn in range(200):
        free = set(range(4)) - {one.slot for one in running}
        while free and waiting and turn % 3 == 0:
            running.append(waiting.pop(0))
            running[-1].slot = free.pop()
        if turn % 5 == 4 and len(running) > 1:  # one loses its slot, and comes back later
            waiting.insert(0, running.pop(0))
        running.reverse()
        if running:
            loop.step(running, logits_for(running, loop))
        for one in [one for one in running if len(loop.all(one)) == 8]:
            running.remove(one)
            finished[one.prompt[0]] = loop.all(one)
    assert [finished[turn] for turn in range(len(options))] == alone


def test_masks_hold_for_their_step_and_their_slot_alone() -> None:
    loop = Loop(Sampler(4, VOCABULARY, "cpu"))
    first, second = request(0, temperature=0.0), request(2, temperature=0.0)
    logits = torch.arange(VOCABULARY).float().expand(2, -1)
    mask = torch.tensor([1 << 6, 0], dtype=torch.int32)
    assert loop.step([first, second], logits, {2: mask}) == [49, 6]
    assert loop.step([second, first], logits, {0: mask}) == [49, 6]
    assert loop.step([first, second], logits) == [49, 49]


def test_nothing_is_sent_while_rows_without_penalties_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, sent = Sampler(4, VOCABULARY, "cpu"), []
    whole = sampler._send
    monkeypatch.setattr(sampler, "_send", lambda changes: (sent.append(len(changes)), whole(changes)))
    loop, requests = Loop(sampler), [request(0, temperature=0.7), request(1, top_k=5)]
    logits = logits_of(2, VOCABULARY, torch.float32, 1.0, 0)
    for _ in range(4):
        loop.step(requests, logits)
    assert len(sent) == 1
    requests[1] = request(1, repetition_penalty=1.2, prompt=[9, 8, 8])
    for _ in range(4):
        loop.step(requests, logits)
    assert sent[1:] == [3, 0, 1, 1]  # the newest, 8 and 9; then what has become known


def test_slots_that_nobody_has_are_padding() -> None:
    sampler = Sampler(3, VOCABULARY, "cpu")
    slots, lengths = torch.tensor([2, 2], dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    assert sampler.draw(torch.zeros(2, VOCABULARY), slots, lengths).tolist() == [-1, -1]


def test_more_top_tokens_than_there_are_leave_all() -> None:
    logits = logits_of(2, VOCABULARY, torch.float32, 1.0, 0)
    drawn = []
    for most in (0, 1 << 40):
        requests = [request(slot, temperature=1.0, top_k=most, seed=slot) for slot in range(2)]
        drawn.append([Loop(Sampler(4, VOCABULARY, "cpu")).step(requests, logits) for _ in range(3)])
    assert drawn[0] == drawn[1]


def test_logprobs_are_given_to_those_who_ask() -> None:
    sampler = Sampler(3, VOCABULARY, "cpu")
    requests = [request(0, temperature=0.0, logprobs=2), request(1, temperature=0.0), request(2, logprobs=0)]
    sampler.prepare(Step([Row(one, 2, 1) for one in requests]))
    logits = logits_of(3, VOCABULARY, torch.float32, 1.0, 0)
    slots, lengths = torch.arange(3, dtype=torch.int32), torch.full((3,), 3, dtype=torch.int32)
    tokens, found = sampler.draw_with_logprobs(logits, slots, lengths, 2)
    assert found.tokens[0].tolist() == logits[0].topk(2).indices.tolist() and found.ranks[:2].tolist() == [1, 0]
    torch.testing.assert_close(found.chosen[2], logits[2].log_softmax(0)[tokens[2]])


def test_more_listed_tokens_than_there_is_room_for_are_refused_with_their_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tersor.engine.sampler.MOST_LISTED", 400)
    loop = Loop(Sampler(4, 5000, "cpu"))
    requests = [request(slot, prompt=list(range(100)), repetition_penalty=1.1) for slot in range(2)]
    with pytest.raises(TersorError, match=r"^2 requests with penalties list 714 tokens, more than 400"):
        loop.step(requests, torch.zeros(2, 5000))


def test_a_models_defaults_fill_what_a_request_leaves_open() -> None:
    config = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.05}
    found = resolved(SamplingParams(), config)
    assert (found.temperature, found.top_k, found.top_p, found.min_p) == (0.6, 0, 0.9, 0.0)
    assert found.repetition_penalty == 1.05
    assert resolved(SamplingParams(temperature=0.0), config).greedy
    assert resolved(SamplingParams(top_k=3), {}).temperature == 1.0
    assert resolved(SamplingParams(temperature=0.2), {"top_k": 20}).top_k == 20
    assert resolved(SamplingParams(repetition_penalty=1.0), config).repetition_penalty == 1.0
    open_to_all = resolved(SamplingParams(), {})
    assert (open_to_all.temperature, open_to_all.top_k, open_to_all.top_p, open_to_all.min_p) == (1.0, 0, 1.0, 0.0)


def test_continuations_have_seeds_of_their_own_and_the_first_that_of_the_request() -> None:
    seeds = [seed_of(17, index) for index in range(1000)]
    assert seeds[0] == 17 and len(set(seeds)) == 1000 and all(0 <= seed < 2**63 for seed in seeds)
    assert seeds == [seed_of(17, index) for index in range(1000)]
    assert seed_of(None, 0) != seed_of(None, 0)


def test_only_options_that_change_single_logits_make_a_list() -> None:
    assert not ListedTokens.wanted(resolved(SamplingParams(temperature=1.0, top_p=0.5), {}))
    for options in ({"logit_bias": {1: 1.0}}, {"min_tokens": 1}, {"presence_penalty": 1.0}):
        assert ListedTokens.wanted(resolved(SamplingParams(**options), {}))


class Told:
    """A sampler that hears of requests from another one."""

    def __init__(self, slots: int, **options: Any) -> None:
        self.teller, self.own = Teller(slots, VOCABULARY, **options), Sampler(slots, VOCABULARY, "cpu", **options)
        self.said: list[int] = []

    def prepare(self, step: Step, masks: dict[int, torch.Tensor] | None) -> None:
        self.teller.prepare(step, masks)
        self.said.append(len(self.teller.news()))
        self.own.read(self.teller.news().clone())

    def draw(self, logits: torch.Tensor, slots: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return self.own.draw(logits, slots, lengths)


def test_a_sampler_that_is_told_of_requests_draws_as_one_that_has_them() -> None:
    draw, told = random.Random(5), Told(8, most_length=40)
    loops = [Loop(Sampler(8, VOCABULARY, "cpu", most_length=40)), Loop(told)]  # type: ignore[arg-type]
    both = [[request(slot, temperature=0.9, seed=slot, **KINDS[slot % len(KINDS)]) for slot in range(7)] for _ in loops]
    for turn in range(30):
        if turn in (9, 17):  # a slot changes hands
            for requests in both:
                requests[turn % 7] = request(turn % 7, prompt=[turn, 7], top_k=3, seed=turn)
        chosen = draw.sample(range(7), draw.randrange(1, 8))
        masks = {slot: torch.tensor([draw.getrandbits(31) | 8, 5], dtype=torch.int32) for slot in chosen if slot < 2}
        logits = logits_of(len(chosen), VOCABULARY, torch.float32, 2.0, turn)
        found = [
            loop.step([requests[slot] for slot in chosen], logits, masks if turn % 3 == 0 else None)
            for loop, requests in zip(loops, both, strict=True)
        ]
        assert found[0] == found[1]
    assert min(told.said) == 5  # nothing but how the step is to be drawn, where nothing changed
