"""How does a checkpoint become a decoder? Tensor after tensor from safetensors to the device, in packed layouts."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import torch

from tersor.checkpoint.config import QuantizationConfig
from tersor.checkpoint.names import TORCH_DTYPES, Form
from tersor.checkpoint.source import Source, open_source, quantization_of, stated_dtype
from tersor.errors import TersorError, UnsupportedError
from tersor.formats import FLOAT_DTYPES, Activations, Assignment, Scheme
from tersor.hardware import resolve_device
from tersor.models.assemble import assemble
from tersor.models.config import DecoderConfig, supported
from tersor.models.decoder import Decoder
from tersor.models.expected import Expected
from tersor.models.expected import check as check_stored
from tersor.models.names import NAMES, Names
from tersor.models.reading import Reading
from tersor.models.share import Share, check
from tersor.models.stored import Stored
from tersor.models.streamed import Offload
from tersor.ops.collective import ALONE, Ranks
from tersor.ops.dispatch import activations_for, kernel_chip
from tersor.planner.placement import Place, Placement


def load(
    model: str | os.PathLike[str] | Source,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    *,
    activations: Activations | str = Activations.NATIVE,
    context: int | None = None,
    ranks: Ranks = ALONE,
    offload: Offload | None = None,
    place: Place | None = None,
) -> Decoder:
    """Load a decoder from a checkpoint: plain, or compressed by `tersor quantize` in whatever schemes.

    Beside the weights that are in place already, memory holds those of one layer of the model, twice.

    Args:
        model: a directory, a Hub id, or an open checkpoint, which stays open.
        device: `auto`, `cpu`, `cuda`, `cuda:N`.
        dtype: of activations and plain weights; `None` is that of config.json on a GPU, and float32 on a CPU.
        activations: what packed weights are multiplied with (`Activations`, or `8bit`: int8 or e4m3, as they are).
        context: tokens of a text at most; `None` is what config.json says.
        ranks: that compute its layers, or those of a stage, together.
        offload: how layers leave the device that do not fit there; `None` has all stay.
        place: of this rank, of which nothing but its part is read; `None` is one of even parts of the whole.

    Raises:
        UnsupportedError: the engine does not have the architecture or what a field says; weights that another method
            compressed, or experts of a layer in several schemes.
        CheckpointError: no whole checkpoint; tensors that are missing, left over or of another shape.
        ShapeError: it cannot be placed so.
        TersorError: the weights do not fit in the device's memory, or those that leave it not where they go.
    """
    if not isinstance(model, Source):
        with open_source(model) as source:
            return load(
                source,
                device,
                dtype,
                activations=activations,
                context=context,
                ranks=ranks,
                offload=offload,
                place=place,
            )
    where = device if isinstance(device, torch.device) else resolve_device(device)
    config, names, expected, schemes = described(model)
    chosen = dtype or usual_dtype(model, where)
    own = place or Placement.even(len(config.layers), tensor=ranks.count).place(ranks.rank)
    way = activations_for(activations, multiplied(config, names, schemes), kernel_chip(where))
    share = Share.of(config, names, schemes, own)
    placing = None
    if offload is not None:
        placing = offload.begin(*weight_bytes(model, config, names, schemes, chosen), where)
    try:
        with Reading(where) as reading:
            stored = Stored(model.tensors, reading, schemes, expected.matrices, chosen, way, share, ranks)
            return assemble(stored, config, names, min(context or config.context, config.context), placing)
    except torch.OutOfMemoryError:
        raise TersorError(f"{model.label}: the weights do not fit in the memory of {where}") from None


def check_placed(model: Source, placing: Callable[[int], Placement] | None = None) -> Placement:
    """Hold that a checkpoint can be loaded as it is placed, before any rank is started; return how that is.

    Args:
        model: the checkpoint.
        placing: says it of so many layers; `None` is one rank.

    Raises:
        UnsupportedError, CheckpointError: as for `load`.
        InputError: it has not so many layers.
        ShapeError: it cannot be placed so.
    """
    config, names, _, schemes = described(model)
    placement = (placing or Placement.even)(len(config.layers))
    check(config, names, schemes, placement)
    return placement


def described(model: Source) -> tuple[DecoderConfig, Names, Expected, dict[str, Form]]:
    """Return what a checkpoint is: its config, names, tensors, and schemes or levels of those that are packed.

    Raises:
        UnsupportedError, CheckpointError: as for `load`.
    """
    why = supported(model.config)
    if why:
        raise UnsupportedError(f"{model.label}: {why}")
    config, raw = DecoderConfig.from_dict(model.config), quantization_of(model.config)
    quantization = None if raw is None else QuantizationConfig.from_dict(raw)
    names = NAMES[config.architecture].as_stored(model.tensors)
    expected = Expected.of(config, names)
    return config, names, expected, check_stored(expected, model.tensors, quantization, names)


def multiplied(config: DecoderConfig, names: Names, forms: Mapping[str, Form]) -> list[Scheme]:
    """Return the schemes of all packed weights of a decoder that meet activations, each once; pruned ones have none.

    Args:
        config, names: of the decoder.
        forms: schemes, or levels, of modules that are packed.
    """
    looked_up = None if config.tied else names.base + names.embedding
    found: dict[Scheme, None] = {}
    for module, form in forms.items():
        if isinstance(form, Assignment):
            found |= dict.fromkeys(form.mix.levels)
        elif isinstance(form, Scheme) and module != looked_up:
            found[form] = None
    return list(found)


def weight_bytes(
    source: Source, config: DecoderConfig, names: Names, schemes: Mapping[str, Form], dtype: torch.dtype
) -> tuple[list[int], int]:
    """Return the bytes of the weights of every layer and of those in none, but for what kernel layouts round up.

    Args:
        source: the checkpoint.
        config, names: of it.
        schemes: of modules that are compressed, whose tensors are taken as they are stored.
        dtype: of all others in memory.
    """
    starts = [names.base + names.layer.format(layer=index) for index in range(len(config.layers))]
    depth, places = starts[0].count("."), {start: index for index, start in enumerate(starts)}
    layers, outside = [0] * len(starts), 0
    for name, tensor in source.tensors.items():
        nbytes, stored = tensor.spec.nbytes, TORCH_DTYPES[tensor.spec.dtype]
        if stored.is_floating_point and stored.itemsize > 1 and name.rpartition(".")[0] not in schemes:
            nbytes = nbytes // stored.itemsize * dtype.itemsize
        place = places.get("".join(f"{part}." for part in name.split(".")[:depth]))
        if place is None:
            outside += nbytes
        else:
            layers[place] += nbytes
    return layers, outside


def usual_dtype(source: Source, device: torch.device) -> torch.dtype:
    """Return the dtype of activations that is meant where none is given.

    Args:
        source: the checkpoint.
        device: where it runs.
    """
    if device.type == "cpu":
        return torch.float32
    return FLOAT_DTYPES.get(stated_dtype(source.config) or "", torch.bfloat16)
