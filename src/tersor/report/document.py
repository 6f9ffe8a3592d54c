"""What is a report made of? One value that `--json` prints, and that the page shows and adds nothing to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tersor import evaluate
from tersor.bench import report as facts
from tersor.report.checkpoints import checkpoint_dict
from tersor.report.quality import find_groups
from tersor.report.runs import SPEEDS, Checkpoint, Measured, Run

KIND, VERSION = "tersor report", 1

_BESIDE = ("kind", "version", "environment", "method", "rows", "skipped")
"""Of a measurement of time, what is shown elsewhere than under what holds for all rows."""


def document(runs: Sequence[Run]) -> dict[str, Any]:
    """Return what a report on runs holds, as JSON values.

    `quality` has a part for each set of models that read the same windows against the same reference; of every further
    part `apart` says why it stands apart from the first.

    Args:
        runs: in the order in which they are shown.
    """
    measured = [run for run in runs if isinstance(run, Measured)]
    groups = find_groups([run for run in measured if run.kind == evaluate.KIND])
    return {
        "kind": KIND,
        "version": VERSION,
        "environment": facts.environment(),
        "runs": [_about(run) for run in runs],
        "quality": [
            {**group.to_dict(), "apart": group.apart_from(groups[0]) if index else None}
            for index, group in enumerate(groups)
        ],
        "tasks": [
            {"run": run.path, "limit": run.result.get("limit"), **score}
            for run in measured
            for score in run.result.get("tasks", ())
            if run.kind == evaluate.KIND
        ],
        "checkpoints": [checkpoint_dict(run) for run in runs if isinstance(run, Checkpoint)],
        "speed": [_speed(run) for run in measured if run.kind in SPEEDS],
    }


def _about(run: Run) -> dict[str, Any]:
    if isinstance(run, Measured):
        return {"run": run.path, "kind": run.kind, "environment": run.result["environment"]}
    made = str(run.config.get("provenance", {}).get("tersor", "unknown"))
    return {"run": run.path, "kind": "checkpoint", "environment": {"tersor": made}}


def _speed(run: Measured) -> dict[str, Any]:
    headings, cells = SPEEDS[run.kind](run.result)
    return {
        "run": run.path,
        "kind": run.kind,
        "environment": run.result["environment"],
        "method": run.result.get("method"),
        "facts": {key: value for key, value in run.result.items() if key not in _BESIDE},
        "columns": [" ".join(heading.split()) for heading in headings],
        "rows": cells,
        "skipped": run.result.get("skipped", []),
    }
