"""Ray: engines on the machines of a cluster answer one batch, and rows of a Ray dataset are answered where they are.

Ray's own processors hand out rows in small batches, which tears prefixes apart. Here an actor holds an engine and is
fed whole prefix groups (`engine.dispatch`), and the program that started it writes the only output file.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from tersor.engine.batch_items import BatchEngine, Item
from tersor.engine.dispatch import Done, Event, Lost, run_over
from tersor.engine.outputs import Answer, RequestOutput
from tersor.engine.params import SamplingParams
from tersor.errors import InputError, TersorError, UnsupportedError

RESTARTS = 3
"""How often a worker's actor is started again."""

MakeEngine = Callable[[int], BatchEngine]
"""Makes the engine of a worker by its number, on the machine where its actor is."""


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise UnsupportedError("Ray is not installed: pip install 'tersor[ray]'") from None
    return ray


class RayEngines:
    """Engines in actors of a Ray cluster; a `BatchEngine` itself. To be closed, or used as a context."""

    def __init__(
        self,
        make: MakeEngine,
        count: int | None = None,
        *,
        address: str | None = None,
        gpus: float = 1.0,
        restarts: int = RESTARTS,
    ) -> None:
        """Connect to a cluster, where the program has not, and start the actors; each makes its engine when it is fed.

        Args:
            make: makes the engine of each.
            count: how many; `None` is as many as the cluster has GPUs for.
            address: of the cluster; `auto` finds one that this machine belongs to, `None` starts one on this machine.
            gpus: of each actor.
            restarts: how often each is started again after it was lost.

        Raises:
            UnsupportedError: Ray is not installed.
            InputError: there is no such cluster, or it has no room for an actor.
        """
        ray = _ray()
        if not ray.is_initialized():
            try:
                ray.init(address=address, log_to_driver=False, include_dashboard=None if address else False)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise InputError(f"cannot connect to Ray at {address}: {_line(error)}") from None
        if count is None:
            count = int(ray.cluster_resources().get("GPU", 0) // gpus) if gpus else 1
        if count < 1:
            raise InputError(f"the cluster has no room for an actor with {gpus:g} GPUs: say how many actors there are")
        self.count = count
        self._ray, self._make = ray, make
        self._type = ray.remote(num_gpus=gpus, max_restarts=0, max_concurrency=2)(_Actor)
        self._restarts = [restarts] * count
        self._actors = [self._type.remote(make, worker) for worker in range(count)]
        self._running: dict[Any, int] = {}
        self._stopped = False

    def run(self, items: Sequence[Item], stopping: Callable[[], bool]) -> Iterator[Answer]:
        """Yield the outputs of all items, in any order.

        Raises:
            InputError: an earlier run was not read to its end, whose answers would be taken for those of this one.
            TersorError: an engine cannot be made, or no actor is left.
        """
        if self._running:
            raise InputError("an earlier run of these engines was not read to its end: make others")
        if self._stopped:
            self._ray.get([actor.go_on.remote() for actor in self._actors])
            self._stopped = False
        return run_over(self, items, stopping)

    def begin(self, worker: int, items: list[Item]) -> None:
        """Have an actor answer these; one that is gone is noticed by `wait`."""
        answers = self._actors[worker].run.options(num_returns="streaming").remote(items)
        self._running[answers] = worker

    def wait(self, seconds: float) -> list[tuple[int, Event]]:
        """Return what an actor sent next, or that it ended."""
        ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=seconds)
        events = []
        for answers in ready:
            worker = self._running[answers]
            try:
                event = self._ray.get(next(answers))
            except StopIteration:
                event = Done()
            except self._ray.exceptions.RayError as error:
                event = _line(error)
            if isinstance(event, Exception):
                raise TersorError(f"the engine of worker {worker} cannot be made: {event}")
            if isinstance(event, str):
                event = self._ended(worker, event)
            if isinstance(event, Done | Lost):
                del self._running[answers]
            events.append((worker, event))
        return events

    def stop(self) -> None:
        """Have all actors begin no further item."""
        self._stopped = True
        for worker in self._running.values():
            self._actors[worker].stop.remote()

    def close(self) -> None:
        """End all actors; idempotent. The connection to the cluster stays the program's."""
        for actor in self._actors:
            with contextlib.suppress(self._ray.exceptions.RayError):
                self._ray.kill(actor)
        self._actors.clear()
        self._running.clear()

    def __enter__(self) -> RayEngines:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _ended(self, worker: int, reason: str) -> Lost:
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.kill(self._actors[worker])
        if self._restarts[worker] == 0:
            return Lost(f"worker {worker}: {reason}", final=True)
        self._restarts[worker] -= 1
        self._actors[worker] = self._type.remote(self._make, worker)
        return Lost(f"worker {worker}: {reason}")


class _Actor:
    """An engine on some machine, made when there is something to answer; `stop` is called while `run` runs."""

    def __init__(self, make: MakeEngine, worker: int) -> None:
        self._make, self._worker = make, worker
        self._engine: BatchEngine | None = None
        self._stop = threading.Event()

    def run(self, items: list[Item]) -> Iterator[Any]:
        """Yield outputs; a line of what went wrong; or why there is no engine, an error."""
        if self._engine is None:
            try:
                self._engine = self._make(self._worker)
            except Exception as error:
                yield TersorError(_line(error))
                return
        try:
            yield from self._engine.run(items, self._stop.is_set)
        except Exception as error:
            yield _line(error)

    def stop(self) -> None:
        self._stop.set()

    def go_on(self) -> None:
        self._stop.clear()


class AnswerBatches:
    """Answers rows of a Ray dataset: a class for `Dataset.map_batches`, where prefixes need no grouping.

    `dataset.map_batches(AnswerBatches, fn_constructor_args=(make, params), batch_size=512, concurrency=1, num_gpus=1)`
    """

    def __init__(self, make: MakeEngine, params: SamplingParams, column: str = "prompt_token_ids") -> None:
        """Make the engine of this actor.

        Args:
            make: makes it; its number is 0.
            params: how all tokens are drawn.
            column: holds the tokens of prompts.
        """
        self._engine, self._params, self._column = make(0), params, column

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the rows with `text` and `token_ids` of the first continuation, and `error`, which may be empty."""
        prompts = batch[self._column]
        items = [Item(str(row), np.asarray(tokens, np.int32), self._params) for row, tokens in enumerate(prompts)]
        found = {output.request_id: output for output in self._engine.run(items, lambda: False)}
        texts, tokens, errors = (np.empty(len(items), dtype=object) for _ in range(3))
        for row, item in enumerate(items):
            output = found[item.key]
            assert isinstance(output, RequestOutput)
            failed = output.error is not None or not output.outputs
            texts[row] = "" if failed else output.outputs[0].text
            tokens[row] = np.array([] if failed else output.outputs[0].token_ids, dtype=np.int64)
            errors[row] = output.error or ""
        return {**batch, "text": texts, "token_ids": tokens, "error": errors}


def _line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
