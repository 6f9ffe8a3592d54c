"""How does a table stand in a terminal, and where there is none?"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_WIDTH = 160
"""Columns of a table that does not go to a terminal."""


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None, words: bool = False
) -> None:
    """Print rows under their columns, the first column to the left, the others to the right.

    Args:
        columns, rows: plain text.
        title: a line above them.
        words: whether cells are words, not numbers: every column to the left then.
    """
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    shown = screen()
    if title is not None:
        shown.print(f"[bold]{escape(title)}[/bold]")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=words, collapse_padding=not words)
    for index, column in enumerate(columns):
        table.add_column(escape(column), justify="right" if index and not words else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    shown.print(table)


def screen() -> Console:
    """Return stdout as rich sees it: as wide as the terminal, or `PLAIN_WIDTH` where it goes elsewhere."""
    from rich.console import Console

    shown = Console(file=sys.stdout, highlight=False)
    if not shown.is_terminal:
        shown.width = PLAIN_WIDTH
    return shown
