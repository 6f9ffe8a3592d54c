"""Which architectures are there, and what do the fields of their config.json mean? A reader for each, by class name.

Defaults are those of the models' own releases, whose config.json may leave them out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tersor.errors import UnsupportedError, did_you_mean
from tersor.models.config import DecoderConfig, Experts, Layer, Norm, Residual
from tersor.models.deepseek import deepseek_v2, deepseek_v3
from tersor.models.fields import Fields
from tersor.models.rotary_fields import local_rotary, rotary
from tersor.ops import Gate
from tersor.ops.attention_form import AttentionForm
from tersor.ops.gates import CLAMP, SLOPE

FULL, SLIDING = "full_attention", "sliding_attention"
_GATES = {"silu": Gate.SILU, "gelu_pytorch_tanh": Gate.GELU_TANH, "gelu": Gate.GELU}


def read(raw: Mapping[str, Any]) -> DecoderConfig:
    """Return the decoder of a config.json.

    Raises:
        UnsupportedError: an architecture, or a value of a field, that the engine does not have; the line names it.
    """
    name = called(raw)
    if name not in READERS:
        near = did_you_mean(name, READERS)
        raise UnsupportedError(f"the engine does not have {name}{near} (it has {', '.join(READERS)})")
    return READERS[name](name, Fields(raw))


def called(raw: Mapping[str, Any]) -> str:
    """Return the class that a config.json names, or that its `model_type` means, or else that type itself."""
    named, kind = raw.get("architectures"), raw.get("model_type")
    name = named[0] if isinstance(named, list) and named else TYPES.get(str(kind))
    return name if isinstance(name, str) else str(kind)


@dataclass(frozen=True, slots=True)
class _Heads:
    """The sizes that every architecture has."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    context: int

    @staticmethod
    def of(fields: Fields, head_dim: int | None = None) -> _Heads:
        hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
        kv_heads = fields.size("num_key_value_heads", heads)
        if heads % kv_heads:
            raise fields.refused("num_key_value_heads", f"a divisor of num_attention_heads, {heads}")
        own = "head_dim" in fields or head_dim is not None
        if not own and hidden % heads:
            raise fields.refused("num_attention_heads", f"a divisor of hidden_size, {hidden}")
        dim = fields.size("head_dim", head_dim) if own else hidden // heads
        layers, context = fields.size("num_hidden_layers"), fields.size("max_position_embeddings", 2048)
        return _Heads(hidden, heads, kv_heads, dim, layers, context)

    def form(self, window: int | None = None, **own: Any) -> AttentionForm:
        """Return the form of a layer's attention; the scale is the common one unless it is given."""
        sizes = {"heads": self.heads, "kv_heads": self.kv_heads, "head_dim": self.head_dim}
        return AttentionForm(**{"scale": self.head_dim**-0.5, "window": window, **sizes, **own})


def _windows(
    fields: Fields, heads: _Heads, sliding: Callable[[int], bool], default: int | None = None
) -> list[int | None]:
    """Return the window of every layer: of those that `layer_types`, or else `sliding`, says have one.

    Args:
        fields, heads: of the model.
        sliding: whether a layer has a window, by its number.
        default: the window where no field says it.
    """
    types = fields.words("layer_types", heads.layers, (FULL, SLIDING))
    window = fields.maybe_size("sliding_window", default)
    if types is None:
        return [window if sliding(index) else None for index in range(heads.layers)]
    if window is None and SLIDING in types:
        raise fields.refused("sliding_window", "a whole number where layers slide")
    return [window if kind == SLIDING else None for kind in types]


def _gate(fields: Fields, name: str, default: str) -> Gate:
    word = fields.word(name, default)
    if word not in _GATES:
        raise fields.refused(name, " or ".join(_GATES))
    return _GATES[word]


def _llama_like(
    name: str,
    fields: Fields,
    *,
    windows: Callable[[Fields, _Heads], list[int | None]] = lambda fields, heads: [None] * heads.layers,
    head_dim: int | None = None,
    theta: float = 10000.0,
    qk_norm: bool = False,
    attention_bias: bool = False,
    experts: Callable[[Fields, int], Experts | None] = lambda fields, layer: None,
    **own: Any,
) -> DecoderConfig:
    """Read an architecture that is Llama but for what the arguments say."""
    heads = _Heads.of(fields, head_dim)
    eps = fields.number("rms_norm_eps", 1e-6)
    turn = rotary(fields, heads.head_dim, heads.context, theta)
    layers = tuple(
        Layer(
            attention=heads.form(window, rotary_dim=turn.dim, norm_eps=eps if qk_norm else None),
            rotary=turn,
            experts=experts(fields, index),
        )
        for index, window in enumerate(windows(fields, heads))
    )
    biased = fields.flag("attention_bias", attention_bias)
    common = {
        "architecture": name,
        "vocabulary": fields.size("vocab_size"),
        "hidden": heads.hidden,
        "ffn": fields.size("intermediate_size"),
        "layers": layers,
        "context": heads.context,
        "norm": Norm(eps=eps),
        "gate": _gate(fields, "hidden_act", "silu"),
        "qkv_bias": biased,
        "out_bias": biased,
        "tied": fields.flag("tie_word_embeddings", False),
        "ends": fields.indices("eos_token_id"),
    }
    return DecoderConfig(**{**common, **own})


def _llama(name: str, fields: Fields) -> DecoderConfig:
    return _llama_like(name, fields, ffn_bias=fields.flag("mlp_bias", False))


def _all_slide(default: int | None) -> Callable[[Fields, _Heads], list[int | None]]:
    """Return what gives every layer the window of config.json, or `default` where that says none."""
    return lambda fields, heads: _windows(fields, heads, lambda index: True, default)


def _mistral(name: str, fields: Fields) -> DecoderConfig:
    return _llama_like(name, fields, windows=_all_slide(4096), qkv_bias=False, out_bias=False)


def _late_slide(fields: Fields, heads: _Heads) -> list[int | None]:
    """Return the windows of Qwen: layers from `max_window_layers` on slide where that is switched on."""
    if not fields.flag("use_sliding_window", False):
        return [None] * heads.layers
    first = fields.count("max_window_layers", 28)
    return _windows(fields, heads, lambda index: index >= first, 4096)


def _qwen2(name: str, fields: Fields) -> DecoderConfig:
    return _llama_like(name, fields, windows=_late_slide, qkv_bias=True, out_bias=False)


def _qwen3(name: str, fields: Fields) -> DecoderConfig:
    return _llama_like(name, fields, windows=_late_slide, head_dim=128, qk_norm=True)


def _phi3(name: str, fields: Fields) -> DecoderConfig:
    return _llama_like(name, fields, windows=_all_slide(None), qkv_bias=False, out_bias=False)


def _alternate(period: int) -> Callable[[int], bool]:
    """Return what says which layers slide: all but every `period`-th."""
    return lambda index: (index + 1) % period != 0


def _gemma(
    name: str,
    fields: Fields,
    *,
    window: int,
    period: int,
    softcaps: tuple[float | None, float | None],
    local_theta: float | None,
    theta: float,
) -> DecoderConfig:
    """Read Gemma 2 or 3, whose defaults the arguments are: `softcaps` of attention and of logits."""
    fields.only("use_bidirectional_attention", False)
    heads = _Heads.of(fields, 256)
    norm = Norm(eps=fields.number("rms_norm_eps", 1e-6), offset=1.0)
    softcap = fields.maybe_number("attn_logit_softcapping", softcaps[0])
    layers = []
    for own in _windows(fields, heads, _alternate(fields.size("sliding_window_pattern", period)), window):
        if local_theta is None:
            turn = rotary(fields, heads.head_dim, heads.context, theta)
        elif own is None:
            turn = rotary(fields, heads.head_dim, heads.context, theta, FULL)
        else:
            turn = local_rotary(fields, heads.head_dim, heads.context, local_theta)
        form = heads.form(
            own,
            scale=fields.number("query_pre_attn_scalar", 256.0) ** -0.5,
            rotary_dim=turn.dim,
            softcap=softcap,
            norm_eps=None if local_theta is None else norm.eps,
            norm_offset=0.0 if local_theta is None else norm.offset,
        )
        layers.append(Layer(attention=form, rotary=turn))
    biased = fields.flag("attention_bias", False)
    return DecoderConfig(
        architecture=name,
        vocabulary=fields.size("vocab_size"),
        hidden=heads.hidden,
        ffn=fields.size("intermediate_size"),
        layers=tuple(layers),
        context=heads.context,
        norm=norm,
        gate=_gate(fields, "hidden_activation", "gelu_pytorch_tanh"),
        residual=Residual.BOTH,
        qkv_bias=biased,
        out_bias=biased,
        tied=fields.flag("tie_word_embeddings", True),
        embedding_scale=heads.hidden**0.5,
        softcap=fields.maybe_number("final_logit_softcapping", softcaps[1]),
        ends=fields.indices("eos_token_id"),
    )


def _gemma2(name: str, fields: Fields) -> DecoderConfig:
    return _gemma(name, fields, window=4096, period=2, softcaps=(50.0, 30.0), local_theta=None, theta=10000.0)


def _gemma3(name: str, fields: Fields) -> DecoderConfig:
    return _gemma(name, fields, window=4096, period=6, softcaps=(None, None), local_theta=10000.0, theta=1000000.0)


def _opt(name: str, fields: Fields) -> DecoderConfig:
    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    fields.only("do_layer_norm_before", True)
    fields.only("_remove_final_layer_norm", False)
    fields.only("layer_norm_elementwise_affine", True)
    fields.only("word_embed_proj_dim", hidden)
    fields.only("activation_function", "relu")
    if hidden % heads:
        raise fields.refused("num_attention_heads", f"a divisor of hidden_size, {hidden}")
    context, first = fields.size("max_position_embeddings", 2048), 2
    dim = hidden // heads
    layer = Layer(attention=AttentionForm(heads=heads, kv_heads=heads, head_dim=dim, scale=dim**-0.5), rotary=None)
    biased = fields.flag("enable_bias", True)
    return DecoderConfig(
        architecture=name,
        vocabulary=fields.size("vocab_size"),
        hidden=hidden,
        ffn=fields.size("ffn_dim"),
        layers=(layer,) * fields.size("num_hidden_layers"),
        context=context,
        norm=Norm(eps=1e-5, centered=True),
        gate=None,
        qkv_bias=biased,
        out_bias=biased,
        ffn_bias=biased,
        tied=fields.flag("tie_word_embeddings", True),
        positions=context + first,
        first_position=first,
        ends=fields.indices("eos_token_id"),
    )


def _expert_count(fields: Fields) -> int:
    """Return how many experts a layer has, by either of the two names of the field."""
    return fields.size("num_experts" if "num_experts" in fields else "num_local_experts")


def _mixtral(name: str, fields: Fields) -> DecoderConfig:
    experts = Experts(
        count=_expert_count(fields),
        top_k=fields.size("num_experts_per_tok", 2),
        ffn=fields.size("intermediate_size"),
    )
    return _llama_like(
        name,
        fields,
        windows=_all_slide(None),
        theta=1000000.0,
        qkv_bias=False,
        out_bias=False,
        experts=lambda of, layer: experts,
    )


def _qwen3_moe(name: str, fields: Fields) -> DecoderConfig:
    experts = Experts(
        count=_expert_count(fields),
        top_k=fields.size("num_experts_per_tok", 8),
        ffn=fields.size("moe_intermediate_size", 768),
        normalize=fields.flag("norm_topk_prob", False),
    )
    dense, step = fields.indices("mlp_only_layers"), fields.size("decoder_sparse_step", 1)

    def windows(of: Fields, heads: _Heads) -> list[int | None]:
        slide = of.flag("use_sliding_window", False)
        return _windows(of, heads, lambda index: slide, 4096)

    return _llama_like(
        name,
        fields,
        windows=windows,
        qk_norm=True,
        experts=lambda of, layer: None if layer in dense or (layer + 1) % step else experts,
    )


def _gpt_oss(name: str, fields: Fields) -> DecoderConfig:
    fields.only("hidden_act", "silu")
    fields.only("swiglu_alpha", SLOPE)
    fields.only("swiglu_limit", CLAMP)
    experts = Experts(
        count=_expert_count(fields),
        top_k=fields.size("num_experts_per_tok", 4),
        ffn=fields.size("intermediate_size"),
        router_bias=True,
        biased=True,
    )
    return _llama_like(
        name,
        fields,
        windows=lambda of, heads: _windows(of, heads, _alternate(2), 128),
        head_dim=64,
        theta=150000.0,
        attention_bias=True,
        gate=Gate.CLAMPED,
        sinks=True,
        experts=lambda of, layer: experts,
    )


READERS: dict[str, Callable[[str, Fields], DecoderConfig]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "Phi3ForCausalLM": _phi3,
    "Gemma2ForCausalLM": _gemma2,
    "Gemma3ForCausalLM": _gemma3,
    "OPTForCausalLM": _opt,
    "MixtralForCausalLM": _mixtral,
    "Qwen3MoeForCausalLM": _qwen3_moe,
    "GptOssForCausalLM": _gpt_oss,
    "DeepseekV2ForCausalLM": deepseek_v2,
    "DeepseekV3ForCausalLM": deepseek_v3,
}
"""Class in config.json -> what reads its fields."""

TYPES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "opt": "OPTForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}
"""`model_type` -> class, for a config.json that names none."""


def model_type(raw: Mapping[str, Any]) -> str:
    """Return the `model_type` of a config.json, that of its class where it names none."""
    types = {name: kind for kind, name in TYPES.items()}
    return str(raw.get("model_type") or types[read(raw).architecture])
