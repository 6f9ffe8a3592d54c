"""How is a weight represented whose output features have different schemes? Its levels, and who has which."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tersor.errors import FormatError, ShapeError
from tersor.formats.scheme import Scheme

MOST_LEVELS = 8
"""More levels would save no bytes that their row sets do not cost."""


@dataclass(frozen=True, slots=True)
class Mix:
    """The schemes that the output features of a weight may have, each a level.

    Attributes:
        levels: level -> its scheme, all different.
    """

    levels: tuple[Scheme, ...]

    def __post_init__(self) -> None:
        keys = [level.key() for level in self.levels]
        twice = [key for key, count in Counter(keys).items() if count > 1]
        if twice:
            raise FormatError(f"level {twice[0]} stands there twice: keep one of them")
        if any(level.outliers is not None for level in self.levels):
            raise FormatError("output features of a mix keep no outliers: leave them out")
        if any(level.has_table for level in self.levels):
            raise FormatError("output features of a mix have no tables: use lut formats alone")
        if not 1 <= len(keys) <= MOST_LEVELS:
            raise FormatError(f"{len(keys)} levels, expected 1 to {MOST_LEVELS}")

    def key(self) -> str:
        """Return a short text that names the levels exactly, such as `uint4:g128:float16+int8:row:float16`."""
        return "+".join(level.key() for level in self.levels)


@dataclass(frozen=True, slots=True)
class Assignment:
    """A mix, and the level of every output feature of one weight.

    Attributes:
        mix: the levels.
        level: a byte for each output feature, its level.
    """

    mix: Mix
    level: bytes

    def __post_init__(self) -> None:
        if self.level and max(self.level) >= len(self.mix.levels):
            raise FormatError(
                f"output feature {self.level.index(max(self.level))} has level {max(self.level)}, and there are "
                f"{len(self.mix.levels)} levels, counted from 0"
            )

    @property
    def rows(self) -> tuple[int, ...]:
        """How many output features have each level."""
        return tuple(map(self.level.count, range(len(self.mix.levels))))

    def key(self) -> str:
        """Return the key of the mix."""
        return self.mix.key()

    def bits_per_weight(self, ic: int) -> float:
        """Return the mean bits stored for a weight of `ic` input channels, scales and levels counted."""
        pairs = zip(self.mix.levels, self.rows, strict=True)
        bits = sum(level.bits_per_weight(ic) * rows for level, rows in pairs if rows)
        return bits / max(1, len(self.level)) + 8 / ic

    def of(self, spans: Sequence[tuple[int, int]]) -> Assignment:
        """Return the levels of the output features in spans of them, one span behind the other."""
        return Assignment(self.mix, b"".join(self.level[first:last] for first, last in spans))

    def spans(self, level: int, spans: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
        """Return which rows of a level's weight are the output features in spans.

        Rows of a level are in the order of output features, so those of a span are side by side.
        """
        found = []
        for first, last in spans:
            start = self.level.count(level, 0, first)
            found.append((start, start + self.level.count(level, first, last)))
        return tuple(found)

    def check(self, oc: int) -> None:
        """Hold that every output feature has a level.

        Raises:
            ShapeError: there are more or fewer.
        """
        if len(self.level) != oc:
            raise ShapeError(f"{len(self.level)} levels for {oc} output features")
