"""A model is calibrated block by block: what layers read is summed up, their codes are chosen, the next block comes.

Two streams of hidden states pass through the blocks, those of the original model and those of the compressed one. In a
block, layers that read the same are a group; a group's statistics are taken with the groups ahead of it compressed, so
that it sees all errors that it can make up for.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tersor.checkpoint.conversion import Step
from tersor.compress import get_recipe
from tersor.compress.statistics import HESSIAN, OUTPUT_HESSIAN, LayerSums
from tersor.convert.calibrate.bits import deterministic, unwatched
from tersor.convert.calibrate.coded import Coded, stacked
from tersor.convert.calibrate.coder import Coder
from tersor.convert.calibrate.experts import expert_statistics
from tersor.convert.calibrate.gradients import Gradients, Importance
from tersor.convert.calibrate.inputs import Group, find_groups, inputs_of
from tersor.convert.calibrate.parts import Parts
from tersor.convert.calibrate.scaling import Scaler, Scaling
from tersor.convert.calibrate.store import VALUE, Store
from tersor.convert.calibrate.streams import Streams
from tersor.convert.calibrate.tasks import Site, Task, matrices, read_tensor
from tersor.convert.calibrate.text import Calibration
from tersor.convert.calibrate.tweak import Tweaker
from tersor.convert.calibrate.units import Units
from tersor.convert.pipeline import Progress, located
from tersor.convert.transforms import AWQ, TWEAK_NORMS
from tersor.errors import FormatError, InputError, NonFiniteError, TersorError
from tersor.integrations.transformers.blocks import BlockModel


class Run:
    """The work on all blocks of one model."""

    def __init__(
        self,
        model: BlockModel,
        steps: Sequence[tuple[Step, str]],
        tasks: Sequence[Task],
        coder: Coder,
        store: Store,
        progress: Progress | None,
        calibration: Calibration,
        units: Units | None = None,
    ) -> None:
        """Prepare; nothing is read yet.

        Args:
            model: built, nothing loaded.
            steps: every tensor of the checkpoint and the parameter that it becomes, or a part of; the latter is empty
                where the model has none.
            tasks: what is to be calibrated.
            coder: what becomes of their weights.
            store: what is finished.
            progress: called after every block.
            calibration: whether a backward pass says what outputs matter, which transforms there are, and the seed.
            units: learns of every block which of its units never fire, where that is wanted.
        """
        self._model, self._tasks, self._coder, self._store = model, tasks, coder, store
        self._units = units
        self._asked = calibration
        self._progress = progress
        self._done = 0
        self._total = 0
        self._steps: dict[int | None, list[tuple[int, Step, str]]] = {}
        for number, (step, parameter) in enumerate(steps):
            outside = step.layer is not None and step.layer.tower
            if parameter and not outside:
                self._steps.setdefault(model.block_of(parameter), []).append((number, step, parameter))

    @torch.no_grad()
    def run(self, ids: torch.Tensor) -> None:
        """Finish all blocks that are not finished yet.

        Args:
            ids: int64 [W, T], the windows.

        Raises:
            InputError: activations that are not finite, a model whose blocks cannot run alone, or weights that cannot
                be compressed.
            TersorError: finished blocks now compute something else, or a GPU cannot have its kernels.
            CheckpointError: the source cannot be read.
            OutputError: the output cannot be written.
        """
        count = len(self._model.blocks)
        first = next((block for block in range(count) if self._of(block) and not self._store.has(block)), count)
        if first == count:
            return
        gradients = self._asked.effort == "high"
        self._coder.prepare(self._tasks, self._model.device)
        with deterministic(self._model.device):
            self._model.load({step.source.spec.name: read_tensor(step) for _, step, _ in self._steps.get(None, [])})
            self._model.tie()
            streams = Streams(self._model, ids)
            each = [self._nbytes(block) for block in range(count)]
            self._total = sum(each) * (3 if gradients else 1)
            self._tell("")
            backward = Gradients(self._model, self._store, ids, self._asked.seed) if gradients else None
            if backward is not None:
                backward.prepare(streams, first, self._load, lambda block: self._advance(each[block]))
            self._done = self._total - sum(each)
            for block in range(count):
                before = self._done
                if not self._of(block) or self._store.has(block):
                    self._again(block, streams)
                else:
                    self._block(block, streams, backward)
                self._done = before
                self._advance(each[block])

    def _of(self, block: int) -> list[Task]:
        return [task for task in self._tasks if task.block == block]

    def _nbytes(self, block: int) -> int:
        return sum(step.source.spec.nbytes for _, step, _ in self._steps.get(block, []))

    def _advance(self, nbytes: int, name: str = "calibration") -> None:
        self._done += nbytes
        self._tell(name)

    def _tell(self, name: str) -> None:
        if self._progress is not None:
            self._progress(self._done, self._total, name)

    def _load(self, block: int) -> None:
        self._model.load({step.source.spec.name: read_tensor(step) for _, step, _ in self._steps.get(block, [])})

    def _again(self, block: int, streams: Streams) -> None:
        """Run a block that is finished, or has nothing to calibrate, with the same bits as the first time."""
        self._load(block)
        twin = self._model.twin(block)
        tasks = self._of(block)
        if tasks:
            coded = [task for task in tasks if self._store.tensors(block, task.index)]
            changed = {
                number: self._store.tensors(block, number)[VALUE] for number in self._store.record(block)["changed"]
            }
            self._give(block, twin, {task.index: self._store.tensors(block, task.index) for task in coded}, changed)
        streams.advance(block, self._model.blocks[block], twin)
        self._model.drop(block)
        if tasks and self._store.record(block)["digest"] != streams.digest():
            raise TersorError(
                f"{self._store.directory.parent} cannot be continued: block {block} now computes something else than "
                "in the interrupted run (another machine or library); remove it"
            )

    def _block(self, block: int, streams: Streams, backward: Gradients | None) -> None:
        started = time.monotonic()
        self._load(block)
        layer, twin = self._model.blocks[block], self._model.twin(block)
        tasks = self._of(block)
        sites = list(dict.fromkeys(task.site for task in tasks))
        importance = backward.measure(streams, block, sites) if backward is not None else {}
        parts = Parts(self._model, block, twin, self._steps[block], tasks)
        scaling = Scaler(parts, streams, self._coder.recipe).find(sites) if AWQ in self._asked.transforms else Scaling()
        self._scale(block, twin, scaling)
        importance = scaling.importance(importance)
        _, hidden, call = next(streams.each(block))
        units = self._units
        silent = units.measure(self._model, layer, streams, block, tasks) if units is not None else None
        done: dict[int, Coded] = {}
        for group in find_groups(self._model, twin, sites, hidden, call):
            own = [task for task in tasks if task.site in group.sites]
            coded = self._group(block, (layer, twin), group, own, streams, importance, scaling)
            done.update(coded)
            self._give(block, twin, {index: each.tensors for index, each in coded.items()}, {})
        changed, norms = dict(scaling.values), []
        if TWEAK_NORMS in self._asked.transforms:
            tweaker = Tweaker(parts, streams, layer, self._asked.seed)
            changed.update(tweaker.tweak())
            norms = tweaker.lines
        streams.advance(block, layer, twin)
        self._model.drop(block)
        record = {
            "block": block,
            "seconds": round(time.monotonic() - started, 3),
            "layers": [each.line for each in done.values()],
            "scales": scaling.lines,
            "norms": norms,
            "changed": sorted(changed),
            "steps": {
                index: [each.squared_error, each.squared_norm, sorted(each.underflowed)] for index, each in done.items()
            },
            "digest": streams.digest(),
            **({"dead_units": silent} if silent is not None else {}),
        }
        tensors = {f"{index}.{name}": tensor for index, each in done.items() for name, tensor in each.tensors.items()}
        tensors.update({f"{number}.{VALUE}": value for number, value in changed.items()})
        self._store.finish(block, tensors, record)
        if backward is not None:
            backward.forget(block)

    def _group(
        self,
        block: int,
        layers: tuple[nn.Module, nn.Module],
        group: Group,
        tasks: Sequence[Task],
        streams: Streams,
        importance: Mapping[Site, Importance],
        scaling: Scaling,
    ) -> dict[int, Coded]:
        """Sum up what a group reads in the original block and in its twin, and choose its codes."""
        if not get_recipe(self._coder.recipe).needs:
            return {task.index: self._alone(task, scaling) for task in tasks}
        if group.part:
            return self._experts(block, layers, group, tasks, streams)
        weighted = {site: found for site, found in importance.items() if site in group.sites}
        device, channels = self._model.device, tasks[0].channels
        sums = {site: LayerSums.of(channels, shift=True, device=device) for site in weighted}
        plain = LayerSums.of(channels, shift=True, device=device)
        for batch, (own, other, call) in zip(streams.batches, streams.each(block), strict=True):
            original, compressed = (
                inputs_of(self._model, layer, group, hidden, call)[0].flatten(0, -2)
                for layer, hidden in zip(layers, (own, other), strict=True)
            )
            original = scaling.original(group.sites[0], original)
            for site, added in sums.items():
                added.add(compressed, weighted[site].weights[batch].flatten().to(device), original)
            if len(sums) < len(group.sites):
                plain.add(compressed, original=original)
        found = {}
        for task in tasks:
            statistics = sums.get(task.site, plain).statistics()
            if task.site in weighted:
                statistics[OUTPUT_HESSIAN] = weighted[task.site].hessian
            self._check(task, statistics)
            started = time.monotonic()
            weight = matrices(task.step, scaling.stored(task)).to(device)
            found[task.index] = self._code(task, weight, statistics)
            self._line(found[task.index], task, started, {"tokens": sums.get(task.site, plain).tokens})
        return found

    def _experts(
        self,
        block: int,
        layers: tuple[nn.Module, nn.Module],
        group: Group,
        tasks: Sequence[Task],
        streams: Streams,
    ) -> dict[int, Coded]:
        """Do the same for the experts of a layer, each with statistics of its own."""
        parts: dict[int, list[Coded]] = {task.index: [] for task in tasks}
        tokens: dict[int, list[int]] = {task.index: [] for task in tasks}
        started = time.monotonic()
        stored = {task.index: matrices(task.step, read_tensor(task.step)) for task in tasks if task.expert is None}
        for expert, count, statistics in expert_statistics(
            self._model, layers, group, streams, block, tasks[0].channels
        ):
            for task in tasks:
                if task.expert not in (None, expert):
                    continue
                self._check(task, statistics)
                whole = stored.get(task.index)
                weight = matrices(task.step, read_tensor(task.step)) if whole is None else whole[expert]
                parts[task.index].append(self._code(task, weight.to(self._model.device), statistics, expert))
                tokens[task.index].append(count)
        found = {}
        for task in tasks:
            own, counts = parts[task.index], tokens[task.index]
            found[task.index] = own[0] if task.expert is not None else stacked(own)
            rare = [
                expert if task.expert is None else task.expert
                for expert, count in enumerate(counts)
                if count < task.channels
            ]
            more = {"tokens": counts if task.expert is None else counts[0], "rarely_hit": rare}
            self._line(found[task.index], task, started, more)
            started = time.monotonic()
        return found

    def _alone(self, task: Task, scaling: Scaling) -> Coded:
        """Choose codes by a recipe that asks nothing of the inputs."""
        started = time.monotonic()
        weight = matrices(task.step, scaling.stored(task)).to(self._model.device)
        experts = range(len(weight)) if weight.dim() == 3 else ()
        found = stacked([self._code(task, weight[expert], {}, expert) for expert in experts]) if experts else None
        result = found or self._code(task, weight, {})
        self._line(result, task, started, {})
        return result

    def _check(self, task: Task, statistics: Mapping[str, torch.Tensor]) -> None:
        if not bool(statistics[HESSIAN].diagonal().isfinite().all()):
            raise InputError(f"what {task.name} reads of this text holds a NaN or an infinity, or is too large to sum")

    def _code(self, task: Task, weight: torch.Tensor, statistics: Mapping[str, torch.Tensor], expert: int = 0) -> Coded:
        """Return what becomes of a weight [OC, IC], of experts in one tensor that of one."""
        first = expert * len(weight) if task.expert is None else 0
        try:
            with unwatched(self._model.device):
                return self._coder.code(task, weight, statistics, first)
        except (NonFiniteError, FormatError) as error:
            raise located(task.step, error) from None

    def _line(self, coded: Coded, task: Task, started: float, more: Mapping[str, Any]) -> None:
        assert task.step.scheme is not None
        norm = coded.squared_norm
        coded.line = {
            "layer": task.name,
            "format": task.step.scheme.key(),
            **coded.line,
            "relative_error": (coded.squared_error / norm) ** 0.5 if norm else 0.0,
            "seconds": round(time.monotonic() - started, 3),
            **more,
        }

    def _scale(self, block: int, twin: nn.Module, scaling: Scaling) -> None:
        """Give a twin weights whose channels are scaled, before codes are chosen for them."""
        scaled = [task for task in self._of(block) if task.site in (*scaling.columns, *scaling.rows)]
        loaded = {task.step.source.spec.name: scaling.stored(task) for task in scaled}
        by_number = {number: step for number, step, _ in self._steps[block]}
        loaded.update({by_number[number].source.spec.name: value for number, value in scaling.values.items()})
        if loaded:
            with self._model.standing_in(block, twin):
                self._model.load(loaded)

    def _give(
        self,
        block: int,
        twin: nn.Module,
        coded: Mapping[int, Mapping[str, torch.Tensor]],
        changed: Mapping[int, torch.Tensor],
    ) -> None:
        """Give a twin what the packed tensors of a block's steps decode to, and what transforms changed."""
        device, dtype = self._model.device, self._model.dtype
        loaded: dict[str, torch.Tensor] = {}
        touched = set()
        for task in self._of(block):
            if task.index in coded:
                tensors = {name: tensor.to(device) for name, tensor in coded[task.index].items()}
                loaded[task.step.source.spec.name] = self._coder.decode(task, tensors, dtype)
                touched.add(task.parameter)
        for number, step, parameter in self._steps[block]:
            name = step.source.spec.name
            if number in changed:
                loaded[name] = changed[number]
            elif parameter in touched and name not in loaded:
                loaded[name] = read_tensor(step)
        with self._model.standing_in(block, twin):
            self._model.load(loaded)
