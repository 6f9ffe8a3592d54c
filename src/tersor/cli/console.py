"""What the verbs do alike: progress on stderr, tables and JSON on stdout, and the threads that a model runs on."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tersor.report.words import measured as measured
from tersor.report.words import plus_minus as plus_minus
from tersor.report.words import size as size
from tersor.screen import print_table as print_table
from tersor.screen import screen

if TYPE_CHECKING:
    import torch

SMALL_BYTES = 32 << 20
"""Weight files below this size make a small model, see `choose_threads`."""


def choose_threads(weight_bytes: int, device: torch.device) -> None:
    """Run a small model on one CPU thread, for the rest of the process.

    Its operations take microseconds: a second thread gains little where a core is free and costs a factor of ten
    where cores are shared, since every operation waits for both. Only a verb may decide this: to a program that uses
    Tersor as a library, its threads belong.

    Args:
        weight_bytes: size of the model's weight files.
        device: where it runs.
    """
    if device.type == "cpu" and weight_bytes < SMALL_BYTES:
        import torch

        torch.set_num_threads(1)


def threads_each(count: int, device: torch.device) -> int:
    """Return the CPU threads that each of several engines has, of those of this process; 0 is as torch has them."""
    if device.type != "cpu":
        return 0
    import torch

    return max(1, torch.get_num_threads() // count)


@contextmanager
def progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar with the time left on a terminal, through stderr, and yield what moves it: (done, in all)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    screen = Console(stderr=True)
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def telling() -> Iterator[None]:
    """Show through stderr what the logger `tersor` is told: warnings, on a terminal also that kernels are compiled."""
    logger = logging.getLogger("tersor")
    handler, level = _Lines(logging.INFO if sys.stderr.isatty() else logging.WARNING), logger.level
    logger.addHandler(handler)
    logger.setLevel(handler.level)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class _Lines(logging.Handler):
    """A line to stderr as it is at that time: a bar that is shown meanwhile moves down."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), file=sys.stderr, flush=True)


def print_section(title: str, lines: Iterable[tuple[str, str]]) -> None:
    """Print a title and, indented under it, lines of a name and what is said of it; all of it plain text."""
    from rich.markup import escape
    from rich.table import Table

    shown = screen()
    shown.print(f"[bold]{escape(title)}[/bold]")
    grid = Table.grid(padding=(0, 2))
    grid.add_column(min_width=18, no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in lines:
        grid.add_row(f"  {escape(name)}", escape(value))
    shown.print(grid)
    shown.print()


def print_json(value: Any) -> None:
    """Print a value as JSON; NaN and infinities are refused."""
    print(json.dumps(value, indent=2, allow_nan=False))
