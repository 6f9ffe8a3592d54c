"""What are the parts of a decoder called in a checkpoint? A table a family, and the architectures that use it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

_WHOLE = "model."


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """Names of modules; `{layer}` and `{expert}` are numbers, and an empty one stands for what a family has not.

    Those of a layer follow `base + layer`, those of the whole model `base`, but for the head.

    Attributes:
        base: of the whole model.
        dropped: what this checkpoint leaves out before `base`: it was saved without the head.
        layer: of a layer.
        embedding, norm, head, positions: of the model.
        input_norm, ffn_norm: before attention and before the feed-forward network.
        attention_out_norm, ffn_out_norm: after them.
        qkv: queries, keys and values: three layers, or one that holds the three.
        out, q_norm, k_norm, sinks: of attention; `sinks` is a tensor.
        query: queries that come from the token itself, where keys and values do not (DeepSeek).
        query_down, query_norm, query_up: of queries that come from a vector of their own.
        key_value_down, key_value_norm, key_value_up: of those keys and values.
        gate_up: gate and up, one that holds both, or up alone; those of a shared expert: `shared_gate_up`.
        down: of the feed-forward network; that of a shared expert: `shared_down`.
        router, choice_bias: of experts; `choice_bias` is a tensor.
        expert: gate, up and down of an expert.
        fused: gate with up, and down, of all experts in one tensor each, instead of `expert`.
        renamed: (part of a name as stored, what patterns of a `quantization_config` call it).
        ignored: whole names of tensors, as regular expressions, that other programs left there and nothing needs.
    """

    base: str = "model."
    dropped: str = ""
    layer: str = "layers.{layer}."
    embedding: str = "embed_tokens"
    norm: str = "norm"
    head: str = "lm_head"
    positions: str = ""
    input_norm: str = "input_layernorm"
    ffn_norm: str = "post_attention_layernorm"
    attention_out_norm: str = ""
    ffn_out_norm: str = ""
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    out: str = "self_attn.o_proj"
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    sinks: str = "self_attn.sinks"
    query: str = "self_attn.q_proj"
    query_down: str = "self_attn.q_a_proj"
    query_norm: str = "self_attn.q_a_layernorm"
    query_up: str = "self_attn.q_b_proj"
    key_value_down: str = "self_attn.kv_a_proj_with_mqa"
    key_value_norm: str = "self_attn.kv_a_layernorm"
    key_value_up: str = "self_attn.kv_b_proj"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    router: str = "mlp.gate"
    choice_bias: str = "mlp.gate.e_score_correction_bias"
    expert: tuple[str, str, str] = (
        "mlp.experts.{expert}.gate_proj",
        "mlp.experts.{expert}.up_proj",
        "mlp.experts.{expert}.down_proj",
    )
    fused: tuple[str, ...] = ()
    shared_gate_up: tuple[str, ...] = ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj")
    shared_down: str = "mlp.shared_experts.down_proj"
    renamed: tuple[str, str] = ("", "")
    ignored: tuple[str, ...] = (r"(.*\.)?rotary_emb\.inv_freq",)

    def as_stored(self, stored: Collection[str]) -> Names:
        """Return the names in a checkpoint with these tensors: one of the model without its head drops `model.`."""
        short = self.base.removeprefix(_WHOLE)
        has = {base: any(name.startswith(base + self.embedding) for name in stored) for base in (self.base, short)}
        return replace(self, base=short, dropped=_WHOLE) if has[short] and not has[self.base] else self

    def pattern_name(self, module: str) -> str:
        """Return what patterns of a `quantization_config` call a module."""
        whole = module if module == self.head else self.dropped + module
        return whole.replace(*self.renamed) if self.renamed[0] else whole


LLAMA = Names()
PHI3 = replace(LLAMA, qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",))
GEMMA = replace(
    LLAMA,
    attention_out_norm="post_attention_layernorm",
    ffn_norm="pre_feedforward_layernorm",
    ffn_out_norm="post_feedforward_layernorm",
)
OPT = replace(
    LLAMA,
    base="model.decoder.",
    norm="final_layer_norm",
    positions="embed_positions",
    input_norm="self_attn_layer_norm",
    ffn_norm="final_layer_norm",
    out="self_attn.out_proj",
    gate_up=("fc1",),
    down="fc2",
)
MIXTRAL = replace(
    LLAMA,
    router="block_sparse_moe.gate",
    expert=(
        "block_sparse_moe.experts.{expert}.w1",
        "block_sparse_moe.experts.{expert}.w3",
        "block_sparse_moe.experts.{expert}.w2",
    ),
    renamed=(".block_sparse_moe.", ".mlp."),
)
GPT_OSS = replace(LLAMA, router="mlp.router", fused=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"))
DEEPSEEK_V3 = replace(LLAMA, ignored=(*LLAMA.ignored, r"model\.layers\.61\..*"))  # drafts tokens ahead

NAMES: dict[str, Names] = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": LLAMA,
    "Qwen2ForCausalLM": LLAMA,
    "Qwen3ForCausalLM": LLAMA,
    "Phi3ForCausalLM": PHI3,
    "Gemma2ForCausalLM": GEMMA,
    "Gemma3ForCausalLM": GEMMA,
    "OPTForCausalLM": OPT,
    "MixtralForCausalLM": MIXTRAL,
    "Qwen3MoeForCausalLM": LLAMA,
    "GptOssForCausalLM": GPT_OSS,
    "DeepseekV2ForCausalLM": LLAMA,
    "DeepseekV3ForCausalLM": DEEPSEEK_V3,
}
"""Class in config.json -> names in its checkpoints."""
