"""A start compiles all that is asked for later: whatever prompts come, none is compiled while they are answered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import packed_models, tiny_lm
from helpers.small_decoders import CONFIGS, config_of

import tersor
from tersor.engine import ahead
from tersor.engine.config import EngineConfig
from tersor.engine.memory import make_pages
from tersor.engine.runner import Runner
from tersor.engine.sampler import Sampler
from tersor.formats import get_scheme
from tersor.kernels.jit import KernelSource, build, module, nvrtc
from tersor.models.random import random_decoder
from tersor.ops import serve_attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

LENGTHS = (1, 2, 3, 5, 7, 8, 9, 13, 17, 31, 33, 47, 63, 64, 65, 97, 100, 111, 127, 129, 150)
PARAMS = (
    {"temperature": 0},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 0.8, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
    {"temperature": 0, "logprobs": 2, "prompt_logprobs": 1},
    {"temperature": 1, "n": 3, "logit_bias": {5: 1.0}},
)
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


@pytest.fixture
def compiled(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that NVRTC compiles, in order; none is there at first, nor loaded by another test."""
    monkeypatch.setattr(module, "_functions", {})
    serve_attention._prepared.cache_clear()
    names: list[str] = []
    compile_source = nvrtc.compile_source

    def counted(source: KernelSource, arch: str) -> nvrtc.Binary:
        names.append(source.name)
        return compile_source(source, arch)

    monkeypatch.setattr(nvrtc, "compile_source", counted)
    return names


@pytest.mark.parametrize("options", [{}, {"activations": "fp8", "kv_dtype": "fp8"}, {"cuda_graph": False}], ids=str)
def test_prompts_of_odd_lengths_ask_for_no_kernel_that_a_start_did_not_compile(
    tmp_path: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    if options.get("activations") == "fp8" and not HOPPER:
        pytest.skip("8-bit activations need compute capability 9.0")
    path = packed_models.compressed(tiny_lm.TINY, tmp_path / "model", format="fp6_e3m2")
    sides: list[int] = []
    compile_all = ahead.compile_all

    def side_by_side(*arguments: Any) -> None:
        compile_all(*arguments)
        sides.append(len(compiled))

    monkeypatch.setattr(ahead, "compile_all", side_by_side)
    given: dict[str, Any] = {"dtype": "bfloat16", "max_rows": 40, "max_step_tokens": 128, "memory": 0.5, **options}
    model = tersor.LLM(path, device="cuda", kv_bytes=256 << 20, **given)
    assert sides == [len(compiled)] and len(compiled) > 15
    prompts = [[3 + (index + place) % 90 for place in range(length)] for index, length in enumerate(LENGTHS)]
    for asked in PARAMS:
        params = tersor.SamplingParams(max_tokens=9, ignore_eos=True, seed=1, **asked)
        outputs = model.generate(prompts, params)
        assert all(len(one.token_ids) == 9 for output in outputs for one in output.outputs)
        for prompt in prompts[::4]:  # alone
            model.generate([prompt], params)
    assert len(model.embed(prompts)) == len(prompts)
    assert compiled[sides[0] :] == []
    model.close()
    monkeypatch.setattr(build, "_memory", {})
    tersor.LLM(path, device="cuda", kv_bytes=256 << 20, **given).close()
    assert len(compiled) == sides[0]  # the disk has all of them


@pytest.mark.parametrize("name", CONFIGS)
def test_steps_of_an_architecture_ask_for_no_kernel_that_was_not_compiled_ahead(compiled: list[str], name: str) -> None:
    config, engine = config_of(name), EngineConfig(max_rows=24, max_step_tokens=150, kv_bytes=64 << 20)
    decoder = random_decoder(config, get_scheme("fp6_e3m2"), "cuda", torch.bfloat16, context=128)
    ahead.compile_for(decoder, ahead.steps_of(engine, 128))
    before = len(compiled)
    assert before > 15
    sampler = Sampler(engine.max_rows + 1, config.vocabulary, decoder.device, most_length=128)
    runner = Runner(decoder, sampler, max_rows=engine.max_rows, max_length=128)
    make_pages(runner, engine)
    for tokens in (*range(1, 70, 3), *range(70, 151, 16), 150):
        runner.rehearse(tokens)
    torch.cuda.synchronize()
    assert runner.graphs and compiled[before:] == []
    runner.release()
