"""How does a rank that draws know of requests that another one has? The same arrays, told instead of copied.

The first rank of a pipeline plans steps and knows how tokens are drawn; the last stage draws them. What a `Sampler` of
one device would copy ahead of a step travels with the step (`orders`), and `Sampler.read` copies it there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tersor.engine.sampler import Sampler


class Teller(Sampler):
    """A sampler that draws nothing: `news` is what another one of as many slots has to know."""

    def __init__(self, slots: int, vocabulary: int, *, most_length: int = 1 << 16) -> None:
        """Make one whose slots are all padding.

        Args:
            slots, vocabulary, most_length: as for `Sampler`, and those of the one that is told.
        """
        self._bitmaps: list[tuple[int, torch.Tensor]] = []
        self._numbers: torch.Tensor | None = None
        super().__init__(slots, vocabulary, "cpu", most_length=most_length)

    def prepare(self, step: Any, masks: Mapping[int, torch.Tensor] | None = None) -> None:
        """Note what the other one does not know of the rows that draw in a step, as `Sampler.prepare` sends it."""
        self._bitmaps, self._numbers = [], None
        super().prepare(step, masks)

    def news(self) -> torch.Tensor:
        """Return what is to be read ahead of the step that was prepared: int32 [N]."""
        head = [self._filters, self._masks, self._penalties, self._used, len(self._bitmaps)]
        parts = [torch.tensor(head, dtype=torch.int32)]
        for slot, mask in self._bitmaps:
            parts += [torch.tensor([slot], dtype=torch.int32), mask]
        if self._numbers is not None:
            parts.append(self._numbers)
        return torch.cat(parts)

    def _allow_some(self, slot: int, mask: torch.Tensor) -> None:
        self._bitmaps.append((slot, mask))

    def _take(self, memory: torch.Tensor, event: torch.cuda.Event | None) -> None:
        assert event is None, "it is on a host"
        self._numbers = memory
