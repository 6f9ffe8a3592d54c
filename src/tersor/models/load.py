"""How does a checkpoint become a decoder? Tensor after tensor from safetensors to the device, in packed layouts."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import torch

from tersor.checkpoint.config import QUANT_METHOD, QuantizationConfig
from tersor.checkpoint.source import Source, open_source, quantization_of, stated_dtype
from tersor.errors import TersorError, UnsupportedError
from tersor.formats import FLOAT_DTYPES, Activations
from tersor.hardware import resolve_device
from tersor.models.config import DecoderConfig, Residual
from tersor.models.decoder import Attention, Decoder, DecoderLayer, NormWeights
from tersor.models.expected import Expected, check
from tersor.models.mixture import Mixture
from tersor.models.names import NAMES, Names
from tersor.models.rotary import Rotary
from tersor.models.stored import Stored
from tersor.models.stored_experts import mixture
from tersor.models.weights import Embedding, FeedForward, Product


def load(
    model: str | os.PathLike[str] | Source,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    *,
    activations: Activations | str = Activations.NATIVE,
    context: int | None = None,
) -> Decoder:
    """Load a decoder from a checkpoint: plain, or compressed by `tersor quantize` in whatever schemes.

    Beside the weights that are in place already, memory holds those of one layer of the model, twice.

    Args:
        model: a directory, a Hub id, or an open checkpoint, which stays open.
        device: `auto`, `cpu`, `cuda`, `cuda:N`.
        dtype: of activations and plain weights; `None` is that of config.json on a GPU, and float32 on a CPU.
        activations: what packed weights are multiplied with (`Activations`).
        context: tokens of a text at most; `None` is what config.json says.

    Raises:
        UnsupportedError: the engine does not have the architecture or what a field says; weights that another method
            compressed, or experts of a layer in several schemes.
        CheckpointError: no whole checkpoint; tensors that are missing, left over or of another shape.
        TersorError: the weights do not fit in the device's memory.
    """
    if not isinstance(model, Source):
        with open_source(model) as source:
            return load(source, device, dtype, activations=activations, context=context)
    where = device if isinstance(device, torch.device) else resolve_device(device)
    config = DecoderConfig.from_dict(model.config)
    raw = quantization_of(model.config)
    if raw is not None and raw.get("quant_method") != QUANT_METHOD:
        raise UnsupportedError(
            f"{model.label}: its weights are compressed by {raw.get('quant_method')}, which the engine does not load: "
            "convert it with tersor quantize"
        )
    quantization = None if raw is None else QuantizationConfig.from_dict(raw)
    names = NAMES[config.architecture].as_stored(model.tensors)
    expected = Expected.of(config, names)
    schemes = check(expected, model.tensors, quantization, names)
    chosen = dtype or _dtype(model, where)
    stored = Stored(model.tensors, schemes, expected.matrices, where, chosen, Activations.of(activations))
    try:
        return _decoder(stored, config, names, min(context or config.context, config.context))
    except torch.OutOfMemoryError:
        raise TersorError(f"{model.label}: the weights do not fit in the memory of {where}") from None


def _dtype(source: Source, device: torch.device) -> torch.dtype:
    """Return the dtype that is meant where none is given."""
    if device.type == "cpu":
        return torch.float32
    return FLOAT_DTYPES.get(stated_dtype(source.config) or "", torch.bfloat16)


def _decoder(stored: Stored, config: DecoderConfig, names: Names, context: int) -> Decoder:
    @functools.cache
    def table(rotary: Rotary) -> torch.Tensor:
        return rotary.table(context, stored.device)

    embedding = stored.matrix(names.base + names.embedding)
    layers = [_layer(stored, config, names, index, table) for index in range(len(config.layers))]
    # A tied head shares the embedding's memory, but for a layout of its own where it needs one.
    head = Product(stored.ready(embedding)) if config.tied else stored.product(names.head, False)
    positions = stored.vector(f"{names.base}{names.positions}.weight") if config.positions else None
    scale = float(torch.tensor(config.embedding_scale, dtype=stored.dtype))
    norm = _norm(stored, config, names.base + names.norm)
    return Decoder(config, Embedding(embedding, stored.dtype, scale), layers, norm, head, positions)


def _layer(
    stored: Stored, config: DecoderConfig, names: Names, index: int, table: Callable[[Rotary], torch.Tensor]
) -> DecoderLayer:
    layer, start = config.layers[index], names.base + names.layer.format(layer=index)
    ffn: FeedForward | Mixture
    if layer.experts is not None:
        ffn = mixture(stored, config, names, start, layer.experts)
    else:
        up = stored.gate_up([start + name for name in names.gate_up], config.gate, config.ffn_bias)
        ffn = FeedForward(up, stored.product(start + names.down, config.ffn_bias))
    form = layer.attention
    norms = None
    if form.norm_eps is not None:
        norms = stored.vector(f"{start}{names.q_norm}.weight"), stored.vector(f"{start}{names.k_norm}.weight")
    attention = Attention(
        form=form,
        qkv=stored.products([start + name for name in names.qkv], config.qkv_bias),
        out=stored.product(start + names.out, config.out_bias),
        rotary=None if layer.rotary is None else table(layer.rotary),
        norms=norms,
        sinks=stored.vector(start + names.sinks).float() if config.sinks else None,
    )
    return DecoderLayer(
        norms=_norms(stored, config, start, names.input_norm, names.ffn_norm),
        attention=attention,
        ffn=ffn,
        out_norms=_norms(stored, config, start, names.attention_out_norm, names.ffn_out_norm)
        if config.residual is Residual.BOTH
        else None,
    )


def _norms(
    stored: Stored, config: DecoderConfig, start: str, first: str, second: str
) -> tuple[NormWeights, NormWeights]:
    return _norm(stored, config, start + first), _norm(stored, config, start + second)


def _norm(stored: Stored, config: DecoderConfig, module: str) -> NormWeights:
    bias = stored.vector(f"{module}.bias") if config.norm.centered else None
    return NormWeights(config.norm, stored.vector(f"{module}.weight"), bias)
