"""How is a number drawn? Points with error bars and bars, as SVG that stands in a page and takes its colours."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 470, 320
LEFT, RIGHT, TOP, BOTTOM = 66, 18, 14, 46
"""Of a picture and of the frame in it, in units of the picture."""

_CAP, _MARK, _LINE = 4, 5, 11
COLOURS = 8
"""Classes `c0` to `c7` of the page."""


class Markup(str):
    """Text that is HTML already."""


def element(name: str, content: str = "", **attributes: str | float) -> Markup:
    """Return an element; values of attributes are escaped, the content is markup. `_` in a name stands for `-`."""
    said = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(_short(value))}"' for key, value in attributes.items()
    )
    return Markup(f"<{name}{said}>{content}</{name}>")


def text(value: object) -> Markup:
    """Return a value as escaped text; markup as it is."""
    return value if isinstance(value, Markup) else Markup(html.escape(str(value)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A model in a picture.

    Attributes:
        number: that it has in the table, written beside the point.
        label: its name.
        x, y: where it is.
        error: of y; 0 draws no bar.
    """

    number: int
    label: str
    x: float
    y: float
    error: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """A way from values to places.

    Attributes:
        low, high: values at the two ends, `low` < `high`.
        start, end: places of the ends.
        log: whether equal ratios are equal distances.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @staticmethod
    def over(values: Iterable[float], start: float, end: float, *, log: bool = False, margin: float = 0.08) -> Scale:
        """Return a scale that holds all values, with some room beside them."""
        known = [math.log10(value) if log else value for value in values]
        low, high = min(known), max(known)
        room = margin * (high - low) or (0.3 if log else 0.1 * abs(high) or 1.0)
        low, high = low - room, high + room
        return Scale(low=10**low if log else low, high=10**high if log else high, start=start, end=end, log=log)

    def __call__(self, value: float) -> float:
        """Return the place of a value; values beyond an end are drawn at that end."""
        bounded = min(max(value, self.low), self.high)
        low, high, at = (
            (math.log10(self.low), math.log10(self.high), math.log10(bounded))
            if self.log
            else (self.low, self.high, bounded)
        )
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Return some round values between the ends."""
        if self.log:
            found = [
                mantissa * 10.0**exponent
                for exponent in range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
                for mantissa in (1, 2, 5)
            ]
            inside = [value for value in found if self.low <= value <= self.high]
            if len(inside) > 6:
                inside = [value for value in inside if math.isclose(math.log10(value) % 1, 0, abs_tol=1e-9)]
            if len(inside) >= 2:
                return inside[:: max(1, len(inside) // 6)]
        step = 10 ** math.floor(math.log10((self.high - self.low) / 4))
        step *= next(factor for factor in (1, 2, 5, 10) if (self.high - self.low) / (factor * step) <= 6)
        first = math.ceil(self.low / step)
        return [number * step for number in range(first, math.floor(self.high / step) + 1)]


def scatter(
    points: Sequence[Point],
    *,
    x_label: str,
    y_label: str,
    log: bool,
    levels: Sequence[tuple[float, str]] = (),
) -> Markup:
    """Return a picture of points with error bars, each with its number.

    Args:
        points: at least one; their y are positive where `log`.
        x_label, y_label: what the axes are.
        log: whether y is logarithmic; a bar that goes to 0 or below ends at the frame.
        levels: y of dashed lines, and what they are.
    """
    ends = [point.y + sign * point.error for point in points for sign in (-1, 0, 1)]
    heights = [*ends, *(y for y, _ in levels)]
    x = Scale.over((point.x for point in points), LEFT, WIDTH - RIGHT)
    y = Scale.over((value for value in heights if value > 0 or not log), HEIGHT - BOTTOM, TOP, log=log)
    parts = [_frame(), *_axis_x(x, x_label), *_axis_y(y, y_label)]
    for value, label in levels:
        place = y(value)
        line = element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=place, y2=place, class_="level")
        parts += [line, element("text", html.escape(label), x=WIDTH - RIGHT - 4, y=place - 4, class_="end small")]
    places: list[tuple[float, float]] = []
    parts += [_point(point, x, y, places) for point in points]
    words = f"{y_label} over {x_label}"
    return element("svg", "".join(parts), viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=words, class_="plot")


def bar(share: float, words: str, kind: str = "bar") -> Markup:
    """Return a bar in a cell.

    Args:
        share: of the cell, from 0 to 1.
        words: what it says, shown beside the pointer.
        kind: class of the bar.
    """
    length = 100 * min(max(share, 0.0), 1.0)
    inner = element("title", html.escape(words)) + element("rect", x=0, y=1, width=length, height=8, class_=kind)
    return element("svg", inner, viewBox="0 0 100 10", class_="cell", role="img", aria_label=words)


def stack(parts: Sequence[tuple[float, str]], words: str) -> Markup:
    """Return bars that stand behind each other in a long cell.

    Args:
        parts: shares of the cell, in all at most 1, and their classes.
        words: what they say, shown beside the pointer.
    """
    inner, at = (
        [element("title", html.escape(words)), element("rect", x=0, y=0, width=300, height=10, class_="room")],
        0.0,
    )
    for share, kind in parts:
        length = 300 * min(max(share, 0.0), 1.0 - at)
        inner.append(element("rect", x=300 * at, y=1, width=length, height=8, class_=f"fill {kind}"))
        at += length / 300
    return element("svg", "".join(inner), viewBox="0 0 300 10", class_="cell long", role="img", aria_label=words)


def _point(point: Point, x: Scale, y: Scale, places: list[tuple[float, float]]) -> Markup:
    """Draw a point; its number goes below numbers that stand there already, which `places` has."""
    left, middle = x(point.x), y(point.y)
    low, high = y(point.y - point.error) if not y.log or point.y > point.error else y.start, y(point.y + point.error)
    words = f"{point.number} {point.label}: {point.y:.6g}" + (f" +- {point.error:.2g}" if point.error else "")
    parts = [element("title", html.escape(words))]
    if point.error:
        parts.append(element("line", x1=left, x2=left, y1=low, y2=high, class_="error"))
        for place in (low, high):
            parts.append(element("line", x1=left - _CAP, x2=left + _CAP, y1=place, y2=place, class_="cap"))
    parts.append(element("circle", cx=left, cy=middle, r=_MARK))
    near_the_end = left > WIDTH - RIGHT - 30
    beside, below = left - 9 if near_the_end else left + 9, middle + 4
    while any(abs(beside - one) < 16 and abs(below - other) < _LINE for one, other in places):
        below += _LINE
    places.append((beside, below))
    kind = "number end" if near_the_end else "number"
    parts.append(element("text", str(point.number), x=beside, y=below, class_=kind))
    return element("g", "".join(parts), class_=f"point c{(point.number - 1) % COLOURS}", data_number=point.number)


def _frame() -> Markup:
    return element("rect", x=LEFT, y=TOP, width=WIDTH - LEFT - RIGHT, height=HEIGHT - TOP - BOTTOM, class_="frame")


def _axis_x(scale: Scale, label: str) -> list[Markup]:
    bottom = HEIGHT - BOTTOM
    parts = [element("text", html.escape(label), x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 8, class_="middle")]
    for value in scale.ticks():
        place = scale(value)
        parts.append(element("line", x1=place, x2=place, y1=TOP, y2=bottom, class_="grid"))
        parts.append(element("text", f"{value:.6g}", x=place, y=bottom + 16, class_="middle small tick-x"))
    return parts


def _axis_y(scale: Scale, label: str) -> list[Markup]:
    middle = (TOP + HEIGHT - BOTTOM) / 2
    turned = f"translate(14 {middle:g}) rotate(-90)"
    parts = [element("text", html.escape(label), transform=turned, class_="middle")]
    for value in scale.ticks():
        place = scale(value)
        parts.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=place, y2=place, class_="grid"))
        parts.append(element("text", f"{value:.6g}", x=LEFT - 6, y=place + 4, class_="end small tick-y"))
    return parts


def _short(value: str | float) -> str:
    """Return an attribute's value; numbers with at most two decimals."""
    return value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")
