"""In vLLM on a GPU: greedy texts are those of our engine, up to ties, compiled and in CUDA graphs, of every weight."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import packed_models, tiny_lm

import tersor

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.timeout(900),
]

PROMPTS = [[3 + (7 * row + place) % 90 for place in range(length)] for row, length in enumerate((5, 33, 64, 130))]
TOKENS = 24
GRAPHS = {"compilation_config": {"cudagraph_capture_sizes": [1, 2, 4]}}
"""As many as there are prompts: each takes time."""
INSIDE = """
import json, sys
from tersor.integrations import vllm as plugin
plugin.register()
from vllm import LLM, SamplingParams, TokensPrompt
if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    llm = LLM(asked["model"], skip_tokenizer_init=True, dtype=asked["dtype"], max_model_len=256, seed=0,
              gpu_memory_utilization=0.05, kv_cache_memory_bytes=1 << 28, **asked["options"])
    params = SamplingParams(max_tokens=asked["tokens"], temperature=0, ignore_eos=True, detokenize=False)
    outputs = llm.generate([TokensPrompt(prompt_token_ids=prompt) for prompt in asked["prompts"]], params)
    print("\\n" + json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
"""
SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 128, "max_position_embeddings": 512}


def answers(model: Path, dtype: str = "float16", activations: str = "16bit", **options: Any) -> list[list[int]]:
    """Return what vLLM draws greedily behind each prompt, in a process of its own."""
    options = {**({} if options.get("enforce_eager") else GRAPHS), **options}
    asked = json.dumps({"model": str(model), "dtype": dtype, "options": options, "prompts": PROMPTS, "tokens": TOKENS})
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INSIDE, asked],
        capture_output=True,
        text=True,
        env={**os.environ, **settings, "TERSOR_VLLM_ACTIVATIONS": activations},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: list[list[int]] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def behind(texts: list[list[int]], model: Path, dtype: str = "float16", activations: str = "16bit") -> list[float]:
    """Return by how many nats each token of greedy texts is behind the most probable one in our engine, sorted."""
    llm = tersor.LLM(
        model, device="cuda", dtype=dtype, activations=activations, kv_bytes=64 << 20, memory=1.0, max_length=256
    )
    params = tersor.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1)
    whole = [[*prompt, *text] for prompt, text in zip(PROMPTS, texts, strict=True)]
    outputs = llm.generate(whole, params)
    llm.close()
    found = []
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        for token, entry in list(zip(output.prompt_token_ids, output.prompt_logprobs, strict=True))[len(prompt) :]:
            found.append(max(one.logprob for one in entry.values()) - entry[token].logprob)
    return sorted(found)


def alike(found: list[list[int]], other: list[list[int]]) -> float:
    """Return the part of all tokens up to which texts are one: a tie that falls otherwise ends a text."""
    same = [next((i for i, pair in enumerate(zip(*texts, strict=True)) if pair[0] != pair[1]), TOKENS)
            for texts in zip(found, other, strict=True)]  # fmt: skip
    return sum(same) / (TOKENS * len(same))


def packed(**options: Any) -> Callable[[Path], Path]:
    return lambda folder: packed_models.compressed(tiny_lm.TINY, folder / "model", **options)


def mixed(folder: Path) -> Path:
    (folder / "text.txt").write_text("def square(x):\n    return x * x\n\n\n# The first rule of a function\n" * 40)
    return packed(target_bits=5.0, calibration=folder / "text.txt", calibration_tokens=512, calibration_window=128)(
        folder
    )


def pruned(folder: Path) -> Path:
    tersor.prune(tiny_lm.TINY, folder / "model", sparsity=0.3, algorithm="magnitude", values="fp6")
    return folder / "model"


def random_experts(kind: str, **sizes: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        model = packed_models.case(kind, folder, {"format": "fp6"}, **SIZES, **sizes).packed
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tiny_lm.TINY / name, model)
        return model

    return make


EXACT, ROUNDED, ROUTED = (0.05, 1.0), (0.5, 1.0), (0.05, 0.9)
"""Nats that a token may be behind the most probable one, and the part of all tokens that has to be as near.

By what computing in float32 or bfloat16 changes: 0.02 in 16 bits; 0.4 where activations are rounded to 8 bits, some of
them otherwise; and where experts have random weights, another choice of one of them changes a token wholly.
"""
KINDS: dict[str, tuple[Callable[[Path], Path], dict[str, str], tuple[float, float]]] = {
    "fp6": (packed(format="fp6"), {}, EXACT),
    "groups": (packed(format="uint4", group_size=64), {}, EXACT),
    "outliers": (packed(format="int4", outliers="3%"), {}, EXACT),
    "embedding": (packed(format="fp6", overrides={"embed_tokens": "int8"}), {}, EXACT),
    "two formats": (packed(format="int8", overrides={"q_proj": "fp6"}), {}, EXACT),
    "mixed": (mixed, {}, EXACT),
    "pruned": (pruned, {}, EXACT),
    "int8 activations": (packed(format="int8"), {"activations": "int8"}, ROUNDED),
    "fp8 activations": (packed(format="fp6"), {"activations": "fp8"}, ROUNDED),
    "experts": (random_experts("qwen3_moe", moe_intermediate_size=128), {}, ROUTED),
    "gpt_oss": (random_experts("gpt_oss", head_dim=64), {"dtype": "bfloat16"}, ROUTED),
}
"""Kind of weight -> (how it is made, how it runs, how near its texts are).

vLLM's attention takes sinks in bfloat16 alone.
"""


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_texts_are_those_of_our_engine(tmp_path: Path, kind: str) -> None:
    make, ways, (most, part) = KINDS[kind]
    model = make(tmp_path)
    found = behind(answers(model, **ways), model, **ways)
    assert len(found) == TOKENS * len(PROMPTS)
    near = sum(one <= most for one in found) / len(found)
    assert near >= part, f"{near:.1%} of {len(found)} tokens are at most {most} nats behind, the last {found[-3:]}"


def test_without_graphs_and_traces_texts_are_the_same(tmp_path: Path) -> None:
    model = packed(format="fp6")(tmp_path)
    assert alike(answers(model, enforce_eager=True), answers(model)) >= 0.9


def test_a_plain_checkpoint_packed_while_loading_says_what_a_stored_one_says(tmp_path: Path) -> None:
    assert answers(tiny_lm.TINY, quantization="tersor") == answers(packed(format="fp6")(tmp_path))
