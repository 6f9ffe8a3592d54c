"""A queue of requests: the first by order, whoever was taken out in between."""

from __future__ import annotations

import random

from tersor.engine.params import SamplingParams
from tersor.engine.request import Request, continuations
from tersor.engine.waiting import Waiting


def requests(count: int) -> list[Request]:
    """Requests in a random order of two priorities, and of arrival among equals."""
    draw = random.Random(0)
    found = [continuations(str(place), [1], SamplingParams())[0] for place in range(count)]
    for place, request in enumerate(found):
        request.order = (draw.randrange(2), place)
    return found


def test_the_first_by_order_is_the_head_whoever_leaves_from_anywhere() -> None:
    waiting, inside, draw = Waiting(), set[Request](), random.Random(1)
    for request in requests(200):
        waiting.push(request)
        inside.add(request)
        for _ in range(draw.randrange(3)):
            if inside:
                head = min(inside, key=lambda one: one.order)
                assert waiting.head() is head
                gone = draw.choice((head, draw.choice(sorted(inside, key=lambda one: one.order))))
                waiting.remove(gone)
                inside.remove(gone)
                assert len(waiting) == len(inside) and set(waiting) == inside
    for request in list(inside):
        waiting.remove(request)
    assert waiting.head() is None and not waiting


def test_one_that_comes_back_is_there_once() -> None:
    waiting, (first, second) = Waiting(), requests(2)
    waiting.push(first)
    waiting.push(second)
    waiting.remove(first)
    waiting.push(first)
    waiting.remove(first)
    assert waiting.head() is second and len(waiting) == 1


def test_requests_that_left_take_no_memory() -> None:
    waiting = Waiting()
    for request in requests(1000):
        waiting.push(request)
        if len(waiting) > 3:
            waiting.remove(max(waiting, key=lambda one: one.order))
    assert len(waiting._heap) < 32
