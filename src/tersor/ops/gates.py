"""How the gate and the up projection of an MLP become one."""

from __future__ import annotations

import enum

import torch
from torch.nn import functional

from tersor.layouts.gated import separate

CLAMP = 7.0
"""What gpt-oss clamps gate and up to."""
SLOPE = 1.702
"""What gpt-oss multiplies the gate by before the sigmoid (Hendrycks and Gimpel, arXiv 1606.08415, section 2)."""


class Gate(enum.IntEnum):
    """An activation of gate times up; the value is EPILOGUE of kernels/cuda/common/gate.cuh."""

    SILU = 1
    """silu(gate) * up: Llama, Qwen, Mixtral, DeepSeek (Shazeer, arXiv 2002.05202)."""
    GELU_TANH = 2
    """gelu(gate) * up, by the approximation with tanh: Gemma."""
    GELU = 3
    """gelu(gate) * up, by the error function."""
    CLAMPED = 4
    """g * sigmoid(1.702 g) * (u + 1) with g = min(gate, 7) and u = up clamped to -7 .. 7: gpt-oss."""

    def combine(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Return gate and up [..., F] as one [..., F], in their dtype."""
        if self is Gate.SILU:
            return functional.silu(gate) * up
        if self is Gate.CLAMPED:
            clamped = gate.clamp(max=CLAMP)
            return clamped * torch.sigmoid(SLOPE * clamped) * (up.clamp(-CLAMP, CLAMP) + 1)
        approximate = "tanh" if self is Gate.GELU_TANH else "none"
        return functional.gelu(gate, approximate=approximate) * up

    def of_rows(self, sums: torch.Tensor) -> torch.Tensor:
        """Return [..., F] of what a gated weight gives for each of its interleaved rows, [..., rows]."""
        gate, up = (half.movedim(0, -1) for half in separate(sums.movedim(-1, 0)))
        return self.combine(gate, up)
