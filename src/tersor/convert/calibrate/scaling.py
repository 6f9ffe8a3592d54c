"""Scales of channels, folded into what makes them: AWQ, for the layers of one block, ahead of their codes.

What reads a norm, or a linear layer through nothing but sums and products, may have its channels multiplied where that
divides them. Whether it holds for a block is tried, by factors of two on some of the text, so that no table of
architectures is asked: a layer whose inputs go elsewhere, too, or through a function, is left as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tersor.checkpoint.conversion import Step
from tersor.checkpoint.names import TORCH_DTYPES
from tersor.compress.awq import Readers
from tersor.compress.statistics import Moments
from tersor.convert.calibrate.bits import unwatched
from tersor.convert.calibrate.gradients import Importance
from tersor.convert.calibrate.inputs import Group, find_groups, watched
from tersor.convert.calibrate.parts import Parts
from tersor.convert.calibrate.streams import Streams
from tersor.convert.calibrate.tasks import Site, Task, matrices, read_tensor
from tersor.formats import Assignment, Pruned
from tersor.integrations.transformers.residual import head_size

_WITHIN, _WITHIN_ROUNDED = 1e-4, 0.02
"""Distance of a block's outputs with factors and without, relative to what the block adds: powers of two change no bit
of a 16-bit product; where a gain is 1 plus a weight, it is rounded."""


@dataclass(slots=True)
class Scaling:
    """What the channels of one block's layers are multiplied with.

    Attributes:
        columns: float32 [IC], what the weights of a layer are multiplied with, and its inputs divided by.
        rows: float32 [OC], what the outputs of a layer are divided by.
        values: number of a step -> a norm's weight, or a bias, as it is stored now.
        lines: of the log.
    """

    columns: dict[Site, torch.Tensor] = field(default_factory=dict)
    rows: dict[Site, torch.Tensor] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list)

    def stored(self, task: Task) -> torch.Tensor:
        """Read a task's tensor in its stored shape, scaled: float32 on the host where it is."""
        found = read_tensor(task.step)
        columns, rows = self.columns.get(task.site), self.rows.get(task.site)
        if columns is None and rows is None:
            return found
        weight = matrices(task.step, found).float()
        if columns is not None:
            weight = weight * columns.cpu()
        if rows is not None:
            weight = weight / rows.cpu()[:, None]
        return matrices(task.step, weight)

    def original(self, site: Site, inputs: torch.Tensor) -> torch.Tensor:
        """Return what a layer would read in the original model if its channels were divided as here, [..., IC]."""
        columns = self.columns.get(site)
        return inputs if columns is None else inputs.float() / columns

    def importance(self, found: Mapping[Site, Importance]) -> dict[Site, Importance]:
        """Return what the gradients of outputs say, which grow where outputs are divided."""
        return {
            site: replace(each, hessian=_grown(each.hessian, self.rows[site])) if site in self.rows else each
            for site, each in found.items()
        }


@dataclass(frozen=True, slots=True)
class _Fold:
    """A group of layers and what makes their channels.

    Attributes:
        group: the layers.
        producer: module of the block whose outputs can be divided.
        offset: of a norm, what its gain is beside its weight; `None` of a linear layer.
        source: int64 [IC], which of the producer's channels each input channel is.
    """

    group: Group
    producer: str
    offset: float | None
    source: torch.Tensor

    def divided(self, parts: Parts, own: str, scales: torch.Tensor) -> torch.Tensor:
        """Return a parameter of the producer, `weight` or `bias`, with channels divided by scales [C], as stored."""
        value = parts.read(self.producer, own)
        if self.offset is not None:
            offset = self.offset if own == "weight" else 0.0
            return (value + offset) / scales - offset
        if own == "bias":
            return value / scales
        task = parts.task(Site(self.producer))
        assert task is not None
        return matrices(task.step, matrices(task.step, value) / scales[:, None])


class Scaler:
    """Finds the scales of one block's layers."""

    def __init__(self, parts: Parts, streams: Streams, recipe: str) -> None:
        """Prepare; nothing is computed yet.

        Args:
            parts: of the block, loaded.
            streams: at its entry.
            recipe: by which codes will be chosen.
        """
        self._parts, self._streams = parts, streams
        self._recipe = recipe
        self._scaling = Scaling()
        _, self._hidden, self._call = next(streams.each(parts.block))

    def find(self, sites: Sequence[Site]) -> Scaling:
        """Return the scales; the twin is left as it was.

        Args:
            sites: of the layers that are compressed.
        """
        folds = self._folds(sites)
        sums = {fold.group: Moments(len(fold.source), self._parts.model.device) for fold in folds}
        firsts = {group.sites[0].module: moments for group, moments in sums.items()}

        def add(name: str, tensors: list[torch.Tensor]) -> None:
            firsts[name].add(tensors[0])

        if folds:
            with watched(self._parts.twin, firsts, add):
                for _, hidden, call in self._streams.each(self._parts.block):
                    self._parts.model.run(self._parts.twin, hidden, call)
        statistics = {group: moments.mean() for group, moments in sums.items()}
        for fold in folds:
            self._search(fold, statistics[fold.group])
        return self._scaling

    def _search(self, fold: _Fold, hessian: torch.Tensor) -> None:
        """Find the scales of one group, and keep them where they help."""
        tasks = [self._parts.linears[site] for site in fold.group.sites]
        device = self._parts.model.device
        layers = []
        for task in tasks:
            form = task.step.scheme
            assert form is not None and not isinstance(form, Pruned), "pruned weights are not calibrated"
            layers.append((matrices(task.step, read_tensor(task.step)).to(device), form))
        names = [task.name for task in tasks]
        if not all(bool(value.isfinite().all()) for value in (hessian, *(weight for weight, _ in layers))):
            # Who chooses codes says where.
            self._scaling.lines.append({"layers": names, "folded_into": None, "left": "a number is not finite"})
            return
        readers = Readers(layers, hessian, fold.source, recipe=self._recipe)
        with unwatched(device):
            found = readers.search()
        if not math.isfinite(found.before):
            self._scaling.lines.append({"layers": names, "folded_into": None, "left": "a scale does not fit its dtype"})
            return
        line: dict[str, Any] = {
            "layers": names,
            "folded_into": self._parts.name(fold.producer),
            "exponent": found.exponent,
            "objective_before": found.before,
            "objective_after": found.after,
        }
        self._scaling.lines.append(line)
        scales, values = found.scales, {}
        weight = self._parts.stored(fold.producer)
        assert weight is not None
        if found.exponent and fold.offset is not None:
            # Rounded to its dtype as it is stored, the norm divides by other scales than were asked for.
            before = self._parts.read(fold.producer) + fold.offset
            values[weight.number] = as_stored(fold.divided(self._parts, "weight", scales), weight.step)
            scales = before / (values[weight.number].float().to(device) + fold.offset)
            usable = scales.isfinite() & (scales > 0)
            values[weight.number] = torch.where(
                usable.cpu(), values[weight.number], as_stored(read_tensor(weight.step), weight.step)
            )
            scales = torch.where(usable, scales, 1.0)
            line["objective_after"] = readers.loss(scales)
        if found.exponent and fold.offset is None and _powers_of_two(self._parts.linears[Site(fold.producer)]):
            scales = scales.log2().round().exp2()  # so that rows of the producer keep their codes
            line["objective_after"] = readers.loss(scales)
        if not found.exponent or line["objective_after"] >= found.before:
            line.update(exponent=0.0, objective_after=found.before)
            return
        if fold.offset is None:
            site = Site(fold.producer)
            self._scaling.rows[site] = scales
        bias = self._parts.stored(fold.producer, "bias")
        if bias is not None:
            values[bias.number] = as_stored(fold.divided(self._parts, "bias", scales), bias.step)
        self._scaling.values.update(values)
        self._scaling.columns.update(dict.fromkeys(fold.group.sites, readers.spread(scales)))

    def _folds(self, sites: Sequence[Site]) -> list[_Fold]:
        """Return the groups whose channels can be scaled; the log says of each other why not."""
        parts, found = self._parts, []
        norms = parts.norms()
        groups = find_groups(parts.model, parts.twin, sites, self._hidden, self._call)
        made = self._made(norms, groups)
        earlier: list[Site] = []
        for group in groups:
            reason = self._obstacle(group)
            fold = None
            if not reason:
                channels = parts.linears[group.sites[0]].channels
                candidates = self._candidates(group, channels, made.get(group), norms, earlier)
                fold = next(filter(self._holds, candidates), None)
                reason = "nothing that makes its inputs can be divided without changing more than them"
            if fold is not None:
                found.append(fold)
            else:
                names = [parts.name(site.module) for site in group.sites]
                self._scaling.lines.append({"layers": names, "folded_into": None, "left": reason})
            earlier += [site for site in group.sites if not site.part]
        return found

    def _obstacle(self, group: Group) -> str:
        """Say why a group cannot be scaled, whatever makes its inputs; empty where it may."""
        if group.part:
            return "experts are not scaled"
        if any(self._parts.task(site) is None for site in group.sites):
            return "a weight is stored in several tensors"
        return ""

    def _made(self, norms: Mapping[str, Any], groups: Sequence[Group]) -> dict[Group, str]:
        """Return for each group the norm whose output it reads."""
        outputs: dict[str, torch.Tensor] = {}
        inputs: dict[str, torch.Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            return lambda _module, _args, output: outputs.__setitem__(name, output)

        handles = [self._parts.twin.get_submodule(name).register_forward_hook(keep(name)) for name in norms]
        try:
            firsts = [group.sites[0].module for group in groups if not group.part]
            with watched(self._parts.twin, firsts, lambda name, tensors: inputs.__setitem__(name, tensors[0])):
                self._run()
        finally:
            for handle in handles:
                handle.remove()
        found = {}
        for group in groups:
            read = inputs.get(group.sites[0].module)
            for name, output in outputs.items():
                if read is not None and (output.data_ptr(), output.shape) == (read.data_ptr(), read.shape):
                    found[group] = name
        return found

    def _candidates(
        self, group: Group, channels: int, norm: str | None, norms: Mapping[str, Any], earlier: Sequence[Site]
    ) -> Iterator[_Fold]:
        device = self._parts.model.device
        own = torch.arange(channels, device=device)
        if norm is not None:
            yield _Fold(group, norm, norms[norm].offset, own)
            return
        size = head_size(self._parts.model.model)
        for site in reversed(earlier):
            task = self._parts.task(site)
            assert task is None or task.step.layer is not None
            features = task.step.layer.shape[0] if task is not None and task.step.layer is not None else 0
            if features == channels:
                yield _Fold(group, site.module, None, own)
            elif features and channels % features == 0 and features % size == 0:
                # Several heads of queries share one of keys and values.
                heads = torch.arange(channels // size, device=device) // (channels // features)
                shared = (heads[:, None] * size + torch.arange(size, device=device)).flatten()
                yield _Fold(group, site.module, None, shared)

    def _holds(self, fold: _Fold) -> bool:
        """Whether the block computes the same with factors of 1/2 and 2 folded."""
        if fold.offset is None and self._held_back(fold):
            return False
        before = self._run()
        with self._applied(fold):
            after = self._run()
        added = (before - self._hidden).float().norm()
        within = _WITHIN_ROUNDED if fold.offset and before.dtype != torch.float32 else _WITHIN
        return bool((after - before).float().norm() <= within * added) and bool(added > 0)

    def _held_back(self, fold: _Fold) -> bool:
        """Whether a linear layer has a bias that is not stored as it is."""
        held = self._parts.twin.get_submodule(fold.producer)._parameters.get("bias")
        return held is not None and self._parts.stored(fold.producer, "bias") is None

    @contextmanager
    def _applied(self, fold: _Fold) -> Iterator[None]:
        parts, before = self._parts, []
        drawing = torch.Generator().manual_seed(0)
        channels = int(fold.source.max()) + 1
        factors = torch.randint(0, 2, (channels,), generator=drawing).float().mul_(1.5).add_(0.5).to(parts.model.device)
        for own in ("weight", "bias"):
            if parts.twin.get_submodule(fold.producer)._parameters.get(own) is not None:
                value = fold.divided(parts, own, factors)
                before.append((fold.producer, own, parts.put(fold.producer, own, value)))
        for site in fold.group.sites:
            task = parts.linears[site]
            weight = matrices(task.step, parts.read(site.module)) * factors[fold.source]
            before.append((site.module, "weight", parts.put(site.module, "weight", matrices(task.step, weight))))
        try:
            yield
        finally:
            for module, own, parameter in before:
                parts.restore(module, own, parameter)

    def _run(self) -> torch.Tensor:
        return self._parts.model.run(self._parts.twin, self._hidden, self._call)


def as_stored(value: torch.Tensor, step: Step) -> torch.Tensor:
    """Return a value on the host in the dtype in which the step's tensor is written."""
    return value.cpu().to(TORCH_DTYPES[step.source.spec.dtype])


def _powers_of_two(task: Task) -> bool:
    """Whether a layer's scales are powers of two, so that other factors of its rows change how they are rounded."""
    form = task.step.scheme
    assert not isinstance(form, Pruned), "pruned weights are not calibrated"
    levels = form.mix.levels if isinstance(form, Assignment) else (form,)
    return any(level is not None and level.scale_dtype == "e8m0" for level in levels)


def _grown(hessian: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return second moments of output gradients [OC, OC], or their P blocks, of outputs divided by rows [OC]."""
    size = hessian.shape[-1]
    factor = rows.to(hessian).view(-1, size) if hessian.dim() == 3 else rows.to(hessian)
    return hessian * factor.unsqueeze(-1) * factor.unsqueeze(-2)
