"""Options that verbs share, called the same and said in the same words."""

from __future__ import annotations

from typing import Annotated

import typer

TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model, as if it were yours.")
]

Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
