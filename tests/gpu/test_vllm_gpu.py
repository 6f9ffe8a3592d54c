"""In vLLM on a GPU: greedy texts are those of our engine, compiled and in CUDA graphs, of every kind of weight."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

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
INSIDE = """
import json, sys
from tersor.integrations import vllm as plugin
plugin.register()
from vllm import LLM, SamplingParams, TokensPrompt
if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    llm = LLM(asked["model"], skip_tokenizer_init=True, dtype=asked["dtype"], max_model_len=256, seed=0,
              gpu_memory_utilization=0.4, **asked["options"])
    params = SamplingParams(max_tokens=asked["tokens"], temperature=0, ignore_eos=True, detokenize=False)
    outputs = llm.generate([TokensPrompt(prompt_token_ids=prompt) for prompt in asked["prompts"]], params)
    print("\\n" + json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
"""


def answers(model: Path, dtype: str = "float16", **options: object) -> list[list[int]]:
    """Return what vLLM draws greedily behind each prompt, in a process of its own."""
    asked = json.dumps({"model": str(model), "dtype": dtype, "options": options, "prompts": PROMPTS, "tokens": TOKENS})
    done = subprocess.run(
        [sys.executable, "-c", INSIDE, asked],
        capture_output=True,
        text=True,
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: list[list[int]] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def wanted(model: Path, dtype: str = "float16") -> list[list[int]]:
    """Return what our engine draws."""
    llm = tersor.LLM(model, device="cuda", dtype=dtype, kv_bytes=64 << 20, memory=0.3, max_length=256)
    params = tersor.SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
    found = [list(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, params)]
    llm.close()
    return found


def alike(found: list[list[int]], other: list[list[int]]) -> float:
    """Return the part of all tokens up to which texts are one: a tie that falls otherwise ends a text."""
    same = [next((i for i, pair in enumerate(zip(*texts, strict=True)) if pair[0] != pair[1]), TOKENS)
            for texts in zip(found, other, strict=True)]  # fmt: skip
    return sum(same) / (TOKENS * len(same))


@pytest.mark.parametrize(
    "options",
    [
        {"format": "fp6"},
        {"format": "uint4", "group_size": 64},
        {"format": "int4", "outliers": "3%"},
        {"format": "fp6", "overrides": {"embed_tokens": "int8"}},
        {"format": "int8", "overrides": {"q_proj": "fp6"}},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_greedy_texts_are_those_of_our_engine(tmp_path: Path, options: dict) -> None:
    model = packed_models.compressed(tiny_lm.TINY, tmp_path / "model", **options)
    assert alike(answers(model), wanted(model)) >= 0.9


def test_experts_of_gpt_oss_say_what_our_engine_says(tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 64, "max_position_embeddings": 512}
    model = packed_models.case("gpt_oss", tmp_path, {"format": "fp6"}, **sizes).packed
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_lm.TINY / name, model)
    # vLLM's attention takes sinks in bfloat16 alone; of random weights, where ties are nearer
    assert alike(answers(model, "bfloat16"), wanted(model, "bfloat16")) >= 0.6


def test_without_graphs_and_traces_texts_are_the_same(tmp_path: Path) -> None:
    model = packed_models.compressed(tiny_lm.TINY, tmp_path / "model", format="fp6")
    assert alike(answers(model, enforce_eager=True), answers(model)) >= 0.9


def test_a_plain_checkpoint_packed_while_loading_says_what_a_stored_one_says(tmp_path: Path) -> None:
    model = packed_models.compressed(tiny_lm.TINY, tmp_path / "model", format="fp6")
    assert answers(tiny_lm.TINY, quantization="tersor") == answers(model)
