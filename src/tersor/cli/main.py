"""The `tersor` command: one verb a module of this package, loaded when it is asked for.

Exit status: 0 done, 1 a failure, 2 bad usage or bad input, 130 interrupted. An error is one line on stderr.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from tersor.errors import TersorError
from tersor.version import __version__

VERBS: dict[str, tuple[str, str]] = {
    "quantize": ("tersor.cli.quantize", "Compress the linear weights of a checkpoint."),
    "inspect": ("tersor.cli.inspect", "Show what a checkpoint holds: format, bits and size of every layer."),
    "eval": ("tersor.cli.eval", "Measure perplexity, and divergence from a reference model, on a text."),
    "generate": ("tersor.cli.generate", "Continue a prompt with a model; the text streams to stdout."),
    "doctor": ("tersor.cli.doctor", "Show versions, GPUs, who serves a linear and why, and the kernel cache."),
    "demo": ("tersor.cli.demo", "Compress the bundled model to five formats and compare them."),
}
"""verb -> (module of this package that defines `command`, one line of help)."""


class _Verbs(TyperGroup):
    """A command group that imports the module of a verb when that verb is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in VERBS:
            return None
        module_name, summary = VERBS[cmd_name]
        verb = typer.Typer(add_completion=False, rich_markup_mode=None)
        verb.command(name=cmd_name, help=summary)(importlib.import_module(module_name).command)
        command = typer.main.get_command(verb)
        command.name = cmd_name
        return command


def _version(value: bool) -> None:
    if value:
        print(f"tersor {__version__}")
        raise typer.Exit


app = typer.Typer(cls=_Verbs, add_completion=False, no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Compress language models and run them from compressed weights."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its status.

    Args:
        arguments: the words after `tersor`; `None` takes the process's own.
    """
    raise SystemExit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit status; errors are printed, never raised."""
    command = typer.main.get_command(app)
    try:
        status = command.main(args=arguments, prog_name="tersor", standalone_mode=False)
    except TersorError as error:
        print(f"tersor: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("tersor: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        # typer carries its own copy of click in some versions, so usage errors are known by their shape.
        message = getattr(error, "format_message", None)
        if message is None:
            if type(error).__name__ == "Abort":
                print("tersor: interrupted", file=sys.stderr)
                return 130
            raise
        text = " ".join(message().split())
        if text:
            context = getattr(error, "ctx", None)
            where = f" (see '{context.command_path} --help')" if context is not None else ""
            print(f"tersor: {text}{where}", file=sys.stderr)
            return 2
        return 0 if type(error).__name__ == "NoArgsIsHelpError" else 2
    return status if isinstance(status, int) else 0
