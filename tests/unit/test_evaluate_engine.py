"""The engine's decoder predicts a window as transformers' code does, and its pages may be kept in fewer bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import tiny_lm

from tersor import LLM, SamplingParams, nn
from tersor.convert import quantize
from tersor.evaluate import EngineModel, engine_model, evaluate
from tersor.evaluate.predictors import TransformersModel
from tersor.integrations.transformers import load
from tersor.models import Decoder

CPU = torch.device("cpu")
WINDOW = 150
"""Tokens, of which the last page is not full."""


@pytest.fixture(scope="module")
def model() -> EngineModel:
    return engine_model(tiny_lm.TINY, CPU)


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return torch.randint(2, 8192, (2, WINDOW), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("packed") / "mixed"
    quantize(tiny_lm.TINY, output, format="fp6_e3m2", overrides=["down_proj=int4:g64"])
    return output


@torch.inference_mode()
def test_logits_are_those_of_transformers(model: EngineModel, windows: torch.Tensor) -> None:
    other = TransformersModel(tiny_lm.model())
    assert (model.vocabulary, model.positions) == (other.vocabulary, other.positions)
    for window in windows:
        torch.testing.assert_close(model.logits(window), other.logits(window), rtol=1e-4, atol=1e-4)


def test_perplexity_is_that_of_transformers_and_no_divergence_is_left(
    model: EngineModel, windows: torch.Tensor
) -> None:
    quality = evaluate(model, windows, reference=tiny_lm.model())
    assert quality.perplexity == pytest.approx(quality.reference_perplexity, rel=1e-5)
    assert quality.perplexity_error == pytest.approx(quality.reference_perplexity_error, rel=1e-4)
    assert quality.kl == pytest.approx(0.0, abs=1e-6) and quality.top1_agreement == 1.0


def test_pages_of_fewer_bits_cost_more_and_the_reference_keeps_its_own(
    model: EngineModel, windows: torch.Tensor
) -> None:
    plain, half, eighth = (
        evaluate(model.keeping(dtype), windows, reference=model) for dtype in (None, torch.float16, torch.float8_e4m3fn)
    )
    assert plain.kl == 0.0 and plain.top1_agreement == 1.0
    assert plain.perplexity == half.reference_perplexity == eighth.reference_perplexity
    assert half.kl is not None and half.kl < 1e-5
    assert eighth.kl is not None and eighth.kl_error is not None and eighth.kl_reverse is not None
    assert 1e-4 < eighth.kl < 1e-1 and eighth.kl > 100 * half.kl and eighth.kl_error > 0
    assert eighth.kl_reverse == pytest.approx(eighth.kl, rel=0.2)


@torch.inference_mode()
def test_a_window_in_fp8_is_predicted_as_an_engine_that_reads_it_in_steps_predicts_it(
    model: EngineModel, windows: torch.Tensor
) -> None:
    options = {"device": "cpu", "kv_dtype": "fp8", "kv_bytes": 1 << 22, "max_rows": 1, "max_step_tokens": 47}
    llm = LLM(tiny_lm.TINY, tokenizer=tiny_lm.tokenizer(), **options)
    (output,) = llm.generate([windows[0].tolist()], SamplingParams(max_tokens=1, prompt_logprobs=0))
    given = [
        entry[token].logprob for token, entry in zip(windows[0].tolist(), output.prompt_logprobs, strict=True) if entry
    ]
    plain, eighth = (
        one.logits(windows[0])[:-1].log_softmax(-1).gather(1, windows[0, 1:, None])[:, 0]
        for one in (model, model.keeping(torch.float8_e4m3fn))
    )
    far = float((plain - torch.tensor(given)).abs().max())
    assert float((eighth - torch.tensor(given)).abs().max()) < 0.01 * far
    assert far > 0.1


def test_a_model_whose_pages_stay_as_they_are_is_asked_once_a_window(
    model: EngineModel, windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, call = [], Decoder.__call__
    monkeypatch.setattr(Decoder, "__call__", lambda *given: calls.append(len(given[1])) or call(*given))
    assert model.keeping(None) is model
    evaluate(model.keeping(None), windows, reference=model)
    assert calls == [WINDOW] * 2
    evaluate(model.keeping(torch.float8_e4m3fn), windows, reference=model)
    assert calls == [WINDOW] * 6


def test_bits_of_compressed_weights_are_those_that_packed_layers_tell(model: EngineModel, packed: Path) -> None:
    assert model.bits_per_weight is None
    told = nn.bits_per_weight(load.ready_model(packed, CPU))
    assert told is not None and 5 < told < 6
    assert engine_model(packed, CPU).bits_per_weight == pytest.approx(told)
