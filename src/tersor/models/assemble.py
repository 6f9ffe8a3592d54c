"""What goes where in a decoder? Its parts from the weights of a checkpoint, by their names."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch

from tersor.models.config import DecoderConfig, Residual
from tersor.models.decoder import Attention, Decoder, DecoderLayer, NormWeights
from tersor.models.mixture import Mixture
from tersor.models.names import Names
from tersor.models.rotary import Rotary
from tersor.models.stored import Stored
from tersor.models.stored_experts import mixture
from tersor.models.weights import Embedding, FeedForward, Product, Shared


def assemble(stored: Stored, config: DecoderConfig, names: Names, context: int) -> Decoder:
    """Return the decoder of `config` with these weights, for texts of up to `context` tokens."""

    @functools.cache
    def table(rotary: Rotary) -> torch.Tensor:
        return rotary.table(context, stored.device)

    embedding = stored.matrix(names.base + names.embedding)
    layers = [_layer(stored, config, names, index, table) for index in range(len(config.layers))]
    # A tied head shares the embedding's memory, but for a layout of its own where it needs one.
    own = Product(stored.ready(embedding)) if config.tied else stored.product(names.head, False)
    ranks, vocabulary = stored.ranks, stored.share.vocabulary
    head = own if ranks.count == 1 else Shared(own, tuple(last - first for first, last in vocabulary), ranks)
    positions = stored.vector(f"{names.base}{names.positions}.weight") if config.positions else None
    scale = float(torch.tensor(config.embedding_scale, dtype=stored.dtype))
    norm = _norm(stored, config, names.base + names.norm)
    config = replace(config, context=context)
    rows = Embedding(embedding, stored.dtype, scale, vocabulary[ranks.rank][0], ranks)
    return Decoder(config, rows, layers, norm, head, positions)


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
    form = stored.share.forms[index]
    norms = None
    if form.norm_eps is not None:
        norms = stored.vector(f"{start}{names.q_norm}.weight"), stored.vector(f"{start}{names.k_norm}.weight")
    attention = Attention(
        form=form,
        qkv=stored.products([start + name for name in names.qkv], config.qkv_bias),
        out=stored.partial(start + names.out, config.out_bias),
        rotary=None if layer.rotary is None else table(layer.rotary),
        norms=norms,
        sinks=stored.vector(start + names.sinks).float() if config.sinks else None,
    )
    first, second = (_norm(stored, config, start + name) for name in (names.input_norm, names.ffn_norm))
    after = None
    if config.residual is Residual.BOTH:
        outs = (names.attention_out_norm, names.ffn_out_norm)
        after = _norm(stored, config, start + outs[0]), _norm(stored, config, start + outs[1])
    return DecoderLayer(norms=(first, second), attention=attention, ffn=ffn, out_norms=after, ranks=stored.ranks)


def _norm(stored: Stored, config: DecoderConfig, module: str) -> NormWeights:
    bias = stored.vector(f"{module}.bias") if config.norm.centered else None
    return NormWeights(config.norm, stored.vector(f"{module}.weight"), bias)
