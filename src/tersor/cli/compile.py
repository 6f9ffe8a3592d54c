"""`tersor compile`: compile the kernels of a compressed model ahead of its first run."""

from __future__ import annotations

from typing import Annotated

import typer

from tersor.cli import chips, console, options


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Compressed checkpoint directory or hub id.")],
    revision: options.Revision = None,
    chip: Annotated[
        str | None, typer.Option(metavar="NAME", help="Compile for this GPU, such as h200, not for those here.")
    ] = None,
    activations: Annotated[str, typer.Option(help="16bit, or fp8 as with `generate --activations fp8`.")] = "16bit",
    fuse: Annotated[bool, typer.Option("--fuse", help="Compile what joined layers need, too: gate with up.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Taken as elsewhere; no code of a model is needed here.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Fill the kernel cache."""
    from tersor.formats import Activations
    from tersor.ops import warm

    chosen = Activations.of(activations)
    for_chips = chips.wanted(chip, "to compile for")
    with console.progress("compiling kernels") as move:
        compiled = warm.compile_ahead(model, for_chips, activations=chosen, fuse=fuse, revision=revision, progress=move)
    if json:
        console.print_json(compiled.to_dict())
        return
    where = ", ".join(compiled.architectures)
    print(
        f"{model}: {compiled.kernels} kernels for {where}, {compiled.from_cache} of them there before; "
        f"{compiled.seconds:.1f} s"
    )
