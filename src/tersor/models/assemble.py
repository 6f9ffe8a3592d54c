"""What goes where in a decoder? Its parts from the weights of a checkpoint, by their names."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch

from tersor.layouts import MixedWeight, SparseWeight, TiledSparseWeight
from tersor.models.config import DecoderConfig, Latent, Residual
from tersor.models.decoder import Attention, Decoder, DecoderLayer
from tersor.models.latent import LatentAttention
from tersor.models.mixture import Mixture
from tersor.models.names import Names
from tersor.models.norm import NormWeights, foldable
from tersor.models.rotary import Rotary
from tersor.models.stored import Stored
from tersor.models.stored_experts import mixture
from tersor.models.streamed import Placing
from tersor.models.weights import Embedding, FeedForward, Product, Shared
from tersor.ops.attention_form import PAGE, AttentionForm


def assemble(
    stored: Stored, config: DecoderConfig, names: Names, context: int, placing: Placing | None = None
) -> Decoder:
    """Return the decoder of `config` with these weights, for texts of up to `context` tokens.

    Args:
        stored: the weights.
        config, names: of the decoder.
        context: tokens of a text at most.
        placing: says where the weights of each layer stay; `None` leaves all on the device.
    """

    @functools.cache
    def table(rotary: Rotary) -> torch.Tensor:
        made = rotary.table(context, stored.device)
        return torch.nn.functional.pad(made, (0, 0, 0, -context % PAGE))  # texts lie in whole pages

    embedding = stored.matrix(names.base + names.embedding)
    assert not isinstance(embedding, MixedWeight | SparseWeight | TiledSparseWeight), "held by `expected.check`"
    layers, streamed = [], None
    for index in range(len(config.layers)):
        layer = _layer(stored, config, names, index, table)
        layers.append(layer if placing is None else placing.place(index, layer))
        del layer
    # A tied head shares the embedding's memory, but for a layout of its own where it needs one.
    own = Product(stored.ready(embedding)) if config.tied else stored.product(names.head, False)
    ranks, vocabulary = stored.ranks, stored.share.vocabulary
    head = own if ranks.count == 1 else Shared(own, tuple(last - first for first, last in vocabulary), ranks)
    positions = stored.vector(f"{names.base}{names.positions}.weight") if config.positions else None
    scale = float(torch.tensor(config.embedding_scale, dtype=stored.dtype))
    norm = _norm(stored, config, names.base + names.norm)
    config = replace(config, context=context)
    start = vocabulary[ranks.rank][0]
    rows = Embedding(embedding, stored.dtype, scale, positions, config.first_position, start, ranks)
    if placing is not None:
        layers, streamed = placing.finish(layers)
    return Decoder(config, rows, layers, norm, head, streamed)


def _layer(
    stored: Stored, config: DecoderConfig, names: Names, index: int, table: Callable[[Rotary], torch.Tensor]
) -> DecoderLayer:
    layer, start = config.layers[index], names.base + names.layer.format(layer=index)
    ffn: FeedForward | Mixture
    if layer.experts is not None:
        ffn = mixture(stored, config, names, start, layer.experts)
    else:
        up = stored.gate_up([start + name for name in names.gate_up], config.gate, config.ffn_bias)
        ffn = FeedForward(up, stored.partial(start + names.down, config.ffn_bias))
    first, second = (_norm(stored, config, start + name) for name in (names.input_norm, names.ffn_norm))
    after = None
    if config.residual is Residual.BOTH:
        outs = (names.attention_out_norm, names.ffn_out_norm)
        after = _norm(stored, config, start + outs[0]), _norm(stored, config, start + outs[1])
    rotary = None if layer.rotary is None else table(layer.rotary)
    form = stored.share.forms[index]
    attention: Attention | LatentAttention
    if config.latent is None:
        attention = _attention(stored, config, names, start, form, rotary)
    else:
        attention = _latent(stored, config, names, start, form, config.latent, rotary)
    if after is None and stored.ranks.count == 1:
        first = foldable(first, attention.reader)
        second = foldable(second, ffn.up if isinstance(ffn, FeedForward) else None)
    return DecoderLayer(norms=(first, second), attention=attention, ffn=ffn, out_norms=after, ranks=stored.ranks)


def _attention(
    stored: Stored, config: DecoderConfig, names: Names, start: str, form: AttentionForm, rotary: torch.Tensor | None
) -> Attention:
    norms = None
    if form.norm_eps is not None:
        norms = stored.vector(f"{start}{names.q_norm}.weight"), stored.vector(f"{start}{names.k_norm}.weight")
    return Attention(
        form=form,
        qkv=stored.products([start + name for name in names.qkv], config.qkv_bias),
        out=stored.partial(start + names.out, config.out_bias),
        rotary=rotary,
        norms=norms,
        sinks=stored.vector(start + names.sinks).float() if config.sinks else None,
    )


def _latent(
    stored: Stored,
    config: DecoderConfig,
    names: Names,
    start: str,
    form: AttentionForm,
    latent: Latent,
    rotary: torch.Tensor | None,
) -> LatentAttention:
    query_norm = query_up = None
    if latent.query:
        query_norm = NormWeights(latent.norm, stored.vector(f"{start}{names.query_norm}.weight"))
        query_up = stored.product(start + names.query_up, False)
    downs = (names.query_down if latent.query else names.query, names.key_value_down)
    return LatentAttention(
        form=form,
        latent=latent,
        down=stored.products([start + name for name in downs], False),
        query_norm=query_norm,
        query_up=query_up,
        key_value_norm=NormWeights(latent.norm, stored.vector(f"{start}{names.key_value_norm}.weight")),
        key_value_up=stored.product(start + names.key_value_up, False),
        out=stored.partial(start + names.out, config.out_bias),
        rotary=rotary,
    )


def _norm(stored: Stored, config: DecoderConfig, module: str) -> NormWeights:
    bias = stored.vector(f"{module}.bias") if config.norm.centered else None
    return NormWeights(config.norm, stored.vector(f"{module}.weight"), bias)
