"""The graph that the planner cuts: one node an operator, every dimension of an operand a product of named parts.

A dimension of 12 heads of 64 is the names ("heads", "width"), major first, whatever views it went through; a linear
whose output is viewed that way later has two names for it, too. Names belong to one operator; what two operators share
is the value between them, whose dimensions consist of the same parts on both sides (`names.settle`). So a cut of a
value is a dimension and a part of it, and a cut of a part that is not the first is a strided (block-cyclic) one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch

Names: TypeAlias = tuple[tuple[str, ...], ...]
"""The names of each dimension of an operand, major first."""
Parts: TypeAlias = tuple[tuple[int, ...], ...]
"""The sizes of the parts of each dimension of a value, major first; a dimension of size 1 has none."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the ranks of one mesh axis have a value.

    Attributes:
        kind: "whole": every rank has all of it; "cut": a part of it; "sum": an addend as large as the whole (pending).
        dim: dimension that is cut.
        part: which part of that dimension.
    """

    kind: Literal["whole", "cut", "sum"]
    dim: int = 0
    part: int = 0

    def __str__(self) -> str:
        """Return "whole", "sum", or "cut 1.0" of dimension 1, part 0."""
        return f"cut {self.dim}.{self.part}" if self.kind == "cut" else self.kind


WHOLE = Placement("whole")
SUM = Placement("sum")


def cut(dim: int, part: int = 0) -> Placement:
    """Return the placement that cuts a part of a dimension."""
    return Placement("cut", dim, part)


@dataclass(frozen=True, slots=True)
class Slot:
    """Stands in an operator's arguments for its input of this index."""

    index: int


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """What an operator calls, with the sizes that its rule reads.

    Attributes:
        target: the operator of torch.
        args: its arguments, inputs as `Slot`.
        kwargs: likewise.
        inputs: shape of each input.
        outputs: shape of each output.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]

    @property
    def name(self) -> str:
        """What torch calls it, such as "aten.linear.default"."""
        return str(self.target)

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        """Return an argument by place or name."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)


@dataclass(frozen=True, slots=True, eq=False)
class Operator:
    """One operator.

    Attributes:
        name: unique in the graph.
        kind: what its rule calls it: "matmul", "pointwise", "view", "gradient", ...
        inputs: names of the values that it reads.
        outputs: names of the values that it makes.
        dims: names of the dimensions of each operand, inputs first.
        sizes: size of each name.
        cuts: names along which it may be cut; each rank computes with its slices of all operands that have the name.
        sums: those of `cuts` that are contracted: a rank computes an addend of the outputs.
        addends: inputs that are added once (a bias): in a contraction that lacks their names, one rank has them.
        linear: sets of inputs that may be pending sums together, the others being whole; the outputs then are, too.
        saves: what its gradient reads beside the gradients of the outputs: indices of operands.
        flops: floating point operations of the whole.
        call: how to run it; `None` where it is derived from another operator.
        path: the module that it belongs to, such as "layers.0.mlp".
        forward: of a gradient, the operator that it belongs to.
        of: of a gradient, for each operand which operand of that operator it is ("value"), or is the gradient of.
        note: why it cannot be cut, where there is no rule for it.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dims: tuple[Names, ...]
    sizes: Mapping[str, int]
    cuts: tuple[str, ...] = ()
    sums: frozenset[str] = frozenset()
    addends: tuple[int, ...] = ()
    linear: tuple[tuple[int, ...], ...] = ()
    saves: tuple[int, ...] = ()
    flops: float = 0.0
    call: Call | None = None
    path: str = ""
    forward: str = ""
    of: tuple[tuple[str, int], ...] = ()
    note: str = ""

    @property
    def operands(self) -> tuple[str, ...]:
        """Names of the values that it reads, then of those that it makes."""
        return self.inputs + self.outputs


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor.

    Attributes:
        name: unique in the graph.
        shape: its sizes.
        dtype: its dtype.
        role: "parameter", "buffer", "constant", "input", "activation" or "gradient".
        parts: what its dimensions consist of.
        path: of a parameter or buffer, its name in the module.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    role: str = "activation"
    parts: Parts = ()
    path: str = ""

    @property
    def bytes(self) -> int:
        """Bytes of the whole."""
        return math.prod(self.shape) * self.dtype.itemsize

    def blocks(self, place: Placement) -> int:
        """Return how many runs a cut leaves a rank: 1 where its slice is contiguous along the dimension."""
        return math.prod(self.parts[place.dim][: place.part])


@dataclass(frozen=True, eq=False)
class Graph:
    """A module's operators, in an order in which they can run.

    Attributes:
        operators: one a node.
        values: every tensor, by name.
        inputs: what the caller gives.
        outputs: what the caller gets.
        constants: tensors that the module carries beside parameters and buffers, by value's name.
    """

    operators: tuple[Operator, ...]
    values: Mapping[str, Value]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @cached_property
    def by_name(self) -> dict[str, Operator]:
        """The operators by name."""
        return {operator.name: operator for operator in self.operators}

    @cached_property
    def makers(self) -> dict[str, Operator]:
        """Which operator makes a value."""
        return {name: operator for operator in self.operators for name in operator.outputs}

    @cached_property
    def users(self) -> dict[str, list[Operator]]:
        """Which operators read a value, in order, each once."""
        found: dict[str, list[Operator]] = {name: [] for name in self.values}
        for operator in self.operators:
            for name in dict.fromkeys(operator.inputs):
                found[name].append(operator)
        return found

    @property
    def parameters(self) -> tuple[Value, ...]:
        """The parameters, in the module's order."""
        return tuple(value for value in self.values.values() if value.role == "parameter")

    @property
    def notes(self) -> tuple[str, ...]:
        """A line for every operator without a rule: it is replicated."""
        return tuple(
            f"{operator.name}: {operator.note}" + (f" (in {operator.path})" if operator.path else "")
            for operator in self.operators
            if operator.note
        )

    @cached_property
    def aside(self) -> frozenset[str]:
        """Values that depend on no parameter and no floating-point input: positions, masks, indices of the caller.

        Every rank computes them whole, so that any placement of them is there for nothing.
        """
        names = {
            value.name
            for value in self.values.values()
            if value.role in ("constant", "buffer") or (value.role == "input" and not value.dtype.is_floating_point)
        }
        for operator in self.operators:
            if all(name in names for name in operator.inputs):
                names.update(operator.outputs)
        return frozenset(names)
