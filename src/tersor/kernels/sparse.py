"""The sparse family: sm90_sparse.cuh, which multiplies with a bitmap and packed values.

A kernel's source, its launch prepared for a problem, then the launch; addresses and sizes alone, as in `dense`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeAlias

from tersor.kernels.jit import Function, KernelSource, tensor_map
from tersor.kernels.tune.sparse import SparseConfig, SparseTile
from tersor.layouts.sparse_packing import SparsePacking

SparseLaunch: TypeAlias = Callable[..., None]
"""Launches the kernel on one prepared problem: `launch` in `prepare_sparse`."""

_SUFFIX = {0: "", 1: "_gated"}


@functools.cache
def sparse_source(packing: SparsePacking, tile: SparseTile, gate: int = 0) -> KernelSource:
    """Return the kernel for one packing of values and tile.

    Args:
        packing: of the values, for the activations' dtype, which the result has, too.
        tile: the compiled shape.
        gate: EPILOGUE of cuda/common/gate.cuh: how gate and up become one, or 0.
    """
    kind = f"{packing.bits}{'c' if packing.converts else ''}t{packing.turn}f{int(packing.finish)}"
    return KernelSource(
        name=f"tersor_sparse_sm90_{kind}_{packing.target}_{tile}{_SUFFIX.get(gate, f'_gated{gate}')}",
        header="sparse/sm90_sparse.cuh",
        parameters={
            **packing.macros(),
            "RING_LAYERS": tile.layers,
            "BITS": 1,
            "SCALE_GROUPS": 0,
            "SCALE_TYPE": 0,
            "ZERO_POINTS": False,
            "BF16": packing.target == "bfloat16",
            "BYTES": False,
            "BYTE_WEIGHT": 4,
            "N_TILE": tile.tokens,
            "ROW_GROUPS": tile.row_groups,
            "K_GROUPS": 1,
            "CLUSTER": 1,
            "GATHERS": tile.gathers,
            "GATHER_ROOM": tile.gather_room,
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
        },
        arguments="TPPPPPPPPPPiiiiif",
    )


def prepare_sparse(
    function: Function, config: SparseConfig, *, bf16: bool, oc: int, ic: int, n: int, factor: float
) -> SparseLaunch:
    """Return what launches the kernel on one problem: all that stays the same from call to call is settled.

    Args:
        function: the loaded kernel of the configuration's tile.
        config: how it runs.
        bf16: whether activations are bfloat16.
        oc, ic, n: sizes; n is at most the tile's tokens.
        factor: of the packing (`SparsePacking`).
    """
    run, maps_rows = function.launch, tensor_map.rows
    grid, block, shared = (config.ctas, 1, 1), (config.tile.threads, 1, 1), config.tile.shared_bytes
    cluster = (config.runs, 1, 1) if config.gathered else None
    element = tensor_map.BFLOAT16 if bf16 else tensor_map.FLOAT16
    runs = config.runs

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
    ) -> None:
        """Launch; what is not there has the address 0.

        Args:
            stream: handle of the stream.
            mask, layers, starts, marks: addresses of `layouts.SparseTiles`.
            scale: address of a float32 scale a row.
            x, x_stride: address of the activations, and elements from one token to the next.
            bias, residual, y: addresses, in the dtype of the activations.
            partial, arrived: addresses of split sums (float32) and of their counters (uint32, zero).
            early: whether weights may be fetched before the kernel ahead has ended: not where that one wrote them.
        """
        # fmt: off
        arguments = (
            maps_rows(x, n, ic, x_stride, element, n),
            mask, layers, starts, marks, scale, bias, residual, y, partial, arrived,
            oc, ic, n, runs, n, factor,
        )
        # fmt: on
        run(grid, block, shared, stream, arguments, early, cluster)

    return launch
