"""The rule of an operator: which names its dimensions have, and along which of them it can be cut.

A rule is a function of a `Call`; `rule` enters it for operators of torch by name. Operators that torch marks as
pointwise share one rule; an operator that has none is replicated, and its note says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from tersor.planner.graph.ir import Call, Names
from tersor.planner.graph.names import Signature

Rule = Callable[[Call], Signature]
RULES: dict[str, Rule] = {}
"""Name of an operator, without its overload -> its rule."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Enter a rule for operators, such as "aten.linear"."""

    def enter(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return enter


def signature_of(call: Call) -> Signature:
    """Return what the call's rule says; without a rule, that nothing of it may be cut."""
    found = RULES.get(base_name(call))
    if found is not None:
        return found(call)
    if torch.Tag.pointwise in getattr(call.target, "tags", ()):
        return pointwise(call)
    return whole(call, note=f"no rule for {call.name}, so that every rank computes all of it")


def base_name(call: Call) -> str:
    """Return the operator's name without its overload."""
    return call.name.rsplit(".", 1)[0] if call.name.count(".") > 1 else call.name


class Namer:
    """Collects the names of a call's operands; a dimension that is not named may not be cut.

    `put(name, operand, dim)` names a dimension; several names of one dimension are put major first.
    """

    def __init__(self, call: Call) -> None:
        """Begin with no names."""
        self.shapes = (*call.inputs, *call.outputs)
        self.first = len(call.inputs)
        self.dims: list[list[list[str]]] = [[[] for _ in shape] for shape in self.shapes]
        self.sizes: dict[str, int] = {}

    def put(self, name: str, operand: int, dim: int, size: int | None = None) -> None:
        """Give a dimension a name, or a part of it of this size; size 1 is left out."""
        dim %= max(1, len(self.shapes[operand]))
        size = self.shapes[operand][dim] if size is None else size
        if size > 1:
            assert self.sizes.setdefault(name, size) == size, f"{name} is {self.sizes[name]} and {size}"
            self.dims[operand][dim].append(name)

    def names(self) -> tuple[tuple[Names, ...], dict[str, int], tuple[str, ...]]:
        """Return names of all operands, sizes, and the names that were put."""
        cuts = tuple(self.sizes)
        for operand, shape in enumerate(self.shapes):
            for dim, size in enumerate(shape):
                if size > 1 and not self.dims[operand][dim]:
                    name = f"whole{operand}_{dim}"
                    self.sizes[name] = size
                    self.dims[operand][dim].append(name)
        return tuple(tuple(tuple(names) for names in operand) for operand in self.dims), self.sizes, cuts

    def signature(
        self,
        kind: str,
        *,
        keep: Iterable[str] = (),
        sums: Iterable[str] = (),
        addends: tuple[int, ...] = (),
        linear: tuple[tuple[int, ...], ...] = (),
        saves: Sequence[int] | None = None,
        flops: float | None = None,
        unsplit: Iterable[str] = (),
        note: str = "",
    ) -> Signature:
        """Return the signature; names in `keep` may not be cut, inputs are saved where `saves` does not say."""
        dims, sizes, cuts = self.names()
        out = math.prod(self.shapes[self.first]) if len(self.shapes) > self.first else 0
        return Signature(
            kind=kind,
            dims=dims,
            sizes=sizes,
            cuts=tuple(name for name in cuts if name not in set(keep)),
            sums=frozenset(name for name in sums if name in sizes),
            addends=addends,
            linear=linear,
            saves=tuple(range(self.first)) if saves is None else tuple(saves),
            flops=float(out) if flops is None else flops,
            unsplit=frozenset(unsplit),
            note=note,
        )


def whole(call: Call, note: str = "", kind: str = "other") -> Signature:
    """The signature of an operator that is never cut."""
    return Namer(call).signature(kind, note=note)


def aligned(namer: Namer, operands: Iterable[int], *, prefix: str = "dim") -> None:
    """Give operands one name a dimension, counted from the last; a size of 1 broadcasts and has none."""
    rank = max(len(shape) for shape in namer.shapes)
    for operand in operands:
        shape = namer.shapes[operand]
        for dim in range(len(shape)):
            namer.put(f"{prefix}{rank - len(shape) + dim}", operand, dim)


ADDITIVE = {"aten.add", "aten.sub", "aten.neg", "aten.clone", "aten.alias", "aten.detach", "aten.lift_fresh_copy"}
"""Linear in all inputs that are tensors together."""
SCALED = {"aten.mul": (0, 1), "aten.div": (0,)}
"""Linear in one of these inputs while the others are whole."""
OF_OUTPUT = {"aten.tanh", "aten.sigmoid", "aten.exp", "aten.relu", "aten.rsqrt", "aten.sqrt", "aten.reciprocal"}
"""Their gradient reads the output and not the inputs."""


def pointwise(call: Call) -> Signature:
    """Every element of the outputs is made of the same element of the inputs."""
    namer, name = Namer(call), base_name(call)
    count = len(call.inputs)
    aligned(namer, range(len(namer.shapes)))
    linear: tuple[tuple[int, ...], ...] = ()
    saves: Sequence[int] | None = None
    scalars = [item for item in call.args[:2] if isinstance(item, (int, float)) and not isinstance(item, bool)]
    if name in ADDITIVE and not scalars:
        linear, saves = (tuple(range(count)),), ()
    elif name in ADDITIVE:
        saves = ()
    elif name in SCALED and call.argument(2, "rounding_mode") is None:
        linear = tuple((place,) for place in SCALED[name] if place < count)
        saves = () if count == 1 else None
    elif name == "aten.where" and count == 3:
        linear, saves = ((1, 2),), (0,)
    elif name in ("aten._to_copy", "aten.copy"):
        linear, saves = ((count - 1,),), ()
    elif name in OF_OUTPUT:
        saves = (count,)
    kind = "view" if name in ("aten.alias", "aten.detach") else "pointwise"
    return namer.signature(kind, linear=linear, saves=saves)


for _name in (
    "aten._to_copy",
    "aten.copy",
    "aten.clone",
    "aten.alias",
    "aten.detach",
    "aten.lift_fresh_copy",
    "aten.full_like",
):
    RULES[_name] = pointwise
for _name in ("aten.zeros_like", "aten.ones_like", "aten.empty_like", "aten.native_dropout", "aten.dropout"):
    RULES[_name] = pointwise


@rule("aten.arange", "aten.full", "aten.zeros", "aten.ones", "aten.empty", "aten.scalar_tensor", "aten.empty_permuted")
def creation(call: Call) -> Signature:
    """Made of nothing: every rank makes all of it."""
    return whole(call, kind="creation")


def shared(namer: Namer, operands: Iterable[int], dims: Iterable[int], names: Mapping[int, str] | None = None) -> None:
    """Give the same dimension of several operands one name, where their sizes are the same."""
    operands = tuple(operands)
    for dim in dims:
        if len({namer.shapes[operand][dim] for operand in operands}) == 1:
            for operand in operands:
                namer.put((names or {}).get(dim, f"dim{dim}"), operand, dim)
