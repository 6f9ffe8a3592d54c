"""What do the experts of a layer read? Each expert's tokens are those that the router sends to it.

An expert that fewer tokens reach than it has input channels has a Hessian without full rank. The Hessian of all experts
together is mixed into its own then, as if it had been reached by as many tokens as are missing.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from tersor.compress.statistics import HESSIAN, SHIFT, LayerSums
from tersor.convert.calibrate.inputs import ExpertInputs, Group, inputs_of
from tersor.convert.calibrate.streams import Streams
from tersor.integrations.transformers.blocks import BlockModel

_SUM_BYTES = 8 << 30
"""Bytes of sums in memory at once: where those of all experts take more, blocks run several times."""


def expert_statistics(
    model: BlockModel,
    layers: tuple[nn.Module, nn.Module],
    group: Group,
    streams: Streams,
    block: int,
    channels: int,
) -> Iterator[tuple[int, int, dict[str, torch.Tensor]]]:
    """Yield every expert's number, how many tokens reached it, and its statistics.

    The Hessian that a rarely hit expert shares is that of the experts whose sums are in memory with its own.

    Args:
        model: runs the block.
        layers: the original block, and its twin with compressed weights.
        group: the experts of the layer, at their input or ahead of `down_proj`.
        streams: what goes into the block.
        block: its number.
        channels: IC.
    """
    module = group.sites[0].module
    original, compressed = (ExpertInputs(layer.get_submodule(module), group.part) for layer in layers)
    size = max(1, _SUM_BYTES // (8 * channels * channels))
    for first in range(0, original.count, size):
        chosen = range(first, min(first + size, original.count))
        sums = {expert: LayerSums.of(channels, shift=True, device=model.device) for expert in chosen}
        for own, other, call in streams.each(block):
            theirs = inputs_of(model, layers[0], group, own, call)
            ours = inputs_of(model, layers[1], group, other, call)
            for expert in chosen:
                rows = compressed.rows(ours, expert)
                if len(rows):
                    sums[expert].add(compressed.of(ours, expert, rows), original=original.of(theirs, expert, rows))
        every = LayerSums.of(channels, shift=True, device=model.device)
        for each in sums.values():
            every.merge(each)
        shared = every.sums[HESSIAN].mean()
        for expert in chosen:
            found = sums.pop(expert)
            statistics, missing = found.statistics(), max(0, channels - found.tokens)
            if missing:
                share = found.tokens / channels
                statistics[HESSIAN] = statistics[HESSIAN] * share + shared * (1 - share)
                statistics[SHIFT] = statistics[SHIFT] * share
            yield expert, found.tokens, statistics
