"""Norm tweaking: when the codes of a block are chosen, its norms are adjusted so that its outputs are the original's.

One pass over the text, in an order drawn from the seed; the steps grow with the depth of the block, as in the paper
(`compress.norms`). The new norms are kept where the error of the block's outputs, over all of the text, is lower.
"""

from __future__ import annotations

from typing import Any

import torch

from tersor.compress.norms import Steps, channel_distance
from tersor.convert.calibrate.parts import Parts
from tersor.convert.calibrate.scaling import as_stored
from tersor.convert.calibrate.streams import Streams

_RATE = 1e-3
"""Length of a step in the first block, relative to a norm's gains; the last block's is twice that."""


class Tweaker:
    """Adjusts the norms of one block, whose twin has its compressed weights."""

    def __init__(self, parts: Parts, streams: Streams, original: torch.nn.Module, seed: int) -> None:
        """Prepare; nothing is computed yet.

        Args:
            parts: of the block.
            streams: at its entry.
            original: the block as it was.
            seed: of the order of batches.
        """
        self._parts, self._streams, self._original, self._seed = parts, streams, original, seed
        forms = parts.norms()
        self._gains = {
            module: float((parts.read(module) + form.offset).square().mean().sqrt()) for module, form in forms.items()
        }
        self._norms = [
            (module, own)
            for module in forms
            for own, parameter in parts.twin.get_submodule(module)._parameters.items()
            if parameter is not None
        ]
        self.lines: list[dict[str, Any]] = []

    def tweak(self) -> dict[int, torch.Tensor]:
        """Adjust the twin's norms; return number of a step -> the parameter as it is stored now, where it changed."""
        parts, name = self._parts, self._parts.name("")
        if not self._norms:
            self.lines.append({"layer": name, "left": "it has no norm that is stored as it is"})
            return {}
        twin = parts.twin
        held = [twin.get_submodule(module)._parameters[own] for module, own in self._norms]
        values = [parameter.detach().float().clone() for parameter in held if parameter is not None]
        before, distance = self._error()
        finite = self._descend(values)
        stored: dict[int, torch.Tensor] = {}
        for (module, own), value in zip(self._norms, values, strict=True):
            place = parts.stored(module, own)
            assert place is not None
            stored[place.number] = as_stored(value, place.step)
            parts.put(module, own, stored[place.number].to(parts.model.device))
        after, nearer = self._error() if finite else (before, distance)
        line: dict[str, Any] = {
            "layer": name,
            "norms": sorted({parts.name(module) for module, _ in self._norms}),
            "error_before": before,
            "error_after": after,
            "distance_before": distance,
            "distance_after": nearer,
        }
        self.lines.append(line)
        if after < before:
            return stored
        line["left"] = "its error is not lower"
        for (module, own), parameter in zip(self._norms, held, strict=True):
            assert parameter is not None
            parts.restore(module, own, parameter)
        return {}

    def _descend(self, values: list[torch.Tensor]) -> bool:
        """Take a step for every batch; return whether all gradients were finite."""
        parts, block = self._parts, self._parts.block
        depth = block / max(1, len(parts.model.blocks) - 1)
        steps = Steps(values, [_RATE * (1 + depth) * self._gains[module] for module, _ in self._norms])
        for own, other, call in self._streams.each_of(block, self._order()):
            wanted = parts.model.run(self._original, own, call)
            given = []
            for (module, name), value in zip(self._norms, values, strict=True):
                parts.put(module, name, value)
                parameter = parts.twin.get_submodule(module)._parameters[name]
                assert parameter is not None
                given.append(parameter.requires_grad_(True))
            with torch.enable_grad():
                distance = channel_distance(parts.model.run(parts.twin, other, call), wanted)
                gradients = torch.autograd.grad(distance, given, allow_unused=True)
            found = [
                torch.zeros_like(value) if gradient is None else gradient
                for value, gradient in zip(values, gradients, strict=True)
            ]
            if not all(bool(gradient.isfinite().all()) for gradient in found):
                return False
            steps.step(found)
        return True

    def _order(self) -> list[int]:
        drawing = torch.Generator().manual_seed(self._seed + self._parts.block)
        return torch.randperm(len(self._streams.batches), generator=drawing).tolist()

    def _error(self) -> tuple[float, float]:
        """Return the mean squared error of the block's outputs over all of the text, and the mean channel distance."""
        parts, error, distance, count = self._parts, 0.0, 0.0, 0
        for own, other, call in self._streams.each(parts.block):
            wanted = parts.model.run(self._original, own, call)
            found = parts.model.run(parts.twin, other, call)
            error += float((found.float() - wanted.float()).square().sum(dtype=torch.float64))
            distance += float(channel_distance(found, wanted)) * len(own)
            count += len(own)
        outputs = self._streams.original[0].numel() * count
        return error / outputs, distance / count
