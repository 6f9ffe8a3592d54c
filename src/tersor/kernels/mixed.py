"""The mixed family: mixed/sm90_mixed.cuh and, of the experts of a layer, experts/sm90_mixed.cuh, products with all row
sets of a mixed weight in one launch.

As in `kernels.dense` a kernel's source, its launch prepared for a problem, then the launch.
"""

from __future__ import annotations

import functools
import itertools
import struct
from collections.abc import Callable, Sequence
from typing import TypeAlias

from tersor.formats.mix import MOST_LEVELS
from tersor.hardware import Chip
from tersor.kernels.jit import Function, KernelSource, tensor_map
from tersor.kernels.macros import sm90_macros
from tersor.kernels.tune import experts as tune_experts
from tersor.kernels.tune import mixed as tune
from tersor.kernels.tune import sm90
from tersor.kernels.tune.problem import FEW_TOKENS
from tersor.layouts.packing import Packing

_OF_ALL = {
    *("BF16", "BYTES", "N_TILE", "ROW_GROUPS", "K_GROUPS", "CLUSTER", "GATHERS", "RESIDENT", "FEW_TOKENS"),
    *("EPILOGUE", "NORM", "OUTLIERS", "PLACED", "X_GROUPS"),
}
"""Parameters in which levels do not differ; the others are named by level (sm90_mixed.cuh)."""
_SETS = struct.Struct(f"@{2 * MOST_LEVELS}P")
_SHARES = struct.Struct(f"@{4 * MOST_LEVELS}i")


@functools.cache
def source(packings: tuple[Packing, ...], result: str, tile: sm90.Tile, chip: Chip, gate: int = 0) -> KernelSource:
    """Return the kernel for the packings of all levels, a dtype of the result and a tile.

    Args:
        packings: of the levels, for the activations of the tile.
        result: dtype of the result, `float16` or `bfloat16`.
        tile: the compiled shape.
        chip: the GPU, whose shared memory is dealt out.
        gate: EPILOGUE of cuda/common/gate.cuh: how gate and up become one, or 0.
    """
    levels = []
    for packing in packings:
        bits, row_bytes = packing.scheme.format.bits, packing.scale_row_bytes
        slots, shared = tile.slots(bits, row_bytes, chip), tile.shared_bytes(bits, row_bytes, chip)
        levels.append(sm90_macros(packing, result, tile, slots, shared, gate, FEW_TOKENS, placed=True))
    return KernelSource(
        name=f"tersor_mixed_sm90_{_name(packings, result, tile)}" + (f"_g{gate}" if gate else ""),
        header="mixed/sm90_mixed.cuh",
        parameters=_parameters(packings, levels),
        arguments="TTTPPPPPPPiiiiii",
    )


@functools.cache
def experts_source(
    packings: tuple[Packing, ...],
    result: str,
    configs: tuple[tune_experts.ExpertsConfig, ...],
    gate: int,
    tables_ready: bool,
) -> KernelSource:
    """Return the kernel of all experts of a layer for the packings of the levels that have rows.

    Args:
        packings: of the levels, for the activations of the tile.
        result: as for `source`.
        configs: how the row sets of those levels run, all with one tile.
        gate, tables_ready: as in `kernels.experts.source`.
    """
    tile, few = configs[0].tile, configs[0].few_tokens
    levels = [
        sm90_macros(packing, result, tile, own.slots, own.shared_bytes, gate, few, placed=True)
        for packing, own in zip(packings, configs, strict=True)
    ]
    return KernelSource(
        name=f"tersor_experts_mixed_sm90_{_name(packings, result, tile)}_g{gate}",
        header="experts/sm90_mixed.cuh",
        parameters={
            **_parameters(packings, levels),
            "GATHERS": 1,
            "GATHERS_TOKENS": configs[0].gathers and gate > 0,
            "TABLES_READY": tables_ready,
        },
        arguments="TTTPPPPPPPPiiiiiii",
    )


def _parameters(
    packings: tuple[Packing, ...], levels: Sequence[dict[str, int | bool | str]]
) -> dict[str, int | bool | str]:
    """Return the parameters of all levels, of those that differ each with the number of its level."""
    parameters: dict[str, int | bool | str] = {"LEVELS": len(packings)}
    for level, (packing, macros) in enumerate(zip(packings, levels, strict=True)):
        own = {**macros, "FACTOR": f"{packing.factor.hex()}f"}
        parameters |= {key if key in _OF_ALL else f"{key}_{level}": value for key, value in own.items()}
    return parameters


def _name(packings: tuple[Packing, ...], result: str, tile: sm90.Tile) -> str:
    names = "_".join(packing.scheme.format.name for packing in packings)
    dtypes = f"{packings[0].target}_{result}" if tile.bytewise else result
    return f"{names}_{dtypes}_{tile.rows}x{tile.tokens}_k{tile.channel_groups}r{tile.resident}"


MixedLaunch: TypeAlias = Callable[..., None]
"""Launches the kernel on one prepared problem; takes keywords alone, those of `launch` in `prepare`."""


def prepare(function: Function, config: tune.MixedConfig, *, bf16: bool, ic: int, n: int, outputs: int) -> MixedLaunch:
    """Return what launches the product on one problem.

    Args:
        function: the loaded kernel.
        config: how it runs.
        bf16: whether 16-bit activations and results are bfloat16.
        ic, n: input channels and tokens.
        outputs: columns of the result.
    """
    tile, run = config.tile, function.launch
    grid, block, shared = (config.ctas, 1, 1), (tile.threads, 1, 1), config.shared_bytes
    element = tensor_map.element(bf16, tile.bytewise)
    box, maps_rows = sm90.box_of(tile, n), tensor_map.rows
    cluster = (config.splits, 1, 1) if config.splits > 1 else None
    none = (0, config.shares[-1].end, 0, 0)  # of levels that there are not
    padded = [*config.shares, *[none] * (MOST_LEVELS - len(config.shares))]
    shares = _SHARES.pack(*(number for share in padded for number in share))
    parts, splits = config.parts, config.splits

    def launch(
        *,
        stream: int,
        sets: Sequence[int],
        x: int,
        x_stride: int,
        x_scale: int,
        features: int,
        bias: int,
        residual: int,
        y: int,
        partial: int,
        arrived: int,
        early: bool,
    ) -> None:
        """Launch; what is not there has the address 0.

        Args:
            stream: handle of the stream.
            sets: addresses of packed codes and of scales, a pair for each of `MOST_LEVELS` levels.
            x, x_stride: address of the activations, and elements from one token to the next.
            x_scale: address of the float32 scales of quantised activations, one a token.
            features: address of the feature of every row (int32), in the order of row sets; 0 where rows are in order.
            bias, residual, y: addresses, in the dtype of the result, in the order of features.
            partial, arrived: addresses of split sums (float32) and of their counters (uint32, zero).
            early: whether weights may be fetched before the kernel ahead has ended: not where that one wrote them.
        """
        arguments = (
            *(maps_rows(x, n, ic, x_stride, element, box), _SETS.pack(*sets), shares),
            *(features, bias, x_scale, residual, y, partial, arrived),
            *(ic, n, outputs, box, parts, splits),
        )
        run(grid, block, shared, stream, arguments, early, cluster)

    return launch


def prepare_experts(
    function: Function,
    configs: Sequence[tune_experts.ExpertsConfig],
    ctas: Sequence[int],
    rows: Sequence[int],
    *,
    bf16: bool,
    ic: int,
    outputs: int,
    bias_rows: int,
    tokens: int,
    top_k: int,
    gathers: bool,
    most_blocks: int,
) -> MixedLaunch:
    """Return what launches the product of all experts of a layer, of all levels that have rows.

    Args:
        function: the loaded kernel.
        configs: how the row sets run, all with one tile.
        ctas: of every level.
        rows: of every level, of one expert.
        bf16, ic, tokens, top_k, gathers, most_blocks: as in `kernels.experts.prepare`.
        outputs: columns of the result.
        bias_rows: rows of all levels of one expert, as a bias has them.
    """
    config, run = configs[0], function.launch
    tile, ends = config.tile, [*itertools.accumulate(ctas)]
    grid, block, shared = (ends[-1], 1, 1), (tile.threads, 1, 1), max(own.shared_bytes for own in configs)
    element = tensor_map.element(bf16, tile.bytewise)
    given, box = (tokens, 1) if gathers else (tokens * top_k + tile.tokens, tile.tokens)
    maps_rows, splits = tensor_map.rows, config.most_splits
    shares = [*zip(rows, ends, strict=True), *[(0, ends[-1])] * (MOST_LEVELS - len(ends))]
    packed = _SHARES.pack(*(number for own, end in shares for number in (own, end, 0, 0)))

    def launch(
        *,
        stream: int,
        sets: Sequence[int],
        features: int,
        bias: int,
        x: int,
        x_stride: int,
        x_scale: int,
        order: int,
        blocks: int,
        y: int,
        partial: int,
        arrived: int,
        early: bool,
    ) -> None:
        """Launch; what is not there has the address 0.

        Args:
            stream, x, x_stride, x_scale, order, blocks, partial, arrived, early: as in `kernels.experts.prepare`.
            sets: addresses of packed codes and of scales of all experts, a pair for each of `MOST_LEVELS` levels.
            features: as in `prepare`.
            bias: address of [E, bias_rows] in the dtype of the result, in the order of features.
            y: address of [pairs, outputs] in the dtype of the result.
        """
        arguments = (
            *(maps_rows(x, given, ic, x_stride, element, box), _SETS.pack(*sets), packed),
            *(features, bias, x_scale, order, blocks, y, partial, arrived),
            *(ic, outputs, bias_rows, top_k, box, most_blocks, splits),
        )
        run(grid, block, shared, stream, arguments, early)

    return launch
