"""What an engine compiles ahead is what its steps ask for: neither a kernel less nor one more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import packed_models, tiny_lm
from helpers.fakes import FakeGpu, pretended
from helpers.small_decoders import config_of

import tersor
from tersor import ops
from tersor.engine import ahead
from tersor.engine.runner import Runner
from tersor.engine.sampler import Sampler
from tersor.formats import Activations, Scheme, get_scheme
from tersor.hardware import CHIPS
from tersor.kernels import jit, small
from tersor.kernels.jit import KernelSource
from tersor.models.config import DecoderConfig
from tersor.models.expected import Expected
from tersor.models.kernels import Steps, kernels_of
from tersor.models.names import NAMES
from tersor.models.outline import outline
from tersor.models.random import random_decoder
from tersor.ops import serve_attention
from tersor.ops.collective import Ranks
from tersor.ops.stages import ONE, Stages
from tersor.planner.placement import Placement

gpu = pretended("NVIDIA H200")
TOKENS, LENGTH, ROWS = 96, 80, 40


def schemes_of(config: DecoderConfig, scheme: Scheme | None) -> dict[str, Scheme]:
    """The schemes of a decoder's modules as `random_decoder` chooses them."""
    names = NAMES[config.architecture]
    plain = (f".{names.router}", *(() if config.tied else (names.embedding,)))
    return {} if scheme is None else {m: scheme for m in Expected.of(config, names).matrices if not m.endswith(plain)}


class Apart(Ranks):
    """A rank that hears nothing of the others, and counts as one that has a kernel for sums."""

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        if self.count > 1:
            jit.get(small.all_reduce_source("bfloat16", self.count), -1)
        return x

    def side_by_side(self, x: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        return x.new_zeros(len(x), sum(widths))

    def from_first(self, x: torch.Tensor, group: Any = None) -> torch.Tensor:
        return x


def recorded(monkeypatch: pytest.MonkeyPatch) -> set[KernelSource]:
    """Return a set that every kernel which is asked for from now on is put into."""
    asked: set[KernelSource] = set()
    get = jit.get

    def recording(source: KernelSource, device: Any) -> jit.Function:
        asked.add(source)
        return get(source, device if isinstance(device, int) else -1)

    serve_attention._prepared.cache_clear()  # another test may have asked the same of another chip
    monkeypatch.setattr(jit, "get", recording)
    return asked


def asked_for(
    config: DecoderConfig,
    scheme: Scheme | None,
    activations: Activations,
    pages: torch.dtype | None,
    ranks: Ranks,
    monkeypatch: pytest.MonkeyPatch,
    placement: Placement | None = None,
    rank: int = 0,
) -> set[KernelSource]:
    """Run steps of every number of tokens, decoding ones and draws of all kinds; return the kernels they ask for."""

    def wide(x: torch.Tensor, weight: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(len(x), weight.shape[1], dtype=out_dtype)

    asked = recorded(monkeypatch)
    monkeypatch.setattr(torch, "mm", wide)  # of cuBLAS: a CPU has no such dtypes
    decoder = random_decoder(
        config,
        scheme,
        "cpu",
        torch.bfloat16,
        head=scheme,
        embedding=scheme if config.tied else None,
        activations=activations,
        context=LENGTH,
        ranks=ranks,
        place=None if placement is None else placement.place(rank),
    )
    sampler = Sampler(ROWS + 1, config.vocabulary, decoder.device, most_length=LENGTH)
    stages = ONE if placement is None else Stages(placement, rank)
    runner = Runner(decoder, sampler, max_rows=ROWS, max_length=LENGTH, kv_dtype=pages, ranks=ranks, stages=stages)
    runner.allocate(2)
    for tokens in (*range(1, 20), *range(20, 64, 4), *range(64, TOKENS + 1, 8)):
        runner.rehearse(tokens)
    logits = torch.zeros(2, config.vocabulary, dtype=torch.bfloat16)
    slots, lengths = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([3, 3], dtype=torch.int32)
    sampler.draw_with_logprobs(logits, slots, lengths)
    ops.logprobs(logits, torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int32))
    return asked


@pytest.mark.parametrize(
    ("gpu", "name", "way", "ranks"),
    [
        ("NVIDIA H200", "llama", "16bit", 1),
        ("NVIDIA H200", "llama", "fp8", 2),
        ("NVIDIA H200", "qwen3-moe", "fp8", 1),
        ("NVIDIA H200", "qwen3-moe", "int8", 1),
        ("NVIDIA H200", "qwen3-moe", "invariant", 1),
        ("NVIDIA H200", "qwen3-moe", "plain", 1),
        ("NVIDIA H200", "gpt-oss", "16bit", 2),
        ("NVIDIA H200", "gemma2", "16bit", 1),
        ("NVIDIA H200", "opt", "plain", 1),
        ("NVIDIA H200", "opt", "fp8", 1),
        ("NVIDIA H200", "deepseek-v3", "16bit", 1),
        ("NVIDIA H200", "deepseek-v3", "fp8", 1),
        ("NVIDIA A100", "qwen3-moe", "16bit", 1),
        ("NVIDIA GeForce RTX 5090", "gpt-oss", "16bit", 1),
        ("NVIDIA B200", "llama", "invariant", 1),
    ],
    indirect=["gpu"],
)
def test_steps_ask_for_what_is_compiled_ahead(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, name: str, way: str, ranks: int
) -> None:
    config, scheme = config_of(name), None if way == "plain" else get_scheme("int8" if way == "int8" else "fp6_e3m2")
    if config.layers[-1] not in config.layers[:-1]:  # the last layer has few of the tokens behind its attention
        config = replace(config, layers=(*config.layers, config.layers[-1]))
    activations = Activations.of(way) if way in ("fp8", "int8") else Activations.NATIVE
    pages = torch.float8_e4m3fn if way == "fp8" else None
    schemes = schemes_of(config, scheme)
    steps = Steps(tokens=TOKENS, rows=ROWS, queries=LENGTH, length=128, pages=pages)
    place = Placement.even(len(config.layers), tensor=ranks).place(0)
    with ops.using(batch_invariant=way == "invariant"):
        asked = asked_for(config, scheme, activations, pages, Apart(0, ranks), monkeypatch)
        parts = outline(config, NAMES[config.architecture], schemes, torch.bfloat16, activations, place)
        listed = set(kernels_of(parts, steps, gpu.chips[0]))
    assert {source.name for source in asked - listed} == set()
    assert {source.name for source in listed - asked} == set()


@pytest.mark.parametrize(
    ("name", "way", "stages"), [("qwen3-moe", "16bit", 1), ("qwen3-moe", "plain", 1), ("llama", "16bit", 3)]
)
def test_a_rank_of_stages_and_of_experts_in_groups_asks_for_what_is_compiled_ahead(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, name: str, way: str, stages: int
) -> None:
    config, scheme = config_of(name), None if way == "plain" else get_scheme("fp6_e3m2")
    config = replace(config, layers=config.layers * 2)
    placement = Placement.even(len(config.layers), pipeline=stages, expert=2)
    native, schemes = Activations.NATIVE, schemes_of(config, scheme)
    for rank in range(0, placement.ranks, 2):
        place = placement.place(rank)
        asked = asked_for(config, scheme, native, None, Apart(0, 2), monkeypatch, placement, rank)
        steps = Steps(tokens=TOKENS, rows=ROWS, queries=LENGTH, length=128)
        parts = outline(config, NAMES[config.architecture], schemes, torch.bfloat16, native, place)
        listed = set(kernels_of(parts, steps, gpu.chips[0]))
        assert {source.name for source in asked - listed} == set()


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
def test_an_engine_compiles_what_its_prompts_ask_for_before_it_answers(
    gpu: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kv_dtype: str
) -> None:
    compiled: set[KernelSource] = set()
    monkeypatch.setattr(ahead, "compile_many", lambda sources, arch, on_done: compiled.update(sources))
    asked, path = recorded(monkeypatch), packed_models.compressed(tiny_lm.TINY, tmp_path / "model", format="fp6_e3m2")
    options: dict[str, Any] = {"device": "cpu", "dtype": "bfloat16", "kv_dtype": kv_dtype, "kv_bytes": 8 << 20}
    model = tersor.LLM(path, max_rows=8, max_step_tokens=40, max_length=100, **options)
    before = set(compiled)
    params = [
        tersor.SamplingParams(max_tokens=3, ignore_eos=True, temperature=1, top_k=4, frequency_penalty=0.5, n=2),
        tersor.SamplingParams(max_tokens=3, ignore_eos=True, temperature=0, logprobs=1, prompt_logprobs=1),
    ]
    for one in params:
        model.generate([list(range(2, 2 + length)) for length in (1, 3, 9, 20, 37, 77)], one)
    assert len(asked) > 15 and {source.name for source in asked - before} == set()


def test_of_layers_that_are_equal_the_first_and_the_last_are_looked_at() -> None:
    config = config_of("llama")
    config = replace(config, layers=config.layers * 3)
    names, schemes = NAMES[config.architecture], schemes_of(config, get_scheme("fp6_e3m2"))
    assert len(outline(config, names, schemes, torch.bfloat16).layers) == 2
    schemes["model.layers.4.mlp.down_proj"] = get_scheme("int8")
    parts = outline(config, names, schemes, torch.bfloat16)
    assert [part.ffn.down.weight.scheme.name for part in parts.layers] == ["fp6_e3m2", "int8", "fp6_e3m2"]
    sources = kernels_of(parts, Steps(tokens=8, rows=8, queries=8, length=64), CHIPS["NVIDIA H200"])
    assert any("linear_sm90_int8" in source.name for source in sources)
