"""Which rows do vLLM's answers make? Those of `tersor bench latency` and of `tersor bench throughput`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tersor.bench import latency, random_checkpoint, throughput
from tersor.bench.contenders import UnfitError
from tersor.bench.latency import Latency
from tersor.bench.throughput import Throughput
from tersor.bench.vllm import loading
from tersor.bench.vllm.process import answers
from tersor.bench.vllm.variants import Variant
from tersor.bench.workloads import SHUFFLED, SORTED, Workload
from tersor.engine.config import EngineConfig
from tersor.errors import InputError
from tersor.formats import float_dtype
from tersor.models.config import DecoderConfig

ORDERS = (SORTED, SHUFFLED)
"""Of `throughput.ORDERS` those that vLLM has: it plans nothing."""

_ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""Of one GPU: with a process of its own, the engine would begin with the first rows that it is sent."""


def latencies(
    variants: Sequence[Variant],
    config: Mapping[str, Any],
    name: str,
    batches: Sequence[int],
    contexts: Sequence[int],
    steps: int = latency.STEPS,
    *,
    dtype: str = "float16",
    kv_dtype: str = "auto",
    cuda_graph: bool = True,
    prefill: int | None = None,
) -> Iterator[Latency | latency.Prefill | latency.Skipped]:
    """Time vLLM's decode steps of a model with random weights, the same ones in every format, which are in no file.

    Args:
        variants: the formats of the weights.
        config: config.json of the model.
        name: of the model, for the rows.
        batches, contexts: every pair is timed.
        steps: of a run.
        dtype, kv_dtype: of activations and of what is quantised, and of keys and values.
        cuda_graph: whether vLLM compiles the model and runs it as CUDA graphs.
        prefill: tokens of prompts whose prefill is timed first; `None` is none.

    Raises:
        OutputError: there is no folder for config.json.
    """
    options = {
        "dtype": dtype,
        "kv_cache_dtype": kv_dtype,
        "max_num_seqs": max(batches),
        "gpu_memory_utilization": EngineConfig().memory,
        "enforce_eager": not cuda_graph,
        "load_format": loading.FORMAT,
    }
    if cuda_graph:  # of steps of these rows alone: vLLM's own list is of some 50 sizes, and ends at 512 rows
        options["compilation_config"] = {"cudagraph_capture_sizes": sorted(set(batches))}
    arguments = {
        "batches": list(batches),
        "contexts": list(contexts),
        "steps": steps,
        "runs": latency.RUNS,
        "vocabulary": DecoderConfig.from_dict(config).vocabulary,
        "prefill": prefill,
    }
    longest = max(max(contexts) + steps, prefill or 0) + 1
    with tempfile.TemporaryDirectory(prefix="tersor-random-") as folder:
        random_checkpoint.config_alone(config, longest, Path(folder), float_dtype(dtype))
        for variant in variants:
            try:
                for found in answers(variant, Path(folder), longest, options, "latency", arguments, _ONE_PROCESS):
                    yield _latency(found, name, variant.format, cuda_graph)
            except UnfitError as error:
                yield latency.Skipped(name=name, format=variant.format, what="", why=str(error))


def _latency(
    found: Mapping[str, Any], name: str, format: str, cuda_graph: bool
) -> Latency | latency.Prefill | latency.Skipped:
    if "prompts" in found:
        return latency.Prefill(name=name, format=format, **found)
    batch, context = found["batch"], found["context"]
    if "why" in found:
        return latency.Skipped(name=name, format=format, what=f"{batch} rows of {context} tokens", why=found["why"])
    return Latency(
        name=name,
        format=format,
        batch=batch,
        context=context,
        milliseconds=found["milliseconds"],
        weight_bytes=None,
        kv_bytes=None,
        cuda_graph=cuda_graph,
    )


def check_orders(orders: Sequence[str]) -> list[str]:
    """Return those orders that vLLM runs requests in.

    Raises:
        InputError: it has none of them.
    """
    found = [order for order in orders if order in ORDERS]
    if not found:
        raise InputError(f"--against vllm runs requests {' or '.join(ORDERS)}: add one of them to --order")
    return found


def throughputs(
    variants: Sequence[Variant],
    config: Mapping[str, Any],
    name: str,
    loads: Sequence[Workload],
    orders: Sequence[str],
    engine: EngineConfig,
    *,
    dtype: str = "float16",
    gpu: int | None = None,
) -> Iterator[Throughput | throughput.Skipped]:
    """Answer workloads by vLLM, with random weights, the same ones in every format.

    Args:
        variants: the formats of the weights; without one, none are made.
        config: config.json of the model.
        name: of the model, for the rows.
        loads: what is asked.
        orders: of `ORDERS`.
        engine: rows and tokens of a step, memory, and what keys and values are kept in, as Tersor has them.
        dtype: of activations and of what is quantised.
        gpu: which of those that torch sees.

    Raises:
        OutputError: there is no room for the weights.
    """
    if not variants:
        return
    options: dict[str, Any] = {
        "dtype": dtype,
        "kv_cache_dtype": engine.kv_dtype,
        "max_num_seqs": engine.max_rows,
        "max_num_batched_tokens": engine.max_step_tokens,
        "gpu_memory_utilization": engine.memory,
    }
    if engine.kv_bytes is not None:
        options["kv_cache_memory_bytes"] = engine.kv_bytes
    arguments = {
        "loads": [{"name": load.name, "settings": load.settings} for load in loads],
        "orders": list(orders),
        "warm": throughput.WARM,
    }
    asked = {load.name: load for load in loads}
    best = {load.name: throughput.optimum(load) for load in loads}
    longest = max(map(throughput.context_of, loads))
    with random_checkpoint.temporary(config, longest, float_dtype(dtype), gpu) as model:
        for variant in variants:
            try:
                for found in answers(variant, model, longest, options, "throughput", arguments, gpu=gpu):
                    load = asked[found["workload"]]
                    yield _throughput(found, name, variant.format, load, best[load.name])
            except UnfitError as error:
                yield throughput.Skipped(name=name, format=variant.format, why=str(error))


def _throughput(found: Mapping[str, Any], name: str, format: str, load: Workload, best: float) -> Throughput:
    total = load.samples * load.tokens
    return Throughput(
        name=name,
        format=format,
        workload=load.name,
        order=found["order"],
        requests=len(load.prompts),
        prompt_tokens=total,
        output_tokens=load.samples * int(load.outputs.sum()),
        seconds=found["seconds"],
        plan_seconds=found["plan_seconds"],
        reuse=None if found["cached"] is None else found["cached"] / total,
        optimum=best,
    )
