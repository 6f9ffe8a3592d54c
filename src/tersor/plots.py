"""Can this picture be written, and what does it say of itself? Needs matplotlib, the extra `plot`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from tersor import files
from tersor.errors import InputError, OutputError, UnsupportedError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_METADATA = {
    ".png": ("Description", {}),
    ".svg": ("Description", {"Date": None}),
    ".pdf": ("Subject", {"CreationDate": None}),
}
"""Suffix -> what its metadata call a description, and what keeps the time of drawing out of the file."""

SUFFIXES = tuple(_METADATA)


def check_plot(path: str | Path) -> None:
    """Say before a long measurement that the picture could not be drawn after it.

    Raises:
        InputError: a file type that cannot be written, or a folder that does not exist.
        UnsupportedError: matplotlib is not installed.
    """
    file = Path(path)
    if file.suffix.lower() not in SUFFIXES:
        raise InputError(f"{file}: a plot is written as one of {', '.join(SUFFIXES)}")
    try:
        if not files.check_target(files.user_path(path)):
            raise InputError(f"{file}: the folder {file.parent} does not exist")
    except OSError as error:
        raise OutputError(f"{file}: cannot be written: {error.strerror}") from None
    if importlib.util.find_spec("matplotlib") is None:
        raise UnsupportedError("a plot needs matplotlib, which is not installed: pip install tersor[plot]")


def save(figure: Figure, path: str | Path, description: str = "") -> None:
    """Write a figure.

    Args:
        figure: of matplotlib.
        path: a file that `check_plot` lets pass.
        description: kept in the file's metadata; one line.

    Raises:
        OutputError: the file cannot be written.
    """
    import matplotlib

    key, rest = _METADATA[Path(path).suffix.lower()]
    try:
        # An SVG names its parts by random numbers unless it is told not to.
        with matplotlib.rc_context({"svg.hashsalt": "tersor"}):
            figure.savefig(files.user_path(path), dpi=150, metadata={key: description, **rest})
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from error
