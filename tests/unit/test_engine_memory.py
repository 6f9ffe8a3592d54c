"""Pages fill what memory is left, and what graphs take is known before them: on a GPU that is not there."""

from __future__ import annotations

from inspect import signature
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.small_decoders import config_of

from tersor.cli import batch, bench_throughput, serve
from tersor.engine.config import EngineConfig
from tersor.engine.memory import make_pages, row_bytes, rows_of
from tersor.engine.runner import Runner, padded_rows
from tersor.errors import TersorError
from tersor.formats import get_scheme
from tersor.models.random import random_decoder
from tersor.ops.collective import ALONE

TOTAL, WEIGHTS, PAGE, STEP, PIECE = 100 << 30, 10 << 30, 8 << 20, 3 << 30, 2 << 20
BUDGET = int(0.9 * TOTAL)


class Machine:
    """A runner on a GPU of which there are numbers alone.

    Attributes:
        first, further: bytes that the largest graph takes, and each of the others, by its number of rows.
        captured: rows of every graph, in order.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, first: int, further: Any) -> None:
        self.first, self.further = first, further
        self.device, self.everyone, self.max_rows = torch.device("cuda", 0), ALONE, 256
        self.pages, self.graphs, self.captured = 0, {}, []
        self.caches = [SimpleNamespace(scales=None)] * 32
        self.allocated: list[int] = []
        for name in ("empty_cache", "reset_peak_memory_stats", "synchronize"):
            monkeypatch.setattr(torch.cuda, name, lambda *_: None)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: STEP)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (TOTAL - self.used, TOTAL))

    @property
    def used(self) -> int:
        pages = self.pages * PAGE + 32 * (PIECE - 1) if self.pages else 0  # every layer's tensor is whole pieces
        return WEIGHTS + pages + sum(self.graphs.values())

    def page_bytes(self) -> int:
        return PAGE

    def passed_bytes(self, tokens: int) -> int:
        return 0

    def allocate(self, pages: int) -> None:
        self.pages, self.graphs = pages, {}
        self.allocated.append(pages)

    def rehearse(self, tokens: int) -> None:
        assert tokens == 8192

    def sizes(self) -> list[int]:
        return Runner.sizes(self)  # type: ignore[arg-type]

    def capture(self, sizes: Any = ()) -> None:
        for size in sizes or self.sizes():
            self.graphs[size] = self.further(size) if self.graphs else self.first
            self.captured.append(size)


def test_pages_fill_what_is_left_and_all_graphs_but_a_few_are_captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, 1 << 30, lambda size: 3 << 20)
    pages = make_pages(machine, EngineConfig())  # type: ignore[arg-type]
    assert machine.pages == pages and list(machine.graphs) == padded_rows(256)[::-1]
    assert 0 <= BUDGET - machine.used - STEP < 256 << 20
    assert len(machine.captured) == len(machine.graphs) + 3


def test_graphs_that_take_more_than_the_first_ones_said_leave_fewer_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, 1 << 30, lambda size: 1 << 20 if size > 100 else 60 << 20)
    pages = make_pages(machine, EngineConfig())  # type: ignore[arg-type]
    assert machine.pages == pages and len(machine.graphs) == len(padded_rows(256))
    assert 0 <= BUDGET - machine.used - STEP < 256 << 20
    assert len(machine.captured) == 2 * len(machine.graphs) + 3


def test_pages_are_no_more_than_asked_for_and_without_graphs_none_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, 1 << 30, lambda size: 3 << 20)
    config = EngineConfig(kv_bytes=100 * PAGE, cuda_graph=False)
    assert make_pages(machine, config) == 100  # type: ignore[arg-type]
    assert not machine.captured


def test_a_gpu_without_room_for_pages_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, 80 << 30, lambda size: 0)
    with pytest.raises(TersorError, match=r"pages of 8\.4 MB fit beside the weights: use fewer rows"):
        make_pages(machine, EngineConfig())  # type: ignore[arg-type]


def test_graphs_end_at_256_rows_and_larger_steps_run_without_one() -> None:
    assert padded_rows(20) == [1, 2, 4, 8, 16, 20]
    assert padded_rows(1024) == padded_rows(256) and max(padded_rows(1024)) == 256
    runner = object.__new__(Runner)
    runner.graphs = dict.fromkeys(padded_rows(1024))  # type: ignore[arg-type]
    draws = SimpleNamespace(request=SimpleNamespace(embeds=False, params=SimpleNamespace(logprobs=None)))
    for rows, size in ((1, 1), (250, 256), (256, 256), (257, None), (1024, None)):
        step = SimpleNamespace(decodes=rows, rows=[draws] * rows, drawing=[draws] * rows)
        assert runner._graph_size(step) == size  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "used", "rows"),
    [
        ({}, WEIGHTS, 1024),
        ({}, BUDGET - (4 << 30), 512),  # a twentieth of what is left holds the logits of 800 rows
        ({}, BUDGET - (1 << 30), 256),
        ({}, BUDGET, 256),
        ({"max_step_tokens": 300}, WEIGHTS, 300),
        ({"max_rows": 700}, BUDGET, 700),
    ],
)
def test_rows_are_1024_unless_told_or_where_their_logits_would_take_much_of_the_memory(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, int], used: int, rows: int
) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (TOTAL - used, TOTAL))
    config = SimpleNamespace(vocabulary=128256, softcap=None)
    decoder = SimpleNamespace(config=config, dtype=torch.bfloat16, device=torch.device("cuda", 0))
    assert row_bytes(decoder) == 128256 * 2 + 16032  # type: ignore[arg-type]
    assert rows_of(EngineConfig(**options), decoder) == rows  # type: ignore[arg-type]


def test_a_server_has_256_rows_and_a_batch_as_many_as_pay() -> None:
    verbs = (serve, batch, bench_throughput)
    assert [signature(verb.command).parameters["max_rows"].default for verb in verbs] == [256, None, 1024]


def test_the_logits_of_all_rows_are_in_what_a_step_takes() -> None:
    decoder = random_decoder(config_of("llama"), get_scheme("fp6_e3m2"), "cpu", torch.float32)
    runner = Runner(decoder, None, max_rows=40, max_length=64)
    runner.allocate(2)
    given: list[int] = []
    decoder.logits = lambda states: given.append(len(states)) or states  # type: ignore[assignment,func-returns-value]
    runner.rehearse(100)
    assert given == [2, 40]
