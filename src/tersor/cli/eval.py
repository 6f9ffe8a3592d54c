"""`tersor eval`: how well do models predict a text, and how far are they from a reference?"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tersor.cli import console, options
from tersor.errors import InputError

if TYPE_CHECKING:
    from tersor.evaluate import Quality


def command(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Checkpoint directories or hub ids.")],
    text: Annotated[Path, typer.Option(help="UTF-8 text file to predict.")],
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of the models, all of them hub ids; not of --reference.")
    ] = None,
    reference: Annotated[str | None, typer.Option(help="Model to compare with, of the same vocabulary.")] = None,
    window: Annotated[int, typer.Option(help="Tokens in a window.")] = 512,
    max_tokens: Annotated[int | None, typer.Option(help="Use only the first tokens of the text.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[
        str,
        typer.Option(help="float32, float16, bfloat16; auto: float32 on a CPU, the checkpoint's on a GPU."),
    ] = "auto",
    activations: Annotated[
        str, typer.Option(help="16bit; fp8, int8: linears quantise activations so, one scale a token.")
    ] = "16bit",
    kv_dtype: Annotated[
        str | None,
        typer.Option(
            help="Run in the engine, keys and values as auto, float16, bfloat16, float32 or fp8; --reference's as auto."
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw size against quality (.png, .pdf, .svg).")] = None,
    trust_remote_code: options.TrustRemoteCode = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Evaluate each model in turn; only one and the reference are in memory at a time."""
    from tersor import evaluate, nn, plots
    from tersor.engine.config import EngineConfig
    from tersor.evaluate import plot as drawing
    from tersor.formats import Activations
    from tersor.hardware import resolve_device
    from tersor.integrations.transformers import load

    multiplied = Activations.of(activations)
    pages = EngineConfig(kv_dtype=kv_dtype or "auto").pages_dtype
    torch_device = resolve_device(device)
    load.resolve_dtype(dtype, torch_device)
    content = evaluate.read_text(text)
    if plot is not None:
        plots.check_plot(plot)
    found_by_name = {name: load.locate(name, revision) for name in models}
    if reference is not None and reference not in found_by_name:
        found_by_name[reference] = load.locate(reference)
    console.choose_threads(max(found.weight_bytes for found in found_by_name.values()), torch_device)
    load.quiet()
    windows = {
        name: evaluate.cut_windows(
            content,
            load.load_tokenizer(found.directory, trust_remote_code=trust_remote_code),
            window=window,
            max_tokens=max_tokens,
        )
        for name, found in found_by_name.items()
    }

    def ready(name: str, multiplied: Activations) -> Any:
        directory = found_by_name[name].directory
        if kv_dtype is not None:
            return evaluate.engine_model(directory, torch_device, dtype, activations=multiplied)
        return load.ready_model(
            directory, torch_device, dtype, activations=multiplied, trust_remote_code=trust_remote_code
        )

    base = None
    if reference is not None:
        for name in models:
            if not windows[name].equal(windows[reference]):
                raise InputError(
                    f"{name} and the reference {reference} split the text into different tokens: "
                    "compare models of one tokenizer"
                )
        base = ready(reference, Activations.NATIVE)
    results: list[dict[str, Any]] = []
    points: list[drawing.Point] = []
    for name in models:
        same = base is not None and name == reference and multiplied is Activations.NATIVE
        model: Any = base if same else ready(name, multiplied)
        if isinstance(model, evaluate.EngineModel):
            model, bits = model.keeping(pages), model.bits_per_weight
        else:
            bits = nn.bits_per_weight(model)
        with console.progress(_label(name)) as move:
            quality = evaluate.evaluate(model, windows[name], reference=base, progress=move)
        found = found_by_name[name]
        size = {"weight_bytes": found.weight_bytes, "bits_per_weight": bits or found.plain_bits}
        results.append({"model": name, **size, **quality.to_dict()})
        points.append(drawing.Point(label=_label(name), size=found.weight_bytes, quality=quality))
        del model
        gc.collect()
    if plot is not None:
        drawing.plot(points, plot)
    if json:
        facts = {"text": str(text), "reference": reference, "device": str(torch_device), "kv_dtype": kv_dtype}
        console.print_json({**facts, "models": results})
        return
    rows = [
        row(_label(result["model"]), result["weight_bytes"], result["bits_per_weight"], point.quality)
        for result, point in zip(results, points, strict=True)
    ]
    first = points[0].quality
    kept = "" if kv_dtype is None else f"; keys and values: {kv_dtype}"
    print(f"{text}: {first.windows} windows of {first.window} tokens; +- is one standard error over windows{kept}")
    console.print_table(columns(reference is not None), rows)


def columns(compared: bool) -> list[str]:
    """Headings of the table that `row` fills."""
    plain = ["model", "bits/weight", "size", "perplexity"]
    return [*plain, "vs reference", "KL(ref||model)", "KL(model||ref)", "same top-1"] if compared else plain


def row(label: str, weight_bytes: int, bits: float, quality: Quality) -> list[str]:
    """One model's line: the comparison is there when a reference was."""
    cells = [
        label,
        f"{bits:.2f}",
        console.size(weight_bytes),
        console.plus_minus(quality.perplexity, quality.perplexity_error, 3),
    ]
    if quality.perplexity_ratio is None or quality.top1_agreement is None:
        return cells
    ratio_error, same_error = quality.perplexity_ratio_error, quality.top1_agreement_error
    change = f"{100 * (quality.perplexity_ratio - 1):+.2f} %"
    same = console.plus_minus(100 * quality.top1_agreement, None if same_error is None else 100 * same_error, 2)
    return [
        *cells,
        change + ("" if ratio_error is None else f" +- {100 * ratio_error:.2f}"),
        console.plus_minus(quality.kl, quality.kl_error, 5),
        console.plus_minus(quality.kl_reverse, quality.kl_reverse_error, 5),
        f"{same} %",
    ]


def _label(name: str) -> str:
    """What a model is called in a table: its directory's name, or a hub id as it is."""
    directory = Path(name)
    return directory.resolve().name if directory.is_dir() else name
