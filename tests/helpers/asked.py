"""Requests of several kinds to a model, and what is compared of their answers; nothing here knows transformers."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
from torch import distributed

import tersor
from tersor.engine import workers
from tersor.engine.config import EngineConfig
from tersor.errors import LostError

PROMPTS = [[5, 6, 7], [8, 9, 5, 11, 12, 60, 61, 62, 63, 64, 65, 66, 67, 68, 69, 70, 71, 72, 73], [95], [40, 41, 40]]
OPTIONS: dict[str, Any] = {"device": "cpu", "kv_bytes": 1 << 22, "max_step_tokens": 16, "max_rows": 8}
PARAMS = [
    tersor.SamplingParams(max_tokens=9, temperature=0, logprobs=2, prompt_logprobs=1, ignore_eos=True),
    tersor.SamplingParams(max_tokens=7, temperature=0, logprobs=0, prompt_logprobs=0, ignore_eos=True),
    tersor.SamplingParams(max_tokens=9, temperature=0.8, n=2, logprobs=0, frequency_penalty=0.5, seed=4),
    tersor.SamplingParams(max_tokens=5, temperature=0, logprobs=1, ignore_eos=True),
]


def answers(model: tersor.LLM) -> list[Any]:
    """Return tokens of all answers, and log probabilities of tokens that were drawn or are in prompts; last states."""
    found: list[Any] = []
    for output in model.generate(PROMPTS, PARAMS):
        for one in output.outputs:
            assert one.logprobs is not None
            pairs = zip(one.token_ids, one.logprobs, strict=True)
            found.append((list(one.token_ids), [entry[token].logprob for token, entry in pairs]))
        for token, entry in zip(output.prompt_token_ids, output.prompt_logprobs or [], strict=False):
            found.append(([token], [] if entry is None else [entry[token].logprob]))
    found += [(one.prompt_token_ids, one.outputs.embedding.tolist()) for one in model.embed(PROMPTS)]
    return found


def same(found: list[Any], wanted: list[Any], within: float = 1e-5) -> None:
    """Hold that answers have the same tokens, and log probabilities and states within a tolerance."""
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in wanted]
    for (_, values), (_, others) in zip(found, wanted, strict=True):
        assert values == pytest.approx(others, abs=within)


def lost(ask: Callable[[], object]) -> None:
    """Kill the only other rank, and hold that who asks is told so within seconds."""
    (child,) = multiprocessing.active_children()
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(LostError, match=r"^rank 1 of 2 ended by SIGKILL$"):
        ask()
    assert time.monotonic() - started < 20


def broken(link: Connection, rank: int, port: int, config: EngineConfig, *_: object) -> None:
    """Be a rank whose weights do not fit."""
    link.send("")
    store = distributed.TCPStore("127.0.0.1", port, config.ranks, is_master=False)
    workers._connect(rank, config.placed(2), torch.device("cpu"), store, lambda _: "")
    link.send("the weights do not fit")
    os._exit(1)
