"""`tersor demo`: the bundled model in five formats, what each costs and how each continues a prompt."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from tersor.cli import console, options
from tersor.errors import InputError

FORMATS = ("fp6_e2m3", "fp6_e3m2", "fp5_e2m2", "fp4_e2m1", "int4")
PROMPT = "def read_file(path):\n"
PENALTY = 1.2
"""A small model decoded greedily repeats itself without one."""
PACKAGE = Path(__file__).resolve().parents[1]
CHECKOUT = PACKAGE.parents[1]
MODEL = CHECKOUT / "examples" / "tiny-lm"


def command(
    model: Annotated[str | None, typer.Option(help="Another model than the bundled one.")] = None,
    revision: options.Revision = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Keep the compressed models here.")] = None,
    formats: Annotated[list[str] | None, typer.Option("--format", help="A format to show; repeatable.")] = None,
    prompt: Annotated[str, typer.Option(help="What to continue.")] = PROMPT,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Tokens to continue with.")] = 64,
    window: Annotated[int, typer.Option(help="Tokens in a window of the evaluation.")] = 512,
    max_tokens: Annotated[int, typer.Option(help="Tokens of Tersor's own text to evaluate on.")] = 16384,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
) -> None:
    """Compress, evaluate and generate, format by format."""
    from tersor import engine, evaluate, nn
    from tersor.convert import quantize
    from tersor.formats import get_scheme
    from tersor.hardware import resolve_device
    from tersor.integrations.transformers import generate, load

    chosen = tuple(formats or FORMATS)
    for name in chosen:
        get_scheme(name)
    sampling = engine.Sampling(
        temperature=0.0, repetition_penalty=PENALTY, max_new_tokens=max_new_tokens, ignore_eos=True
    )
    torch_device = resolve_device(device)
    found = load.locate(_bundled() if model is None else model, revision)
    console.choose_threads(found.weight_bytes, torch_device)
    load.quiet()
    tokenizer = load.load_tokenizer(found.directory, trust_remote_code=trust_remote_code)
    windows = evaluate.cut_windows(own_text(), tokenizer, window=window, max_tokens=max_tokens)
    base = load.ready_model(found.directory, torch_device, trust_remote_code=trust_remote_code)
    results: list[dict[str, Any]] = []
    with ExitStack() as stack:
        folder = output or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tersor-demo-")))
        for format_name in (None, *chosen):
            where, subject = found, base
            if format_name is not None:
                where = load.locate(_compress(quantize, found.directory, folder, format_name, trust_remote_code))
                subject = load.ready_model(where.directory, torch_device, trust_remote_code=trust_remote_code)
            with console.progress(format_name or "original") as move:
                quality = evaluate.evaluate(subject, windows, reference=base, progress=move)
            generator = generate.Generator(subject, tokenizer)
            stream = generator.stream(prompt, sampling)
            text = "".join(stream)
            bits = nn.bits_per_weight(subject) or where.plain_bits
            results.append(
                {
                    "format": format_name or "original",
                    "bits_per_weight": bits,
                    "weight_bytes": where.weight_bytes,
                    "tokens_per_second": stream.statistics.tokens_per_second,
                    "text": text,
                    **quality.to_dict(),
                }
            )
    if json:
        console.print_json(
            {"model": str(found.directory), "device": str(torch_device), "prompt": prompt, "formats": results}
        )
        return
    _print(results, prompt, f"{found.directory.name} on {torch_device}")
    if output is not None:
        print(f"The compressed models are in {output}.")


def own_text() -> str:
    """Tersor's documentation and sources, one after the other in a fixed order.

    In a checkout README.md, docs/*.md and src/tersor/**/*.py; of an installed package its sources alone.
    """
    files: list[Path] = []
    if (CHECKOUT / "pyproject.toml").is_file():
        files += [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").glob("*.md"))]
    files += sorted(PACKAGE.rglob("*.py"))
    return "\n\n".join(file.read_text(encoding="utf-8") for file in files if file.is_file())


def _bundled() -> Path:
    if not MODEL.is_dir():
        raise InputError("the bundled model is part of a checkout (examples/tiny-lm), not of the package: give --model")
    return MODEL


def _compress(quantize: Any, source: Path, folder: Path, name: str, trust_remote_code: bool) -> Path:
    """Compress `source` and show how far it is."""
    with console.progress(f"compressing to {name}") as move:
        quantize(
            source,
            folder / name,
            format=name,
            progress=lambda done, total, _: move(done, total),
            trust_remote_code=trust_remote_code,
        )
    return folder / name


def _print(results: list[dict[str, Any]], prompt: str, where: str) -> None:
    rows = [
        [
            result["format"],
            f"{result['bits_per_weight']:.2f}",
            console.size(result["weight_bytes"]),
            console.plus_minus(result["perplexity"], result.get("perplexity_error"), 2),
            f"{100 * (result['perplexity_ratio'] - 1):+.2f} %",
            f"{result['kl']:.4f}",
            f"{100 * result['top1_agreement']:.1f} %",
            "-" if result["tokens_per_second"] is None else f"{result['tokens_per_second']:.1f}",
        ]
        for result in results
    ]
    first = results[0]
    print(f"{where}, predicting Tersor's own text: {first['windows']} windows of {first['window']} tokens")
    console.print_table(["format", "bits", "size", "perplexity", "change", "KL", "top-1", "tokens/s"], rows)
    print(
        "bits: stored for a compressed weight, its scales counted; size: all weights on disk; change, KL (nats per "
        "token)\nand top-1 (same most probable token) against the original"
    )
    for result in results:
        print(f"\n--- {result['format']} continues {prompt!r}:")
        print(result["text"].strip("\n"))
