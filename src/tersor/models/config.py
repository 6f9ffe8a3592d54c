"""What is a decoder, as one value? Sizes, forms and numbers of every layer; `architectures` makes it of config.json."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tersor.checkpoint.config import QUANT_METHOD
from tersor.checkpoint.source import quantization_of
from tersor.errors import UnsupportedError
from tersor.models.rotary import Rotary
from tersor.ops import Gate
from tersor.ops.attention_form import AttentionForm


class Residual(enum.Enum):
    """Where norms stand beside the sums of a layer."""

    PRE = "pre"
    """x + f(norm(x))."""
    BOTH = "both"
    """x + norm(f(norm(x))): Gemma 2 and 3 (arXiv 2408.00118)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """A norm over the channels of a token.

    Attributes:
        eps: is added to the mean of squares.
        offset: is added to the weights (1 for Gemma).
        centered: whether the mean is subtracted first and a bias added at last (LayerNorm, arXiv 1607.06450); else it
            is an RMS norm (arXiv 1910.07467).
    """

    eps: float
    offset: float = 0.0
    centered: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """The experts of a layer and how its router chooses, the latter as in `ops.route`.

    Attributes:
        count, top_k: E and K.
        ffn: channels inside an expert.
        scoring, normalize, groups, top_groups, scale: as in `ops.route`.
        choice_bias: whether the router has a bias of each expert that takes part in the choice alone.
        router_bias: whether its logits have a bias.
        biased: whether gate, up and down have biases.
        wide: whether the router's product is float32 whatever activations are.
        shared: channels inside the experts that every token goes through; 0 for none.
    """

    count: int
    top_k: int
    ffn: int
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True
    groups: int = 1
    top_groups: int = 1
    scale: float = 1.0
    choice_bias: bool = False
    router_bias: bool = False
    biased: bool = False
    wide: bool = False
    shared: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """What one layer has of its own.

    Attributes:
        attention: its form, the window among it.
        rotary: how queries and keys turn, or `None`.
        experts: instead of a feed-forward network that every token goes through, or `None`.
    """

    attention: AttentionForm
    rotary: Rotary | None
    experts: Experts | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Latent:
    """The vectors that queries, keys and values come from (MLA: DeepSeek-V2, arXiv 2405.04434, section 2.1).

    Attributes:
        query: channels of what queries come from; 0 where they come from the token itself.
        key_value: channels of what keys and values come from.
        fixed, turned, value: channels of a head: of keys that do not turn and that do, and of values.
        interleaved: whether a channel that turns stands beside its partner.
        norm: of those vectors.
    """

    query: int
    key_value: int
    fixed: int
    turned: int
    value: int
    interleaved: bool
    norm: Norm


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """A decoder.

    Attributes:
        architecture: name of the class in config.json.
        vocabulary: rows of the embedding and of the output head.
        hidden, ffn: width of the residual stream and of the feed-forward networks.
        layers: in order.
        context: tokens of a text at most.
        norm: of layers and of the output.
        gate: how gate and up become one; `None` is relu of up alone, without a gate (OPT).
        residual: where norms stand.
        qkv_bias, out_bias, ffn_bias: which products have biases: queries, keys and values; the output of attention; the
            feed-forward network.
        latent: what queries, keys and values come from, where that is not the token itself, or `None` (DeepSeek).
        sinks: whether every head has a score that belongs to no token (gpt-oss).
        tied: whether the output head is the embedding.
        embedding_scale: multiplies embeddings.
        softcap: logits -> softcap * tanh(logits / softcap), or `None`.
        positions: rows of a learned embedding of positions, those before the first included; 0 for none (OPT).
        first_position: row of the first position.
        ends: tokens that end a text.
    """

    architecture: str
    vocabulary: int
    hidden: int
    ffn: int
    layers: tuple[Layer, ...]
    context: int
    norm: Norm
    gate: Gate | None = Gate.SILU
    residual: Residual = Residual.PRE
    qkv_bias: bool = False
    out_bias: bool = False
    ffn_bias: bool = False
    latent: Latent | None = None
    sinks: bool = False
    tied: bool = False
    embedding_scale: float = 1.0
    softcap: float | None = None
    positions: int = 0
    first_position: int = 0
    ends: tuple[int, ...] = ()

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> DecoderConfig:
        """Make one of a config.json.

        Raises:
            UnsupportedError: an architecture, or a value of a field, that the engine does not have; the line names it.
        """
        from tersor.models.architectures import read

        return read(raw)


def supported(raw: Mapping[str, Any]) -> str:
    """Return why a checkpoint with this config.json is not one that the engine loads, in a line; empty if it is."""
    quantization = quantization_of(dict(raw))
    method = QUANT_METHOD if quantization is None else quantization.get("quant_method")
    if method != QUANT_METHOD:
        return f"the engine does not load weights compressed by {method}: convert them with tersor quantize"
    try:
        DecoderConfig.from_dict(raw)
    except UnsupportedError as error:
        return str(error)
    return ""
