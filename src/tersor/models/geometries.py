"""Which sizes do well-known models have? Their config.json, as their makers publish it, but for what nothing needs."""

from __future__ import annotations

from typing import Any

from tersor.errors import InputError, did_you_mean
from tersor.models.config import DecoderConfig

_LLAMA_3_1 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _sizes(layers: int, hidden: int, ffn: int, heads: int, kv_heads: int) -> dict[str, int]:
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    return dict(zip(names, (layers, hidden, ffn, heads, kv_heads), strict=True))


def _llama(*sizes: int, vocabulary: int, context: int, theta: float, **own: Any) -> dict[str, Any]:
    common = {"architectures": ["LlamaForCausalLM"], "vocab_size": vocabulary, "max_position_embeddings": context}
    return {**common, **_sizes(*sizes), "rms_norm_eps": 1e-5, "rope_theta": theta, **own}


def _llama_2(*sizes: int) -> dict[str, Any]:
    return _llama(*sizes, vocabulary=32000, context=4096, theta=10000.0)


def _llama_3(*sizes: int) -> dict[str, Any]:
    return _llama(*sizes, vocabulary=128256, context=8192, theta=500000.0)


def _qwen(name: str, *sizes: int, vocabulary: int, context: int, **own: Any) -> dict[str, Any]:
    common = {"architectures": [name], "vocab_size": vocabulary, "max_position_embeddings": context}
    return {**common, **_sizes(*sizes), "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, **own}


def _qwen_2_5(*sizes: int) -> dict[str, Any]:
    return _qwen("Qwen2ForCausalLM", *sizes, vocabulary=152064, context=32768)


def _qwen_3(*sizes: int, name: str = "Qwen3ForCausalLM", **own: Any) -> dict[str, Any]:
    return _qwen(name, *sizes, vocabulary=151936, context=40960, head_dim=128, **own)


def _opt(layers: int, hidden: int, heads: int) -> dict[str, Any]:
    return {
        "architectures": ["OPTForCausalLM"],
        "vocab_size": 50272,
        "hidden_size": hidden,
        "ffn_dim": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 2048,
    }


def _gpt_oss(layers: int, experts: int) -> dict[str, Any]:
    scaling = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
    return {
        "architectures": ["GptOssForCausalLM"],
        "vocab_size": 201088,
        **_sizes(layers, 2880, 2880, 64, 8),
        "head_dim": 64,
        "num_local_experts": experts,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "rope_scaling": {**scaling, "original_max_position_embeddings": 4096},
    }


GEOMETRIES: dict[str, dict[str, Any]] = {
    "llama-2-7b": _llama_2(32, 4096, 11008, 32, 32),
    "llama-2-13b": _llama_2(40, 5120, 13824, 40, 40),
    "llama-2-70b": _llama_2(80, 8192, 28672, 64, 8),
    "llama-3-8b": _llama_3(32, 4096, 14336, 32, 8),
    "llama-3-70b": _llama_3(80, 8192, 28672, 64, 8),
    "llama-3.1-405b": _llama(
        *(126, 16384, 53248, 128, 8), vocabulary=128256, context=131072, theta=500000.0, rope_scaling=_LLAMA_3_1
    ),
    "mistral-7b": {
        **_llama(32, 4096, 14336, 32, 8, vocabulary=32768, context=32768, theta=1000000.0),
        "architectures": ["MistralForCausalLM"],
        "sliding_window": None,
    },
    "qwen2.5-7b": _qwen_2_5(28, 3584, 18944, 28, 4),
    "qwen2.5-14b": _qwen_2_5(48, 5120, 13824, 40, 8),
    "qwen2.5-32b": _qwen_2_5(64, 5120, 27648, 40, 8),
    "qwen2.5-72b": _qwen_2_5(80, 8192, 29568, 64, 8),
    "qwen3-8b": _qwen_3(36, 4096, 12288, 32, 8),
    "qwen3-32b": _qwen_3(64, 5120, 25600, 64, 8),
    "opt-6.7b": _opt(32, 4096, 32),
    "opt-13b": _opt(40, 5120, 40),
    "opt-30b": _opt(48, 7168, 56),
    "opt-66b": _opt(64, 9216, 72),
    "qwen3-30b-a3b": _qwen_3(
        *(48, 2048, 6144, 32, 4),
        name="Qwen3MoeForCausalLM",
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
    ),
    "mixtral-8x7b": {
        **_llama(32, 4096, 14336, 32, 8, vocabulary=32000, context=32768, theta=1000000.0),
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "deepseek-v3": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "vocab_size": 129280,
        **_sizes(61, 7168, 18432, 128, 128),
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "first_k_dense_replace": 3,
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "max_position_embeddings": 163840,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
        },
    },
    "gpt-oss-20b": _gpt_oss(24, 32),
    "gpt-oss-120b": _gpt_oss(36, 128),
}
"""Name -> config.json."""


def config_json(name: str) -> dict[str, Any]:
    """Return the config.json that a name stands for.

    Raises:
        InputError: it is no name of `GEOMETRIES`.
    """
    known = name.lower()
    if known not in GEOMETRIES:
        raise InputError(f"no geometry {name!r}{did_you_mean(known, GEOMETRIES)}: use one of {', '.join(GEOMETRIES)}")
    return GEOMETRIES[known]


def geometry(name: str) -> DecoderConfig:
    """Return the decoder that a name stands for.

    Raises:
        InputError: it is no name of `GEOMETRIES`.
    """
    return DecoderConfig.from_dict(config_json(name))
