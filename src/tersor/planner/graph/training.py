"""The backward pass of a graph: a gradient operator for each operator that a parameter reaches, and an update for each.

A gradient has the names of its operator, so it is cut along the same (`cuts.gradient_way` says what is then a slice and
what a pending sum), and it costs time and memory of its own. Gradients that meet at a value are read together by the
operator that made it, which adds them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tersor.errors import InputError
from tersor.planner.graph.ir import Graph, Operator, Value

GRADIENT = "gradient of "
"""What the name of a gradient begins with."""


@dataclass(frozen=True, slots=True)
class Optimiser:
    """What an optimiser keeps and reads for each number of a parameter.

    Attributes:
        name: what it is called.
        bytes: of state, a number of a parameter: two moments in float32 are 8.
        master: bytes of a copy in float32 of a parameter with fewer bits.
    """

    name: str
    bytes: float
    master: float = 0.0

    def state(self, parameter: Value) -> float:
        """Return the bytes of state of a whole parameter."""
        per_number = self.bytes + (self.master if parameter.dtype.itemsize < 4 else 0.0)
        return math.prod(parameter.shape) * per_number


ADAM = Optimiser("adam", bytes=8.0, master=4.0)
SGD = Optimiser("sgd", bytes=0.0)


def training(graph: Graph, *, through: Sequence[str] = ()) -> Graph:
    """Return the graph with its backward pass and an update of every parameter.

    Gradients of the outputs are given, as 1 is for a loss. Parameters that no output depends on have neither. Inputs in
    `through` have gradients, too: an earlier stage made them.

    Raises:
        InputError: no parameter reaches an output, so there is nothing to train.
    """
    needed = reached(graph, through)
    values = dict(graph.values)
    contributions: dict[str, list[str]] = {}
    for name in graph.outputs:
        if name in needed:
            values[GRADIENT + name] = _gradient(graph.values[name], GRADIENT + name)
            contributions[name] = [GRADIENT + name]
    if not contributions:
        raise InputError("no parameter reaches a floating-point output: there is nothing to train")
    gradients: list[Operator] = []
    for operator in reversed(graph.operators):
        wanted = [place for place, name in enumerate(operator.inputs) if name in needed]
        made = [place for place, name in enumerate(operator.outputs) if name in contributions]
        if not wanted or not made:
            continue
        gradient = gradient_of(operator, wanted, {place: contributions[operator.outputs[place]] for place in made})
        for place, name in zip(wanted, gradient.outputs, strict=True):
            values[name] = _gradient(graph.values[operator.inputs[place]], name)
            contributions.setdefault(operator.inputs[place], []).append(name)
        gradients.append(gradient)
    updates = tuple(
        _update(parameter, contributions[parameter.name])
        for parameter in graph.parameters
        if parameter.name in contributions
    )
    operators = (*graph.operators, *gradients, *updates)
    return Graph(operators, values, graph.inputs, graph.outputs, graph.constants)


def gradient_of(operator: Operator, wanted: list[int], given: dict[int, list[str]]) -> Operator:
    """Return the operator that makes the gradients of some inputs.

    Args:
        operator: whose.
        wanted: which of its inputs.
        given: the gradients of its outputs, by output; several are added.
    """
    count = len(operator.inputs)
    reads: list[tuple[str, int, str]] = [
        ("gradient", count + place, name) for place, names in given.items() for name in names
    ]
    reads += [("value", operand, operator.operands[operand]) for operand in operator.saves]
    makes = [("gradient", place, f"{GRADIENT}{operator.inputs[place]} by {operator.name}.{place}") for place in wanted]
    both = [*reads, *makes]
    return Operator(
        name=GRADIENT + operator.name,
        kind="gradient",
        inputs=tuple(name for _, _, name in reads),
        outputs=tuple(name for _, _, name in makes),
        dims=tuple(operator.dims[operand] for _, operand, _ in both),
        sizes=operator.sizes,
        cuts=operator.cuts,
        flops=operator.flops * _times(operator, wanted),
        path=operator.path,
        forward=operator.name,
        of=tuple((what, operand) for what, operand, _ in both),
        note="",
    )


def _times(operator: Operator, wanted: list[int]) -> float:
    """Return what gradients compute, in what the operator does.

    A product has as large a product for each of its factors, attention five products for its two.
    """
    if operator.kind in ("matmul", "convolution"):
        return float(max(1, sum(place not in operator.addends for place in wanted)))
    return 2.5 if operator.kind == "attention" else 1.0


def reached(graph: Graph, through: Sequence[str]) -> set[str]:
    """Return floating-point values that depend on a parameter, or on inputs that do."""
    found = {parameter.name for parameter in graph.parameters if parameter.dtype.is_floating_point}
    found.update(name for name in through if graph.values[name].dtype.is_floating_point)
    for operator in graph.operators:
        if found.intersection(operator.inputs):
            found.update(name for name in operator.outputs if graph.values[name].dtype.is_floating_point)
    return found


def _gradient(of: Value, name: str) -> Value:
    return Value(name, of.shape, of.dtype, "gradient", of.parts)


def _update(parameter: Value, gradients: list[str]) -> Operator:
    """Return the step of the optimiser for one parameter: every number by itself, so it is cut as one likes."""
    names = tuple(tuple(f"dim{dim}.{part}" for part in range(len(parts))) for dim, parts in enumerate(parameter.parts))
    sizes = {f"dim{dim}.{part}": size for dim, parts in enumerate(parameter.parts) for part, size in enumerate(parts)}
    return Operator(
        name=f"update of {parameter.name}",
        kind="update",
        inputs=(parameter.name, *gradients),
        outputs=(),
        dims=(names,) * (1 + len(gradients)),
        sizes=sizes,
        cuts=tuple(sizes),
        flops=10.0 * math.prod(parameter.shape),
        path=parameter.path,
    )
