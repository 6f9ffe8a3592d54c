"""Which parts does a dimension consist of, so that all operators that touch a value agree?

Operators begin with the names that their rules give; a view that takes a dimension of 768 for 12 x 64 splits it there.
Splitting goes on until every value has the same parts at its maker and at all its readers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tersor.planner.graph.ir import Call, Names, Parts


@dataclass(frozen=True, slots=True)
class Signature:
    """What a rule says of a call; the fields are those of `ir.Operator`.

    Attributes:
        dims: names of each operand's dimensions; a dimension that may not be cut has a name that is not in `cuts`.
        sizes: size of each name; a name of size 1 stands nowhere.
        unsplit: names that may be cut only while they are one part, since indices count along them.
    """

    kind: str
    dims: tuple[Names, ...]
    sizes: Mapping[str, int]
    cuts: tuple[str, ...] = ()
    sums: frozenset[str] = frozenset()
    addends: tuple[int, ...] = ()
    linear: tuple[tuple[int, ...], ...] = ()
    saves: tuple[int, ...] = ()
    flops: float = 0.0
    unsplit: frozenset[str] = frozenset()
    note: str = ""


@dataclass(slots=True)
class Named:
    """An operator on its way to names that fit: operand values, what its rule says, and how its names were split."""

    call: Call
    operands: tuple[str, ...]
    signature: Signature
    split: dict[str, tuple[int, ...]]
    broken: set[str]

    @classmethod
    def begin(cls, call: Call, operands: tuple[str, ...], signature: Signature) -> Named:
        """Return it with every name one part."""
        return cls(call, operands, signature, {name: (size,) for name, size in signature.sizes.items()}, set())

    def sizes(self, names: Sequence[str]) -> tuple[int, ...]:
        """Return the sizes of the parts of these names."""
        return tuple(size for name in names for size in self.split[name])

    def part_names(self, name: str) -> tuple[str, ...]:
        """Return the names of the parts of a name: itself where there is one."""
        parts = self.split[name]
        return (name,) if len(parts) == 1 else tuple(f"{name}.{index}" for index in range(len(parts)))

    def final(self) -> tuple[tuple[Names, ...], dict[str, int], tuple[str, ...], frozenset[str]]:
        """Return dims, sizes, cuts and sums with all names split."""
        rule = self.signature
        dims = tuple(
            tuple(tuple(part for name in names for part in self.part_names(name)) for names in operand)
            for operand in rule.dims
        )
        sizes = {
            part: size
            for name in rule.sizes
            for part, size in zip(self.part_names(name), self.split[name], strict=True)
        }
        lost = self.broken | {name for name in rule.unsplit if len(self.split[name]) > 1}
        cuts = tuple(part for name in rule.cuts if name not in lost for part in self.part_names(name))
        sums = frozenset(part for name in rule.sums for part in self.part_names(name)) & set(cuts)
        return dims, sizes, cuts, sums


def common(first: Sequence[int], second: Sequence[int]) -> tuple[int, ...] | None:
    """Return the coarsest factors that split both, or `None`: 4 x 3 and 2 x 6 have 2 x 2 x 3, 3 x 4 and 2 x 6 none.

    Both have one product; factors are major first.
    """
    ends = sorted({*_ends(first), *_ends(second)})
    factors = [large // small for small, large in zip([1, *ends], ends, strict=False)]
    if any(large % small for small, large in zip([1, *ends], ends, strict=False)):
        return None
    return tuple(reversed(factors))


def _ends(factors: Sequence[int]) -> list[int]:
    return [math.prod(factors[place:]) for place in range(len(factors))]


def settle(operators: Sequence[Named], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Parts]:
    """Split names and values until they agree; return the parts of every value.

    Where two ways to split a dimension have nothing in common, the operator that came second may not be cut there.
    """
    parts: dict[str, list[tuple[int, ...]]] = {
        name: [(size,) if size > 1 else () for size in shape] for name, shape in shapes.items()
    }
    readers: dict[str, list[int]] = {name: [] for name in shapes}
    for place, operator in enumerate(operators):
        for name in set(operator.operands):
            readers[name].append(place)
    waiting = list(range(len(operators)))
    queued = set(waiting)
    while waiting:
        place = waiting.pop(0)
        queued.discard(place)
        for name in _agree(operators[place], parts):
            for reader in readers[name]:
                if reader not in queued:
                    queued.add(reader)
                    waiting.append(reader)
    for operator in operators:
        _forbid(operator, parts)
    return {name: tuple(dims) for name, dims in parts.items()}


def _forbid(operator: Named, parts: Mapping[str, list[tuple[int, ...]]]) -> None:
    """Forbid cuts of all names that stand in a dimension whose parts are others than the value's."""
    again = True
    while again:
        again = False
        for value, names in zip(operator.operands, operator.signature.dims, strict=True):
            for dim, of_dim in enumerate(names):
                lost = bool(operator.broken.intersection(of_dim)) or operator.sizes(of_dim) != parts[value][dim]
                if lost and not operator.broken.issuperset(of_dim):
                    operator.broken.update(of_dim)
                    again = True


def _agree(operator: Named, parts: dict[str, list[tuple[int, ...]]]) -> set[str]:
    """Split an operator's names and its values to common parts; return the values that changed."""
    changed: set[str] = set()
    again = True
    while again:
        again = False
        for value, names in zip(operator.operands, operator.signature.dims, strict=True):
            for dim, of_dim in enumerate(names):
                mine, theirs = operator.sizes(of_dim), parts[value][dim]
                if mine == theirs or not of_dim or operator.broken.intersection(of_dim):
                    continue
                both = common(mine, theirs)
                if both is None:
                    operator.broken.update(of_dim)
                    continue
                if both != theirs:
                    parts[value][dim] = both
                    changed.add(value)
                if both != mine:
                    again = True
                    _split(operator, of_dim, both)
    return changed


def _split(operator: Named, names: Sequence[str], sizes: Sequence[int]) -> None:
    """Give the names of one dimension the parts `sizes`."""
    rest = list(sizes)
    for name in names:
        size, taken = operator.signature.sizes[name], 1
        mine: list[int] = []
        while taken < size:
            mine.append(rest.pop(0))
            taken *= mine[-1]
        operator.split[name] = tuple(mine)
