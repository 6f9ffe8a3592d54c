"""Streaming generation: the same tokens as transformers, text cut where it may be, every reason to end."""

from __future__ import annotations

import copy
import inspect
import math
from typing import Any

import pytest
import torch
from helpers import tiny_lm

from tersor.engine import Sampling
from tersor.errors import InputError, TersorError, UnsupportedError
from tersor.integrations.transformers import decode
from tersor.integrations.transformers.generate import Generator, chat_prompt, stream
from tersor.integrations.transformers.load import load_tokenizer

PROMPT = "def read_file(path):\n"


def generator(**config: Any) -> Generator:
    """The tiny model with another generation config; weights are shared."""
    model = copy.copy(tiny_lm.model())
    model.generation_config = copy.deepcopy(model.generation_config)
    model.generation_config.update(**config)
    return Generator(model, tiny_lm.tokenizer())


def reference(prompt: str, **options: Any) -> list[int]:
    """New tokens by transformers' own generate."""
    inputs = tiny_lm.tokenizer()(prompt, return_tensors="pt")
    output = tiny_lm.model().generate(**inputs, do_sample=False, pad_token_id=0, **options)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("prompt", [PROMPT, "The first step is", "import os\nimport"])
def test_greedy_is_what_transformers_generates(prompt: str) -> None:
    mine = generator().stream(prompt, Sampling(max_new_tokens=24))
    text = "".join(mine)
    assert mine.tokens == reference(prompt, max_new_tokens=24)
    assert text == tiny_lm.tokenizer().decode(mine.tokens)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_goes_by_the_name_that_the_model_has_for_it(name: str) -> None:
    mine, original, given = generator(), tiny_lm.model().forward, set()
    real = "cache" if "cache" in inspect.signature(original).parameters else "past_key_values"

    def with_cache(input_ids: torch.Tensor, cache: Any = None, **options: Any) -> Any:
        given.add(type(cache).__name__)
        return original(input_ids=input_ids, **{real: cache}, **options)

    def with_past_key_values(input_ids: torch.Tensor, past_key_values: Any = None, **options: Any) -> Any:
        return with_cache(input_ids, past_key_values, **options)

    mine.model.forward = with_cache if name == "cache" else with_past_key_values
    found = mine.stream(PROMPT, Sampling(max_new_tokens=5))
    list(found)
    assert found.tokens == reference(PROMPT, max_new_tokens=5)
    assert given == {"DynamicCache"}


def test_repetition_penalty_is_that_of_transformers() -> None:
    mine = generator().stream(PROMPT, Sampling(max_new_tokens=24, repetition_penalty=1.3))
    list(mine)
    assert mine.tokens == reference(PROMPT, max_new_tokens=24, repetition_penalty=1.3)
    assert mine.tokens != reference(PROMPT, max_new_tokens=24)


@pytest.mark.parametrize("penalty", [None, 1.3])
def test_a_static_cache_gives_the_same_tokens(penalty: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    options = Sampling(max_new_tokens=24, repetition_penalty=penalty)
    expected = generator().stream(PROMPT, options)
    list(expected)
    monkeypatch.setattr(decode, "_wants_static", lambda device: True)
    static = generator()
    for _ in range(2):  # the second stream uses the cache of the first again
        again = static.stream(PROMPT, options)
        list(again)
        assert again.tokens == expected.tokens
    assert type(static._decoder.cache).__name__ == "StaticCache"
    assert static._decoder.length == 128


def test_a_sliding_window_in_a_static_cache_is_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=8192,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=6,
        max_position_embeddings=256,
        initializer_range=0.5,
    )
    model = MistralForCausalLM(config).eval()
    options = Sampling(max_new_tokens=30, ignore_eos=True)
    expected = Generator(model, tiny_lm.tokenizer()).stream(PROMPT, options)
    list(expected)
    monkeypatch.setattr(decode, "_wants_static", lambda device: True)
    static = Generator(model, tiny_lm.tokenizer())
    mine = static.stream(PROMPT, options)
    list(mine)
    assert static._decoder.static
    assert mine.tokens == expected.tokens
    assert len(set(mine.tokens)) > 5


def test_a_step_leaves_no_trace_once_its_state_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a capture relies on: warm-up steps change only the tensors that are restored."""
    monkeypatch.setattr(decode, "_wants_static", lambda device: True)
    options = Sampling(repetition_penalty=1.2, max_new_tokens=4).resolved(tiny_lm.model().generation_config)
    decoder = decode.Decoder(tiny_lm.model(), options, 64)
    decoder.prefill([5, 6, 7, 8], None)
    state = decoder._state()
    before = [tensor.clone() for tensor in state]
    tokens = []
    for _ in range(3):
        decoder.step()
        tokens.append(decoder.fetch(decoder.publish()))
        with torch.inference_mode():
            decode._restore(state, before)
    assert tokens[0] == tokens[1] == tokens[2]
    decoder.step()
    decoder.step()
    assert decoder.cache.get_seq_length() == 6 and int(decoder.position) == 7


@pytest.mark.parametrize("number", [0.5, 3, True])
def test_a_scalar_is_filled_while_a_step_is_captured(number: float) -> None:
    """A mask of gpt-oss begins with `torch.tensor(0.0, device=...)`, which copies from the host."""
    with decode.FilledScalars():
        plain, typed = torch.tensor(number), torch.tensor(number, dtype=torch.bfloat16, device="meta")
        several = torch.tensor([1, 2])
    assert plain.equal(torch.tensor(number)) and plain.dtype == torch.tensor(number).dtype
    assert typed.dtype == torch.bfloat16 and typed.shape == () and typed.is_meta
    assert several.tolist() == [1, 2]


def test_a_cuda_graph_insisted_on_without_a_gpu() -> None:
    with pytest.raises(UnsupportedError, match="no CUDA graph for this model: the model is on cpu"):
        list(Generator(tiny_lm.model(), tiny_lm.tokenizer(), cuda_graph=True).stream(PROMPT))


def test_a_seed_repeats_a_text_and_another_does_not() -> None:
    texts = [
        "".join(stream(tiny_lm.model(), tiny_lm.tokenizer(), PROMPT, temperature=1.0, seed=seed, max_new_tokens=16))
        for seed in (7, 7, 8)
    ]
    assert texts[0] == texts[1] != texts[2]
    one = generator()
    options = Sampling(temperature=1.0, seed=7, max_new_tokens=16)
    assert [("".join(one.stream(PROMPT, options))) for _ in range(2)] == texts[:2]


def test_without_a_seed_texts_differ() -> None:
    one = generator()
    options = Sampling(temperature=1.5, max_new_tokens=16)
    assert len({"".join(one.stream(PROMPT, options)) for _ in range(3)}) > 1


def test_a_stop_text_ends_the_stream_and_is_not_in_it() -> None:
    whole = "".join(generator().stream(PROMPT, Sampling(max_new_tokens=24)))
    stop = whole[17:23]  # begins and ends inside tokens
    mine = generator().stream(PROMPT, Sampling(max_new_tokens=24, stop=(stop,)))
    pieces = list(mine)
    assert "".join(pieces) == whole[: whole.index(stop)]
    assert mine.statistics.finish_reason == "stop" and mine.statistics.new_tokens < 24


def test_the_end_of_sequence_token_ends_the_stream_unless_ignored() -> None:
    tokens = reference(PROMPT, max_new_tokens=12)
    eos = tokens[5]
    first = tokens.index(eos)
    ended = generator(eos_token_id=[1, eos]).stream(PROMPT, Sampling(max_new_tokens=12))
    text = "".join(ended)
    assert ended.tokens == tokens[: first + 1] and ended.statistics.finish_reason == "eos"
    assert text == tiny_lm.tokenizer().decode(tokens[:first])
    ignored = generator(eos_token_id=eos).stream(PROMPT, Sampling(max_new_tokens=12, ignore_eos=True))
    list(ignored)
    assert ignored.tokens == tokens and ignored.statistics.finish_reason == "length"


def test_statistics_add_up() -> None:
    mine = generator().stream(PROMPT, Sampling(max_new_tokens=5))
    list(mine)
    numbers = mine.statistics
    assert numbers.prompt_tokens == len(tiny_lm.tokenizer()(PROMPT)["input_ids"])
    assert numbers.new_tokens == len(mine.tokens) == 5
    assert numbers.prefill_seconds > 0 and numbers.decode_seconds > 0
    assert numbers.tokens_per_second == pytest.approx(4 / numbers.decode_seconds)
    assert (numbers.cuda_graph, numbers.eager_reason) == (False, "the model is on cpu")
    assert numbers.to_dict()["finish_reason"] == "length"


def test_one_token_has_no_rate() -> None:
    mine = generator().stream(PROMPT, Sampling(max_new_tokens=1))
    list(mine)
    assert mine.statistics.tokens_per_second is None and mine.statistics.new_tokens == 1


def test_a_stream_cannot_be_read_on_once_another_has_begun() -> None:
    one, options = generator(), Sampling(max_new_tokens=12, ignore_eos=True)
    first = one.stream(PROMPT, options)
    next(first)
    whole = "".join(one.stream("import os\nimport", options))
    with pytest.raises(TersorError, match=r"^another stream of this generator has begun: read one to its end, or make"):
        next(first)
    assert "".join(one.stream("import os\nimport", options)) == whole
    assert whole == "".join(generator().stream("import os\nimport", options))


def test_text_comes_piece_by_piece() -> None:
    mine = generator().stream(PROMPT, Sampling(max_new_tokens=12))
    next(mine)
    assert len(mine.tokens) < 12


def test_the_context_ends_before_the_tokens_asked_for() -> None:
    mine = generator().stream([5] * 2046, Sampling(max_new_tokens=50, ignore_eos=True))
    list(mine)
    assert len(mine.tokens) == 2 and mine.statistics.finish_reason == "context"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([5] * 2048, "2048 tokens, the model 2048 positions"), ([5, 8192], "token 8192, the model has 8192")],
)
def test_prompts_that_do_not_fit(prompt: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        generator().stream(prompt)


def test_an_empty_prompt_begins_at_the_beginning() -> None:
    mine = generator().stream("", Sampling(max_new_tokens=2))
    list(mine)
    assert mine.statistics.prompt_tokens == 1
    nameless = load_tokenizer(tiny_lm.TINY)
    nameless.bos_token = None
    with pytest.raises(InputError, match="the prompt is empty"):
        Generator(tiny_lm.model(), nameless).stream("")


def test_chat_needs_a_template() -> None:
    with pytest.raises(InputError, match="no chat template"):
        chat_prompt(tiny_lm.tokenizer(), "Hello")
    talking = load_tokenizer(tiny_lm.TINY)
    talking.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    assert talking.decode(chat_prompt(talking, "Hello")) == "user: Hello\nassistant:"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_logits_that_are_not_finite_end_a_stream_before_their_token(bad: float, temperature: float) -> None:
    """The line says which token and in which layer first; nothing is drawn from them."""
    model = copy.deepcopy(tiny_lm.model())
    length = len(tiny_lm.tokenizer()(PROMPT)["input_ids"])
    calls = []

    def spoil(module: Any, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        calls.append(output.shape[1])
        return output * bad if len(calls) >= 4 or output.shape[1] > length else output

    model.model.layers[1].mlp.down_proj.register_forward_hook(spoil)
    found = Generator(model, tiny_lm.tokenizer()).stream(
        PROMPT, Sampling(max_new_tokens=9, temperature=temperature, seed=3)
    )
    with pytest.raises(
        TersorError, match=r"^new token 4 .* not finite, first in model\.layers\.1\.mlp\.down_p"
    ) as caught:
        list(found)
    assert len(found.tokens) == 3 and min(found.tokens) >= 0
    assert caught.value.exit_status == 1 and "\n" not in str(caught.value)


def test_a_prompt_whose_logits_are_not_finite_gives_no_token() -> None:
    model = copy.deepcopy(tiny_lm.model())
    model.model.norm.weight.data.fill_(math.nan)
    found = Generator(model, tiny_lm.tokenizer()).stream(PROMPT, Sampling(max_new_tokens=3))
    with pytest.raises(TersorError, match=r"new token 1 cannot be drawn: .* first in model\.norm"):
        list(found)
    assert found.tokens == []


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-45, 1e-300])
def test_a_tiny_temperature_draws_the_most_probable_token(temperature: float) -> None:
    options = Sampling(temperature=temperature, max_new_tokens=6, seed=1)
    found = generator().stream(PROMPT, options)
    list(found)
    assert found.tokens == reference(PROMPT, max_new_tokens=6)
