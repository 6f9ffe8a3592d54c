"""Which kernels do steps ask for between products? Told ahead of the first, as `needed` does, without a GPU."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TypeAlias

import torch

from tersor.formats import Activations
from tersor.hardware import Chip
from tersor.kernels import norms, quantizing, small
from tersor.kernels.jit import KernelSource
from tersor.layouts import MixedWeight, PackedWeight
from tersor.ops import quantized
from tersor.ops.gates import Gate
from tersor.ops.heads import LatentHeads
from tersor.ops.norm import TARGETS, channels_fit

Readers: TypeAlias = Collection[PackedWeight | MixedWeight]
"""The weights of what reads a norm's result."""


def norm(
    rows: int, channels: int, dtype: torch.dtype, layer: bool, chip: Chip, readers: Readers = ()
) -> Iterator[KernelSource]:
    """Yield the kernels of `ops.layer_norm`, or of `ops.rms_norm`, or of those as bytes.

    Args:
        rows: at most.
        channels, dtype: of rows.
        layer: whether it is a layer norm.
        chip: the GPU.
        readers: the weights of what reads the result, where that is packed or mixed products alone.
    """
    if dtype in TARGETS and channels_fit(channels):
        made = quantized.common_activations(readers) if chip.capability == (9, 0) else Activations.NATIVE
        of_warps = norms.ctas_of_warps(rows, channels, chip.sms) if made.dtype and not layer else 0
        for warps in dict.fromkeys((0, of_warps)):
            yield norms.norm_source(TARGETS[dtype], layer, channels, made, warps)


def numbers(
    channels: int, dtype: torch.dtype, gate: Gate | None = None, capped: bool = False
) -> Iterator[KernelSource]:
    """Yield the kernel of `ops.gated`, `ops.softcap` or `ops.relu` with a result of so many channels.

    Args:
        channels, dtype: of the result.
        gate: how gate and up become one, if it is that.
        capped: whether it is a soft cap.
    """
    if dtype in TARGETS and channels_fit(channels, None):
        yield small.pointwise_source(TARGETS[dtype], int(gate or 0), capped)


def activation(
    channels: int, dtype: torch.dtype, gate: Gate | None, chip: Chip, readers: Readers
) -> Iterator[KernelSource]:
    """Yield the kernel of `ops.gated` or `ops.relu`, or of those as bytes.

    Args:
        channels, dtype: of the result.
        gate: how gate and up become one; `None` is relu.
        chip: the GPU.
        readers: as for `norm`.
    """
    made = quantized.common_activations(readers) if chip.capability == (9, 0) else Activations.NATIVE
    if made is Activations.NATIVE:
        yield from numbers(channels, dtype, gate)
    elif dtype in TARGETS and channels_fit(channels, None):
        yield quantizing.quantize_source(TARGETS[dtype], made, int(gate or 0), relu=gate is None)


def latent_heads(of: LatentHeads, dtype: torch.dtype) -> Iterator[KernelSource]:
    """Yield the kernels of `ops.heads` for heads of such sizes."""
    if dtype in TARGETS and of.whole:
        yield small.heads_source(of.interleaved)
    if dtype in TARGETS and of.value != of.width and of.trims:
        yield small.trim_source()


def rows(channels: int, dtype: torch.dtype, index: torch.dtype, positions: bool = False) -> Iterator[KernelSource]:
    """Yield the kernel of `ops.gather_rows` and `ops.lookup`.

    Args:
        channels, dtype: of the rows.
        index: dtype of the index.
        positions: whether rows of positions are added.
    """
    if dtype in TARGETS and channels_fit(channels):
        yield small.rows_source(TARGETS[dtype], index == torch.int64, positions)


def tokens_of_steps() -> Iterator[KernelSource]:
    """Yield the kernels of `ops.resolve` and `ops.keep`."""
    yield from (small.resolve_source(), small.keep_source())


def sums(dtype: torch.dtype, ranks: int) -> Iterator[KernelSource]:
    """Yield the kernel that adds up small tensors of several GPUs."""
    if dtype in TARGETS and 1 < ranks <= small.MOST_RANKS:
        yield small.all_reduce_source(TARGETS[dtype], ranks)
