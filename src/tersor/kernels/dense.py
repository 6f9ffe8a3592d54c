"""The dense family: sm90_linear.cuh and sm80_linear.cuh (fused), dequantize.cuh and epilogue.cuh (around cuBLAS).

A kernel's source, its launch prepared for a problem, then the launch. The family takes addresses and sizes and knows
nothing of tensors; `ops` checks that a call is legal.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch

from tersor.formats import FLOAT_DTYPES, Activations, Scheme
from tersor.hardware import Chip
from tersor.kernels import tune
from tersor.kernels.jit import Function, KernelSource, tensor_map
from tersor.kernels.macros import sm80_macros, sm90_macros
from tersor.kernels.quantizing import quantize_source
from tersor.kernels.tune import sm80, sm90
from tersor.kernels.tune.problem import FEW_TOKENS
from tersor.layouts.blocks import ic_blocks, oc_blocks
from tersor.layouts.packing import Packing, activations_of, target_of, unsupported_reason

_SM80_THREADS = 256
_DEQUANTIZE_WARPS = 4

SQUARED_CHANNELS = 64
"""Channels of a token whose squares one product adds up for the norm behind it."""


class Norm(enum.IntEnum):
    """What is folded into a product of the RMS norms around it; the value is NORM of cuda/dense/sm90_norm.cuh."""

    NONE = 0
    IN = 1
    """Activations still lack the division of the norm ahead."""
    OUT = 2
    """The result is scaled and squared for the norm behind."""


def squares_stride(channels: int) -> int:
    """Return the floats from one token's sums of squares to the next: whole 16 bytes."""
    return -(-channels // (4 * SQUARED_CHANNELS)) * 4


@functools.cache
def sm80_source(packing: Packing, n_tile: int, stages: int, shared_bytes: int, gate: int = 0) -> KernelSource:
    """Return the mma.sync kernel for one packing and tile; it checks that it has as much shared memory."""
    return KernelSource(
        name=f"tersor_linear_sm80_{packing.scheme.format.name}_{packing.target}_n{n_tile}{_suffix(gate)}",
        header="dense/sm80_linear.cuh",
        parameters=sm80_macros(packing, n_tile, stages, shared_bytes, gate),
        arguments="PPPPPPPPqiiiif",
    )


@functools.cache
def sm90_source(
    packing: Packing,
    result: str,
    tile: sm90.Tile,
    slots: sm90.Slots,
    shared_bytes: int,
    gate: int = 0,
    few_tokens: int = FEW_TOKENS,
    norm: Norm = Norm.NONE,
    outliers: int = 0,
) -> KernelSource:
    """Return the wgmma kernel for one packing, dtype of the result and tile; few tokens take mma.sync.

    Args:
        packing: of the weight, for the activations of the tile.
        result: dtype of the result, `float16` or `bfloat16`: also that of the activations where they stay as they come.
        tile: the compiled shape.
        slots: how its shared memory is dealt out.
        shared_bytes: how much of it there is; the kernel checks that it adds up.
        gate: EPILOGUE of cuda/common/gate.cuh: how gate and up become one, or 0.
        few_tokens: tokens up to which mma.sync may multiply; 0 forbids it.
        norm: what is folded into it of the norms around it.
        outliers: rounds of outliers that a block has room for in a slot (`layouts.outliers`); 0 where it adds none.

    Raises:
        ValueError: the packing is for other activations than the tile.
    """
    if tile.activations is not activations_of(packing.layout):
        raise ValueError(f"a weight packed for {packing.target} activations does not meet those of {tile}")
    dtypes = f"{packing.target}_{result}" if tile.bytewise else result
    return KernelSource(
        name=(
            f"tersor_linear_sm90_{packing.scheme.format.name}_{dtypes}_{tile.rows}x{tile.tokens}"
            f"_k{tile.channel_groups}c{tile.cluster}r{tile.resident}{_suffix(gate)}"
            f"{'' if norm is Norm.NONE else f'_norm_{norm.name.lower()}'}{f'_beside{outliers}' if outliers else ''}"
        ),
        header="dense/sm90_linear.cuh",
        parameters=sm90_macros(
            packing, result, tile, slots, shared_bytes, gate, few_tokens, int(norm), outliers=outliers
        ),
        arguments="TPPPPPPPPiiiiiifPPPffP",
    )


def _suffix(gate: int) -> str:
    return "" if not gate else "_gated" if gate == 1 else f"_gated{gate}"


def fused_source(
    packing: Packing,
    result: str,
    config: tune.LinearConfig,
    gate: int = 0,
    norm: Norm = Norm.NONE,
    outliers: int = 0,
) -> KernelSource:
    """Return the kernel that a configuration asks for.

    Args:
        packing: of the weight, for the configuration's activations.
        result: dtype of the result, `float16` or `bfloat16`.
        config: how the kernel runs.
        gate: EPILOGUE of cuda/common/gate.cuh: how gate and up become one, or 0.
        norm: what is folded into it of the norms around it; the sm90 schedule alone has kernels for that.
        outliers: as for `sm90_source`; the configuration has that room (`tune.choose_beside`).
    """
    if config.schedule == tune.SM90:
        tile, slots = sm90.tile_of(config), sm90.Slots(config.weight_slots, config.x_slots, config.gather_room)
        few = config.few_tokens
        return sm90_source(packing, result, tile, slots, config.shared_bytes, gate, few, norm, outliers)
    return sm80_source(packing, config.n_tile, config.weight_slots, config.shared_bytes, gate)


def parts(config: tune.LinearConfig, n: int) -> tuple[int, int]:
    """Return the float32 sums and the counters that the splits of a configuration exchange."""
    outputs = config.token_tiles * config.row_tiles - config.whole_tiles * config.cluster
    tokens = config.n_tile if config.schedule == tune.SM90 else n
    return outputs * config.splits * 64 * config.row_groups * tokens, outputs


@functools.cache
def dequantize_source(packing: Packing, outliers: int = 0) -> KernelSource:
    """Return the kernel that decodes tiles to a dense 16-bit matrix.

    Args:
        packing: of the weight.
        outliers: as for `sm90_source`; rows then have their scales and their outliers.
    """
    beside = f"_beside{outliers}" if outliers else ""
    return KernelSource(
        name=f"tersor_dequantize_{packing.scheme.format.name}_{packing.target}{beside}",
        header="dense/dequantize.cuh",
        parameters={**packing.macros(), "BF16": packing.target == "bfloat16", "OUTLIERS": outliers},
        arguments="PPPiiifPi",
    )


@functools.cache
def epilogue_source(packing: Packing, gate: int = 0) -> KernelSource:
    """Return the kernel that scales (`Packing.scales_sums`), biases and rounds a float32 product."""
    return finish_source(packing.target, packing.scale_bytes // 4 if packing.scales_sums else 0, gate)


@functools.cache
def finish_source(target: str, row_scale: int, gate: int = 0) -> KernelSource:
    """Return the same for a result of dtype `target` and scales so many floats apart; 0: without any."""
    return KernelSource(
        name=f"tersor_epilogue_{target}{_suffix(gate)}",
        header="dense/epilogue.cuh",
        parameters={"BF16": target == "bfloat16", "ROW_SCALE": row_scale, "EPILOGUE": gate},
        arguments="PPPPPiiif",
    )


FusedLaunch: TypeAlias = Callable[..., None]
"""Launches a fused kernel on one prepared problem. Takes keywords alone, those of `launch` in `prepare_fused`: no two
addresses change places, and a call costs a tenth of what an object of twelve fields would."""


def prepare_fused(
    function: Function,
    config: tune.LinearConfig,
    *,
    bf16: bool,
    oc: int,
    ic: int,
    n: int,
    aligned: bool,
    factor: float,
) -> FusedLaunch:
    """Return what launches a fused kernel on one problem: all that stays the same from call to call is settled."""
    shared, run = config.shared_bytes, function.launch
    grid, block = (config.row_tiles, config.splits, 1), (_SM80_THREADS, 1, 1)
    cluster, box, maps_rows = None, 0, None
    element = tensor_map.element(bf16, config.activations is not Activations.NATIVE)
    if config.schedule == tune.SM90:
        grid, block = (config.ctas, 1, 1), (sm90.tile_of(config).threads, 1, 1)
        cluster = (config.splits, 1, 1) if config.gathered else None
        box, maps_rows = sm90.box_rows(config, n), tensor_map.rows
    whole_tiles, splits = config.whole_tiles, config.splits

    def launch(
        *,
        stream: int,
        weight: int,
        scale: int,
        x: int,
        x_stride: int,
        x_scale: int,
        bias: int,
        residual: int,
        y: int,
        partial: int,
        arrived: int,
        early: bool,
        norm_weight: int = 0,
        scaled: int = 0,
        squares: int = 0,
        norm_scale: float = 0.0,
        norm_eps: float = 0.0,
        kept: int = 0,
    ) -> None:
        """Launch; what is not there has the address 0.

        Args:
            stream: handle of the stream.
            weight, scale: addresses of packed codes and scales.
            x, x_stride: address of the activations, and elements from one token to the next.
            x_scale: address of the float32 scales of quantised activations, one a token or as `scales_stride` says.
            bias, residual, y: addresses, in the dtype of the result.
            partial, arrived: addresses of split sums (float32) and of their counters (uint32, zero).
            early: whether the sm90 schedule may fetch weights before the kernel ahead has ended: not where that one
                wrote them.
            norm_weight, scaled, squares, norm_scale, norm_eps: `Norms` in cuda/dense/sm90_norm.cuh.
            kept: address of outliers as `layouts.outliers.arrange` leaves them.
        """
        # fmt: off
        if maps_rows is None:
            arguments = (
                weight, scale, x, bias, residual, y, partial, arrived,
                x_stride, oc, ic, n, aligned, factor,
            )
            run(grid, block, shared, stream, arguments)
        else:
            mapped = (
                maps_rows(x, n, ic, x_stride, element, box),
                weight, scale, bias, x_scale, residual, y, partial, arrived,
                oc, ic, n, whole_tiles, splits, box, factor,
                norm_weight, scaled, squares, norm_scale, norm_eps, kept,
            )
            run(grid, block, shared, stream, mapped, early, cluster)
        # fmt: on

    return launch


def launch_dequantize(
    function: Function,
    stream: int,
    *,
    weight: int,
    scale: int,
    scratch: int,
    first_block: int,
    oc: int,
    ic: int,
    factor: float,
    kept: int = 0,
    weight_oc: int = 0,
) -> None:
    """Launch the decode of `oc` output channels, from a block of 16 on, into dense scratch memory [oc, ic].

    Args:
        function: `dequantize_source`, loaded.
        stream: handle of the stream.
        weight, scale, scratch: addresses.
        first_block, oc, ic, factor: see above, and what decoded values are multiplied by.
        kept, weight_oc: of a weight with outliers, their address (`layouts.outliers.arrange`), and all of its rows.
    """
    grid = (-(-ic_blocks(ic) // _DEQUANTIZE_WARPS), oc_blocks(oc), 1)
    arguments = (weight, scale, scratch, first_block, oc, ic, factor, kept, weight_oc)
    function.launch(grid, (32 * _DEQUANTIZE_WARPS, 1, 1), 0, stream, arguments)


MOST_FINISHED = 65535
"""Tokens of a launch of the epilogue: CTAs of a grid along its second dimension."""


def launch_epilogue(
    function: Function,
    stream: int,
    *,
    sums: int,
    scale: int,
    bias: int,
    residual: int,
    y: int,
    first_oc: int,
    slice_oc: int,
    oc: int,
    n: int,
    factor: float,
) -> None:
    """Launch what makes y [n, oc], or [n, outputs] with a gate, of float32 sums [n, slice_oc] from `first_oc` on.

    There are at most MOST_FINISHED tokens.
    """
    grid = (-(-slice_oc // 256), n, 1)
    arguments = (sums, scale, bias, residual, y, first_oc, slice_oc, oc, factor)
    function.launch(grid, (256, 1, 1), 0, stream, arguments)


def problem_of(
    scheme: Scheme,
    shape: tuple[int, int],
    n: int,
    *,
    aligned: bool = True,
    activations: Activations | str = Activations.NATIVE,
    batch_invariant: bool = False,
) -> tune.LinearProblem:
    """Return the problem that N tokens of 16-bit activations make with a weight of a scheme and a shape, (OC, IC).

    Where it has tables the activations are of their dtype.

    Raises:
        FormatError: no kernel decodes the scheme.
    """
    chosen = Activations.of(activations)
    dtype = FLOAT_DTYPES[scheme.scale_dtype] if scheme.has_table else torch.float16
    packing = Packing.beside(chosen, dtype, scheme)
    return tune.LinearProblem.of(
        packing, shape, n, aligned=aligned, activations=chosen, batch_invariant=batch_invariant
    )


def kernels_for(
    scheme: Scheme,
    dtype: torch.dtype,
    chip: Chip,
    activations: Activations | str = Activations.NATIVE,
    gate: int = 0,
) -> list[KernelSource]:
    """Return the kernels that linears of a scheme can ask for on a chip; none where they cannot run.

    Those of the batch-invariant mode are not among them.

    Args:
        scheme: of the weight.
        dtype: of the activations as they come, and of the result.
        chip: the GPU.
        activations: what the weight is multiplied with.
        gate: EPILOGUE of cuda/common/gate.cuh: how gate and up become one, or 0.
    """
    chosen = Activations.of(activations)
    result, target = target_of(Activations.NATIVE, dtype), target_of(chosen, dtype)
    if result is None or target is None or unsupported_reason(scheme, target):
        return []
    packing = Packing.of(scheme, target)
    if chosen is Activations.NATIVE:
        return list(sources(packing, chip, gate))
    return list(quantized_sources(packing, result, chip, gate))


def sources(packing: Packing, chip: Chip, gate: int = 0) -> Iterator[KernelSource]:
    """Yield every kernel that a linear with activations as they come can ask for on a chip, in its usual mode."""
    bits, row_bytes = packing.scheme.format.bits, packing.scale_row_bytes
    for tokens in sm80.TILES:
        depth, _ = sm80.stages(tokens, bits, row_bytes, chip)
        yield sm80_source(packing, tokens, depth, depth * sm80.stage_bytes(tokens, bits, row_bytes), gate)
    if chip.capability == (9, 0):
        yield from _sm90_sources(packing, packing.target, Activations.NATIVE, chip, gate)
    yield dequantize_source(packing)
    yield epilogue_source(packing, gate)


def quantized_sources(packing: Packing, result: str, chip: Chip, gate: int = 0) -> Iterator[KernelSource]:
    """Yield every kernel that a linear with quantised activations and a result of dtype `result` can ask for on a chip.

    Args:
        packing: of the weight, for such activations.
        result: `float16` or `bfloat16`.
        chip: the GPU.
        gate: EPILOGUE of cuda/common/gate.cuh: how gate and up become one, or 0.
    """
    activations = activations_of(packing.layout)
    if chip.capability == (9, 0):
        yield quantize_source(result, activations)
        yield from _sm90_sources(packing, result, activations, chip, gate)


def _sm90_sources(
    packing: Packing, result: str, activations: Activations, chip: Chip, gate: int
) -> Iterator[KernelSource]:
    bits, row_bytes = packing.scheme.format.bits, packing.scale_row_bytes
    for tile in sm90.tiles(packing.sums_in_block, activations):
        slots, shared_bytes = tile.slots(bits, row_bytes, chip), tile.shared_bytes(bits, row_bytes, chip)
        yield sm90_source(packing, result, tile, slots, shared_bytes, gate)
