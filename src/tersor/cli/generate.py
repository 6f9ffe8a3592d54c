"""`tersor generate`: continue a prompt, the text streaming to stdout and one line of statistics to stderr."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tersor.cli import console, options, planned
from tersor.engine.config import EngineConfig
from tersor.errors import InputError, TersorError, did_you_mean

if TYPE_CHECKING:
    from tersor.engine.continuation import Statistics

GRAPHS = {"auto": None, "on": True, "off": False}
_ALIKE = "the most probable token is always taken, so samples are alike and a seed changes nothing: add --temperature 1"


def command(
    model: Annotated[str, typer.Argument(help="Checkpoint directory or hub id.")],
    prompt: Annotated[str, typer.Option(help="The prompt; - reads standard input.")],
    revision: options.Revision = None,
    chat: Annotated[bool, typer.Option("--chat", help="Apply the model's chat template.")] = False,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens", "-n", help="Most tokens to draw; else what the model's generation config says, or 256."
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="Above 0 samples; 0 is greedy, as is a model whose generation config does not say do_sample."
        ),
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k most probable tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample among tokens that reach this probability.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Drop tokens below this fraction of the best.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1 repeats less.")] = None,
    samples: Annotated[
        int, typer.Option(help="Continue the prompt so many times at once; texts are printed when all have ended.")
    ] = 1,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the generation; repeatable.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end of the text.")] = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    activations: options.Activations = "16bit",
    cuda_graph: Annotated[str, typer.Option(help="Decode step as a CUDA graph: auto, on or off.")] = "auto",
    offload: options.Offload = None,
    resident_layers: options.ResidentLayers = None,
    offload_directory: options.OffloadDirectory = None,
    tensor_parallel: options.TensorParallel = 1,
    pipeline_parallel: options.PipelineParallel = 1,
    expert_parallel: options.ExpertParallel = 1,
    placement: options.Placed = None,
    plan: options.Planned = None,
    trust_remote_code: options.TrustRemoteCode = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON at the end instead of streaming.")] = False,
) -> None:
    """Continue one prompt, once or several times."""
    from tersor import engine, one_prompt
    from tersor.formats import Activations
    from tersor.hardware import resolve_device
    from tersor.integrations.transformers import load
    from tersor.llm import chat_tokens, generation_config

    if cuda_graph not in GRAPHS:
        near = did_you_mean(cuda_graph, GRAPHS)
        raise InputError(f"cuda graph {cuda_graph!r}{near}: use auto, on or off")
    if samples < 1:
        raise InputError(f"samples is {samples}: it must be at least 1")
    Activations.check(activations)
    sampling = engine.Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        max_new_tokens=max_new_tokens,
        stop=tuple(stop or ()),
        ignore_eos=ignore_eos,
    )
    axes = {
        "tensor_parallel": tensor_parallel,
        "pipeline_parallel": pipeline_parallel,
        "expert_parallel": expert_parallel,
    }
    away = {"offload": offload, "resident_layers": resident_layers, "offload_directory": offload_directory}
    ranks = EngineConfig.of(placement=planned.placement(model, revision, placement, plan), **axes, **away)
    text = _read() if prompt == "-" else prompt
    torch_device = resolve_device(device)
    found = load.locate(model, revision)
    console.choose_threads(found.weight_bytes, torch_device)
    load.quiet()
    tokenizer = load.load_tokenizer(found.directory, trust_remote_code=trust_remote_code)
    if (samples > 1 or seed is not None) and not sampling.resolved(generation_config(found.directory)).temperature:
        print(f"tersor: {_ALIKE}", file=sys.stderr, flush=True)
    asked = one_prompt.Asked(
        prompt=chat_tokens(tokenizer, [{"role": "user", "content": text}]) if chat else text,
        sampling=sampling,
        samples=samples,
        device=torch_device,
        dtype=dtype,
        activations=activations,
        cuda_graph=GRAPHS[cuda_graph],
        ranks=ranks,
        trust_remote_code=trust_remote_code,
    )
    with console.telling():
        continuing = one_prompt.ready(found.directory, tokenizer, asked)
    stream = continuing.stream() if samples == 1 else None
    if continuing.why:
        print(f"tersor: {continuing.why}", file=sys.stderr, flush=True)
    if stream is None:
        rows, numbers = continuing.samples()
        if json:
            listed: dict[str, Any] = {"continuations": [row.to_dict() for row in rows], "device": str(torch_device)}
            console.print_json({"model": model, "prompt": text, **listed, **numbers.to_dict()})
            return
        for index, row in enumerate(rows, 1):
            print(f"[{index}/{samples}]\n{row.text}", flush=True)
        print(summary(numbers, torch_device.type), file=sys.stderr)
        return
    if json:
        produced = "".join(stream)
        fields = {
            "text": produced,
            "tokens": stream.tokens,
            "device": str(torch_device),
            **stream.statistics.to_dict(),
        }
        console.print_json({"model": model, "prompt": text, **fields})
        return
    try:
        for piece in stream:
            sys.stdout.write(piece)
            sys.stdout.flush()
        print(flush=True)
    except TersorError:
        if stream.tokens:
            print(flush=True)  # the error begins on a line of its own
        raise
    except BrokenPipeError:
        # The reader has seen enough; what Python flushes at exit must not fail a second time.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    print(summary(stream.statistics, torch_device.type), file=sys.stderr)


def summary(numbers: Statistics, device_type: str) -> str:
    """The statistics of a stream in one line; on a GPU it says whether steps were a CUDA graph."""
    parts = [
        f"{numbers.prompt_tokens} prompt tokens in {numbers.prefill_seconds:.3f} s",
        f"{numbers.new_tokens} new tokens"
        + (f" in {numbers.samples} samples" if numbers.samples > 1 else "")
        + ("" if numbers.tokens_per_second is None else f" at {numbers.tokens_per_second:.1f} tokens/s"),
        f"ended by {numbers.finish_reason}",
    ]
    if numbers.cuda_graph:
        parts.append(f"CUDA graph (captured in {numbers.capture_seconds:.2f} s)")
    elif device_type == "cuda":
        parts.append(f"no CUDA graph: {numbers.eager_reason}")
    return "; ".join(parts)


def _read() -> str:
    """Return what standard input holds, as text."""
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not UTF-8 text: byte {data[error.start]:#04x} at {error.start}") from None
