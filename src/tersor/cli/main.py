"""The `tersor` command: one verb a module of this package, loaded when it is asked for.

Exit status: 0 done, 1 a failure, 2 bad usage or bad input, 130 interrupted. An error is one line on stderr.
A reader that stops early (`tersor inspect MODEL | head`) ends the command quietly, status 1.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from tersor.errors import InputError, TersorError, did_you_mean
from tersor.version import __version__

VERBS: dict[str, tuple[str, str]] = {
    "quantize": ("tersor.cli.quantize", "Compress the linear weights of a checkpoint."),
    "prune": ("tersor.cli.prune", "Make weights of a checkpoint zero, fit the others, and store it smaller."),
    "inspect": ("tersor.cli.inspect", "Show what a checkpoint holds: format, bits and size of every layer."),
    "eval": ("tersor.cli.eval", "Measure perplexity, divergence from a reference model, and answers to tasks."),
    "report": ("tersor.cli.report", "Write one page of what was measured of models, and of what they are made of."),
    "generate": ("tersor.cli.generate", "Continue a prompt with a model; the text streams to stdout."),
    "serve": ("tersor.cli.serve", "Answer over HTTP by OpenAI's API, with a chat page, until told to end."),
    "batch": (
        "tersor.cli.batch",
        "Answer a file of requests in OpenAI's batch format; --resume goes on.",
    ),
    "plan": ("tersor.cli.plan", "Plan how a model is spread over GPUs: what each holds, what it costs, and why."),
    "run": ("tersor.cli.run", "Serve, batch, generate or time a model by a plan."),
    "bench": ("tersor.cli.bench", "Time linears, experts, decode steps and workloads; find the fastest kernels."),
    "compile": ("tersor.cli.compile", "Compile the kernels of a compressed model ahead of its first run."),
    "doctor": ("tersor.cli.doctor", "Show versions, GPUs, who serves a linear and why, and the kernel cache."),
    "demo": ("tersor.cli.demo", "Compress the bundled model to five formats and compare them."),
}
"""verb -> (module of this package that defines `command`, or `VERBS` of its own, and one line of help); `CONTEXT` of a
module says how its words are parsed, where not as usual."""

INTERRUPTED = 130
"""Exit status of a command ended by Ctrl-C."""


class _Verbs(TyperGroup):
    """A command group that imports the module of a verb when that verb is called."""

    verbs = VERBS
    path = "tersor"

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.verbs)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in self.verbs:
            near = did_you_mean(cmd_name, self.verbs)
            raise InputError(f"no verb {cmd_name!r}{near} (verbs: {', '.join(self.verbs)}; see '{self.path} --help')")
        module_name, summary = self.verbs[cmd_name]
        module = importlib.import_module(module_name)
        if hasattr(module, "VERBS"):
            inner = type("_Inner", (_Verbs,), {"verbs": module.VERBS, "path": f"{self.path} {cmd_name}"})
            verb = typer.Typer(cls=inner, add_completion=False, rich_markup_mode=None)
            verb.callback(help=summary)(lambda: None)
        else:
            verb = typer.Typer(add_completion=False, rich_markup_mode=None)
            settings = getattr(module, "CONTEXT", None)
            verb.command(name=cmd_name, help=summary, context_settings=settings)(module.command)
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
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Compress language models and run them from compressed weights."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its status.

    Args:
        arguments: the words after `tersor`; `None` takes the process's own.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be text
    raise SystemExit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit status; errors are printed, never raised."""
    command = typer.main.get_command(app)
    try:
        status = command.main(args=arguments, prog_name="tersor", standalone_mode=False)
        sys.stdout.flush()
    except TersorError as error:
        print(f"tersor: {_one_line(str(error))}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        status = INTERRUPTED
    except BrokenPipeError:
        # What Python flushes at exit must not fail a second time.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"tersor: {_one_line(where + (error.strerror or str(error)))}", file=sys.stderr)
        return 1
    except Exception as error:
        # typer carries its own copy of click in some versions, so usage errors are known by their shape.
        message = getattr(error, "format_message", None)
        if type(error).__name__ == "Abort":
            status = INTERRUPTED
        elif message is None and str(error).endswith(("null byte", "surrogates not allowed")):
            print(f"tersor: a path holds a character that no path can have: {_one_line(str(error))}", file=sys.stderr)
            return 2  # typer sees to it in newer versions
        elif message is None:
            raise
        else:
            text = " ".join(message().split())
            if not text:
                return 0 if type(error).__name__ == "NoArgsIsHelpError" else 2
            context = getattr(error, "ctx", None)
            where = f" (see '{context.command_path} --help')" if context is not None else ""
            print(f"tersor: {text}{where}", file=sys.stderr)
            return 2
    if status == INTERRUPTED:
        print("tersor: interrupted", file=sys.stderr)
    return status if isinstance(status, int) else 0


def _one_line(text: str) -> str:
    """Return a message on one line, whatever the names in it hold."""
    return "\\n".join(text.splitlines()).encode("utf-8", "backslashreplace").decode()
