"""A module that holds one rank's part of another, and computes with the other ranks what the whole one computes.

It runs the operators of the traced graph on this rank's slices as a plan places them (`planner.graph`): forward, and
backward through the moves between placements, so that an ordinary optimiser trains what the rank holds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from tersor.errors import InputError
from tersor.ops.placed import Line, Mover, moved
from tersor.planner.graph.cuts import gradient_place
from tersor.planner.graph.ir import WHOLE, Operator
from tersor.planner.graph.local import run
from tersor.planner.graph.moves import Moves, Places
from tersor.planner.graph.options import Option
from tersor.planner.graph.problem import Space
from tersor.planner.problem import Choice


class Spread(nn.Module):
    """A rank's part of a module.

    Calls take the whole inputs, of the sizes that the module was traced with, on every rank, and return the whole
    outputs. Weights that are gathered for the forward pass are kept for the backward pass.
    """

    def __init__(self, module: nn.Module, space: Space, choice: Choice, mesh: DeviceMesh) -> None:
        """Take this rank's slices of a module's parameters.

        Args:
            module: what `space` was traced from.
            space: its graph on a mesh.
            choice: an option for each block.
            mesh: the devices, with the axes of `space` in order.

        Raises:
            InputError: the mesh has other axes than the plan.
        """
        super().__init__()
        planned = tuple(axis.ranks for axis in space.mesh)
        if tuple(mesh.shape) != planned:
            raise InputError(f"the plan is for a mesh of {list(planned)} ranks, and this one has {list(mesh.shape)}")
        lines = [Line(mesh.get_group(axis), mesh.get_local_rank(axis), ranks) for axis, ranks in enumerate(planned)]
        self._mover = Mover(lines, Moves(space.mesh))
        self._graph = space.graph
        self._forward = [one for one in space.graph.operators if one.kind not in ("gradient", "update")]
        self._last = {name: place for place, one in enumerate(self._forward) for name in one.inputs}
        chosen = space.chosen(choice)
        self._homes: dict[str, Option] = {name: option for option in chosen.values() for name in option.ways}
        self._places = {name: option for option in chosen.values() for name in option.stored}
        self._everywhere: Places = (WHOLE,) * len(lines)
        own = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
        self._names: dict[str, str] = {}
        for value in space.graph.values.values():
            if value.role == "parameter":
                places = self._kept(value.name)
                mine = self._mover.slice(own[value.path].detach(), places, value.parts).clone()
                self._names[value.name] = value.path.replace(".", "/")
                self.register_parameter(self._names[value.name], nn.Parameter(mine, own[value.path].requires_grad))
            elif value.role in ("buffer", "constant"):
                tensor = space.graph.constants.get(value.name, own.get(value.path))
                assert tensor is not None, value.name
                self._names[value.name] = f"{value.role}/{value.name}"
                self.register_buffer(self._names[value.name], tensor.detach().clone(), persistent=False)

    def _kept(self, name: str) -> Places:
        """Return where a parameter is between steps; one that no operator reads is whole."""
        return self._places[name].updated[name] if name in self._places else self._everywhere

    def whole_parameters(self) -> dict[str, torch.Tensor]:
        """Return the parameters of the whole module by their names in it, gathered on every rank."""
        found = {}
        for value in self._graph.parameters:
            mine = self.get_parameter(self._names[value.name]).detach()
            found[value.path] = self._mover.move(mine, self._kept(value.name), self._everywhere, value.parts)
        return found

    def whole_gradients(self) -> dict[str, torch.Tensor]:
        """Return the gradients of the whole module by their names in it, gathered on every rank."""
        found = {}
        for value in self._graph.parameters:
            mine = self.get_parameter(self._names[value.name]).grad
            if mine is not None:
                found[value.path] = self._mover.move(mine, self._kept(value.name), self._everywhere, value.parts)
        return found

    @property
    def device(self) -> torch.device:
        """Where the rank's tensors are."""
        tensors = (*self.parameters(), *self.buffers())
        return tensors[0].device if tensors else torch.device("cpu")

    def gradient(self, name: str) -> torch.Tensor | None:
        """Return the whole gradient of a parameter by its name in the graph, or none where there is none here."""
        mine = self.get_parameter(self._names[name]).grad if name in self._names else None
        parts = self._graph.values[name].parts if mine is not None else ()
        return None if mine is None else self._mover.move(mine, self._kept(name), self._everywhere, parts)

    def put_gradient(self, name: str, whole: torch.Tensor) -> None:
        """Take this rank's part of a whole gradient; parameters that are not here take none."""
        if name in self._names:
            mine = self._mover.slice(whole, self._kept(name), self._graph.values[name].parts)
            self.get_parameter(self._names[name]).grad = mine.clone()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the whole outputs: one tensor where there is one, else a tuple.

        Raises:
            InputError: other tensors than those that the module was traced with.
        """
        known = _Known(self)
        given = tensors_in([args, kwargs])
        wanted = [self._graph.values[name] for name in self._graph.inputs]
        if [tuple(one.shape) for one in given] != [one.shape for one in wanted]:
            raise InputError(
                f"the plan is for inputs of {[list(one.shape) for one in wanted]}, not {[list(x.shape) for x in given]}"
            )
        for value, tensor in zip(wanted, given, strict=True):
            known.put(value.name, tensor, self._everywhere)
        for place, operator in enumerate(self._forward):
            known.run(operator)
            known.forget([name for name in operator.operands if self._last.get(name, place) <= place])
        outputs = [known.at(name, self._everywhere, self._everywhere) for name in self._graph.outputs]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


class _Known:
    """The values of one call that are needed yet: where they are, and copies at other placements."""

    def __init__(self, spread: Spread) -> None:
        self._of = spread
        self._values: dict[str, tuple[torch.Tensor, Places]] = {}
        self._copies: dict[tuple[str, Places, Places], torch.Tensor] = {}
        self._kept = set(spread._graph.outputs)

    def put(self, name: str, tensor: torch.Tensor, places: Places) -> None:
        """Take a value that is at these placements."""
        self._values[name] = (tensor, places)

    def forget(self, names: list[str]) -> None:
        """Let go of values that no operator reads any more."""
        gone = set(names) - self._kept
        for name in gone:
            self._values.pop(name, None)
        for key in [key for key in self._copies if key[0] in gone]:
            del self._copies[key]

    def at(self, name: str, places: Places, gradient: Places) -> torch.Tensor:
        """Return a value at these placements, for a reader whose gradient of it is at those."""
        key = (name, places, gradient)
        if key not in self._copies:
            self._copies[key] = self._copy(name, places, gradient)
        return self._copies[key]

    def _copy(self, name: str, places: Places, gradient: Places) -> torch.Tensor:
        spread, value = self._of, self._of._graph.values[name]
        mover = spread._mover
        if value.role == "parameter":
            tensor: torch.Tensor = spread.get_parameter(spread._names[name])
            made = spread._kept(name)
            stored = spread._places[name].stored[name] if name in spread._places else made
            there = mover.move(mover.move(tensor.detach(), made, stored, value.parts), stored, places, value.parts)
        else:
            if name not in self._values:
                self.put(name, spread.get_buffer(spread._names[name]), spread._everywhere)
            tensor, made = self._values[name]
            there = mover.move(tensor.detach(), made, places, value.parts) if made != places else tensor
        back = tuple(place if place.kind == "cut" else WHOLE for place in made)
        if there is tensor and gradient == back:
            return tensor
        return moved(mover, tensor, there, value.parts, (gradient, back))

    def run(self, operator: Operator) -> None:
        """Run an operator on this rank's slices."""
        spread = self._of
        option = spread._homes.get(operator.name)
        if option is None:
            everywhere = spread._everywhere
            outputs = run(operator, [self.at(name, everywhere, everywhere) for name in operator.inputs])
            for name, tensor in zip(operator.outputs, outputs, strict=True):
                self.put(name, tensor, everywhere)
            return
        ways, count = option.ways[operator.name], len(operator.inputs)
        inputs = []
        for operand, name in enumerate(operator.inputs):
            gradient = tuple(gradient_place(way, operand, count) for way in ways)
            inputs.append(self.at(name, tuple(way.places[operand] for way in ways), gradient))
        divided: dict[str, int] = {}
        place: dict[str, int] = {}
        for line, way in zip(spread._mover.lines, ways, strict=True):
            if way.cuts:
                divided[way.name] = divided.get(way.name, 1) * line.ranks
                place[way.name] = place.get(way.name, 0) * line.ranks + line.rank
        outputs = run(operator, inputs, divided, place)
        for index, (name, tensor) in enumerate(zip(operator.outputs, outputs, strict=True)):
            self.put(name, tensor, tuple(way.places[count + index] for way in ways))


def tensors_in(items: Any) -> list[torch.Tensor]:
    """Return the tensors among nested arguments, in order."""
    if isinstance(items, torch.Tensor):
        return [items]
    if isinstance(items, dict):
        items = list(items.values())
    return [tensor for item in items for tensor in tensors_in(item)] if isinstance(items, (list, tuple)) else []
