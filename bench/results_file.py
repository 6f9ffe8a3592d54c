"""Where measurements are kept: JSON files in `results`, beside this one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tersor.bench import report

RESULTS = Path(__file__).resolve().parent / "results"


def write(name: str, result: dict[str, Any]) -> Path:
    """Write `result` with what it depends on to results/<name>.json and return the path."""
    path = RESULTS / f"{name}.json"
    report.write(path, report.text({"environment": report.environment(), **result}))
    return path


def marked(text: str, name: str, table: str) -> str:
    """Return a page with a table between `<!-- NAME -->` and the next `<!-- end -->`, in place of what is there."""
    made = f"<!-- {name} -->\n\n{table}\n\n<!-- end -->"
    return re.sub(rf"<!-- {re.escape(name)} -->.*?<!-- end -->", lambda _: made, text, count=1, flags=re.DOTALL)
