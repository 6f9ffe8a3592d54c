"""Who has what of a model by `--plan` or `--placement`? Both become a placement before a weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tersor.errors import InputError

if TYPE_CHECKING:
    from tersor.planner.placement import Placement


def placement(model: str, revision: str | None, given: str | None, plan: Path | None) -> str | Placement | None:
    """Return what an engine is to be placed by; `None` is by its axes.

    Args:
        model, revision: the checkpoint.
        given: what `--placement` says.
        plan: what `--plan` says.

    Raises:
        InputError: both are given; the plan is none, is of another version or model, or is not run by the engine.
    """
    if plan is None:
        return given
    _one_of_two(given)
    from tersor.checkpoint.source import open_source
    from tersor.models.planned import placed
    from tersor.planner.plan import read

    found = read(plan)
    with open_source(model, revision) as source:
        return placed(found, source)


def copies(given: str | Placement | None, plan: Path | None, data_parallel: int) -> tuple[int, Placement | None]:
    """Return how many copies of a model there are to be, and what each of them is placed by.

    Args:
        given: what `placement` returned.
        plan: what `--plan` says.
        data_parallel: what `--data-parallel` says; 1 is nothing.

    Raises:
        InputError: the placement is none, or is of another number of copies.
    """
    from tersor.planner.placement import Placement

    placed = Placement.read(given) if isinstance(given, str) else given
    if placed is None or placed.data == 1:
        return data_parallel, placed
    if data_parallel not in (1, placed.data):
        what = "placement" if plan is None else "plan"
        raise InputError(f"--data-parallel is {data_parallel}, and the {what} is of {placed.data} copies")
    return placed.data, replace(placed, data=1)


def of_config(
    raw: Mapping[str, Any], name: str, scheme: str, given: str | None, plan: Path | None
) -> str | Placement | None:
    """Return the same for a model of random weights, by its config.json, name and one scheme; errors as there."""
    if plan is None:
        return given
    _one_of_two(given)
    from tersor.checkpoint.config import parse_scheme
    from tersor.models.planned import placed_config
    from tersor.planner.plan import read

    form = None if scheme == "16bit" else parse_scheme(scheme, None, None, "--format")
    return placed_config(read(plan), raw, name, form)


def _one_of_two(given: str | None) -> None:
    if given is not None:
        raise InputError("--plan and --placement both say who has what: give one of the two")
