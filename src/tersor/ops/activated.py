"""How do gates and relu meet products with 8-bit activations? As bytes, made in the launch that quantises.

The definition is two steps, `ops.gated` or `ops.relu` and `Activations.quantize`; the kernel gives the same bits. A
gate in the epilogue of a product has no such launch: a token's scale is that of all its channels, of which a CTA has
some.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch

from tersor.formats import Activations
from tersor.kernels import jit, quantizing, small
from tersor.layouts import MixedWeight, PackedWeight
from tersor.ops import current, norm, pointwise
from tersor.ops.gates import Gate
from tersor.ops.quantized import Quantized, common_activations

_launch = functools.lru_cache(1024)(quantizing.prepare_quantize)


def takes_activated(
    x: torch.Tensor, weights: Iterable[PackedWeight | MixedWeight], gate: Gate | None
) -> Activations | None:
    """Return what a kernel makes of rows in their activation where all products of them take that, in the current mode.

    Args:
        x: [T, 2 F], gate and up one behind the other, or [T, F] without a gate.
        weights: of all that reads the activation's result.
        gate: how gate and up become one; `None` is relu.

    Returns:
        `None` where none does.
    """
    activations = common_activations(weights)
    return activations if activations is not Activations.NATIVE and _serves(x, gate) else None


def activated_quantized(x: torch.Tensor, gate: Gate | None, activations: Activations) -> Quantized:
    """Return `ops.gated` or, without a gate, `ops.relu` of every row as bytes. It has no gradient.

    Args:
        x, gate: as for `takes_activated`; errors are those of `ops.gated` and `ops.relu`.
        activations: what kind of bytes.
    """
    pointwise.check("activated_quantized", x, gate is not None)
    if _serves(x, gate):
        return _launched(x, gate, activations)
    return Quantized.of(pointwise.relu(x) if gate is None else pointwise.gated(x, gate), activations)


def _serves(x: torch.Tensor, gate: Gate | None) -> bool:
    """Tell whether a kernel makes bytes of rows in their activation."""
    chip = norm.serving_chip(x, most=None)
    whole = gate is None or x.shape[1] % (2 * small.CHANNELS) == 0
    return chip is not None and chip.capability == (9, 0) and whole


def _launched(x: torch.Tensor, gate: Gate | None, activations: Activations) -> Quantized:
    index = x.get_device()
    if index >= 0 and current.device() != index:
        with torch.cuda.device(index):
            return _launched(x, gate, activations)
    x = x.contiguous()
    rows, channels = len(x), x.shape[1] // (1 if gate is None else 2)
    source = quantizing.quantize_source(norm.TARGETS[x.dtype], activations, int(gate or 0), relu=gate is None)
    launch = _launch(jit.get(source, index), n=rows, ic=channels, activations=activations)
    dtype = activations.dtype
    assert dtype is not None
    codes = current.empty((rows, channels), (quantizing.codes_stride(channels), 1), dtype)
    scales = norm.empty_scales(rows, channels, activations)
    places = {"x": x.data_ptr(), "codes": codes.data_ptr(), "scales": scales.data_ptr()}
    launch(stream=current.stream(index), x_stride=x.stride(0), **places)
    return Quantized(codes, scales, x.dtype)
