"""Activations quantised to bytes ahead of a product, by dense/quantize_activations.cuh, and how they lie in memory.

As in `kernels.dense`: a kernel's source, its launch prepared for a problem, then the launch, by addresses and sizes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeAlias

from tersor.formats import Activations
from tersor.kernels.jit import Function, KernelSource
from tersor.kernels.macros import quantized_macros

_CHANNELS, _CHANNELS_IN_GROUPS = 32, 16
"""Channels that a thread has under way: of a whole row, or of scales in groups."""
_THREADS = 1024


@functools.cache
def quantize_source(target: str, activations: Activations, gate: int = 0, relu: bool = False) -> KernelSource:
    """Return the kernel that turns 16-bit activations of a dtype into bytes with a scale a token or a group.

    Args:
        target: `float16` or `bfloat16`.
        activations: what they become.
        gate: EPILOGUE of cuda/common/gate.cuh: how gate and up become one first, or 0.
        relu: without a gate, whether what is negative becomes 0 first.
    """
    return KernelSource(
        name=f"tersor_quantize_activations_{target}_{activations.word}" + (f"_g{gate}" if gate else "_relu" * relu),
        header="dense/quantize_activations.cuh",
        parameters={
            "BF16": target == "bfloat16",
            **quantized_macros(activations),
            "EPILOGUE": gate,
            "RELU": relu and not gate,
        },
        arguments="PPPPqqiii",
    )


QuantizeLaunch: TypeAlias = Callable[..., int]
"""Launches the quantising of activations on one prepared problem: `launch` in `prepare_quantize`."""


def codes_stride(ic: int) -> int:
    """Return the bytes from one token's quantised codes to the next: whole 16 bytes, as a tensor map needs."""
    return -(-ic // 16) * 16


def scales_stride(n: int) -> int:
    """Return the scales from one group of channels to the next, of n tokens each, where activations have groups."""
    return -(-n // 4) * 4


def quantized_bytes(n: int, ic: int, activations: Activations) -> int:
    """Return the bytes of quantised activations [n, ic]: codes [n, codes_stride], then float32 scales, [n] or, in
    groups, [groups, scales_stride]."""
    scales = n if activations.group_size is None else activations.scales(ic) * scales_stride(n)
    return n * codes_stride(ic) + 4 * scales


def prepare_quantize(function: Function, *, n: int, ic: int, activations: Activations) -> QuantizeLaunch:
    """Return what launches the quantising of activations to codes [n, ic], such as `quantize_source` has it."""
    warps = -(-ic // (32 * (_CHANNELS if activations.group_size is None else _CHANNELS_IN_GROUPS)))
    grid, block, row = (n, 1, 1), (min(32 * warps, _THREADS), 1, 1), codes_stride(ic)
    run = function.launch

    def launch(
        *, stream: int, x: int, x_stride: int, codes: int, scales: int = 0, order: int = 0, top_k: int = 1
    ) -> int:
        """Launch, and return the address of the scales.

        Args:
            stream: handle of the stream.
            x, x_stride: address of 16-bit activations, with a gate [n, 2 ic], and elements from one token to the next.
            codes: address of `quantized_bytes`, or of codes alone.
            scales: address of the scales; 0 has them behind the codes.
            order: address of n numbers: row i of the codes is that of token order[i] / top_k; 0 for token i.
            top_k: what those numbers are divided by.
        """
        scales_at = scales or codes + n * row
        whole = not (x % 16 or x_stride % 8 or ic % 8)
        run(grid, block, 0, stream, (x, order, codes, scales_at, x_stride, row, ic, whole, top_k), True)
        return scales_at

    return launch
