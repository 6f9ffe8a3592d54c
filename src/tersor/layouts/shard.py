"""Where may a weight be cut, so that every rank has a part of it? Legal quanta, and the cuts themselves.

A column shard holds some output channels (rows of the weight) and may start anywhere; a row shard holds some input
channels, whole 32-bit words of the stored stream and whole scale groups of them. Ranks need not have the same: 29568
channels in groups of 128 are 116 and 115 groups. Everything here is arithmetic on sizes: what a rank has is known
without a weight, a device or a process.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

from tersor.errors import ShapeError
from tersor.formats import Assignment, Pruned, Scheme
from tersor.formats.scheme import ROW_ELEMENTS
from tersor.layouts.blocks import BLOCK_IC, UNIT_OC

Span: TypeAlias = tuple[int, int]
"""First channel, and the one after the last."""
ALIGNED = 8
"""Channels of a plain weight that stay together: 16 bytes of 16-bit numbers, which products on GPUs ask of rows."""


@dataclass(frozen=True, slots=True)
class Heads:
    """The heads of an attention that a rank has.

    Attributes:
        queries: query heads.
        keys: heads of keys and values that those queries read; several ranks have the same ones where there are fewer
            than ranks.
    """

    queries: Span
    keys: Span


@dataclass(frozen=True, slots=True)
class Part:
    """What a rank has of a matrix [OC, IC], or of a vector [OC].

    Attributes:
        rows: spans of output channels, one behind the other; `None` is all.
        columns: input channels; `None` is all.
    """

    rows: tuple[Span, ...] | None = None
    columns: Span | None = None

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the part of a tensor of the shape `whole`; leading axes of a matrix stay whole."""
        axes = list(whole)
        if self.rows is not None:
            axes[-2 if len(whole) > 1 else -1] = sum(last - first for first, last in self.rows)
        if self.columns is not None:
            axes[-1] = self.columns[1] - self.columns[0]
        return tuple(axes)

    def transposed(self) -> Part:
        """Return the part of a matrix that is stored as [IC, OC]; its rows must be one span."""
        return Part(None if self.columns is None else (self.columns,), None if self.rows is None else self.rows[0])

    def stored(self, scheme: Scheme) -> tuple[Part, Part]:
        """Return the parts of a packed weight's words, and of its scales and zero points, in the stored stream.

        Raises:
            ShapeError: the columns are not whole quanta.
        """
        if self.columns is None:
            return self, self
        words, groups = stored_columns(scheme, self.columns)
        return Part(self.rows, words), Part(self.rows, groups)

    def groups(self, form: Pruned) -> Span | None:
        """Return the scale groups of the input channels of a pruned weight; `None` is all.

        Raises:
            ShapeError: the columns do not start at a whole quantum.
        """
        if self.columns is None:
            return None
        first, last = self.columns
        if first % quantum(form):
            raise ShapeError(f"columns {first} to {last} of a weight in {form.key()} do not start at a whole quantum")
        size = None if form.sparse.scheme is None else form.sparse.scheme.group_size
        return None if size is None else (first // size, -(-last // size))


def quantum(form: Scheme | Assignment | Pruned | None) -> int:
    """Return the input channels that a weight is cut in: whole words of the stream, and whole scale groups.

    Args:
        form: of a packed weight, whose levels are all cut alike where it is mixed; `None` is a plain one, whose rows
            keep to `ALIGNED` channels, as do those of a pruned one.
    """
    if form is None:
        return ALIGNED
    if isinstance(form, Pruned):
        scheme = form.sparse.scheme
        return math.lcm(ALIGNED, 1 if scheme is None else scheme.group_size or 1)
    schemes = form.mix.levels if isinstance(form, Assignment) else (form,)
    return math.lcm(ROW_ELEMENTS, *(scheme.group_size or 1 for scheme in schemes))


def cut(size: int, ranks: int, unit: int = 1, *, tile: int = BLOCK_IC, what: str = "channels") -> tuple[Span, ...]:
    """Deal channels out to ranks, evenly but for one unit; the first ranks have more.

    Kernels compute whole tiles. So shares are whole tiles where the largest share is no more tiles by it.

    Args:
        size: channels.
        ranks: how many have a share, each at least one unit.
        unit: channels that stay together; the last unit may be shorter.
        tile: channels of a kernel's tile.
        what: is cut, for the error.

    Raises:
        ShapeError: there are fewer units than ranks.
    """
    fine = -(-size // unit)
    if fine < ranks:
        raise ShapeError(f"{what}: {size} in units of {unit} are {fine} shares, and there are {ranks} ranks")
    whole = math.lcm(unit, tile)
    if -(-size // whole) >= ranks and _tiles(size, ranks, whole, tile) <= _tiles(size, ranks, unit, tile):
        unit = whole
    each, more = divmod(-(-size // unit), ranks)
    starts = [min(size, unit * (each * rank + min(rank, more))) for rank in range(ranks + 1)]
    return tuple(pairwise(starts))


def cut_rows(size: int, ranks: int, *, what: str = "rows") -> tuple[Span, ...]:
    """Deal output channels out to ranks: as `cut`, in units of rows that kernels compute."""
    return cut(size, ranks, tile=UNIT_OC, what=what)


def cut_heads(
    heads: int, kv_heads: int, head_dim: int, ranks: int, unit: int = 1, *, what: str = "heads"
) -> tuple[Heads, ...]:
    """Deal the heads of an attention out to ranks: whole heads of keys and values, with the queries that read them.

    With more ranks than heads of keys and values, several ranks have one of them, and share its queries.

    Args:
        heads, kv_heads, head_dim: of the whole attention.
        ranks: how many have a share.
        unit: channels that the weight behind the attention is cut in (`quantum`).
        what: is cut, for the error.

    Raises:
        ShapeError: there are too few heads, or their channels are not whole units.
    """
    ratio = heads // kv_heads
    if kv_heads >= ranks:
        together = unit // math.gcd(unit, ratio * head_dim)
        spans = cut(kv_heads, ranks, together, tile=1, what=f"{what}, kv heads")
        return tuple(Heads((first * ratio, last * ratio), (first, last)) for first, last in spans)
    if ratio * head_dim % unit:
        raise ShapeError(
            f"{what}: the {ratio * head_dim} channels of a kv head's queries are not whole units of {unit}, and "
            f"{ranks} ranks share {kv_heads} kv heads"
        )
    together = unit // math.gcd(unit, head_dim)
    found = []
    for head, (first, last) in enumerate(cut(ranks, kv_heads, tile=1)):
        spans = cut(ratio, last - first, together, tile=1, what=f"{what}, query heads of a kv head")
        found += [Heads((head * ratio + start, head * ratio + end), (head, head + 1)) for start, end in spans]
    return tuple(found)


def stored_columns(scheme: Scheme, columns: Span) -> tuple[Span, Span | None]:
    """Return words of a row of the stored stream and scale groups (`None` is the one of a row) of input channels.

    Raises:
        ShapeError: they do not start at a quantum. They may end at none, which is then the end of the row.
    """
    first, last = columns
    if first % quantum(scheme):
        raise ShapeError(f"columns {first} to {last} of a weight in {scheme.key()} do not start at a whole quantum")
    bits, size = scheme.format.bits, scheme.group_size
    words = (first // ROW_ELEMENTS * bits, -(-last // ROW_ELEMENTS) * bits)
    return words, None if size is None else (first // size, -(-last // size))


def _tiles(size: int, ranks: int, unit: int, tile: int) -> int:
    """Return the tiles of the largest share."""
    units = math.ceil(math.ceil(size / unit) / ranks)
    return math.ceil(min(size, units * unit) / tile)
