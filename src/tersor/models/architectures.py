"""Which architectures are there, and what do the fields of their config.json mean? A reader for each, by class name.

Defaults are those of the models' own releases, whose config.json may leave them out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tersor.errors import UnsupportedError, did_you_mean
from tersor.models.config import DecoderConfig, Experts, Layer, Norm
from tersor.models.fields import Fields
from tersor.models.rotary_fields import rotary
from tersor.ops import Gate
from tersor.ops.attention_form import AttentionForm

FULL, SLIDING = "full_attention", "sliding_attention"
_GATES = {"silu": Gate.SILU, "gelu_pytorch_tanh": Gate.GELU_TANH, "gelu": Gate.GELU}


def read(raw: Mapping[str, Any]) -> DecoderConfig:
    """Return the decoder of a config.json.

    Raises:
        UnsupportedError: an architecture, or a value of a field, that the engine does not have; the line names it.
    """
    named = raw.get("architectures")
    name = named[0] if isinstance(named, list) and named else _BY_TYPE.get(str(raw.get("model_type")))
    if not isinstance(name, str) or name not in READERS:
        found = name if isinstance(name, str) else raw.get("model_type")
        near = did_you_mean(found, READERS) if isinstance(found, str) else ""
        raise UnsupportedError(f"the engine does not have {found}{near} (it has {', '.join(READERS)})")
    return READERS[name](name, Fields(raw))


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


READERS: dict[str, Callable[[str, Fields], DecoderConfig]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "Phi3ForCausalLM": _phi3,
}
"""Class in config.json -> what reads its fields."""

_BY_TYPE = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
}
"""`model_type` -> class, for a config.json that names none."""
