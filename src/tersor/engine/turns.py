"""Whose turn is it, where as many steps are under way as a model has stages? Each step has its share of who decodes.

A row that decodes begins with the token of its request's row before. In a pipeline of P stages that token is back when
P - 1 other steps have begun, so requests take turns: in a step is a P-th of them, those who waited longest first, and
nobody who was in one of the last P - 1 steps and whose token the host has not read. So stages are busy with steps of
about one size, whoever comes and leaves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import attrgetter

from tersor.engine.request import RUNNING, Request

_BY_TURN = attrgetter("turn")


class Turns:
    """Who may be in the next step.

    Attributes:
        stages: of the model.
        made: steps so far.
    """

    def __init__(self, stages: int) -> None:
        self.stages, self.made = stages, 0

    def next(self, running: Sequence[Request]) -> Iterable[Request]:
        """Return the running requests that may have a row in the next step, the oldest first; prompts always may."""
        if self.stages == 1:
            return running
        prompts, ready, decoding = [], [], 0
        for request in running:
            if request.state != RUNNING:
                continue
            if request.length - request.computed != 1:
                prompts.append(request)
                continue
            decoding += 1
            unread = request.length - request.known
            if not unread or (unread == 1 and request.turn + self.stages <= self.made):
                ready.append(request)
        chosen = set(sorted(ready, key=_BY_TURN)[: -(-decoding // self.stages)])
        for request in chosen:
            request.turn = self.made
        return [*(request for request in ready if request in chosen), *prompts]
