"""Where measurements are kept: JSON files in `results`, beside this one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tersor.bench import report

RESULTS = Path(__file__).resolve().parent / "results"


def write(name: str, result: dict[str, Any]) -> Path:
    """Write `result` with what it depends on to results/<name>.json and return the path."""
    path = RESULTS / f"{name}.json"
    report.write(path, report.text({"environment": report.environment(), **result}))
    return path
