"""`tersor run PLAN VERB ...`: serve, batch, generate or time by a plan, as `--plan` of that verb."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tersor.errors import InputError, did_you_mean

CONTEXT = {"ignore_unknown_options": True, "allow_interspersed_args": False}
"""Options behind the verb are the verb's."""
RUNS = {"serve": 1, "batch": 1, "generate": 1, "bench": 2}
"""Verbs that take a plan, and how many words they are."""


def command(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="What tersor plan -o wrote.")],
    verb: Annotated[
        str, typer.Argument(metavar="VERB", help="serve, batch, generate, bench latency or bench throughput.")
    ],
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[WORDS]...", help="What the verb takes.", show_default=False)
    ] = None,
) -> None:
    """Run a verb by a plan; under torchrun every process is a rank of it."""
    if verb not in RUNS:
        known = "serve, batch, generate, bench latency or throughput"
        raise InputError(f"no verb {verb!r} runs a plan{did_you_mean(verb, RUNS)}: {known}")
    from tersor.cli.main import run

    given = [verb, *(words or [])]
    raise typer.Exit(run([*given[: RUNS[verb]], "--plan", str(plan), *given[RUNS[verb] :]]))
