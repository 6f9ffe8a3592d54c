"""Decoders of several architectures with sizes that kernels take, small enough for a CPU; without weights."""

from __future__ import annotations

from typing import Any

from tersor.models.config import DecoderConfig

COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"]},
    "qwen3-moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "norm_topk_prob": True,
    },
    "gpt-oss": {
        "architectures": ["GptOssForCausalLM"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 32,
        "rope_theta": 150000.0,
    },
    "gemma2": {
        "architectures": ["Gemma2ForCausalLM"],
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 32,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    },
    "opt": {"architectures": ["OPTForCausalLM"], "ffn_dim": 512, "hidden_size": 256},
    "deepseek-v3": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "num_key_value_heads": 4,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "q_lora_rank": 128,
        "kv_lora_rank": 128,
        "moe_intermediate_size": 128,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
}


def config_of(name: str) -> DecoderConfig:
    """Return one by its name in `CONFIGS`."""
    return DecoderConfig.from_dict({**COMMON, **CONFIGS[name]})
