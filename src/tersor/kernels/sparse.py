"""The sparse family: sm90_sparse.cuh, which multiplies with a bitmap and packed values, and sm90_decompress.cuh.

A kernel's source, its launch prepared for a problem, then the launch; addresses and sizes alone, as in `dense`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeAlias

from tersor.formats import Sparse
from tersor.kernels.jit import Function, KernelSource, tensor_map
from tersor.kernels.tune.sparse import FEW, SparseConfig, SparseTile
from tersor.layouts.blocks import UNIT_OC
from tersor.layouts.packing import SCALE_TYPES
from tersor.layouts.sparse_cuts import CUT_UNITS, PLACE_NUMBERS
from tersor.layouts.sparse_packing import SparsePacking
from tersor.layouts.sparse_tiles import BEYOND

SparseLaunch: TypeAlias = Callable[..., None]
"""Launches the kernel on one prepared problem: `launch` in `prepare_sparse`."""

_NUMBERS = {"float16": 1, "bfloat16": 2, "float32": 3}
"""Dtype of plain numbers -> NUMBER of stored.cuh."""
_STORED_ROWS = 4
_UNROLLED = 4
"""Blocks that a warp multiplies one behind the other in code: of four there are 8 % fewer instructions than of one."""
PLACE_BYTES = 4 * PLACE_NUMBERS
"""Of what a place has ahead of the units' starts."""
_SUFFIX = {0: "", 1: "_gated"}


@functools.cache
def sparse_source(packing: SparsePacking, tile: SparseTile, gate: int = 0, result: str = "") -> KernelSource:
    """Return the kernel for one packing of values and tile.

    Args:
        packing: of the values, for activations of some type.
        tile: the compiled shape, for activations of as many bytes.
        gate: EPILOGUE of cuda/common/gate.cuh: how gate and up become one, or 0.
        result: `float16` or `bfloat16` beside 8-bit activations; else it is the activations' dtype.
    """
    return KernelSource(
        name=f"tersor_sparse_sm90_{_kind(packing)}{result}_{tile}{_SUFFIX.get(gate, f'_gated{gate}')}",
        header="sparse/sm90_sparse.cuh",
        parameters=_parameters(packing, tile, gate, result or packing.target),
        arguments="TPPPPPPPPPPPPiiiiif",
    )


@functools.cache
def decompress_source(packing: SparsePacking, tile: SparseTile) -> KernelSource:
    """Return the kernel that decodes rows for cuBLAS.

    Args:
        packing: of the values, for the dtype of the decoded weight.
        tile: `tune.decompress_tile`.
    """
    return KernelSource(
        name=f"tersor_decompress_sm90_{_kind(packing)}_{tile}",
        header="sparse/sm90_decompress.cuh",
        parameters=_parameters(packing, tile, 0, packing.target),
        arguments="PPPPPPiiPiif",
    )


@functools.cache
def stored_source(sparse: Sparse, target: str) -> KernelSource:
    """Return the kernel that decodes rows of a weight as it is stored, to `float16` or `bfloat16`."""
    scheme = sparse.scheme
    numbers = "0.0f" if scheme is None else ", ".join(f"{value!r}f" for value in scheme.format.values().tolist())
    return KernelSource(
        name=f"tersor_decode_stored_{sparse.values.name}_{target}",
        header="sparse/stored.cuh",
        parameters={
            "NUMBER_BITS": sparse.value_bits,
            "NUMBER": 0 if scheme is not None else _NUMBERS[sparse.values.name],
            "TABLE": numbers,
            "SCALE_TYPE": 0 if scheme is None else SCALE_TYPES[scheme.scale_dtype],
            "ZERO_POINTS": scheme is not None and scheme.has_zero_point,
            "BF16": target == "bfloat16",
        },
        arguments="PPPPPPiiiiiq",
    )


def _kind(packing: SparsePacking) -> str:
    converts = "c" if packing.converts else ""
    return f"{packing.bits}{converts}t{packing.turn}f{int(packing.finish)}_{packing.target}"


def _parameters(packing: SparsePacking, tile: SparseTile, gate: int, result: str) -> dict[str, int | bool | str]:
    return {
        **packing.macros(),
        "RING_LAYERS": tile.layers,
        "LAYERS_BEYOND": BEYOND,
        "UNROLLED": _UNROLLED if tile.tokens <= FEW else 1,
        "BITS": 1,
        "SCALE_GROUPS": 0,
        "SCALE_TYPE": 0,
        "ZERO_POINTS": False,
        "RATIOS": False,
        "BF16": result == "bfloat16",
        "BYTES": packing.bytewise,
        "BYTE_WEIGHT": 4,
        "PIECES": False,
        "N_TILE": tile.tokens,
        "ROW_GROUPS": tile.row_groups,
        "K_GROUPS": 1,
        "CLUSTER": 1,
        "GATHERS": 1,
        "GATHER_ROOM": 0,
        "RESIDENT": tile.resident,
        "WEIGHT_SLOTS": tile.masks,
        "X_SLOTS": tile.x_slots,
        "SHARED_BYTES": tile.slot_bytes,
        "FEW_TOKENS": 0,
        "EPILOGUE": gate,
        "NORM": 0,
        "OUTLIERS": 0,
        "PLACED": False,
        "X_GROUPS": False,
    }


def prepare_sparse(
    function: Function,
    config: SparseConfig,
    *,
    bf16: bool,
    oc: int,
    ic: int,
    n: int,
    places: int,
    factor: float,
) -> SparseLaunch:
    """Return what launches the kernel on one problem: all that stays the same from call to call is settled.

    Args:
        function: the loaded kernel of the configuration's tile.
        config: how it runs.
        bf16: whether results are bfloat16, and activations that are no bytes.
        oc, ic, n: sizes.
        places: of the layout, whether the configuration deals blocks out to them or not.
        factor: of the packing (`SparsePacking`).
    """
    run, maps_rows = function.launch, tensor_map.rows
    grid, block, shared = (config.ctas, 1, 1), (config.tile.threads, 1, 1), config.tile.shared_bytes
    element = tensor_map.element(bf16, config.tile.bytewise)
    ctas, share, ahead = config.place_ctas, config.tile.share(n), PLACE_BYTES * places

    def launch(
        *,
        stream: int,
        mask: int,
        layers: int,
        starts: int,
        marks: int,
        scale: int,
        x: int,
        x_stride: int,
        bias: int,
        residual: int,
        y: int,
        partial: int,
        arrived: int,
        early: bool,
        x_scale: int = 0,
    ) -> None:
        """Launch; what is not there has the address 0.

        Args:
            stream: handle of the stream.
            mask, layers, starts, marks: addresses of `layouts.SparseTiles`.
            scale: address of a float32 scale a row.
            x, x_stride: address of the activations, and elements from one token to the next.
            bias, residual, y: addresses, in the dtype of the activations.
            partial, arrived: addresses of sums of cut tiles (float32) and of their counters (uint32, zero).
            early: whether weights may be fetched before the kernel ahead has ended: not where that one wrote them.
            x_scale: address of a float32 scale a token of 8-bit activations.
        """
        # fmt: off
        arguments = (
            maps_rows(x, n, ic, x_stride, element, share),
            mask, layers, starts + ahead, marks, scale, x_scale, bias, residual, y, partial, arrived, starts,
            oc, ic, n, ctas, share, factor,
        )
        # fmt: on
        run(grid, block, shared, stream, arguments, early)

    return launch


def launch_decompress(
    function: Function,
    stream: int,
    config: SparseConfig,
    *,
    mask: int,
    layers: int,
    starts: int,
    marks: int,
    scale: int,
    dense: int,
    first_row: int,
    rows: int,
    ic: int,
    places: int,
    factor: float,
) -> None:
    """Launch the decode of rows into dense memory [rows, ic].

    Args:
        function, config: the kernel, and how it runs so many rows.
        stream: handle of the stream.
        mask, marks, scale: addresses for the first of the rows; it is the first one of a tile of 256.
        starts: address of `SparseTiles.starts`, of all rows.
        layers: address of all layers.
        dense: address of the result.
        first_row, rows: which; whole tiles of 256, or up to the last row of the weight.
        ic: input channels.
        places: of the layout.
        factor: of the packing.
    """
    tile = config.tile
    own = starts + PLACE_BYTES * places + 4 * (first_row // UNIT_OC)
    skipped = first_row // (CUT_UNITS * UNIT_OC)
    arguments = (mask, layers, own, marks, scale, dense, rows, ic, starts, config.place_ctas, skipped, factor)
    function.launch((config.ctas, 1, 1), (tile.threads, 1, 1), tile.shared_bytes, stream, arguments)


def launch_stored(
    function: Function,
    stream: int,
    *,
    mask: int,
    values: int,
    starts: int,
    scale: int,
    zero_point: int,
    dense: int,
    first_row: int,
    rows: int,
    ic: int,
    groups: int,
    words: int,
) -> None:
    """Launch the decode of rows of a stored weight into dense memory [rows, ic].

    Args:
        function, stream: the kernel of `stored_source`, and the handle of the stream.
        mask, values, starts, scale, zero_point: addresses of a `SparseWeight`'s tensors, of all rows; 0 without one.
        dense: address of the result.
        first_row, rows: which.
        ic, groups: input channels, and scales of a row (1 without any).
        words: of all values.
    """
    arguments = (mask, values, starts, scale, zero_point, dense, first_row, rows, ic, groups, ic // groups, words)
    function.launch((-(-rows // _STORED_ROWS), 1, 1), (32 * _STORED_ROWS, 1, 1), 0, stream, arguments)
