"""A signal that a whole group of processes gets is for the first one, which ends the others when it is done."""

from __future__ import annotations

import multiprocessing
import os
import signal

import pytest
from helpers import tiny_lm

import tersor
from tersor.engine import processes

GREEDY = tersor.SamplingParams(max_tokens=4, temperature=0)


def test_ranks_go_on_until_the_first_one_ends_them() -> None:
    model = tersor.LLM(tiny_lm.TINY, device="cpu", kv_bytes=1 << 22, max_length=128, tensor_parallel=2)
    try:
        (wanted,) = model.generate("The first rule", GREEDY)
        (rank,) = multiprocessing.active_children()
        for number in (signal.SIGINT, signal.SIGTERM):
            assert rank.pid is not None
            os.kill(rank.pid, number)
            (found,) = model.generate("The first rule", GREEDY)
            assert found.outputs[0].token_ids == wanted.outputs[0].token_ids
    finally:
        model.close()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_engine_of_a_batch_goes_on_until_nothing_is_asked_any_more(number: signal.Signals) -> None:
    before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    here, there = multiprocessing.Pipe()

    def make(worker: int) -> object:
        signal.raise_signal(number)
        return object()

    here.close()
    try:
        processes._serve(there, 0, make, None)  # type: ignore[arg-type]
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
