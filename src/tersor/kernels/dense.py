"""The linear family: sm90_linear.cuh and sm80_linear.cuh (fused), dequantize.cuh and epilogue.cuh (around cuBLAS).

Takes addresses and sizes, knows nothing of tensors; `ops` checks that a call is legal.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TypeAlias

from tersor.formats import ElementFormat, Scheme
from tersor.hardware import Chip
from tersor.kernels import tune
from tersor.kernels.jit import Function, KernelSource, tensor_map
from tersor.kernels.tune import sm80, sm90
from tersor.kernels.tune.problem import FEW_TOKENS
from tersor.layouts import decode_groups, scales, tiles

_SM80_THREADS = 256
_DEQUANTIZE_WARPS = 4

_QUANTIZE_THREADS = 256

_SCALE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 2, "e8m0": 3}
"""Scale dtype -> SCALE_TYPE of scales.cuh."""


def _decode_parameters(fmt: ElementFormat, target: str, fp8: bool = False) -> dict[str, int | bool | str]:
    """Parameters of decode.cuh; `target` is the dtype of the result, and of the activations unless they are 8-bit."""
    group = decode_groups.decode_group(fmt, decode_groups.FP8 if fp8 else target)
    return {
        "BITS": fmt.bits,
        "BF16": target == "bfloat16",
        "DECODE_WORDS": group.words,
        "DECODE_REGISTERS": group.registers,
        "DECODE_MASK": f"{group.mask}u",
        "DECODE_SHIFT": group.shift,
        "DECODE_RAISED": group.raised,
        "DECODE_TERMS": ", ".join(str(number) for row in group.terms for number in row),
        "DECODE_FINISH": int(group.finish),
        "DECODE_CONSTANT": f"{group.constant}u",
    }


def _scale_parameters(scheme: Scheme) -> dict[str, int | bool | str]:
    """One scale a row is float32 in tiles, whatever it was stored in."""
    groups = tiles.scales_in_block(scheme.group_size)
    return {
        "SCALE_GROUPS": groups,
        "SCALE_TYPE": _SCALE_TYPES[scheme.scale_dtype] if groups else 0,
        "ZERO_POINTS": scheme.has_zero_point,
    }


@functools.cache
def sm80_source(
    scheme: Scheme, target: str, n_tile: int, stages: int, shared_bytes: int, gated: bool = False
) -> KernelSource:
    """Return the mma.sync kernel for one weight type, activation dtype and tile; it checks its shared memory."""
    return KernelSource(
        name=f"tersor_linear_sm80_{scheme.format.name}_{target}_n{n_tile}{_suffix(gated)}",
        header="dense/sm80_linear.cuh",
        parameters={
            **_decode_parameters(scheme.format, target),
            **_scale_parameters(scheme),
            "N_TILE": n_tile,
            "STAGES": stages,
            "SHARED_BYTES": shared_bytes,
            "EPILOGUE": int(gated),
        },
        arguments="PPPPPPPPqiiiif",
    )


@functools.cache
def sm90_source(
    scheme: Scheme,
    target: str,
    tile: sm90.Tile,
    slots: sm90.Slots,
    shared_bytes: int,
    gated: bool = False,
    few_tokens: int = FEW_TOKENS,
) -> KernelSource:
    """Return the wgmma kernel for one weight type, dtype of the result and tile; few tokens take mma.sync."""
    kind = f"{decode_groups.FP8}_{target}" if tile.fp8 else target
    return KernelSource(
        name=(
            f"tersor_linear_sm90_{scheme.format.name}_{kind}_{tile.rows}x{tile.tokens}"
            f"_k{tile.channel_groups}c{tile.cluster}r{tile.resident}{_suffix(gated)}"
        ),
        header="dense/sm90_linear.cuh",
        parameters={
            **_decode_parameters(scheme.format, target, tile.fp8),
            **_scale_parameters(scheme),
            "FP8": tile.fp8,
            "FP8_WEIGHT": 5
            if tile.fp8 and decode_groups.decode_group(scheme.format, decode_groups.FP8).operand == "e5m2"
            else 4,
            "N_TILE": tile.tokens,
            "ROW_GROUPS": tile.row_groups,
            "K_GROUPS": tile.channel_groups,
            "CLUSTER": tile.cluster,
            "GATHERS": tile.gathered,
            "GATHER_ROOM": slots.gather_room,
            "RESIDENT": tile.resident,
            "WEIGHT_SLOTS": slots.weights,
            "X_SLOTS": slots.x,
            "SHARED_BYTES": shared_bytes,
            "FEW_TOKENS": tile.tokens if tile.few and few_tokens else 0,  # wgmma is one kernel for either mode
            "EPILOGUE": int(gated),
        },
        arguments="TPPPPPPPPiiiiiif",
    )


def _suffix(gated: bool) -> str:
    return "_gated" if gated else ""


def fused_source(scheme: Scheme, target: str, config: tune.LinearConfig, gated: bool = False) -> KernelSource:
    """Return the kernel that a configuration asks for; `gated` as in cuda/gate.cuh."""
    if config.schedule == tune.SM90:
        slots = sm90.Slots(config.weight_slots, config.x_slots, config.gather_room)
        return sm90_source(scheme, target, sm90.tile_of(config), slots, config.shared_bytes, gated, config.few_tokens)
    return sm80_source(scheme, target, config.n_tile, config.weight_slots, config.shared_bytes, gated)


def parts(config: tune.LinearConfig, n: int) -> tuple[int, int]:
    """Return the float32 sums and the counters that the splits of a configuration exchange."""
    outputs = config.token_tiles * config.row_tiles - config.whole_tiles * config.cluster
    tokens = config.n_tile if config.schedule == tune.SM90 else n
    return outputs * config.splits * 64 * config.row_groups * tokens, outputs


@functools.cache
def quantize_source(target: str) -> KernelSource:
    """Return the kernel that turns 16-bit activations of a dtype into e4m3 with a scale a token."""
    return KernelSource(
        name=f"tersor_quantize_activations_{target}",
        header="dense/quantize_activations.cuh",
        parameters={"BF16": target == "bfloat16"},
        arguments="PPPqqii",
    )


@functools.cache
def dequantize_source(scheme: Scheme, target: str) -> KernelSource:
    """Return the kernel that decodes tiles to a dense 16-bit matrix."""
    return KernelSource(
        name=f"tersor_dequantize_{scheme.format.name}_{target}",
        header="dense/dequantize.cuh",
        parameters={**_decode_parameters(scheme.format, target), **_scale_parameters(scheme)},
        arguments="PPPiiif",
    )


@functools.cache
def epilogue_source(scheme: Scheme, target: str, gated: bool = False) -> KernelSource:
    """Return the kernel that scales (where there is one scale a row), biases and rounds a float32 product."""
    row_scale = scales.scale_bytes(scheme) // 4 if scheme.group_size is None else 0
    return KernelSource(
        name=f"tersor_epilogue_{target}{_suffix(gated)}",
        header="dense/epilogue.cuh",
        parameters={"BF16": target == "bfloat16", "ROW_SCALE": row_scale, "EPILOGUE": int(gated)},
        arguments="PPPPPiiif",
    )


FusedLaunch: TypeAlias = Callable[[int, int, int, int, int, int, int, int, int, int, int, bool], None]
"""Takes stream, weight, scale, x, elements between rows of x, scales of x, bias, residual, y, partial, arrived, early:
see `prepare_fused`."""


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
    """Return what launches a fused kernel on one problem: all that stays the same from call to call is settled.

    What is returned takes the handle of a stream and device addresses (0 for none), in the order of `FusedLaunch`.
    `early` lets the sm90 schedule fetch weights before the kernel ahead has ended: not where that one wrote them.
    """
    shared, run = config.shared_bytes, function.launch
    grid, block = (config.row_tiles, config.splits, 1), (_SM80_THREADS, 1, 1)

    def launch_sm80(
        stream: int,
        weight: int,
        scale: int,
        x: int,
        stride: int,
        x_scale: int,
        bias: int,
        residual: int,
        y: int,
        partial: int,
        arrived: int,
        early: bool,
    ) -> None:
        arguments = (weight, scale, x, bias, residual, y, partial, arrived, stride, oc, ic, n, aligned, factor)
        run(grid, block, shared, stream, arguments)

    if config.schedule != tune.SM90:
        return launch_sm80

    grid, block = (config.ctas, 1, 1), (sm90.tile_of(config).threads, 1, 1)
    rows_of_x, box = tensor_map.rows, sm90.box_rows(config, n)
    kind = tensor_map.BYTE if config.activation_bits == 8 else tensor_map.BFLOAT16 if bf16 else tensor_map.FLOAT16
    whole_tiles, splits = config.whole_tiles, config.splits
    cluster = (splits, 1, 1) if config.gathered else None

    def launch_sm90(
        stream: int,
        weight: int,
        scale: int,
        x: int,
        stride: int,
        x_scale: int,
        bias: int,
        residual: int,
        y: int,
        partial: int,
        arrived: int,
        early: bool,
    ) -> None:
        x_map = rows_of_x(x, n, ic, stride, kind, box)
        places = (x_map, weight, scale, bias, x_scale, residual, y, partial, arrived)
        run(grid, block, shared, stream, (*places, oc, ic, n, whole_tiles, splits, box, factor), early, cluster)

    return launch_sm90


QuantizeLaunch: TypeAlias = Callable[[int, int, int, int], int]
"""Takes stream, x, elements between rows of x and where codes and scales go: see `prepare_quantize`."""


def codes_stride(ic: int) -> int:
    """Return the bytes from one token's e4m3 codes to the next: whole 16 bytes, as a tensor map needs."""
    return -(-ic // 16) * 16


def prepare_quantize(function: Function, *, n: int, ic: int) -> QuantizeLaunch:
    """Return what launches the quantising of activations [n, ic] to e4m3.

    What is returned takes the handle of a stream, the address and stride of x and the address of n * (codes_stride +
    4) bytes: codes [n, codes_stride], then float32 scales [n], whose address it returns.
    """
    grid, block, row = (n, 1, 1), (_QUANTIZE_THREADS, 1, 1), codes_stride(ic)
    run = function.launch

    def launch(stream: int, x: int, stride: int, codes: int) -> int:
        scales_at = codes + n * row
        aligned = not (x % 16 or stride % 8)
        run(grid, block, 0, stream, (x, codes, scales_at, stride, row, ic, aligned), True)
        return scales_at

    return launch


def launch_dequantize(
    function: Function,
    stream: int,
    *,
    weight: int,
    scale: int,
    scratch: int,
    first_row_block: int,
    rows: int,
    ic: int,
    factor: float,
) -> None:
    """Launch the decode of `rows` rows, from a row block on, into dense scratch memory."""
    grid = (-(-tiles.column_blocks(ic) // _DEQUANTIZE_WARPS), tiles.row_blocks(rows), 1)
    arguments = (weight, scale, scratch, first_row_block, rows, ic, factor)
    function.launch(grid, (32 * _DEQUANTIZE_WARPS, 1, 1), 0, stream, arguments)


def launch_epilogue(
    function: Function,
    stream: int,
    *,
    sums: int,
    scale: int,
    bias: int,
    residual: int,
    y: int,
    first: int,
    columns: int,
    oc: int,
    n: int,
    factor: float,
) -> None:
    """Launch what makes y [n, oc], or [n, outputs] where gated, of float32 sums [n, columns] of rows first.. ."""
    grid = (-(-columns // 256), n, 1)
    arguments = (sums, scale, bias, residual, y, first, columns, oc, factor)
    function.launch(grid, (256, 1, 1), 0, stream, arguments)


def sources(scheme: Scheme, target: str, chip: Chip, gated: bool = False) -> Iterator[KernelSource]:
    """Yield every kernel that a linear of this scheme and dtype can ask for on a chip, in its usual mode."""
    groups, bits, row_bytes = tiles.scales_in_block(scheme.group_size), scheme.format.bits, scales.row_bytes(scheme)
    for tokens in sm80.TILES:
        depth, _ = sm80.stages(tokens, bits, row_bytes, chip)
        shared = depth * sm80.stage_bytes(tokens, bits, row_bytes)
        yield sm80_source(scheme, target, tokens, depth, shared, gated)
    if chip.capability == (9, 0):
        for tile in sm90.tiles(groups):
            slots, shared = tile.slots(bits, row_bytes, chip), tile.shared_bytes(bits, row_bytes, chip)
            yield sm90_source(scheme, target, tile, slots, shared, gated)
    yield dequantize_source(scheme, target)
    yield epilogue_source(scheme, target, gated)


def fp8_sources(scheme: Scheme, target: str, chip: Chip, gated: bool = False) -> Iterator[KernelSource]:
    """Yield every kernel that a linear with 8-bit activations can ask for on a chip; `target` is of the result."""
    groups, bits, row_bytes = tiles.scales_in_block(scheme.group_size), scheme.format.bits, scales.row_bytes(scheme)
    if chip.capability == (9, 0):
        yield quantize_source(target)
        for tile in sm90.tiles(groups, fp8=True):
            slots, shared = tile.slots(bits, row_bytes, chip), tile.shared_bytes(bits, row_bytes, chip)
            yield sm90_source(scheme, target, tile, slots, shared, gated)
