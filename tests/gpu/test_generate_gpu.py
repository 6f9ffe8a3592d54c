"""Generation with the decode step as a CUDA graph: the same text as launched one kernel at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tersor import evaluate
from tersor.cli import main
from tersor.convert import quantize
from tersor.engine import Sampling
from tersor.errors import TersorError
from tersor.integrations.transformers import decode, load
from tersor.integrations.transformers.generate import Generator, TextStream

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny-lm"
PROMPT = "def read_file(path):\n"
SAMPLED = Sampling(
    temperature=0.9,
    top_k=100,
    top_p=0.95,
    min_p=0.01,
    repetition_penalty=1.1,
    seed=5,
    max_new_tokens=64,
    ignore_eos=True,
)


@pytest.fixture(scope="module", params=["bfloat16", "fp6_e3m2", "int4"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The tiny model as it is, and compressed, on the GPU with its tokenizer."""
    path = TINY
    if request.param != "bfloat16":
        path = tmp_path_factory.mktemp("packed") / request.param
        quantize(TINY, path, format=request.param)
    return load.load_model(path, "cuda"), load.load_tokenizer(TINY)


def run(generator: Generator, options: Sampling, prompt: str = PROMPT) -> tuple[str, TextStream]:
    stream = generator.stream(prompt, options)
    text = "".join(stream)
    return text, stream


@pytest.mark.parametrize("options", [Sampling(max_new_tokens=64, ignore_eos=True), SAMPLED], ids=["greedy", "sampled"])
def test_a_graph_gives_the_text_of_eager_steps(loaded: Any, options: Sampling) -> None:
    eager_text, eager = run(Generator(*loaded, cuda_graph=False), options)
    text, graph = run(Generator(*loaded, cuda_graph=True), options)
    assert graph.statistics.cuda_graph and not eager.statistics.cuda_graph
    assert graph.tokens == eager.tokens and text == eager_text
    assert len(set(graph.tokens)) > 5
    for name, stream in (("eager", eager), ("graph", graph)):
        numbers = stream.statistics
        print(f"{name}: {numbers.tokens_per_second:.0f} tokens/s, captured in {numbers.capture_seconds:.2f} s")


def test_a_graph_is_captured_once_and_serves_other_prompts(loaded: Any) -> None:
    options = Sampling(max_new_tokens=32, ignore_eos=True)
    generator = Generator(*loaded, cuda_graph=True)
    run(generator, options)
    captured = generator._decoder.graph
    for prompt in ("import os\n", "The first step is", PROMPT):
        text, stream = run(generator, options, prompt)
        assert text == run(Generator(*loaded, cuda_graph=False), options, prompt)[0]
        assert stream.statistics.capture_seconds == 0
    assert generator._decoder.graph is captured


def test_a_longer_stream_gets_a_longer_cache(loaded: Any) -> None:
    generator = Generator(*loaded, cuda_graph=True)
    run(generator, Sampling(max_new_tokens=8))
    assert generator._decoder.length == decode.ROUND
    options = Sampling(max_new_tokens=2 * decode.ROUND, ignore_eos=True)
    text, stream = run(generator, options)
    assert len(stream.tokens) == 2 * decode.ROUND
    assert text == run(Generator(*loaded, cuda_graph=False), options)[0]


def test_the_first_tokens_are_those_of_transformers(loaded: Any) -> None:
    model, tokenizer = loaded
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids.cuda()
    expected = model.generate(ids, do_sample=False, max_new_tokens=4, pad_token_id=0)[0, ids.shape[1] :].tolist()
    # transformers' growing cache takes other attention kernels: 16-bit rounding may part the texts later on.
    assert run(Generator(*loaded), Sampling(max_new_tokens=4, ignore_eos=True))[1].tokens == expected


def test_a_seed_repeats_a_text_and_another_does_not(loaded: Any) -> None:
    generator = Generator(*loaded, cuda_graph=True)
    texts = [run(generator, SAMPLED)[0] for _ in range(2)]
    assert texts[0] == texts[1]
    other = Sampling(temperature=0.9, seed=6, max_new_tokens=64, ignore_eos=True)
    assert run(Generator(*loaded, cuda_graph=True), other)[0] != texts[0]


def test_stop_texts_and_the_end_of_the_text(loaded: Any) -> None:
    options = Sampling(max_new_tokens=64, ignore_eos=True)
    whole = run(Generator(*loaded), options)[0]
    stop = whole[20:26]
    text, stream = run(Generator(*loaded, cuda_graph=True), Sampling(max_new_tokens=64, stop=(stop,), ignore_eos=True))
    assert text == whole[: whole.index(stop)] and stream.statistics.finish_reason == "stop"


def test_a_sliding_window_model_runs_as_a_graph() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=8192,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=16,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    model = MistralForCausalLM(config).eval().cuda()
    tokenizer = load.load_tokenizer(TINY)
    options = Sampling(max_new_tokens=48, ignore_eos=True)
    text, stream = run(Generator(model, tokenizer, cuda_graph=True), options)
    assert text == run(Generator(model, tokenizer, cuda_graph=False), options)[0]
    assert stream.statistics.cuda_graph


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_model_that_synchronises_says_so_and_runs_eagerly(loaded: Any, temperature: float) -> None:
    model, tokenizer = loaded
    options = Sampling(max_new_tokens=16, ignore_eos=True, temperature=temperature, seed=3)

    def look(module: torch.nn.Module, arguments: object, output: torch.Tensor) -> None:
        float(output.sum())  # forbidden while a graph is captured

    handle = model.get_submodule("model.layers.0").mlp.register_forward_hook(look)
    try:
        text, stream = run(Generator(model, tokenizer), options)
    finally:
        handle.remove()
    assert not stream.statistics.cuda_graph
    assert stream.statistics.eager_reason.startswith("capture failed")
    assert torch.randn(3, device="cuda").isfinite().all()  # torch's random numbers are left as they were
    assert text == run(Generator(model, tokenizer, cuda_graph=False), options)[0]


def test_evaluation_on_the_gpu_agrees_with_the_cpu() -> None:
    text = "def square(x):\n    return x * x\n\n\nclass Point:\n    def __init__(self, x):\n        self.x = x\n" * 40
    windows = evaluate.cut_windows(text, load.load_tokenizer(TINY), window=128, max_tokens=512)
    cpu = evaluate.evaluate(load.load_model(TINY, "cpu"), windows)
    gpu = load.load_model(TINY, "cuda", "float32")
    quality = evaluate.evaluate(gpu, windows, reference=load.load_model(TINY, "cpu"))
    assert quality.perplexity == pytest.approx(cpu.perplexity, rel=1e-3)
    assert quality.kl < 1e-5 and quality.top1_agreement > 0.99


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("cuda_graph", [True, False])
def test_logits_that_are_not_finite_end_a_stream(cuda_graph: bool, temperature: float) -> None:
    """The weight goes bad between two replays; the token of the step that reads it is not given out."""
    model, tokenizer = load.load_model(TINY, "cuda"), load.load_tokenizer(TINY)
    options = Sampling(max_new_tokens=32, ignore_eos=True, temperature=temperature, seed=1)
    stream = Generator(model, tokenizer, cuda_graph=cuda_graph).stream(PROMPT, options)
    with pytest.raises(TersorError, match=r"^new token \d+ cannot be drawn: .* first in model\.norm"):
        for _ in stream:
            if len(stream.tokens) >= 4:
                model.model.norm.weight.data.fill_(float("nan"))
    assert 4 <= len(stream.tokens) < 32 and all(0 <= token < len(tokenizer) for token in stream.tokens)


@pytest.mark.parametrize("options", [Sampling(max_new_tokens=48, ignore_eos=True), SAMPLED], ids=["greedy", "sampled"])
def test_several_samples_as_a_graph_are_those_of_eager_steps(loaded: Any, options: Sampling) -> None:
    generator = Generator(*loaded, cuda_graph=True)
    eager, _ = Generator(*loaded, cuda_graph=False).samples(PROMPT, 5, options)
    for _ in range(2):  # the second time replays the graph of the first
        found, numbers = generator.samples(PROMPT, 5, options)
        assert numbers.cuda_graph and [row.tokens for row in found] == [row.tokens for row in eager]
    assert len({tuple(row.tokens) for row in found}) == (5 if options is SAMPLED else 1)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("format_name", [None, "fp6_e3m2"])
def test_the_verb_gives_the_same_by_graphs_and_without(
    format_name: str | None, samples: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = TINY
    if format_name is not None:
        model = tmp_path / format_name
        quantize(TINY, model, format=format_name)
    words = ["generate", str(model), "--prompt", PROMPT, "-n", "8", "--dtype", "float16", "--ignore-eos", "--json"]
    results = []
    for graph in ("on", "off"):
        before = torch.cuda.memory_allocated()
        assert main.run([*words, "--samples", str(samples), "--cuda-graph", graph]) == 0
        assert torch.cuda.max_memory_allocated() - before < 1 << 30  # not what is left of the GPU
        captured = capsys.readouterr()
        assert captured.err.count("\n") == captured.err.count("samples are alike") == int(samples > 1)
        results.append(json.loads(captured.out))
    captured_steps, eager = results
    for key in ("tokens", "text", "continuations"):
        assert captured_steps.get(key) == eager.get(key)
    assert captured_steps["cuda_graph"] and captured_steps["capture_seconds"] > 0
    assert not eager["cuda_graph"] and eager["eager_reason"] == "not asked for"
    assert eager["new_tokens"] == 8 * samples


def test_the_verb_computes_in_float32_through_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", str(TINY), "--prompt", PROMPT, "-n", "4", "--dtype", "float32"]
    assert main.run(words) == 0
    assert "LlamaForCausalLM runs through transformers: kernels take float16" in capsys.readouterr().err
