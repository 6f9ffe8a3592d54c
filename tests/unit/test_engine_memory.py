"""Pages fill what memory is left, and what graphs take is known before them: on a GPU that is not there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tersor.engine.config import EngineConfig
from tersor.engine.memory import make_pages
from tersor.engine.runner import Runner, padded_rows
from tersor.errors import TersorError
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
        self.device, self.ranks, self.max_rows = torch.device("cuda", 0), ALONE, 256
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
