"""What do the fields of a DeepSeek's config.json mean? V2 (arXiv 2405.04434) and V3 (arXiv 2412.19437)."""

from __future__ import annotations

import math
from typing import Any

from tersor.models.config import DecoderConfig, Experts, Latent, Layer, Norm
from tersor.models.fields import Fields
from tersor.models.rotary_fields import rotary
from tersor.ops import Gate
from tersor.ops.attention_form import AttentionForm


def deepseek_v2(name: str, fields: Fields) -> DecoderConfig:
    """Return a DeepSeek-V2."""
    fields.only("mlp_bias", False)
    fields.only("scoring_func", "softmax")
    fields.only("topk_method", "greedy", "group_limited_greedy")
    fields.only("norm_topk_prob", False)
    limited = fields.word("topk_method", "greedy") == "group_limited_greedy"
    groups = (fields.size("n_group"), fields.size("topk_group")) if limited else (1, 1)
    return _deepseek(name, fields, groups, first=0, scale=1.0, shared=2, normalize=False, interleaved=True)


def deepseek_v3(name: str, fields: Fields) -> DecoderConfig:
    """Return a DeepSeek-V3."""
    fields.only("scoring_func", "sigmoid")
    fields.only("topk_method", "noaux_tc")
    groups = fields.size("n_group", 8), fields.size("topk_group", 4)
    normalize, interleaved = fields.flag("norm_topk_prob", True), fields.flag("rope_interleave", True)
    own: dict[str, Any] = {"scoring": "sigmoid", "choice_bias": True}
    return _deepseek(name, fields, groups, 3, 2.5, 1, normalize, interleaved, **own)


def _deepseek(
    name: str,
    fields: Fields,
    groups: tuple[int, int],
    first: int,
    scale: float,
    shared: int,
    normalize: bool,
    interleaved: bool,
    **own: Any,
) -> DecoderConfig:
    """Read what both have; `first`, `scale` and `shared` are defaults of fields, and `own` of the experts."""
    fields.only("attention_bias", False)
    fields.only("hidden_act", "silu")
    fields.only("moe_layer_freq", 1)
    heads, context = fields.size("num_attention_heads"), fields.size("max_position_embeddings", 2048)
    fields.only("num_key_value_heads", heads)
    fixed, turned = fields.size("qk_nope_head_dim", 128), fields.size("qk_rope_head_dim", 64)
    value, width = fields.size("v_head_dim", 128), fixed + turned
    if value > width:
        raise fields.refused("v_head_dim", f"at most the {width} channels of a key")
    turn = rotary(fields, turned, context, 10000.0)
    form = AttentionForm(
        heads=heads, kv_heads=heads, head_dim=width, scale=width**-0.5 * _magnitude(fields), rotary_dim=turn.dim
    )
    ffn = fields.size("moe_intermediate_size")
    experts = Experts(
        count=fields.size("n_routed_experts" if "n_routed_experts" in fields else "num_local_experts"),
        top_k=fields.size("num_experts_per_tok"),
        ffn=ffn,
        normalize=normalize,
        groups=groups[0],
        top_groups=groups[1],
        scale=fields.number("routed_scaling_factor", scale),
        wide=True,
        shared=ffn * fields.size("n_shared_experts", shared),
        **own,
    )
    dense = fields.count("first_k_dense_replace", first)
    return DecoderConfig(
        architecture=name,
        vocabulary=fields.size("vocab_size"),
        hidden=fields.size("hidden_size"),
        ffn=fields.size("intermediate_size"),
        layers=tuple(
            Layer(attention=form, rotary=turn, experts=None if index < dense else experts)
            for index in range(fields.size("num_hidden_layers"))
        ),
        context=context,
        norm=Norm(eps=fields.number("rms_norm_eps", 1e-6)),
        gate=Gate.SILU,
        latent=Latent(
            query=fields.maybe_size("q_lora_rank", 1536) or 0,
            key_value=fields.size("kv_lora_rank", 512),
            fixed=fixed,
            turned=turned,
            value=value,
            interleaved=interleaved,
            norm=Norm(eps=1e-6),
        ),
        tied=fields.flag("tie_word_embeddings", False),
        ends=fields.indices("eos_token_id"),
    )


def _magnitude(fields: Fields) -> float:
    """Return what the scale of attention is multiplied by where YaRN makes texts longer."""
    said = fields.part("rope_parameters") or fields.part("rope_scaling")
    slope = None if said is None else said.maybe_number("mscale_all_dim")
    if said is None or slope is None:
        return 1.0
    return (0.1 * slope * math.log(max(1.0, said.number("factor"))) + 1) ** 2
