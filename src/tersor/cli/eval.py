"""`tersor eval`: how well do models predict a text, how far are they from a reference, and how do they do at tasks?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tersor.cli import console, options
from tersor.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tersor.evaluate import Comparison, Judgement, Quality
    from tersor.integrations.lm_eval.tasks import TaskScore


def command(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Checkpoint directories or hub ids; one may say how it runs: MODEL@activations=fp8,kv-dtype=fp8.",
        ),
    ],
    text: Annotated[Path | None, typer.Option(help="UTF-8 text file to predict.")] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of the models, all of them hub ids; not of --reference.")
    ] = None,
    reference: Annotated[str | None, typer.Option(help="Model to compare with, of the same vocabulary.")] = None,
    window: Annotated[int, typer.Option(help="Tokens in a window.")] = 512,
    max_tokens: Annotated[int | None, typer.Option(help="Use only the first tokens of the text.")] = None,
    noise_floor: Annotated[
        bool,
        typer.Option(
            "--noise-floor/--no-noise-floor",
            help="Compare the reference with itself, rounded once: a KL below that says nothing.",
        ),
    ] = True,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="TASK[,TASK]",
            help="Tasks of lm-eval to answer in the engine: names, YAML files or folders of them.",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only so many documents of each task.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[
        str,
        typer.Option(help="float32, float16, bfloat16; auto: float32 on a CPU, the checkpoint's on a GPU."),
    ] = "auto",
    activations: Annotated[
        str, typer.Option(help="16bit; fp8, int8, int8:g128: linears quantise activations so.")
    ] = "16bit",
    kv_dtype: Annotated[
        str | None,
        typer.Option(
            help="Run in the engine, keys and values as auto, float16, bfloat16, float32 or fp8; --reference's as auto."
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw size against quality (.png, .pdf, .svg).")] = None,
    trust_remote_code: options.TrustRemoteCode = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write JSON to a file.")] = None,
    json: options.Json = False,
) -> None:
    """Evaluate each model in turn; only one and the reference are in memory at a time."""
    from tersor import evaluate, plots
    from tersor.bench import report
    from tersor.cli import bench
    from tersor.evaluate import plot as drawing
    from tersor.hardware import resolve_device
    from tersor.integrations.transformers import load

    if text is None and tasks is None:
        raise InputError("there is nothing to measure on: give --text FILE, a text to predict, or --tasks TASK")
    for given, name in ((reference, "--reference"), (plot, "--plot"), (max_tokens, "--max-tokens")):
        if text is None and given is not None:
            raise InputError(f"{name} is of a text that is predicted: give --text FILE, too")
    if limit is not None and tasks is None:
        raise InputError("--limit is of tasks: give --tasks TASK, too")
    subjects = [evaluate.subject(name, activations=activations, kv_dtype=kv_dtype) for name in models]
    base = None if reference is None else evaluate.subject(reference)
    torch_device = resolve_device(device)
    load.resolve_dtype(dtype, torch_device)
    content = None if text is None else evaluate.read_text(text)
    if plot is not None:
        plots.check_plot(plot)
    if output is not None:
        bench.check_folder("--output", output)
    chosen = None if tasks is None else evaluate.find_tasks(tasks)
    found = {one.name: load.locate(one.name, revision) for one in subjects}
    if base is not None and base.name not in found:
        found[base.name] = load.locate(base.name)
    console.choose_threads(max(place.weight_bytes for place in found.values()), torch_device)
    load.quiet()
    judgement, scores = None, []
    if content is not None:
        judge = evaluate.Judge(
            text=content,
            found=found,
            device=torch_device,
            dtype=dtype,
            window=window,
            max_tokens=max_tokens,
            trust_remote_code=trust_remote_code,
            progress=console.progress,
        )
        judgement = judge.judge(subjects, base, noise_floor=noise_floor)
        if plot is not None:
            points = [
                drawing.Point(label=one.subject.label, size=one.weight_bytes, quality=one.quality)
                for one in judgement.models
            ]
            floor = judgement.noise_floor
            drawing.plot(points, plot, noise_floor=None if floor is None else floor.quality.kl)
    if chosen is not None:
        scores = evaluate.run_tasks(
            chosen,
            subjects,
            found,
            torch_device,
            dtype=dtype,
            limit=limit,
            trust_remote_code=trust_remote_code,
            progress=console.progress,
        )
    facts = {"text": None if text is None else str(text), "reference": reference, "device": str(torch_device)}
    facts |= {"dtype": dtype, "activations": activations, "kv_dtype": kv_dtype}
    result = {
        "kind": evaluate.KIND,
        "version": evaluate.VERSION,
        "environment": report.environment(),
        **facts,
        **({} if judgement is None else judgement.to_dict()),
        **({} if chosen is None else {"limit": limit, "tasks": [score.to_dict() for score in scores]}),
    }
    if output is not None:
        report.write(output, report.text(result))
    if json:
        console.print_json(result)
        return
    if judgement is not None:
        kept = "" if kv_dtype is None else f"; keys and values: {kv_dtype}"
        show_judgement(judgement, f"{text}: ", kept)
    if scores:
        show_scores(scores, limit)


def show_judgement(judgement: Judgement, source: str, kept: str = "") -> None:
    """Print the table of models and, of two and more, that of their differences to the first.

    Args:
        judgement: what was measured.
        source: begins the line above, such as `text.txt: `.
        kept: ends it.
    """
    first = judgement.models[0].quality
    print(f"{source}{first.windows} windows of {first.window} tokens; +- is one standard error over windows{kept}")
    compared, floor, rows = judgement.reference is not None, judgement.noise_floor, []
    shown = list(judgement.models)
    if judgement.reference is not None and all(one.quality.kl != 0 for one in shown):
        shown.insert(0, judgement.reference)
    for one in shown:
        rows.append(row(one.subject.label, one.weight_bytes, one.bits_per_weight, one.quality))
    if floor is not None:
        rows.append(["noise floor", "", "", *row("", 0, 0.0, floor.quality)[3:]])
    console.print_table(columns(compared), rows)
    if compared:
        print("KL: KL(reference || model) in nats a token, x 1000; its median is over windows, p99 over tokens;")
        print("flips: another most probable token; loss: perplexity above the reference's")
    if floor is not None:
        print(f"noise floor: the reference with {floor.rounding}; a KL below it says nothing")
    labels = [one.subject.label for one in judgement.models]
    found = {j: comparison for i, j, comparison in judgement.comparisons() if i == 0}
    if found:
        differences = [difference_row(labels[j], comparison) for j, comparison in found.items()]
        console.print_table(difference_columns(labels[0], compared), differences)
    for j, label in enumerate(labels):
        if j and j not in found:
            print(f"{label} reads other tokens than {labels[0]}, and is not compared with it")


def columns(compared: bool) -> list[str]:
    """Headings of the table that `row` fills."""
    plain = ["model", "bits/weight", "size", "perplexity"]
    return [*plain, "loss, %", "KL x 1000", "median", "p99", "flips, %"] if compared else plain


def row(label: str, weight_bytes: int, bits: float, quality: Quality) -> list[str]:
    """One model's line: the comparison is there when a reference was."""
    cells = [
        label,
        f"{bits:.2f}",
        console.size(weight_bytes),
        console.plus_minus(quality.perplexity, quality.perplexity_error, 3),
    ]
    if quality.kl is None or quality.perplexity_ratio is None:
        return cells
    return [
        *cells,
        console.measured(100 * (quality.perplexity_ratio - 1), _times(100, quality.perplexity_ratio_error), sign=True),
        console.measured(1000 * quality.kl, _times(1000, quality.kl_error)),
        console.measured(_times(1000, quality.kl_median)),
        console.measured(_times(1000, quality.kl_p99)),
        console.measured(_times(100, quality.flips), _times(100, quality.flips_error)),
    ]


def difference_columns(first: str, compared: bool) -> list[str]:
    """Headings of the table that `difference_row` fills."""
    plain = [f"against {first}", "log perplexity", "first better in"]
    return [*plain, "KL x 1000", "first nearer in"] if compared else plain


def difference_row(label: str, found: Comparison) -> list[str]:
    """One further model's line: its difference to the first, and in how many windows the first is the better one."""
    cells = [
        label,
        console.measured(found.log_perplexity_difference, found.log_perplexity_difference_error, sign=True),
        f"{found.log_perplexity_better} of {found.windows}",
    ]
    if found.kl_difference is None:
        return cells
    return [
        *cells,
        console.measured(1000 * found.kl_difference, _times(1000, found.kl_difference_error), sign=True),
        f"{found.kl_better} of {found.windows}",
    ]


def show_scores(scores: Sequence[TaskScore], limit: int | None) -> None:
    """Print what every model reached at every task."""
    some = "" if limit is None else f" of the first {limit} documents"
    print(f"tasks of lm-eval, in the engine; +- is the standard error{some} that lm-eval gives")
    rows: list[list[Any]] = [
        [one.label, one.task, one.metric, f"{one.documents}", console.measured(one.value, one.error)] for one in scores
    ]
    console.print_table(["model", "task", "metric", "documents", "value"], rows)


def _times(factor: float, value: float | None) -> float | None:
    return None if value is None else factor * value
