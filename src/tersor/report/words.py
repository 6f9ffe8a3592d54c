"""How are numbers written for people? Sizes in decimal units, values with the digits that their errors leave them."""

from __future__ import annotations

import math


def size(count: int) -> str:
    """A number of bytes in decimal units, such as `55.6 MB`."""
    amount = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"


def plus_minus(value: float | None, error: float | None, digits: int) -> str:
    """A value and its standard error, `-` where there is none."""
    if value is None:
        return "-"
    return f"{value:.{digits}f}" + ("" if error is None else f" +- {error:.{digits}f}")


def measured(value: float | None, error: float | None = None, *, sign: bool = False) -> str:
    """A value with as many digits as its standard error makes sense of: two of the error's, else four of its own.

    Args:
        value: `None` shows as `-`.
        error: `None` where there is none.
        sign: whether a plus is shown.
    """
    if value is None:
        return "-"
    digits = _decimals(error, 2) if error else _decimals(value, 4)
    shown = f"{value:{'+' if sign and value else ''}.{digits}f}"
    return shown if error is None else f"{shown} +- {error:.{digits}f}"


def times(factor: float, value: float | None) -> float | None:
    """A product, `None` where there is no value."""
    return None if value is None else factor * value


def _decimals(value: float, significant: int) -> int:
    """Return how many decimals show so many significant digits, from 0 to 9."""
    return min(max(significant - 1 - math.floor(math.log10(abs(value))), 0), 9) if value else 0
