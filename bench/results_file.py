"""Where measurements are kept: JSON files in `results`, beside this one."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tersor.bench import report

RESULTS = Path(__file__).resolve().parent / "results"


def write(name: str, result: dict[str, Any]) -> Path:
    """Write `result` with what it depends on to results/<name>.json and return the path."""
    path = RESULTS / f"{name}.json"
    report.write(path, report.text({"environment": report.environment(), **result}))
    return path


def gpu() -> str:
    """Return what stands for this machine's GPU in a file's name, such as `h200`; without one that is `cpu`."""
    import torch

    return torch.cuda.get_device_name().split()[-1].lower() if torch.cuda.is_available() else "cpu"


def read(name: str) -> dict[str, Any]:
    """Return what `write` has written."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def marked(text: str, name: str, table: str) -> str:
    """Return a page with a table between `<!-- NAME -->` and the next `<!-- end -->`, in place of what is there."""
    made = f"<!-- {name} -->\n\n{table}\n\n<!-- end -->"
    return re.sub(rf"<!-- {re.escape(name)} -->.*?<!-- end -->", lambda _: made, text, count=1, flags=re.DOTALL)


def rewrote(description: str | None, page: Path, made: Callable[[str], str]) -> bool:
    """Read the command line of a script that knows `--write` alone; where it is there, make a page anew and say so.

    Args:
        description: of the script.
        page: the file.
        made: returns its text, with a table of what was measured, of the text that it has.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--write", action="store_true", help=f"make the table of {page.name} of the results")
    if not parser.parse_args().write:
        return False
    page.write_text(made(page.read_text(encoding="utf-8")), encoding="utf-8")
    return True
