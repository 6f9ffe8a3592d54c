"""What runs in vLLM's process? It loads a model, and times what a file asks for; `process` starts it.

Answers are JSON, a line each, where stdout was; what vLLM itself prints goes to stderr.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tersor.bench import workloads
from tersor.bench.vllm import loading

Answers = Iterator[dict[str, Any]]
_PREFILLED = 32768
"""Tokens of the prompts that are timed at once."""


def main() -> None:
    """Answer what the file that is named on the command line asks."""
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as lines:
        os.dup2(2, 1)
        os.environ.update(asked["environment"])
        if asked["gpu"] is not None:
            seen = os.environ.get("CUDA_VISIBLE_DEVICES")
            os.environ["CUDA_VISIBLE_DEVICES"] = seen.split(",")[asked["gpu"]] if seen else str(asked["gpu"])

        def answer(**found: Any) -> None:
            print(json.dumps(found), file=lines, flush=True)

        try:
            if asked["llm"].get("load_format") == loading.FORMAT:
                loading.register()
            from vllm import LLM

            for found in TASKS[asked["task"]](LLM(**asked["llm"]), **asked["arguments"]):
                answer(**found)
        except Exception as error:
            answer(error=f"{type(error).__name__}: {error}")
            raise
        answer(done=True)


def latency(
    llm: Any,
    *,
    batches: Sequence[int],
    contexts: Sequence[int],
    steps: int,
    runs: int,
    vocabulary: int,
    prefill: int | None = None,
) -> Answers:
    """Time decode steps: what so many more tokens of every row take, a row being found in pages but for its last ones.

    Args:
        llm: `vllm.LLM`.
        batches, contexts: rows, and tokens of their texts in the middle of the steps; every pair is timed.
        steps: of a run.
        runs: whose median is taken.
        vocabulary: of the random tokens.
        prefill: tokens of prompts of which nothing is in pages, and which draw one token each, all of them at once;
            these are timed first. `None` times none.
    """
    random = np.random.Generator(np.random.PCG64(0))
    if prefill is not None:
        count = max(1, _PREFILLED // prefill)
        one = [_params(max_tokens=1, temperature=0)] * count
        times = []
        for _ in range(runs + 1):
            prompts = list(random.integers(1, vocabulary, (count, prefill)))
            times.append(_answered(llm, prompts, one)[0])
        seconds = statistics.median(times[1:])
        yield {"prompts": count, "prompt_tokens": prefill, "tokens_per_second": count * prefill / seconds}
    for context in contexts:
        length = max(1, context - steps // 2)
        for batch in batches:
            cell = {"batch": batch, "context": context}
            room, needed = _room(llm), batch * (length + steps + 1)
            if room < needed:
                yield {**cell, "why": f"its keys and values hold {room} tokens, and the rows have {needed}"}
                continue
            prompts = list(random.integers(1, vocabulary, (batch, length)))
            few, many = ([_params(max_tokens=drawn, temperature=0)] * batch for drawn in (1, steps + 1))
            _answered(llm, prompts, many)
            times = [_answered(llm, prompts, many)[0] - _answered(llm, prompts, few)[0] for _ in range(runs)]
            yield {**cell, "milliseconds": statistics.median(times) / steps * 1e3}


def throughput(llm: Any, *, loads: Sequence[dict[str, Any]], orders: Sequence[str], warm: int) -> Answers:
    """Answer workloads, in every order once, each with empty pages.

    Args:
        llm: `vllm.LLM`.
        loads: `name` and `settings` of the workloads, which make the same prompts here.
        orders: sorted or shuffled, the latter being as they come.
        warm: requests of a run before each, which is not timed.
    """
    for asked in loads:
        load = workloads.make(asked["name"], **asked["settings"])
        # of several answers to a prompt vLLM draws none greedily
        drawing = {"n": load.samples, "temperature": 0 if load.samples == 1 else 1}
        params = [_params(max_tokens=int(output), **drawing) for output in load.outputs]
        for order in orders:
            _answered(llm, load.prompts[:warm], params[:warm])
            if not llm.reset_prefix_cache():
                raise RuntimeError("vLLM did not empty its pages")
            begun = time.perf_counter()
            places = list(range(len(params)))
            if order == workloads.SORTED:
                places.sort(key=lambda place: workloads.sort_key(load.prompts[place]))
            planned = time.perf_counter() - begun
            seconds, outputs = _answered(
                llm, [load.prompts[place] for place in places], [params[place] for place in places]
            )
            cached = sum(output.num_cached_tokens for output in outputs) if load.samples == 1 else None
            found = {"seconds": planned + seconds, "plan_seconds": planned, "cached": cached}
            yield {"workload": load.name, "order": order, **found}


TASKS: dict[str, Callable[..., Answers]] = {"latency": latency, "throughput": throughput}
"""What a file may ask for."""


def _params(**own: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(ignore_eos=True, detokenize=False, **own)


def _answered(llm: Any, prompts: Sequence[Any], params: Sequence[Any]) -> tuple[float, list[Any]]:
    """Return the seconds from tokens to tokens, and vLLM's outputs.

    Args:
        llm: `vllm.LLM`.
        prompts: int [length] each.
        params: one a prompt.
    """
    from vllm import TokensPrompt

    begun = time.perf_counter()
    outputs = llm.generate(
        [TokensPrompt(prompt_token_ids=prompt.tolist()) for prompt in prompts], params, use_tqdm=False
    )
    seconds = time.perf_counter() - begun
    drawn = sum(len(one.token_ids) for output in outputs for one in output.outputs)
    expected = sum(one.n * one.max_tokens for one in params)
    if drawn != expected:
        raise RuntimeError(f"{drawn} tokens were drawn, expected {expected}")
    return seconds, outputs


def _room(llm: Any) -> int:
    """Return how many tokens' keys and values there is room for."""
    room = getattr(llm.llm_engine.vllm_config.cache_config, "kv_cache_size_tokens", None)
    if room is None:
        raise RuntimeError("this vLLM does not say how many tokens its keys and values hold: 0.26 does")
    return room


if __name__ == "__main__":
    main()
