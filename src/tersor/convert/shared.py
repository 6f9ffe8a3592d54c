"""Which weights share levels? Those of the experts of a layer, where they read or where they write.

An output feature has one level in every expert, gate and up of a channel the same: so kernels multiply the rows of a
level of all experts as one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tersor.checkpoint.modules import LinearLayer
from tersor.compress.allocation import Chosen, Floats, Fused


@dataclass(frozen=True, slots=True)
class Shared:
    """Weights of a layer's experts that read the same: gate and up of all of them, or down.

    Attributes:
        modules: those that a checkpoint stores: a weight each, or one that holds all.
        count: how many experts there are.
        ic: input channels.
        channels: what has a level of its own: rows, or channels of gate and up.
        parts: rows of a channel in an expert: gate and up, or one.
        rows: where both stand in one weight: `plain` where there is one of them, `halves`, or `pairs`.
    """

    modules: tuple[str, ...]
    count: int
    ic: int
    channels: int
    parts: int = 1
    rows: str = "plain"

    def fused(self, name: str, losses: Floats) -> Fused:
        """Return what the allocation has to know.

        Args:
            name: of these weights.
            losses: summed over experts, [levels, parts * channels], those of the gate first.
        """
        split = np.split(losses, self.parts, axis=1)
        stored = self.count if len(self.modules) > 1 else 1
        parts = {part_name(name, part): own for part, own in enumerate(split)}
        owner, _, own = name.rpartition(".")
        return Fused(parts, self.ic, self.parts > 1, self.count, stored, owner, own == "down_proj")

    def spread(self, name: str, chosen: Mapping[str, Chosen]) -> dict[str, Chosen]:
        """Return module -> the level of each of its output features, of what was chosen for `fused`."""
        level: NDArray[np.uint8] = chosen[part_name(name, 0)]
        if len(self.modules) == 1 and self.rows == "halves":
            level = np.concatenate([level, level])
        elif len(self.modules) == 1 and self.rows == "pairs":
            level = np.repeat(level, 2)
        return dict.fromkeys(self.modules, level)


def part_name(name: str, part: int) -> str:
    """Return what a part of shared weights is called in an allocation."""
    return f"{name}[{part}]"


def shared_weights(layers: Iterable[LinearLayer]) -> dict[str, Shared]:
    """Return the shared weights among layers, by the model's parameter that holds them."""
    members: dict[str, list[LinearLayer]] = {}
    for layer in layers:
        if layer.experts:
            members.setdefault(layer.experts, []).append(layer)
    return {name: _shared(name, own) for name, own in members.items()}


def _shared(name: str, layers: list[LinearLayer]) -> Shared:
    first = layers[0]
    modules = tuple(layer.module for layer in layers)
    if first.stacked:
        count, oc, ic = first.shape
        parts = 1 if first.rows == "plain" else 2
        return Shared(modules, count, ic, oc // parts, parts, first.rows)
    owner = name.rpartition(".")[0]
    count = len({module.removeprefix(f"{owner}.").partition(".")[0] for module in modules})
    oc, ic = first.shape
    return Shared(modules, count, ic, oc, len(modules) // count)
