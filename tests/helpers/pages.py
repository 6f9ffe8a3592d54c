"""A report as a test reads it: taken apart by the standard library, written and refused from the command line."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest

from tersor.cli.main import run

VOID = {"meta"}


class Page(HTMLParser):
    """A page, taken apart; elements that are not closed in order fail.

    Attributes:
        elements: name, attributes and text of every element, in the order of their ends.
        rows: cells of every row of a table.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str], str]] = []
        self.rows: list[list[str]] = []
        self._open: list[tuple[str, dict[str, str], list[str]]] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self._open.append((tag, {key: value or "" for key, value in attrs}, []))
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag: str) -> None:
        name, attributes, parts = self._open.pop()
        assert name == tag
        self.elements.append((name, attributes, "".join(parts)))
        if tag in ("td", "th"):
            self.rows[-1].append("".join(parts))

    def handle_data(self, data: str) -> None:
        if self._open:
            self._open[-1][2].append(data)

    def named(self, name: str, kind: str = "") -> list[tuple[dict[str, str], str]]:
        """Attributes and text of elements of a name that have a class, where one is given."""
        return [
            (attributes, text)
            for own, attributes, text in self.elements
            if own == name and (not kind or kind in attributes.get("class", "").split())
        ]

    def row(self, *beginning: str) -> list[str]:
        """The one row that begins with these cells."""
        (found,) = [cells for cells in self.rows if cells[: len(beginning)] == list(beginning)]
        return found


def reported(folder: Path, *runs: str) -> Page:
    """Write a report and return its page."""
    target = folder / "report.html"
    assert run(["report", *runs, "-o", str(target)]) == 0
    return Page(target.read_text(encoding="utf-8"))


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command line that must fail with one line, and return the line."""
    capsys.readouterr()
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("tersor: ")
    return captured.err
