"""Norms and activations that hand bytes to mixed weights, on a GPU: the bits of two steps, and no launch between."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import decoders, tiny_lm
from helpers.mixes import compressed, levels, matrix, mixed

import tersor
from tersor import models, ops
from tersor.formats import Activations, Mix, get_scheme
from tersor.layouts import MixedWeight
from tersor.ops import Gate, Rows

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="8-bit activations need compute capability 9.0",
)

INTEGERS = Mix((get_scheme("uint4", 32), get_scheme("int8")))
FLOATS = Mix((get_scheme("fp5_e2m2"), get_scheme("fp7_e3m3")))
KINDS = [(INTEGERS, Activations.INT8), (INTEGERS, Activations.INT8_GROUPS), (FLOATS, Activations.E4M3)]


def ready(weight: MixedWeight, dtype: torch.dtype, activations: Activations) -> MixedWeight:
    device = torch.device("cuda")
    return weight.to(device).to_layout(lambda scheme: ops.preferred_layout(scheme, dtype, device, activations))


def rows(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("mix", "activations"), KINDS)
def test_products_have_the_bits_of_two_steps(
    mix: Mix, activations: Activations, dtype: torch.dtype, launched: list[str]
) -> None:
    form = levels(300, mix=mix)
    weight, *halves = (mixed(matrix(300, seed), form) for seed in range(3))
    plain, both = (ready(one, dtype, activations) for one in (weight, MixedWeight.gate_up(*halves)))
    gain, bias = rows(192, dtype=dtype), rows(300, dtype=dtype)
    for tokens in (1, 7, 33, 130, 700):
        x, added = rows(tokens, 192, dtype=dtype), rows(tokens, 300, dtype=dtype, seed=1)
        assert ops.takes_quantized(x, (plain, both), gain) is activations
        made, normed = ops.rms_norm_quantized(x, gain, 1e-6, activations=activations), ops.rms_norm(x, gain, 1e-6)
        expected = ops.linear(normed, plain, bias, residual=added), ops.gated_linear(normed, both, gate=Gate.GELU)
        launched.clear()
        assert torch.equal(ops.linear_quantized(made, plain, bias, residual=added), expected[0])
        assert torch.equal(ops.linear_quantized(made, both, gate=Gate.GELU), expected[1])
        assert len(launched) == 2 and all("mixed" in name for name in launched)
        with ops.using(batch_invariant=True):
            expected = ops.linear(normed, plain, bias, residual=added), ops.gated_linear(normed, both, gate=Gate.GELU)
            assert torch.equal(ops.linear_quantized(made, plain, bias, residual=added), expected[0])
            assert torch.equal(ops.linear_quantized(made, both, gate=Gate.GELU), expected[1])


@pytest.mark.parametrize("activations", [Activations.E4M3, Activations.INT8, Activations.INT8_GROUPS])
@pytest.mark.parametrize("gate", [*Gate, None])
def test_an_activation_that_quantises_gives_the_bits_of_two_steps(gate: Gate | None, activations: Activations) -> None:
    for dtype, channels in ((torch.float16, 14336), (torch.bfloat16, 264), (torch.float16, 33008)):
        x = rows(9, channels * (1 if gate is None else 2), dtype=dtype)
        x[3] = 0
        alone = ops.relu(x) if gate is None else ops.gated(x, gate)
        made = ops.activated_quantized(x, gate, activations)
        expected = ops.Quantized.of(alone, activations)
        assert torch.equal(made.codes.view(torch.uint8), expected.codes.view(torch.uint8))
        assert torch.equal(made.scales.contiguous(), expected.scales.contiguous())


@pytest.mark.parametrize("kind", ["llama", "opt", "qwen3_moe"])
def test_steps_of_a_decoder_launch_nothing_between_a_norm_and_a_mixed_product(
    kind: str, tmp_path: Path, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, path, _ = compressed(kind, tmp_path, mix=INTEGERS, max_position_embeddings=256)
    decoder = models.load(path, "cuda", torch.bfloat16, activations="int8")
    text = decoders.texts(96)[1].cuda()

    def logits() -> list[torch.Tensor]:
        steps = (text, text[:1])  # a prompt, and as many rows as a decoding step has
        with torch.inference_mode():
            return [decoder(one, Rows.of_text(len(one), decoder.device), decoder.caches(4), None) for one in steps]

    found = logits()
    norms = [number for number, name in enumerate(launched) if "norm_bfloat16" in name and "int8" in name]
    assert len(norms) >= 4 and all("mixed" in launched[number + 1] for number in norms), launched
    assert any("int8_relu" in name for name in launched) == (kind == "opt")
    with monkeypatch.context() as patch:
        patch.setattr(ops, "takes_quantized", lambda *_: None)
        patch.setattr(ops, "takes_activated", lambda *_: None)
        launched.clear()
        assert all(torch.equal(*pair) for pair in zip(logits(), found, strict=True))
        assert not any("norm_bfloat16" in name and "int8" in name for name in launched)


def test_no_step_of_the_engine_quantises_ahead_of_a_product_behind_a_norm(tmp_path: Path, launched: list[str]) -> None:
    """Prompts in chunks, and decoding steps, which are captured."""
    _, path, _ = compressed("llama", tmp_path, mix=INTEGERS, max_position_embeddings=256)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_lm.TINY / name, path)
    options: dict[str, Any] = {"dtype": "bfloat16", "activations": "int8", "max_rows": 4, "max_length": 100}
    model = tersor.LLM(path, max_step_tokens=24, kv_bytes=8 << 20, **options)
    params = tersor.SamplingParams(max_tokens=12, ignore_eos=True, temperature=0)
    made = model.generate([list(range(2, 2 + length)) for length in (1, 20, 37)], params)
    assert [len(one.outputs[0].token_ids) for one in made] == [12] * 3
    norms = [number for number, name in enumerate(launched) if "norm_bfloat16" in name and "int8" in name]
    assert norms and all("mixed" in launched[number + 1] for number in norms)
    alone = [number for number, name in enumerate(launched) if "quantize_activations" in name]
    assert alone and not any("norm" in launched[number - 1] for number in alone)
