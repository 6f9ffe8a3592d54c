"""How long does attention over pages take, beside the time that its bytes take?

    python bench/attention.py
    python bench/attention.py --heads 64 --kv-heads 8 --pages e4m3 --prefill
    python bench/attention.py --groups

A CUDA graph walks over caches that together do not fit the L2 cache, each launch as in a step: it starts before the one
ahead has ended, norms nothing, rotates, appends one token a row, and attends. `roof` is the time of keys and values at
the bandwidth that a large read reaches. With `--prefill`, rows of many tokens follow, in TFLOP/s of what they see, by
the kernel of the GPU and, where warpgroups multiply in that one, by the one in which warps do. With `--groups`, steps
follow whose rows share pages (`bench/shared_pages.py`), and nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from typing import Any

import results_file
import shared_pages
import torch

from tersor import hardware, ops
from tersor.bench import timing
from tersor.kernels import attention, attention_sm90, decode_attention, jit, shared_attention
from tersor.ops import serve_attention

BATCHES = (1, 8, 32)
CONTEXTS = (512, 2048, 8192)
PREFILLS = ((16, 512, 512), (4, 2048, 2048), (1, 8192, 8192), (8, 256, 8192), (8, 16, 8192), (1, 64, 8192))
"""Rows, new tokens of each, tokens of each text."""
LEAST_BYTES = 300 << 20
MOST_CACHES = 150


def main() -> None:
    """Parse the command line, compile, measure, print a table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=32, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=8, help="heads of keys and values")
    parser.add_argument("--head-dim", type=int, default=128, help="channels of a head")
    parser.add_argument("--pages", choices=("float16", "e4m3"), default="float16", help="numbers in pages")
    parser.add_argument("--batch", default=",".join(map(str, BATCHES)), help="rows of a step")
    parser.add_argument("--context", default=",".join(map(str, CONTEXTS)), help="tokens of each text")
    parser.add_argument("--prefill", action="store_true", help="time rows of many tokens, too")
    parser.add_argument("--groups", action="store_true", help="time rows that share pages")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("timing needs a CUDA device")
    form = ops.AttentionForm(
        heads=arguments.heads,
        kv_heads=arguments.kv_heads,
        head_dim=arguments.head_dim,
        scale=arguments.head_dim**-0.5,
        rotary_dim=arguments.head_dim,
    )
    e4m3, chip = arguments.pages == "e4m3", hardware.of_device(0)
    kind = attention.Kind(head_dim=form.head_dim, dtype="float16", e4m3=e4m3)
    group = form.heads // form.kv_heads
    most = {kind.query_tiles(n * group) for n in (1, attention.FEW_QUERIES)}
    sources = {decode_attention.decode_source(kind, tiles, chip, False, one) for tiles in most for one in (False, True)}
    sources |= {attention.append_source(kind), attention.prefill_source(kind, chip)}
    kernels = ["warps"]
    if attention_sm90.takes(kind, chip):
        kernels.insert(0, "warpgroups")
        sources.add(attention_sm90.prefill_source(kind, chip))
    if arguments.groups:
        tiles = kind.query_tiles(group)
        sources = {decode_attention.decode_source(kind, tiles, chip, shares) for shares in (False, True)}
        sources.add(shared_attention.shared_source(kind, chip))
    jit.compile_many(list(sources), jit.arch_for(torch.cuda.get_device_capability()), os.cpu_count())
    gpu = results_file.gpu()
    about = {"heads": form.heads, "kv_heads": form.kv_heads, "head_dim": form.head_dim, "pages": arguments.pages}
    if arguments.groups:
        with torch.inference_mode():
            shared = shared_pages.measure(form, e4m3)
        print(f"written to {results_file.write(f'attention_groups_{gpu}', {**about, 'rows': shared})}")
        return
    bandwidth = timing.read_bandwidth()
    torch.cuda.empty_cache()
    print(f"{torch.cuda.get_device_name()}: {bandwidth / 1e12:.2f} TB/s read")
    found: list[dict[str, Any]] = []
    with torch.inference_mode():
        for context in (int(number) for number in arguments.context.split(",")):
            for batch in (int(number) for number in arguments.batch.split(",")):
                microseconds, nbytes = measure(form, batch, 1, context, e4m3)
                roof = nbytes / bandwidth * 1e6
                found.append({"batch": batch, "context": context, "us": round(microseconds, 2), "roof": round(roof, 2)})
                print(f"batch {batch:4} context {context:6}: {microseconds:8.2f} us, roof {roof:8.2f}", flush=True)
        for rows, fresh, length in PREFILLS if arguments.prefill else ():
            pairs = rows * (fresh * length - fresh * (fresh - 1) / 2)
            for kernel in kernels:
                with only(kernel):
                    microseconds, _ = measure(form, rows, fresh, length, e4m3)
                tflops = 4 * pairs * form.heads * form.head_dim / microseconds / 1e6
                step = {"batch": rows, "new": fresh, "context": length, "kernel": kernel}
                found.append({**step, "us": round(microseconds, 1), "tflops": round(tflops, 1)})
                words = f"{rows:4} rows of {fresh:5} of {length:6}, {kernel:10}"
                print(f"{words}: {microseconds:9.1f} us, {tflops:6.1f} TFLOP/s", flush=True)
    print(f"written to {results_file.write(f'attention_{gpu}', {**about, 'rows': found})}")


@contextlib.contextmanager
def only(kernel: str) -> Iterator[None]:
    """Prefill by one kernel: `warpgroups`, or `warps` where another would serve, too."""
    takes = attention_sm90.takes
    if kernel == "warps":
        attention_sm90.takes = lambda kind, chip: False
    serve_attention._prepared.cache_clear()
    try:
        yield
    finally:
        attention_sm90.takes = takes
        serve_attention._prepared.cache_clear()


def measure(form: ops.AttentionForm, batch: int, fresh: int, length: int, e4m3: bool) -> tuple[float, int]:
    """Return microseconds of one launch, and the bytes of keys and values that it reads."""
    of_text = -(-length // ops.PAGE)
    dtype = torch.float8_e4m3fn if e4m3 else torch.float16
    token_bytes = 2 * form.kv_heads * (form.head_dim * dtype.itemsize + (4 if e4m3 else 0))
    count = min(max(2, -(-LEAST_BYTES // (batch * length * token_bytes))), MOST_CACHES)
    caches = [ops.PagedCache.empty(1 + batch * of_text, form, dtype, "cuda") for _ in range(count)]
    for cache in caches:
        cache.pages.view(torch.int8).random_(-60, 60)  # any finite numbers
    table = 1 + torch.randperm(batch * of_text, device="cuda").int().view(batch, of_text)
    starts = torch.arange(0, batch * fresh + 1, fresh, dtype=torch.int32, device="cuda")
    lengths = torch.full((batch,), length, dtype=torch.int32, device="cuda")
    rows = ops.Rows(starts, lengths, table, fresh, length, settled=True)
    qkv = torch.randn(batch * fresh, form.qkv_channels, dtype=torch.float16, device="cuda")
    rotary = torch.randn(length, form.rotary_dim, device="cuda")
    calls = [lambda cache=cache: ops.attend(qkv, cache, rows, form, rotary) for cache in caches]
    repeats = max(1, min(100 // count, 2000 // (batch * fresh)))
    return timing.graph_microseconds(calls * repeats, replays=5), batch * length * token_bytes


if __name__ == "__main__":
    main()
