"""`tersor batch`: answer a file of requests in OpenAI's batch format."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tersor.cli import console, options, planned
from tersor.engine.config import EngineConfig
from tersor.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from tersor.engine.batch_file import Progress, Report

_ENGINE = EngineConfig()


def command(
    model: Annotated[str, typer.Option("--model", "-m", help="Checkpoint directory or hub id.")],
    input: Annotated[Path, typer.Option("--input", "-i", metavar="FILE", help="Requests: a JSON object a line.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Gets a line an answer, in the order they finish.")
    ],
    errors: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Gets a line a failure; else beside the output.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a job that was begun.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="With --resume: run again what failed.")] = False,
    data_parallel: options.DataParallel = 1,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Engines are actors of a Ray cluster: its address, auto, or local."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What the model is called; requests may not call it anything else then.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Of requests that do not say.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of requests that do not say; 0 is greedy.")] = None,
    tool_parser: options.ToolParser = "auto",
    reasoning_parser: options.ReasoningParser = "auto",
    revision: options.Revision = None,
    device: options.Device = _ENGINE.device,
    dtype: options.Dtype = _ENGINE.dtype,
    activations: options.Activations = _ENGINE.activations,
    kv_dtype: options.KvDtype = _ENGINE.kv_dtype,
    max_length: options.MaxLength = _ENGINE.max_length,
    max_rows: options.ManyRows = _ENGINE.max_rows,
    max_step_tokens: options.MaxStepTokens = _ENGINE.max_step_tokens,
    memory: options.Memory = _ENGINE.memory,
    kv_bytes: options.KvBytes = _ENGINE.kv_bytes,
    tensor_parallel: options.TensorParallel = _ENGINE.tensor_parallel,
    offload: options.Offload = _ENGINE.offload,
    resident_layers: options.ResidentLayers = _ENGINE.resident_layers,
    offload_directory: options.OffloadDirectory = _ENGINE.offload_directory,
    pipeline_parallel: options.PipelineParallel = _ENGINE.pipeline_parallel,
    expert_parallel: options.ExpertParallel = _ENGINE.expert_parallel,
    placement: options.Placed = None,
    plan: options.Planned = None,
    trust_remote_code: options.TrustRemoteCode = False,
    json: Annotated[bool, typer.Option("--json", help="Print what became of the job as JSON.")] = False,
) -> None:
    """Answer a file of requests; what is answered stays, and --resume goes on."""
    if any(importlib.util.find_spec(package) is None for package in ("fastapi", "jinja2")):
        raise UnsupportedError("batches are read as the server reads requests: pip install 'tersor[serve]'")
    if retry_failed and not resume:
        raise InputError("--retry-failed is given without --resume: a new job has no failures yet")
    from tersor.formats import Activations
    from tersor.hardware import resolve_device
    from tersor.integrations.transformers import load
    from tersor.server import batch

    Activations.check(activations)
    given = planned.placement(model, revision, placement, plan)
    data_parallel, placed = planned.copies(given, plan, data_parallel)
    config = EngineConfig(
        device=device,
        dtype=dtype,
        activations=activations,
        kv_dtype=kv_dtype,
        max_length=max_length,
        max_rows=max_rows,
        max_step_tokens=max_step_tokens,
        memory=memory,
        kv_bytes=kv_bytes,
        tensor_parallel=tensor_parallel,
        offload=offload,
        resident_layers=resident_layers,
        offload_directory=offload_directory,
        pipeline_parallel=pipeline_parallel,
        expert_parallel=expert_parallel,
        placement=placed,
        trust_remote_code=trust_remote_code,
    )
    load.quiet()
    where = resolve_device(device)
    console.choose_threads(load.locate(model, revision).weight_bytes, where)
    asked: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature}
    chosen = batch.BatchOptions(
        name=name,
        defaults={option: value for option, value in asked.items() if value is not None},
        resume=resume,
        retry_failed=retry_failed,
        errors=None if errors is None else str(errors),
        data_parallel=data_parallel,
        ray=ray,
        threads=console.threads_each(data_parallel, where),
        tool_parser=tool_parser,
        reasoning_parser=reasoning_parser,
    )
    with _shown() as (move, stop), console.telling():
        report = batch.answer_file(
            model, input, output, config, chosen, revision=revision, on_progress=move, on_stop=stop
        )
    if json:
        console.print_json(told(report))
    else:
        print(report.message, file=sys.stderr if report.interrupted else sys.stdout)
    if report.exit_status:
        raise typer.Exit(report.exit_status)


@contextmanager
def _shown() -> Iterator[tuple[Callable[[Progress], None], Callable[[], None]]]:
    """Show a bar, rates and the time left on a terminal, through stderr; yield what moves it and what says it stops."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rates]}"))
    screen = Console(stderr=True)
    with Bars(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task("answering", total=None, rates="")

        def move(now: Progress) -> None:
            bar.update(task, completed=now.done + now.failed, total=now.total, rates=rates(now))

        yield move, lambda: bar.update(task, description="finishing what runs")


def told(report: Report) -> dict[str, Any]:
    """What became of a job, as JSON values."""
    now = report.progress
    return {
        "total": now.total,
        "answered": now.done,
        "failed": now.failed,
        "before": now.before,
        "seconds": now.seconds,
        "tokens": now.drawn,
        "interrupted": report.interrupted,
        "output": str(report.output),
        "errors": str(report.errors),
    }


def rates(now: Progress) -> str:
    """What a job does a second, how long the rest takes, and how much failed, in words."""
    words = [f"{now.rate:.1f} requests/s", f"{now.drawn / now.seconds if now.seconds else 0:.0f} tokens/s"]
    if now.left is not None:
        minutes, seconds = divmod(round(now.left), 60)
        words.append(f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left")
    if now.failed:
        words.append(f"{now.failed} failed")
    return ", ".join(words)
