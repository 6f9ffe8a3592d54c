"""How are devices dealt out to data, pipeline, tensor and expert ranks? Nodes with fast links inside, slower between.

Replicas come first, then their stages, then the ranks of a stage, which stand side by side: a tensor group is inside a
node, or takes whole nodes. No size has to be a power of two; devices that no group takes are idle.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TypeAlias

from tersor.errors import InputError

_REPLICAS = 64
"""Replicas whose links are looked at: those beyond stand in nodes like them."""


_NODES = (2, 3, 4, 6, 8, 12, 16)
"""Nodes that a tensor group may take."""
Group: TypeAlias = tuple[tuple[int, int], ...]
"""Where a group stands: nodes, and its ranks in each."""


@dataclass(frozen=True)
class Mesh:
    """Devices.

    Attributes:
        nodes: devices of every node; those of a node reach each other over its own links.
    """

    nodes: tuple[int, ...]

    @property
    def devices(self) -> int:
        """All of them."""
        return sum(self.nodes)

    @staticmethod
    def of(devices: int | None, shape: str | None, reach: int) -> Mesh:
        """Return the mesh that a user means.

        Args:
            devices: in all; alone they fill nodes of `reach`.
            shape: `2x8` for two nodes of eight, or devices of every node as `8+4`.
            reach: devices of a node at most.

        Raises:
            InputError: neither is there, a shape is none, or it holds another number of devices.
        """
        if shape is not None:
            match = re.fullmatch(r"(\d+)x(\d+)", shape)
            if match:
                nodes = (int(match[2]),) * int(match[1])
            elif re.fullmatch(r"\d+(\+\d+)*", shape):
                nodes = tuple(map(int, shape.split("+")))
            else:
                raise InputError(f"mesh {shape!r}: write NODESxDEVICES such as 2x8, or devices of nodes such as 8+4")
            if not nodes or min(nodes) < 1:
                raise InputError(f"mesh {shape!r} holds no devices")
            if max(nodes) > reach:
                raise InputError(f"mesh {shape!r}: the links inside a node reach {reach} devices, not {max(nodes)}")
            if devices is not None and sum(nodes) != devices:
                raise InputError(f"mesh {shape!r} holds {sum(nodes)} devices, and --devices says {devices}")
            return Mesh(nodes)
        if devices is None:
            raise InputError("say how many devices there are: --devices 8, or --mesh 2x8")
        if devices < 1:
            raise InputError(f"{devices} devices: at least 1")
        whole, rest = divmod(devices, reach)
        return Mesh((reach,) * whole + ((rest,) if rest else ()))

    def words(self) -> str:
        """Return the mesh as text that `of` reads."""
        alike = len(set(self.nodes)) == 1
        return f"{len(self.nodes)}x{self.nodes[0]}" if alike else "+".join(map(str, self.nodes))

    def groups(self, tensor: int) -> tuple[Group, ...]:
        """Return where tensor groups of so many ranks stand, each as (node, ranks in it); none where none fits."""
        return _groups(self.nodes, tensor)

    def sizes(self, most: int) -> tuple[int, ...]:
        """Return the sizes that a tensor group can have: up to a node's, then some of whole nodes, at most `most`."""
        size, alike = max(self.nodes), len(set(self.nodes)) == 1
        beyond = (size * nodes for nodes in _NODES if alike and size * nodes <= min(most, self.devices))
        return (*range(1, min(most, size) + 1), *beyond)


@lru_cache(maxsize=256)
def _groups(nodes: tuple[int, ...], tensor: int) -> tuple[Group, ...]:
    if tensor <= max(nodes):
        return tuple(((node, tensor),) for node, size in enumerate(nodes) for _ in range(size // tensor))
    found: list[Group] = []
    own: list[tuple[int, int]] = []
    for node, size in enumerate(nodes):
        own.append((node, size))
        if sum(count for _, count in own) == tensor:
            found.append(tuple(own))
            own = []
        elif sum(count for _, count in own) > tensor:
            own = [(node, size)] if size < tensor else []
    return tuple(found)


@lru_cache(maxsize=256)
def _widest(nodes: tuple[int, ...], tensor: int) -> tuple[int, ...]:
    """Return the ranks in each node of the group that is in most nodes."""
    return max((tuple(count for _, count in place) for place in _groups(nodes, tensor)), key=len)


@dataclass(frozen=True)
class Axes:
    """How many ranks there are along each axis.

    Attributes:
        mesh: the devices.
        data: replicas of the model.
        pipeline: stages of a replica.
        tensor: ranks of a stage.
        expert: replicas that have the experts of a layer together; 1 where every replica has them all.
    """

    mesh: Mesh
    data: int
    pipeline: int
    tensor: int
    expert: int = 1

    @property
    def used(self) -> int:
        """Devices with a part of the model."""
        return self.data * self.pipeline * self.tensor

    def words(self) -> str:
        """Return the axes as text, such as `DP2 PP1 TP4`."""
        text = f"DP{self.data} PP{self.pipeline} TP{self.tensor}"
        return text if self.expert == 1 else f"{text} EP{self.expert * self.tensor}"

    @cached_property
    def _places(self) -> tuple[Group, ...]:
        return self.mesh.groups(self.tensor)

    @cached_property
    def tensor_group(self) -> tuple[int, ...]:
        """Ranks of a tensor group in each of its nodes: of the group that is in most."""
        return _widest(self.mesh.nodes, self.tensor)

    @cached_property
    def crossings(self) -> int:
        """Boundaries of stages, of the replica that has most, whose two stages stand in different nodes."""
        return max(
            sum(
                self._places[replica * self.pipeline + stage][-1][0]
                != self._places[replica * self.pipeline + stage + 1][0][0]
                for stage in range(self.pipeline - 1)
            )
            for replica in range(min(self.data, _REPLICAS))
        )

    @cached_property
    def expert_group(self) -> tuple[int, ...]:
        """Ranks that have the experts of a layer together, in each of their nodes: of the group that is in most."""
        if self.expert == 1:
            return self.tensor_group
        found: list[tuple[int, ...]] = []
        for first in range(0, min(self.data - self.expert + 1, _REPLICAS), self.expert):
            counts: dict[int, int] = {}
            for replica in range(first, first + self.expert):
                for node, count in self._places[replica * self.pipeline]:
                    counts[node] = counts.get(node, 0) + count
            found.append(tuple(counts.values()))
        return max(found, key=lambda group: (len(group), max(group)))

    def devices(self, replica: int, stage: int) -> tuple[int, ...]:
        """Return the devices of a stage of a replica, by their number on the mesh."""
        starts = [sum(self.mesh.nodes[:node]) for node in range(len(self.mesh.nodes))]
        index = replica * self.pipeline + stage
        place = self._places[index]
        before: dict[int, int] = {}
        for other in self._places[:index]:
            for node, count in other:
                before[node] = before.get(node, 0) + count
        return tuple(starts[node] + before.get(node, 0) + number for node, count in place for number in range(count))


def factorisations(mesh: Mesh, layers: int, most_tensor: int, experts: int = 0) -> Iterator[Axes]:
    """Yield every way to deal out a mesh: all replicas that fit for each number of stages and tensor ranks.

    Args:
        mesh: the devices.
        layers: of the model; no stage is empty.
        most_tensor: ranks that a stage can be cut for.
        experts: of a layer; 0 where there are none.
    """
    for tensor in mesh.sizes(most_tensor):
        groups = len(mesh.groups(tensor))
        for pipeline in range(1, min(layers, groups) + 1):
            data = groups // pipeline
            yield Axes(mesh, data, pipeline, tensor)
            for expert in range(2, min(data, experts // tensor) + 1 if experts else 0):
                if data % expert == 0:
                    yield Axes(mesh, data, pipeline, tensor, expert)
