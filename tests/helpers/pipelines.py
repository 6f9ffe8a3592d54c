"""Engines whose ranks are threads of this process: what they send each other are queues, without a network."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import tersor
from helpers.ranks import ranks_of
from tersor import llm
from tersor.checkpoint.source import Source, open_source
from tersor.engine.build import build
from tersor.engine.config import EngineConfig
from tersor.engine.orders import END, Line, Order
from tersor.engine.workers import Seat, Team
from tersor.models.load import check_placed
from tersor.ops.collective import ALONE, Ranks
from tersor.ops.stages import Stages
from tersor.planner.placement import Placement

_SECONDS = 60


class _Queues(Stages):
    """Stages that pass tensors on through queues, one for each rank and way."""

    def __init__(self, placement: Placement, rank: int, everyone: Ranks, ways: dict[Any, queue.Queue[Any]]) -> None:
        super().__init__(placement, rank, everyone)
        self._ways, self._rank = ways, rank

    def take(self, x: torch.Tensor) -> torch.Tensor:
        return x.copy_(self._ways[self._source, self._rank].get(timeout=_SECONDS))

    def pass_on(self, x: torch.Tensor) -> None:
        for target in self._targets:
            self._ways[self._rank, target].put(x.clone())

    def give_back(self, x: torch.Tensor) -> None:
        self._ways["back"].put(x.clone())

    def get_back(self, x: torch.Tensor) -> torch.Tensor:
        found = self._ways["back"].get(timeout=_SECONDS)
        assert found.shape == x.shape and found.dtype == x.dtype
        return x.copy_(found)


class _Told(Line):
    """A line that is a queue for every rank but the first."""

    def __init__(self, rank: int, told: list[queue.Queue[Any]]) -> None:
        super().__init__(ALONE, None)  # type: ignore[arg-type]
        self._rank, self._told = rank, told
        self._buffer = torch.empty(0, dtype=torch.int32)

    def tell(self, order: Order, buffer: torch.Tensor) -> None:
        for one in self._told[1:]:
            one.put((order, buffer.clone()))

    def end(self) -> None:
        for one in self._told[1:]:
            one.put((END, None))

    def order(self) -> Order:
        order, self._buffer = self._told[self._rank].get(timeout=_SECONDS)
        return order

    def read(self, buffer: torch.Tensor) -> None:
        buffer.copy_(self._buffer)


def _gather(config: EngineConfig, source: Source) -> Team:
    """Return the ranks of a model, each a thread."""
    placement = check_placed(source, config.placed)
    count, directory = placement.ranks, source.directory
    everyone = ranks_of(count)
    inside = [one for index in range(len(placement.stages)) for one in ranks_of(len(placement.members(index)))]
    pairs = [(one, other) for one in range(count) for other in range(count)]
    ways: dict[Any, queue.Queue[Any]] = {pair: queue.Queue() for pair in [*pairs, "back"]}
    told: list[queue.Queue[Any]] = [queue.Queue() for _ in range(count)]
    failed: list[BaseException] = []

    def seat(rank: int) -> Seat:
        stages = _Queues(placement, rank, everyone[rank], ways)
        return Seat(torch.device("cpu"), placement.place(rank), inside[rank], stages, _Told(rank, told))

    def work(rank: int) -> None:
        try:
            own = seat(rank)
            with open_source(directory) as opened:
                built = build(opened, config, own.device, own.ranks, own.line, own.stages, own.place)
            built.runner.follow()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(1, count)]
    for thread in threads:
        thread.start()
    first = seat(0)

    def end() -> None:
        assert first.line is not None
        first.line.end()
        for thread in threads:
            thread.join(_SECONDS)
        assert not failed, failed

    return Team(first, end=end)


@contextmanager
def model(path: Path, monkeypatch: pytest.MonkeyPatch, placement: Placement, **options: Any) -> Iterator[tersor.LLM]:
    """Yield a model whose ranks are threads; at the end all have to have ended well."""
    with monkeypatch.context() as patch:
        patch.setattr(llm, "gather", _gather)
        made = tersor.LLM(path, placement=placement, **options)
    try:
        yield made
    finally:
        made.close()
