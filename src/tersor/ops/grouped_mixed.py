"""One launch for the row sets of all experts of a layer whose weights have one mix: how it is made and launched.

A product of `ops.grouped` on compute capability 9.0, in its usual mode; elsewhere every level is a launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tersor.formats import Activations
from tersor.formats.mix import MOST_LEVELS
from tersor.hardware import Chip
from tersor.kernels.tune import experts as tune
from tersor.kernels.tune.experts_problem import most_blocks
from tersor.layouts import StackedMixedWeight
from tersor.layouts.gated import gated_channels
from tersor.layouts.packing import target_of
from tersor.ops import current, mode
from tersor.ops.quantizing import Quantize
from tersor.ops.settled import settled
from tersor.ops.tables import Tables

if TYPE_CHECKING:
    from tersor.kernels.mixed import MixedLaunch


@dataclass(frozen=True, slots=True)
class MixedProduct:
    """One of the two products with all of its row sets, ready to be launched.

    Attributes:
        config: how the first row set runs; the others have its tile.
        launch: launches the kernel.
        quantize: quantises what it reads before that; `None` where that stays as it comes.
    """

    config: tune.ExpertsConfig
    launch: MixedLaunch
    quantize: Quantize | None


def product_of(
    weight: StackedMixedWeight,
    problems: tune.Problems,
    configs: Sequence[tune.ExpertsConfig],
    gate: int,
    dtype: torch.dtype,
    index: int,
    chip: Chip,
    tables_ready: bool = False,
) -> MixedProduct:
    """Return one of the two products, ready to be launched.

    Args:
        weight: of all experts, its row sets in one kernel layout.
        problems, configs: of every row set, which `tune.together` has in one launch, and how it runs.
        gate: EPILOGUE of cuda/common/gate.cuh; 0 for the second product.
        dtype: of activations as they come, and of the result.
        index: the CUDA device.
        chip: that device.
        tables_ready: whether the routing tables were there before the kernel ahead started.
    """
    from tersor.kernels import jit, mixed

    result = target_of(Activations.NATIVE, dtype)
    assert result is not None
    config, (tokens, top_k), ic = configs[0], (problems[0].tokens, problems[0].top_k), weight.shape[2]
    packings, pairs = tuple(one.packing for one in weight.sets), tokens * top_k
    ready = tables_ready and config.activations is Activations.NATIVE
    launch = mixed.prepare_experts(
        jit.get(mixed.experts_source(packings, result, tuple(configs), gate, ready), index),
        configs,
        tune.counts(problems, config.tile, chip, gate > 0),
        [one.oc for one in problems],
        bf16=result == "bfloat16",
        ic=ic,
        outputs=gated_channels(weight.shape[1]) if gate else weight.shape[1],
        bias_rows=weight.shape[1],
        tokens=tokens,
        top_k=top_k,
        gathers=config.gathers and gate > 0,
        most_blocks=most_blocks(pairs, weight.experts, config.block_tokens),
    )
    return MixedProduct(
        config, launch, Quantize.of(result, config.activations, pairs, ic, index, room=config.block_tokens)
    )


def run(
    product: MixedProduct,
    weight: StackedMixedWeight,
    bias: torch.Tensor | None,
    x: int,
    x_stride: int,
    x_scale: int,
    tables: Tables,
    y: torch.Tensor,
) -> None:
    """Launch a product on the current device and stream.

    Args:
        product: of `product_of`.
        weight: as there.
        bias: [E, rows of the weight] in y's dtype, in the order of features, or `None`.
        x, x_stride, x_scale: as in `kernels.experts.prepare`.
        tables: of the pairs, with blocks of as many tokens as the product's.
        y: at least [P, outputs], written.
    """
    now, config, index = mode.current(), product.config, y.get_device()
    stream, partial, arrived = current.stream(index), 0, 0
    if config.floats:
        partial, arrived, _parts = now.workspace.split_sums(index, stream, config.floats, config.counters)
    bias = None if bias is None else bias.contiguous()
    sets = [address for one in weight.sets for address in (one.data.data_ptr(), one.scale.data_ptr())]
    still = [settled(one.data, one.scale) for one in weight.sets]
    order, _, blocks = tables.addresses
    product.launch(
        stream=stream,
        sets=[*sets, *[0] * (2 * MOST_LEVELS - len(sets))],
        features=0 if weight.features is None else weight.features.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        x=x,
        x_stride=x_stride,
        x_scale=x_scale,
        order=order,
        blocks=blocks,
        y=y.data_ptr(),
        partial=partial,
        arrived=arrived,
        early=all(still) and now.early,
    )
