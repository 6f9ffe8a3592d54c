"""Time decode steps of a whole model: 16-bit weights against packed ones, both as CUDA graphs.

    python bench/generate.py
    python bench/generate.py --layers 4 --formats fp6_e3m2,int4 --eager
    python bench/generate.py --geometry qwen3-30b-a3b --batch 1,8,32,64

The weights are random and made on the GPU (nothing is downloaded); time does not depend on them. A step's time is the
wall clock of the loop of `integrations.transformers.generate`, a step under way while the host waits for the tokens
before it; that of the engine is measured by `tersor bench latency`. One row decodes greedily, several draw at
temperature 1, so that they part and their tokens go to experts of their own. `roof` is the time to read the weights
once, of a mixture those of the experts that a step's tokens go to, counted in one step of each row, at the read
bandwidth measured in the same run. The experts of a plain mixture run by torch's grouped product and by the batched one
of transformers; the faster counts as the baseline. `--eager` adds rows for the same step launched one kernel at a time.
With `--device cpu` a tiny geometry runs through the same code and nothing is written.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from typing import Any

import geometries
import results_file
import torch

from tersor.bench import timing
from tersor.engine import Sampling
from tersor.errors import TersorError
from tersor.formats import dtype_name, get_scheme
from tersor.integrations.transformers.decode import Decoder
from tersor.integrations.transformers.step_experts import BATCHED, GROUPED

RUNS = 3
EAGER_STEPS = 16
DEFAULTS = {
    geometries.LLAMA: ("float16", 128, "generate_h200"),
    geometries.QWEN_MOE: ("bfloat16", 32, "generate_moe_h200"),
}
"""Geometry -> dtype of activations, steps and name of the results; torch's grouped product takes bfloat16 alone."""


def main(words: list[str] | None = None) -> list[dict[str, Any]]:
    """Parse the command line, measure, print a line a row, write the results, and return the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", default=geometries.LLAMA, choices=list(geometries.GEOMETRIES))
    parser.add_argument("--layers", type=int, help="decoder layers; default: those of the geometry")
    parser.add_argument("--batch", default="1", help="rows of a step, separated by commas")
    parser.add_argument("--formats", default="fp6_e3m2", help="formats, separated by commas")
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], help="default: float16; bfloat16 of a mixture")
    parser.add_argument("--experts", default=f"{GROUPED},{BATCHED}", help="how those of the baseline run: one or both")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, help=f"of a timed run, 128 or 32; the median of {RUNS} runs counts")
    parser.add_argument("--eager", action="store_true", help="time steps that are no CUDA graph, too")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--output", help="name of the file under bench/results")
    arguments = parser.parse_args(words)
    on_gpu = arguments.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        parser.error("no CUDA device here: --device cpu runs a tiny geometry through the same code")
    sizes = dict((geometries.GEOMETRIES if on_gpu else geometries.TINY)[arguments.geometry])
    if arguments.layers is not None:
        sizes["num_hidden_layers"] = arguments.layers
    own_dtype, own_steps, own_output = DEFAULTS[arguments.geometry]
    dtype = getattr(torch, arguments.dtype or own_dtype) if on_gpu else torch.float32
    all_steps = arguments.steps or own_steps
    batches = [int(word) if word.isdigit() else 0 for word in arguments.batch.split(",")]
    ways = arguments.experts.split(",")
    if 0 in batches or not {GROUPED, BATCHED}.issuperset(ways):
        parser.error("--batch takes numbers from 1 on, --experts grouped_mm, batched_mm or both")
    bandwidth = timing.read_bandwidth() if on_gpu else None
    rows: list[dict[str, Any]] = []
    for scheme in [None, *(get_scheme(name) for name in arguments.formats.split(","))]:
        started = time.perf_counter()
        model = geometries.build(arguments.geometry, sizes, scheme, arguments.device, dtype)
        if on_gpu:
            torch.cuda.synchronize()
        weights = dtype_name(dtype) if scheme is None else scheme.key()
        print(f"{weights}: built in {time.perf_counter() - started:.1f} s", flush=True)
        plain_mixture = scheme is None and "num_experts" in sizes
        for way in ways if plain_mixture else [None]:
            if way is not None:
                model.set_experts_implementation(way)
            for batch in batches:
                for use_graph in (True, False) if on_gpu and arguments.eager else (on_gpu,):
                    steps = all_steps if use_graph or not on_gpu else EAGER_STEPS
                    row = {"weights": weights, **({} if way is None else {"experts": way}), "batch": batch}
                    row |= measure(model, arguments.prompt_tokens, steps, use_graph, batch)
                    if bandwidth is not None and "read_bytes" in row:
                        row["roof_ms"] = round(row["read_bytes"] / bandwidth * 1e3, 3)
                    rows.append(row)
                    print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        del model
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
    print(table(rows, batches, use_graph=on_gpu))
    if not on_gpu:
        return rows
    path = results_file.write(
        arguments.output or own_output,
        {
            "geometry": {"name": arguments.geometry, **sizes},
            "dtype": dtype_name(dtype),
            "prompt_tokens": arguments.prompt_tokens,
            "steps": all_steps,
            "read_bandwidth": bandwidth,
            "transformers": _transformers_version(),
            "rows": rows,
        },
    )
    print(f"written to {path}")
    return rows


def measure(model: Any, prompt_tokens: int, steps: int, use_graph: bool, batch: int = 1) -> dict[str, Any]:
    """Time decode steps of `batch` rows after a prompt of random tokens; say what failed where they cannot run."""
    options = Sampling(temperature=float(batch > 1), seed=0, max_new_tokens=1).resolved(model.generation_config)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(model.config.vocab_size, (prompt_tokens,), generator=generator).tolist()
    try:
        decoder = Decoder(model, options, prompt_tokens + RUNS * steps + 4, use_graph, batch)
        decoder.prefill(prompt, 0)
        decoder.step()
        times = [run(decoder, steps) for _ in range(RUNS)]
    except (TersorError, torch.OutOfMemoryError) as error:
        return {"cuda_graph": use_graph, "failed": str(error).splitlines()[0]}
    seconds = statistics.median(times) / steps
    hits = geometries.experts_hit(model, decoder._forward)
    weight_bytes, read_bytes = geometries.read_bytes(model, hits)
    return {
        "cuda_graph": decoder.graph is not None,
        "tokens_per_second": round(batch / seconds, 1),
        "ms_per_step": round(seconds * 1e3, 3),
        "weight_bytes": weight_bytes,
        "read_bytes": read_bytes,
        **({"experts_hit": hits} if hits else {}),
        "cache_tokens": decoder.length,
        "capture_seconds": round(decoder.capture_seconds, 2),
    }


def run(decoder: Decoder, steps: int) -> float:
    """Return the seconds that `steps` steps take, from tokens on the host to the last ones there."""
    before = decoder.publish()
    decoder.fetch(before)
    start = time.perf_counter()
    for _ in range(steps):
        decoder.step()
        token = decoder.publish()
        decoder.fetch(before)
        before = token
    decoder.fetch(before)
    return time.perf_counter() - start


def table(rows: list[dict[str, Any]], batches: list[int], use_graph: bool) -> str:
    """Return ms a step of every kind of weights, the faster way of the baseline's experts, and times its speed."""
    lines = ["batch  weights                      ms/step  roof ms  baseline/this"]
    for batch in batches:
        baseline = None
        there = [r for r in rows if r["batch"] == batch and r["cuda_graph"] == use_graph and "failed" not in r]
        for weights in dict.fromkeys(row["weights"] for row in there):
            best = min((row for row in there if row["weights"] == weights), key=lambda row: row["ms_per_step"])
            baseline = baseline or best["ms_per_step"]
            name = weights + (f" ({best['experts']})" if "experts" in best else "")
            roof = f"{best['roof_ms']:8.3f}" if "roof_ms" in best else "       -"
            lines.append(
                f"{batch:5}  {name:27} {best['ms_per_step']:8.3f} {roof} {baseline / best['ms_per_step']:14.2f}"
            )
    return "\n".join(lines)


def _transformers_version() -> str:
    import transformers

    return transformers.__version__


if __name__ == "__main__":
    main()
