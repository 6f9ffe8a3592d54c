"""Ranks that are threads of this process: what `ops.collective` exchanges, without processes or a network."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch.nn import functional

from tersor.ops.collective import Ranks

_T = TypeVar("_T")


class _Thread(Ranks):
    """One of several ranks; each puts its tensor on a table that all can see, and reads those of all."""

    def __init__(self, rank: int, table: list[torch.Tensor | None], barrier: threading.Barrier) -> None:
        super().__init__(rank, len(table))
        self._table, self._barrier = table, barrier

    def _all(self, x: torch.Tensor) -> list[torch.Tensor]:
        self._table[self.rank] = x.clone()
        self._barrier.wait(timeout=60)
        found = [one for one in self._table if one is not None]
        self._barrier.wait(timeout=60)
        return found

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return x.copy_(torch.stack(self._all(x)).sum(0))

    def side_by_side(self, x: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        assert x.shape[1] == widths[self.rank]
        return torch.cat(self._all(functional.pad(x, (0, 0))), dim=1)

    def from_first(self, x: torch.Tensor) -> torch.Tensor:
        return x.copy_(self._all(x)[0])

    def least(self, number: int, device: torch.device) -> int:
        return min(int(one) for one in self._all(torch.tensor(number)))


def ranks_of(count: int) -> list[Ranks]:
    """Return the ranks of one team, for a thread each."""
    table: list[torch.Tensor | None] = [None] * count
    barrier = threading.Barrier(count)
    return [_Thread(rank, table, barrier) for rank in range(count)]


def together(count: int, work: Callable[[Ranks], _T]) -> list[_T]:
    """Return what `work` makes for every rank, in a thread each; the first error of any ends all."""
    table: list[torch.Tensor | None] = [None] * count
    barrier = threading.Barrier(count)

    def run(rank: int) -> _T:
        try:
            return work(_Thread(rank, table, barrier))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(run, rank) for rank in range(count)]
        errors = [error for one in futures if (error := one.exception()) is not None]
        for error in errors:
            if not isinstance(error, threading.BrokenBarrierError):
                raise error
        return [one.result() for one in futures]
