"""`tersor report`: one page of what was measured of models, and of what they are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tersor.cli import console, options
from tersor.errors import InputError


def command(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="JSON of tersor eval or tersor bench (--output, --json), or directories of compressed checkpoints.",
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the page: one HTML file.")
    ] = None,
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "Tersor report",
    card: Annotated[
        bool,
        typer.Option(
            "--card",
            help="Write into each checkpoint's model card what the runs measured of it, in place of what stands there.",
        ),
    ] = False,
    trust_remote_code: options.TrustRemoteCode = False,
    json: Annotated[bool, typer.Option("--json", help="Print what the page is made of.")] = False,
) -> None:
    """Read all runs, then write one page, which needs no network; nothing is measured."""
    from tersor.bench import report as written
    from tersor.cli import bench
    from tersor.report.card import write_cards
    from tersor.report.document import document
    from tersor.report.page import page
    from tersor.report.runs import read_runs

    if output is None and not card and not json:
        raise InputError("there is nothing to write: give -o FILE, --card or --json")
    if output is not None:
        bench.check_folder("--output", output)
    found = read_runs(runs, trust_remote_code=trust_remote_code)
    made = document(found)
    if output is not None:
        written.write(output, page(made, title))
    cards = write_cards(found) if card else []
    if json:
        console.print_json(made)
    else:
        for group in made["quality"]:
            if group["apart"]:
                print(f"{', '.join(model['label'] for model in group['models'])}: shown apart: {group['apart']}")
    bench.say_written(json, output, *cards)
