"""The parameters of headers on which several families build: the tiles of the sm80 and the sm90 schedule."""

from __future__ import annotations

import torch

from tersor.formats import Activations
from tersor.kernels.tune import sm90
from tersor.layouts.packing import Packing

_BYTE_WEIGHTS = {"e4m3": 4, "e5m2": 5, "int8": 8}
"""Type of decoded weights beside 8-bit activations -> BYTE_WEIGHT of dense/sm90_linear.cuh."""


def sm80_macros(
    packing: Packing, n_tile: int, stages: int, shared_bytes: int, gate: int
) -> dict[str, int | bool | str]:
    """Return the parameters of dense/sm80_tile.cuh; `gate` is EPILOGUE of cuda/common/gate.cuh."""
    return {
        **packing.macros(),
        "BF16": packing.target == "bfloat16",
        "N_TILE": n_tile,
        "STAGES": stages,
        "SHARED_BYTES": shared_bytes,
        "EPILOGUE": gate,
    }


def sm90_macros(
    packing: Packing,
    result: str,
    tile: sm90.Tile,
    slots: sm90.Slots,
    shared_bytes: int,
    gate: int,
    few_tokens: int,
    norm: int = 0,
    placed: bool = False,
    outliers: int = 0,
) -> dict[str, int | bool | str]:
    """Return the parameters of dense/sm90_linear.cuh, which other kernels on its rings have, too.

    Args:
        packing, result, tile, slots, shared_bytes, few_tokens: as in `kernels.dense.sm90_source`.
        gate: EPILOGUE of cuda/common/gate.cuh.
        norm: NORM of cuda/dense/sm90_norm.cuh.
        placed: PLACED of cuda/dense/sm90_places.cuh.
        outliers: OUTLIERS of cuda/dense/sm90_outliers.cuh: rounds of a block that have room in a slot.
    """
    return {
        **packing.macros(),
        "BF16": result == "bfloat16",
        "BYTES": tile.bytewise,
        "X_GROUPS": tile.activations.group_size is not None,
        "PIECES": tile.in_pieces and _one_scale(packing, tile.activations),
        "BYTE_WEIGHT": _BYTE_WEIGHTS.get(packing.group.operand, 4),
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
        "EPILOGUE": gate,
        "NORM": norm,
        "PLACED": placed,
        "OUTLIERS": outliers,
    }


def _one_scale(packing: Packing, activations: Activations) -> bool:
    """Whether sums of a block are scaled as a whole: a row, a token or both have one scale there."""
    return packing.sums_in_block == 1 or (packing.sums_in_block == 0 and activations.group_size is not None)


def quantized_macros(activations: Activations) -> dict[str, int | bool | str]:
    """Return the parameters of common/quantized.cuh but for the dtype."""
    return {"INT8": activations.dtype is torch.int8, "X_GROUPS": activations.group_size is not None}
