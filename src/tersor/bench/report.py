"""What was measured, where, with what: the facts beside the numbers, and how results are written."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tersor import files, hardware
from tersor.errors import OutputError
from tersor.version import __version__

_PACKAGE = Path(__file__).resolve().parents[1]


def environment() -> dict[str, Any]:
    """Return what a number depends on: commit (`unknown` outside a checkout), versions, driver, GPU and date (UTC)."""
    import torch

    facts: dict[str, Any] = {
        "commit": commit(_PACKAGE),
        "tersor": __version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": hardware.driver_version(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        facts |= {"gpu": properties.name, "multiprocessors": properties.multi_processor_count}
    return facts


def commit(folder: Path) -> str:
    """Return the short commit of the checkout that tracks a folder, or `unknown`: an installed package has none."""
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return "unknown"
    return _git(folder, "rev-parse", "--short", "HEAD") or "unknown"


def result(
    kind: str,
    version: int,
    method: str,
    facts: Mapping[str, Any],
    rows: Iterable[Any],
    skipped: Iterable[Any],
    versions: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return what a measurement writes as JSON.

    Args:
        kind, version: what it is, for who reads it again.
        method: how it was measured, in a sentence.
        facts: what else holds for all rows.
        rows, skipped: dataclasses, in order.
        versions: of other packages that rows depend on.
    """
    return {
        "kind": kind,
        "version": version,
        "environment": {**environment(), **(versions or {})},
        "method": method,
        **facts,
        "rows": [asdict(row) for row in rows],
        "skipped": [asdict(row) for row in skipped],
    }


def text(result: dict[str, Any]) -> str:
    """Return a result as JSON that is easy to compare: an object in a list of objects takes one line."""
    parts = []
    for key, value in result.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            shown = "[\n  " + ",\n  ".join(json.dumps(item, allow_nan=False) for item in value) + "\n ]"
        else:
            shown = json.dumps(value, indent=1, allow_nan=False).replace("\n", "\n ")
        parts.append(f" {json.dumps(key)}: {shown}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def write(path: Path, content: str) -> None:
    """Write a file whole or not at all, and its folder where there is none.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        target = files.user_path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        files.write_whole(target, content.encode())
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from error


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
