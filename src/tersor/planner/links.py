"""How long does it take ranks to exchange so many bytes? Tables over payload, ranks and link, each with its source.

A table says microseconds for payloads and numbers of ranks; between payloads time is on a straight line, below the
first it is the first, and beyond the last as many more as the last two say. Between numbers of ranks it is on a line
over their logarithm. Ranks of several nodes reduce inside a node, then between the nodes, then gather inside.

The payload of `all_reduce` is what a rank has; of `all_gather`, `reduce_scatter` and `all_to_all` what all ranks have
together, or one has ahead of it.
"""

from __future__ import annotations

import bisect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tersor.errors import InputError
from tersor.hardware import CHIPS, Chip

KIND, VERSION = "tersor links", 1
ALL_REDUCE, ONE_SHOT, ALL_GATHER = "all_reduce", "one_shot", "all_gather"
REDUCE_SCATTER, ALL_TO_ALL, SEND = "reduce_scatter", "all_to_all", "point_to_point"
OPERATIONS = (ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, ALL_TO_ALL, SEND)
_MEASURED = Path(__file__).parent / "links" / "h200.json"
_ALIGNED = 16


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Microseconds of one operation over one link.

    Attributes:
        source: where the numbers come from.
        rows: ranks -> [(bytes, microseconds), ...], bytes ascending.
        most_bytes, most_ranks: what it serves at most; 0 is anything.
    """

    source: str
    rows: Mapping[int, tuple[tuple[float, float], ...]]
    most_bytes: int = 0
    most_ranks: int = 0

    def seconds(self, nbytes: float, ranks: int) -> float:
        """Return the time of one call."""
        known = sorted(self.rows)
        place = bisect.bisect_left(known, ranks)
        if place < len(known) and known[place] == ranks:
            return _on_line(self.rows[ranks], nbytes) * 1e-6
        if place == 0:
            return _on_line(self.rows[known[0]], nbytes) * 1e-6
        low, high = (
            (known[place - 1], known[place]) if place < len(known) else (known[-2:] if len(known) > 1 else known * 2)
        )
        first, second = _on_line(self.rows[low], nbytes), _on_line(self.rows[high], nbytes)
        share = math.log(ranks / low) / math.log(high / low) if high > low else 0.0
        return (first + (second - first) * share) * 1e-6

    @property
    def bandwidth(self) -> float:
        """Bytes a second of the largest payloads, of the fewest ranks; infinite where they take no longer."""
        points = self.rows[min(self.rows)]
        (size, time), (more, longer) = points[-2:] if len(points) > 1 else (points[0], points[0])
        return (more - size) / (longer - time) * 1e6 if longer > time else math.inf


def _on_line(points: Sequence[tuple[float, float]], nbytes: float) -> float:
    if nbytes <= points[0][0] or len(points) == 1:
        return points[0][1]
    place = min(len(points) - 1, bisect.bisect_left([size for size, _ in points], nbytes))
    (size, time), (more, longer) = points[place - 1 : place + 1]
    return time + (longer - time) * (nbytes - size) / (more - size)


@dataclass(frozen=True, slots=True)
class Exchange:
    """What one exchange takes.

    Attributes:
        seconds: of a call.
        words: what is done, in a few words.
        source: of the numbers.
    """

    seconds: float
    words: str
    source: str


NOTHING = Exchange(0.0, "", "")


@dataclass(frozen=True, eq=False)
class Links:
    """Tables of the links inside a node and between nodes.

    Attributes:
        label: what they are called: the chip's name, or a file.
        chip: whose they are.
        reach: GPUs that the links inside a node connect at most.
        inside, between: operation -> table.
        one_shot: of our own sum of what is small (`ops.one_shot`), or `None` where there is none.
    """

    label: str
    chip: str
    reach: int
    inside: Mapping[str, Table]
    between: Mapping[str, Table]
    one_shot: Table | None = None
    _cache: dict[tuple[str, int, tuple[int, ...]], Exchange] = field(default_factory=dict, repr=False)

    def exchange(self, operation: str, nbytes: int, groups: tuple[int, ...]) -> Exchange:
        """Return what an operation takes of the ranks of one group.

        Args:
            operation: one of `OPERATIONS`.
            nbytes: the payload.
            groups: ranks of it in every node; for `point_to_point` (2,) inside a node and (1, 1) between two.
        """
        if sum(groups) == 1 or not nbytes:
            return NOTHING
        key = (operation, nbytes, groups)
        if key not in self._cache:
            self._cache[key] = self._exchange(operation, nbytes, groups)
        return self._cache[key]

    def _exchange(self, operation: str, nbytes: int, groups: tuple[int, ...]) -> Exchange:
        most, nodes = max(groups), len(groups)
        if nodes == 1:
            table = self._table(operation, nbytes, most)
            name = "one-shot all-reduce" if table is self.one_shot else operation.replace("_", "-")
            return Exchange(table.seconds(nbytes, most), f"{name} of {nbytes} bytes, {most} ranks", table.source)
        words = f"{operation.replace('_', '-')} of {nbytes} bytes, {sum(groups)} ranks in {nodes} nodes"
        if operation == SEND:
            table = self.between[SEND]
            return Exchange(table.seconds(nbytes, 2), words, table.source)
        share = -(-nbytes // most)
        steps = {
            ALL_REDUCE: ((self.inside, REDUCE_SCATTER), (self.between, ALL_REDUCE), (self.inside, ALL_GATHER)),
            ALL_GATHER: ((self.between, ALL_GATHER), (self.inside, ALL_GATHER)),
            REDUCE_SCATTER: ((self.inside, REDUCE_SCATTER), (self.between, REDUCE_SCATTER)),
            ALL_TO_ALL: ((self.inside, ALL_TO_ALL), (self.between, ALL_TO_ALL)),
        }[operation]
        total, sources = 0.0, []
        for tables, step in steps:
            ranks = most if tables is self.inside else nodes
            if ranks > 1:
                table = tables[step]
                each = share if tables is self.between and operation != ALL_TO_ALL else nbytes
                total += table.seconds(each, ranks)
                sources.append(table.source)
        return Exchange(total, words, "; ".join(dict.fromkeys(sources)))

    def _table(self, operation: str, nbytes: int, ranks: int) -> Table:
        own = self.one_shot
        if own is None or operation != ALL_REDUCE or nbytes % _ALIGNED:
            return self.inside[operation]
        if nbytes <= own.most_bytes and ranks <= own.most_ranks:
            return own
        return self.inside[operation]

    @cached_property
    def sources(self) -> dict[str, str]:
        """Where the numbers of every table come from."""
        found = {f"inside a node, {name}": table.source for name, table in self.inside.items()}
        if self.one_shot is not None:
            found["inside a node, one_shot"] = self.one_shot.source
        return found | {f"between nodes, {name}": table.source for name, table in self.between.items()}


def of_chip(chip: Chip) -> Links:
    """Return the tables for a chip: those of the H200, whose bytes take longer where NVLink or PCIe is slower."""
    links = read(_MEASURED)
    known = CHIPS[links.chip]
    own = chip.nvlink or chip.pcie
    if own == known.nvlink:
        return links
    factor, note = known.nvlink / own, f"estimate for {chip.name}: payloads count {known.nvlink / own:.3g} times in "
    inside = {name: _slower(table, factor, note) for name, table in links.inside.items()}
    one = None if links.one_shot is None or not chip.nvlink else _slower(links.one_shot, factor, note)
    return Links(f"{links.label}, for {chip.name}", chip.name, links.reach, inside, links.between, one)


def _slower(table: Table, factor: float, note: str) -> Table:
    rows = {ranks: tuple((size / factor, time) for size, time in points) for ranks, points in table.rows.items()}
    return Table(note + table.source, rows, table.most_bytes, table.most_ranks)


def read(path: Path) -> Links:
    """Read a file of tables.

    Raises:
        InputError: it is none; the line says what is wrong.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise InputError(f"{path} is no JSON: {error}") from None
    if not isinstance(raw, dict) or raw.get("kind") != KIND:
        raise InputError(f"{path} holds no links: tersor plan calibrate writes some")
    if raw.get("version") != VERSION:
        raise InputError(f"{path} is version {raw.get('version')} of the links, and this Tersor reads {VERSION}")
    try:
        inside = {name: _table(entry) for name, entry in raw["inside"].items()}
        between = {name: _table(entry) for name, entry in raw["between"].items()}
        one = inside.pop(ONE_SHOT, None)
        missing = [name for tables in (inside, between) for name in OPERATIONS if name not in tables]
        if missing:
            raise InputError(f"{path} has no table of {missing[0]}")
        label = path.name if path != _MEASURED else raw["chip"]
        return Links(label, str(raw["chip"]), int(raw["reach"]), inside, between, one)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is no whole file of links: {type(error).__name__} {error}") from None


def _table(entry: Mapping[str, Any]) -> Table:
    rows = {}
    for ranks, points in entry["us"].items():
        rows[int(ranks)] = tuple((float(size), float(time)) for size, time in points)
        sizes = [size for size, _ in rows[int(ranks)]]
        if not sizes or sizes != sorted(set(sizes)) or min(time for _, time in rows[int(ranks)]) < 0:
            raise ValueError(f"payloads of {ranks} ranks do not ascend")
        times = [time for _, time in rows[int(ranks)]]
        if times != sorted(times):
            raise ValueError(f"times of {ranks} ranks descend")
    if not rows:
        raise ValueError("a table without ranks")
    return Table(str(entry["source"]), rows, int(entry.get("most_bytes", 0)), int(entry.get("most_ranks", 0)))
