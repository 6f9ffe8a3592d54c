"""Tables of tensors, with the layers that are alike in one line."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

_Row = TypeVar("_Row")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def collapse(rows: Iterable[tuple[str, Hashable, _Row]]) -> list[tuple[str, list[_Row]]]:
    """Join rows that differ only in the numbers in their names.

    Args:
        rows: name, what else has to be equal, and the row itself.

    Returns:
        Names with ranges, such as `layers.0-31.mlp.up_proj.weight`, and the rows they stand for.
    """
    groups: dict[tuple[str, Hashable], list[tuple[tuple[int, ...], _Row]]] = {}
    for name, key, row in rows:
        numbers = tuple(int(number) for number in _NUMBER.findall(name))
        groups.setdefault((_NUMBER.sub("{}", name), key), []).append((numbers, row))
    result = []
    for (template, _), members in groups.items():
        axes = [sorted(set(axis)) for axis in zip(*(numbers for numbers, _ in members), strict=True)]
        whole = 1
        for axis in axes:
            whole *= len(axis)
        if whole == len(members):
            result.append((template.format(*(_ranges(axis) for axis in axes)), [row for _, row in members]))
        else:
            result += [(template.format(*numbers), [row]) for numbers, row in members]
    return result


def _ranges(numbers: Sequence[int]) -> str:
    """Write sorted numbers as `0-3,7`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def shape_words(shape: Sequence[int]) -> str:
    """Write a shape as `4096x1024`."""
    return "x".join(map(str, shape)) or "scalar"


def scheme_words(key: str) -> str:
    """Write a scheme's key for people: `fp6_e3m2, row, float16`; an `mx` format's name says it all.

    The key of a mix is `mixed`, with how many levels there are; that of a pruned weight is `sparse`, with its values;
    outliers stand at the end.
    """
    from tersor.formats import FLOAT_DTYPES, Scheme

    if key.startswith("sparse:"):
        return f"sparse, {scheme_words(key.removeprefix('sparse:'))}"
    if key in FLOAT_DTYPES:
        return key

    levels = key.count("+") + 1
    if levels > 1:
        return f"mixed, {levels} levels"
    scheme = Scheme.from_key(key)
    beside = "" if scheme.outliers is None else f" + {scheme.outliers.percent:g} % {scheme.outliers.dtype}"
    if scheme.is_mx:
        return scheme.name + beside
    group = "row" if scheme.group_size is None else f"group {scheme.group_size}"
    return f"{scheme.format.name}, {group}, {scheme.scale_dtype}{beside}"
