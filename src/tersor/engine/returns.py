"""Which tokens are on their way back from the last stage? The first one keeps them for the steps that begin with them.

A step of a pipeline begins while those ahead of it are in later stages. It needs no tokens but those of the step in
which its requests were last, and its order says up to which step that is (`Order.kept`): the first rank receives them,
and all ranks of the first stage keep them, at that place of their streams and nowhere else.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from tersor import ops
from tersor.engine.launched import Drawn, Launched
from tersor.engine.orders import Order
from tersor.ops.collective import Ranks
from tersor.ops.sampling_form import MOST_LOGPROBS
from tersor.ops.stages import Stages

if TYPE_CHECKING:
    from tersor.engine.request import Step


@dataclass(slots=True, eq=False)
class _Away:
    """A step whose tokens are not kept yet: its number, its order, slots int32 [draws], and on the first rank more."""

    number: int
    order: Order
    slots: torch.Tensor
    launched: Launched | None = None
    tokens: torch.Tensor | None = None


class Returns:
    """Steps in later stages, seen from a rank of the first."""

    def __init__(self, stages: Stages, ranks: Ranks, newest: torch.Tensor, hidden: int) -> None:
        """Begin with no step.

        Args:
            stages: of the model.
            ranks: of the first stage.
            newest: int64 [slots]: the newest token of every slot, as `ops.keep` writes it.
            hidden: channels of a state.
        """
        self._stages, self._ranks, self._newest, self._hidden = stages, ranks, newest, hidden
        self._away: deque[_Away] = deque()
        self._number = self._received = 0
        self._drew: NDArray[np.int64] = np.zeros(len(newest), dtype=np.int64)

    def needed(self, tokens: NDArray[np.int32]) -> int:
        """Return up to which step tokens are to be kept for one that begins with `tokens`, on the first rank."""
        unread = tokens[tokens < 0]
        return max(self._received, int(self._drew[-1 - unread].max()) if len(unread) else 0)

    def begin(self, order: Order, slots: torch.Tensor, step: Step | None = None) -> Launched | None:
        """Note a step that was passed on.

        Args:
            order: of it.
            slots: int32 [order.draws], of rows that draw; may change afterwards.
            step: on the first rank, which gets it back.
        """
        self._number += 1
        away = _Away(self._number, order, slots.clone())
        self._away.append(away)
        if step is None:
            return None
        self._drew[[row.request.slot for row in step.drawing]] = away.number
        away.launched = Launched(step, self._stages.everyone, lambda: self._receive(away.number))
        return away.launched

    def keep(self, number: int) -> None:
        """Keep the tokens of all steps up to one, as its order says, on every rank of the first stage.

        Raises:
            LostError: a rank is gone.
        """
        if self._ranks.first:
            self._receive(number)
        while self._away and self._away[0].number <= number:
            away = self._away.popleft()
            if not away.order.draws:
                continue
            tokens = away.tokens
            if tokens is None:
                tokens = self._newest.new_empty(away.order.draws)
            ops.keep(self._newest, away.slots, self._ranks.from_first(tokens))

    def _receive(self, number: int) -> None:
        """Have what steps up to one gave come to the first rank, and on to its host."""
        for away in self._away:
            if away.number > number:
                return
            if away.tokens is None and away.launched is not None:
                drawn = self._drawn(away.order)
                for tensor in drawn.tensors():
                    self._stages.get_back(tensor)
                away.launched.publish(drawn)
                away.tokens = drawn.tokens
                self._received = away.number

    def _drawn(self, order: Order) -> Drawn:
        """Return memory for what a step gives."""

        def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=self._newest.device)

        def logprobs(count: int) -> ops.Logprobs:
            wide = (count, MOST_LOGPROBS)
            return ops.Logprobs(
                empty(count, dtype=torch.float32),
                empty(count, dtype=torch.int32),
                empty(*wide, dtype=torch.int32),
                empty(*wide, dtype=torch.float32),
            )

        return Drawn(
            empty(order.draws, dtype=torch.int64),
            logprobs(order.draws) if order.draws and order.logprobs else None,
            logprobs(order.more) if order.more else None,
            empty(order.embeds, self._hidden, dtype=torch.float32) if order.embeds else None,
        )
