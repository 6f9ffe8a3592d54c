"""How long does drawing tokens take, by rows and options? And norms and lookups, beside torch's own.

    python bench/sampling.py [--vocabulary 128256] [--dtype bfloat16] [--rows 1,8,32,128] [--output sampling.csv]

Every line is the median of a CUDA graph of calls one after the other, in microseconds a call: what a step pays. Logits
are Gaussian numbers whose spread makes a model's usual entropy (`--spread`); with `flat` in the name they are so alike
that top-p keeps half of the tokens. Takes less than half a minute.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from tersor import ops
from tersor.bench.timing import graph_microseconds
from tersor.ops import Allowed, Listed, SamplingRows

CALLS = 12
"""Of a graph: launches overlap as in a chain of kernels."""


def rows_of(count: int, **options: float) -> SamplingRows:
    """Rows with the same options."""
    values = {"temperature": 0.8, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **options}

    def full(name: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((count,), values[name], dtype=dtype, device="cuda")

    return SamplingRows(
        temperature=full("temperature", torch.float32),
        top_k=full("top_k", torch.int32),
        top_p=full("top_p", torch.float32),
        min_p=full("min_p", torch.float32),
        seeds=torch.arange(count, device="cuda"),
        positions=torch.arange(count, dtype=torch.int32, device="cuda"),
    )


def listed(count: int, tokens: int) -> Listed:
    """Penalties of rows that have seen so many tokens each."""
    starts = torch.arange(count, dtype=torch.int32, device="cuda") * tokens
    each = torch.ones(count, device="cuda")
    return Listed(
        starts=starts,
        ends=starts + tokens,
        tokens=torch.arange(tokens, dtype=torch.int32, device="cuda").repeat(count),
        counts=torch.ones(count * tokens, dtype=torch.int32, device="cuda"),
        biases=torch.zeros(count * tokens, device="cuda"),
        newest=torch.zeros(count, dtype=torch.int64, device="cuda"),
        pending=torch.ones(count, dtype=torch.int32, device="cuda"),
        repetition=each * 1.1,
        presence=each * 0.1,
        frequency=each * 0.1,
    )


def empty_list(count: int) -> Listed:
    """No row has penalties, and the kernel that looks for them runs."""
    found = listed(count, 1)
    return replace(found, ends=found.starts.clone())


def calls(count: int, logits: torch.Tensor, flat: torch.Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield what is timed for so many rows."""
    vocabulary = logits.shape[1]
    plain, greedy = rows_of(count), rows_of(count, temperature=0.0)
    whole = replace(plain, listed=empty_list(count))  # what a step has where any row may have anything
    yield "torch argmax", lambda: logits.argmax(-1)
    yield "torch softmax, noise, argmax", lambda: (logits.float().softmax(-1) / torch.rand_like(logits)).argmax(-1)
    yield "greedy", lambda: ops.draw(logits, replace(greedy, filters=False))
    yield "temperature", lambda: ops.draw(logits, replace(plain, filters=False))
    yield "temperature, flat", lambda: ops.draw(flat, replace(plain, filters=False))
    yield "greedy, all kernels", lambda: ops.draw(logits, replace(whole, temperature=greedy.temperature))
    yield "temperature, all kernels", lambda: ops.draw(logits, whole)
    for name, options in (
        ("top-k 50", {"top_k": 50}),
        ("top-p 0.9", {"top_p": 0.9}),
        ("top-k 50, top-p 0.9", {"top_k": 50, "top_p": 0.9}),
        ("min-p 0.05", {"min_p": 0.05}),
        ("top-p 0.9, min-p 0.05", {"top_p": 0.9, "min_p": 0.05}),
    ):
        filtered = rows_of(count, **options)
        yield name, lambda rows=filtered: ops.draw(logits, rows)  # type: ignore[misc]
        if name == "top-p 0.9":
            yield "top-p 0.9, flat", lambda rows=filtered: ops.draw(flat, rows)  # type: ignore[misc]
    bits = torch.full((count, -(-vocabulary // 32)), -1, dtype=torch.int32, device="cuda")
    masks = Allowed(bits=bits, rows=torch.arange(count, dtype=torch.int32, device="cuda"))
    yield "grammar", lambda: ops.draw(logits, replace(plain, allowed=masks, filters=False))
    targets = torch.zeros(count, dtype=torch.int64, device="cuda")
    for most in (0, 20):
        asks = torch.full((count,), most, dtype=torch.int32, device="cuda")
        yield f"logprobs {most}", lambda asks=asks: ops.logprobs(logits, targets, asks, 20)  # type: ignore[misc]
    penalised = replace(plain, listed=listed(count, 2000), filters=False)
    yield "penalties of 2,000 tokens", lambda: ops.draw(logits, penalised)  # the last: it changes logits


def small_calls(count: int, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield norms and lookups of so many tokens, 4,096 channels."""
    table = torch.randn(32000, 4096, device="cuda").to(dtype)
    x, weight = torch.randn(count, 4096, device="cuda").to(dtype), torch.ones(4096, device="cuda").to(dtype)
    tokens = torch.arange(count, device="cuda")
    yield "torch rms_norm", lambda: torch.nn.functional.rms_norm(x, (4096,), weight, 1e-6)
    yield "rms_norm", lambda: ops.rms_norm(x, weight, 1e-6)
    yield "layer_norm", lambda: ops.layer_norm(x, weight, weight, 1e-5)
    yield "torch embedding", lambda: torch.nn.functional.embedding(tokens, table)
    yield "lookup", lambda: ops.lookup(tokens, table)


def main() -> None:
    """Time everything and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rows", default="1,8,32,128")
    parser.add_argument("--spread", type=float, default=3.5)
    parser.add_argument("--output", help="a CSV file, beside what is printed")
    options = parser.parse_args()
    dtype: torch.dtype = getattr(torch, options.dtype)
    lines = []
    for count in map(int, options.rows.split(",")):
        generator = torch.Generator(device="cuda").manual_seed(0)
        noise = torch.randn(count, options.vocabulary, device="cuda", generator=generator)
        found = [*calls(count, (noise * options.spread).to(dtype), noise.to(dtype))]
        found += [*small_calls(count, dtype if dtype != torch.float32 else torch.bfloat16)]
        for name, call in found:
            lines.append((name, count, round(graph_microseconds([call] * CALLS, replays=5), 2)))
            print(f"{name:32} {count:5} rows {lines[-1][2]:10.2f} us", flush=True)
    if options.output:
        with open(options.output, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("what", "rows", "microseconds"))
            writer.writerows(lines)


if __name__ == "__main__":
    sys.exit(main())
