"""What does every output feature of a model lose at every level? One backward pass, one product a level.

The model runs forward and backward block by block, as for `gradients`; on the way back each block gives its inputs and
gradients to `compress.salience`. The scores of a block are kept in the store, so that an interrupted run takes them up.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch

from tersor.checkpoint.conversion import Step
from tersor.checkpoint.reader import SafetensorsFile
from tersor.compress.salience import KL, Salience, rounding_error
from tersor.convert.calibrate.bits import deterministic
from tersor.convert.calibrate.expert_scores import ExpertScores
from tersor.convert.calibrate.gradients import Backward, Gradients, Take
from tersor.convert.calibrate.store import Store, write_tensors
from tersor.convert.calibrate.streams import Streams
from tersor.convert.calibrate.tasks import Site, Task, matrices, read_tensor
from tersor.convert.pipeline import Progress, located
from tersor.errors import FormatError, InputError, NonFiniteError
from tersor.formats import Mix
from tersor.integrations.transformers.blocks import BlockModel


class BlockScores(ABC):
    """Scores of the layers of one model's blocks, of one kind."""

    def __init__(
        self,
        model: BlockModel,
        steps: Sequence[tuple[Step, str]],
        tasks: Sequence[Task],
        store: Store,
        progress: Progress | None,
    ) -> None:
        """Prepare; nothing is read yet.

        Args:
            model: built, nothing loaded.
            steps: every tensor of the checkpoint and the parameter that it becomes, as for `run.Run`.
            tasks: the layers that are scored.
            store: where scores and gradients are kept.
            progress: called after every block.
        """
        self._model, self._tasks, self._store = model, tasks, store
        self._progress = progress
        self._steps: dict[int | None, list[tuple[Step, str]]] = {}
        for step, parameter in steps:
            outside = step.layer is not None and step.layer.tower
            if parameter and not outside:
                self._steps.setdefault(model.block_of(parameter), []).append((step, parameter))
        self._done = self._total = self._window = 0

    @torch.no_grad()
    def run(self, ids: torch.Tensor, *, seed: int | None, keep_gradients: bool) -> dict[str, torch.Tensor]:
        """Return module -> its scores.

        Args:
            ids: int64 [W, T], the windows.
            seed: of the labels that the model draws; `None` takes those of the text.
            keep_gradients: whether they are needed again.

        Raises:
            InputError: activations or gradients that are not finite, or a model whose blocks cannot run alone.
            CheckpointError: the source cannot be read.
            OutputError: the disk is full or does not let us write.
        """
        count, self._window = len(self._model.blocks), ids.shape[1]
        paths = [self._store.path("scores", block) for block in range(count)]
        backward = Gradients(self._model, self._store, ids, seed)
        if not all(path.exists() for path in paths):
            self._total = 2 * sum(map(self._nbytes, range(count)))
            self._tell("")
            with deterministic(self._model.device):
                self._load(None)
                self._model.tie()
                streams = Streams(self._model, ids)
                advance = lambda block: self._advance(self._nbytes(block))  # noqa: E731
                backward.visit(streams, self._load, advance, self._score, keep=keep_gradients)
        if not keep_gradients:
            for block in range(count):
                backward.forget(block)
        found: dict[str, torch.Tensor] = {}
        for path in paths:
            with SafetensorsFile(path) as file:
                found |= {name: file.read(name) for name in file.tensors}
        return found

    def _score(self, block: int, run: Backward) -> None:
        """Keep the scores of one loaded block's layers; `run` runs it backward."""
        found = self.score(block, [task for task in self._tasks if task.block == block], run)
        write_tensors(self._store.path("scores", block), found, {})

    @abstractmethod
    def score(self, block: int, tasks: Sequence[Task], run: Backward) -> dict[str, torch.Tensor]:
        """Return the scores of one loaded block's layers by their names.

        Args:
            block: its number.
            tasks: the layers.
            run: runs the block backward.

        Raises:
            InputError: a score is not finite; the layer is named.
        """

    def _load(self, block: int | None) -> None:
        self._model.load({step.source.spec.name: read_tensor(step) for step, _ in self._steps.get(block, [])})

    def _nbytes(self, block: int) -> int:
        return sum(step.source.spec.nbytes for step, _ in self._steps.get(block, []))

    def _advance(self, nbytes: int) -> None:
        self._done += nbytes
        self._tell("scores of output features")

    def _tell(self, name: str) -> None:
        if self._progress is not None:
            self._progress(min(self._done, self._total), self._total, name)


class Scoring(BlockScores):
    """What each output feature loses at each level of a mix, float64 [levels, OC], nats a token or MixLLM's score.

    Experts of a layer are summed up, under the name of the parameter that holds the weights of all of them, the rows of
    the gate before those of up.
    """

    def __init__(
        self,
        model: BlockModel,
        steps: Sequence[tuple[Step, str]],
        tasks: Sequence[Task],
        mix: Mix,
        store: Store,
        progress: Progress | None,
        by: str = KL,
    ) -> None:
        """Prepare as `BlockScores` does, for the levels of a mix; `by` is a key of `SCORES`, `kl` of experts."""
        super().__init__(model, steps, tasks, store, progress)
        self._mix, self._by = mix, by

    def score(self, block: int, tasks: Sequence[Task], run: Backward) -> dict[str, torch.Tensor]:
        """Return the scores of all features of a block's layers."""
        sums: dict[str, Salience] = {}
        take: dict[Site, Take] = {}
        scored = []
        for module, wanted in _experts(tasks).items():
            names = {task.site.part: task.parameter for task in wanted}
            experts = self._model.blocks[block].get_submodule(module)
            own = ExpertScores(experts, self._mix, list(names), self._model.device)
            scored.append((names, own))
            *others, last = own.together
            try:
                for chosen in others:
                    run({wanted[0].site: own.take(chosen)}, replace=False)
                take[wanted[0].site] = own.take(last)
            except (NonFiniteError, FormatError) as error:
                raise InputError(f"{self._model.name_of(block, module)}: {error}") from None
        for task in tasks:
            if task.site.part:
                continue
            weight = matrices(task.step, read_tensor(task.step)).to(self._model.device)
            try:
                deltas = [rounding_error(weight.float(), scheme) for scheme in self._mix.levels]
            except (NonFiniteError, FormatError) as error:
                raise located(task.step, error) from None
            total = sums[task.name] = Salience(len(deltas), len(weight), self._by, self._model.device)
            take[task.site] = _adding(total, deltas, 0 if self._by == KL else self._window)
        run(take, replace=True)
        found = {name: total.mean() for name, total in sums.items()}
        for names, own in scored:
            found |= {names[part]: score for part, score in own.mean().items()}
        for name, score in found.items():
            if not bool(score.isfinite().all()):
                raise InputError(f"the score of {name} holds a NaN or an infinity on this text")
        return found


def _experts(tasks: Sequence[Task]) -> dict[str, list[Task]]:
    """Return the modules of experts of a block, and the tasks of each."""
    found: dict[str, list[Task]] = {}
    for task in tasks:
        if task.site.part:
            found.setdefault(task.site.module, []).append(task)
    return found


def _adding(own: Salience, deltas: Sequence[torch.Tensor], window: int) -> Take:
    """Return what adds all tokens of a batch at once, or with a window each so many as a sample."""

    def add(given: list[torch.Tensor], gradient: torch.Tensor) -> None:
        x, pulled = given[0].flatten(0, -2), gradient.flatten(0, -2)
        for first in range(0, len(x), window or len(x)):
            sample = slice(first, first + window if window else None)
            own.add(x[sample], pulled[sample], deltas)

    return add


def unscored(shapes: Mapping[str, tuple[int, ...]], tasks: Sequence[Task]) -> list[str]:
    """Return the modules that would get levels, and are in no decoder block."""
    known = {task.name for task in tasks}
    return [module for module in shapes if module not in known]
