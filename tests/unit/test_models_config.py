"""What the engine reads in a config.json, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from tersor import models
from tersor.errors import UnsupportedError
from tersor.models import DecoderConfig
from tersor.models.config import Residual
from tersor.ops import Gate

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "eos_token_id": [128001, 128009],
}
GEMMA3: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "vocab_size": 262144,
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "num_hidden_layers": 26,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "eos_token_id": 1,
}
PHI3: dict[str, Any] = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "vocab_size": 32064,
    "hidden_size": 192,
    "intermediate_size": 8192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "original_max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "sliding_window": 262144,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0 + 0.05 * index for index in range(24)],
        "long_factor": [1.0 + 0.5 * index for index in range(24)],
    },
}


def test_a_llama_is_read() -> None:
    config = DecoderConfig.from_dict(LLAMA)
    assert (config.vocabulary, config.hidden, config.ffn, config.context) == (128256, 4096, 14336, 8192)
    assert len(config.layers) == 32 and len(set(config.layers)) == 1
    form = config.layers[0].attention
    assert (form.heads, form.kv_heads, form.head_dim, form.rotary_dim) == (32, 8, 128, 128)
    assert form.scale == 128**-0.5 and form.window is None and form.norm_eps is None
    assert config.gate is Gate.SILU and config.residual is Residual.PRE and not config.tied
    assert config.norm.eps == 1e-5 and config.ends == (128001, 128009)
    assert config == DecoderConfig.from_dict(LLAMA) and hash(config) == hash(DecoderConfig.from_dict(LLAMA))


def test_gemma_3_has_a_base_of_its_own_where_layers_slide() -> None:
    config = DecoderConfig.from_dict(GEMMA3)
    windows = [layer.attention.window for layer in config.layers]
    assert windows[:6] == [512] * 5 + [None] and windows.count(None) == 4
    assert {(layer.attention.window, layer.rotary.base) for layer in config.layers if layer.rotary} == {
        (512, 10000.0),
        (None, 1000000.0),
    }
    assert config.tied and config.norm.offset == 1.0 and config.embedding_scale == math.sqrt(1152)
    assert config.layers[0].attention.norm_offset == 1.0


ROTARIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama3": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        }
    },
    "yarn": {
        "rope_scaling": {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 512},
        "max_position_embeddings": 8192,
    },
    "yarn as gpt-oss has it": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 256,
        },
    },
    "yarn with two slopes": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 16.0,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
            "original_max_position_embeddings": 512,
        },
    },
    "new fields": {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}},
}


def turns(rotary: Any, positions: int, **kind: str) -> torch.Tensor:
    """Return cosines and sines of transformers, in the order of our tables."""
    cos, sin = rotary(torch.zeros(1), torch.arange(positions)[None], **kind)
    return torch.cat([one[0, :, : one.shape[-1] // 2] for one in (cos, sin)], dim=1)


@pytest.mark.parametrize("case", ROTARIES)
def test_tables_of_rotation_are_those_of_transformers(case: str) -> None:
    raw = {**LLAMA, "rope_theta": 10000.0, **ROTARIES[case]}
    rotary = DecoderConfig.from_dict(raw).layers[0].rotary
    assert rotary is not None
    wanted = turns(LlamaRotaryEmbedding(AutoConfig.for_model(**raw)), 700)
    torch.testing.assert_close(rotary.table(700), wanted, rtol=0, atol=2e-4)


@pytest.mark.parametrize("positions", [128, 129])
def test_a_long_context_has_divisors_of_its_own_in_phi_3(positions: int) -> None:
    rotary = DecoderConfig.from_dict(PHI3).layers[0].rotary
    assert rotary is not None
    wanted = turns(Phi3RotaryEmbedding(AutoConfig.for_model(**PHI3)), positions)
    torch.testing.assert_close(rotary.table(positions), wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 8.0}])
def test_tables_of_gemma_3_are_those_of_transformers(scaling: dict[str, Any] | None) -> None:
    raw = {**GEMMA3, "rope_scaling": scaling}
    wanted = Gemma3RotaryEmbedding(AutoConfig.for_model(**raw))
    layers = DecoderConfig.from_dict(raw).layers
    for index, kind in ((0, "sliding_attention"), (5, "full_attention")):
        rotary = layers[index].rotary
        assert rotary is not None
        torch.testing.assert_close(rotary.table(300), turns(wanted, 300, layer_type=kind), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architectures": ["LamaForCausalLM"]}, "does not have LamaForCausalLM, did you mean 'LlamaForCausalLM'"),
        ({"architectures": None, "model_type": "t5"}, "does not have t5"),
        ({"architectures": None, "model_type": None}, "does not have None"),
        ({"hidden_act": "relu2"}, "hidden_act is 'relu2': the engine takes silu or gelu_pytorch_tanh or gelu"),
        ({"vocab_size": None}, "vocab_size is None: the engine takes a whole number"),
        ({"hidden_size": -1}, "hidden_size is -1"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"num_attention_heads": 33}, "num_key_value_heads is 8: the engine takes a divisor of num_attention"),
        ({"attention_bias": "yes"}, "attention_bias is 'yes': the engine takes true or false"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.type is 'dynamic': the engine takes"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling.low_freq_factor is missing"),
        ({"rope_scaling": [1]}, "rope_scaling is [1]: the engine takes an object"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5"),
        ({"eos_token_id": "end"}, "eos_token_id is 'end': the engine takes whole numbers"),
    ],
)  # fmt: skip
def test_a_config_that_is_not_understood_is_refused_in_a_line(changes: dict[str, Any], said: str) -> None:
    raw = {**LLAMA, **changes}
    why = models.supported(raw)
    assert said in why and "\n" not in why
    with pytest.raises(UnsupportedError) as caught:
        DecoderConfig.from_dict(raw)
    assert str(caught.value) == why


def test_an_opt_with_another_form_is_refused_by_the_field() -> None:
    raw = {"architectures": ["OPTForCausalLM"], "vocab_size": 9, "hidden_size": 64, "num_attention_heads": 4}
    raw |= {"ffn_dim": 8, "num_hidden_layers": 1, "do_layer_norm_before": False}
    assert models.supported(raw) == "config.json: do_layer_norm_before is False: the engine takes True"
    assert models.supported({**raw, "do_layer_norm_before": True}) == ""


def test_layers_that_slide_need_a_window() -> None:
    raw = {**GEMMA3, "sliding_window": None, "layer_types": ["sliding_attention"] * 26}
    assert "sliding_window is None: the engine takes a whole number where layers slide" in models.supported(raw)
    raw = {**GEMMA3, "layer_types": ["chunked_attention"] * 26}
    assert "layer_types is ['chunked_attention'" in models.supported(raw)


def test_an_architecture_is_known_by_its_type_where_no_class_is_named() -> None:
    raw = {name: value for name, value in LLAMA.items() if name != "architectures"}
    assert DecoderConfig.from_dict(raw) == DecoderConfig.from_dict(LLAMA)
