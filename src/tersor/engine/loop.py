"""A core's steps in one thread, and between them what other threads ask for: how every engine runs that is online."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence

from tersor.engine.core import Core
from tersor.engine.outputs import RequestOutput
from tersor.engine.params import SamplingParams
from tersor.errors import TersorError

Told = list[tuple[str, RequestOutput | Exception]]
"""Requests that changed, and what became of them."""
Job = Callable[[Core, Callable[[Told], None]], None]


class Loop:
    """Any thread may ask; one thread calls `run`, before or after that, and alone touches the core."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()

    def add(
        self, request_id: str, prompt: Sequence[int], params: SamplingParams | None, salt: str | None = None
    ) -> None:
        """Have a request taken in; that it cannot be is told as its end."""

        def job(core: Core, tell: Callable[[Told], None]) -> None:
            try:
                core.add(request_id, prompt, params, salt=salt)
            except TersorError as error:
                tell([(request_id, error)])

        self._jobs.put(job)

    def abort(self, request_id: str) -> None:
        """Have a request ended; nothing happens where it has ended or never was."""
        self._jobs.put(lambda core, tell: core.abort(request_id))

    def end(self) -> None:
        """Have `run` return before the next step."""
        self._jobs.put(None)

    def run(self, core: Core, tell: Callable[[Told], None]) -> None:
        """Run steps until told to end; whatever a step raises ends them, too.

        Args:
            core: whose.
            tell: told after every step which requests changed.
        """
        while self._serve(core, tell):
            tell([(one.request_id, one) for one in core.step()])

    def _serve(self, core: Core, tell: Callable[[Told], None]) -> bool:
        """Run jobs that wait, or wait for one where there is nothing else to do; return whether to go on."""
        while not self._jobs.empty() or not core.unfinished:
            job = self._jobs.get()
            if job is None:
                return False
            job(core, tell)
        return True
