"""What is a weight multiplied with? Activations as they come, or quantised first, each way with a name."""

from __future__ import annotations

import enum

import torch

from tersor.errors import InputError, did_you_mean


class Activations(str, enum.Enum):
    """What the activations of a linear are when they meet the weight; the value is the name that users give.

    A further way (int8, one scale a token and group) is a member here with its dtype, its `quantize` and its kernels.
    """

    NATIVE = "16bit"
    """Multiplied in the dtype they come in, float16 or bfloat16."""
    E4M3 = "fp8"
    """Quantised to float8_e4m3fn with one float32 scale a token, by the operator itself (W6A8 and the like)."""

    def __str__(self) -> str:
        return self.value

    @staticmethod
    def of(value: Activations | str) -> Activations:
        """Return the member that a name (`16bit`, `fp8`) stands for.

        Raises:
            InputError: there is none; the message names the nearest.
        """
        try:
            return Activations(value)
        except ValueError:
            known = [member.value for member in Activations]
            near = did_you_mean(str(value), known)
            raise InputError(f"activations {value!r}{near}: use {' or '.join(known)}") from None

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of quantised codes; `None` where activations stay as they come."""
        return torch.float8_e4m3fn if self is Activations.E4M3 else None

    @property
    def bits(self) -> int:
        """Bits of one activation in the product."""
        return 16 if self.dtype is None else 8 * self.dtype.itemsize

    def quantize(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantise activations: one scale a token, the largest magnitude / 448.

        Args:
            x: float32 [N, IC].

        Returns:
            Codes [N, IC] in `dtype`, and scales, float32 [N, 1]: x is about codes * scales. A token with an infinity or
            a NaN gets NaNs.
        """
        if self is not Activations.E4M3:
            raise ValueError(f"activations {self.value} are not quantised")
        largest = torch.full_like(x[:, :1], 448.0)  # a tensor: a GPU divides by a number through its reciprocal
        magnitude = x.abs().nan_to_num(nan=0.0, posinf=float("inf")).amax(dim=1, keepdim=True)
        factor = torch.where(magnitude > 0, largest / magnitude, 0.0)
        return (x * factor).to(torch.float8_e4m3fn), magnitude / largest

    def dequantize(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Return float32 activations [N, IC] of codes [N, IC] and scales [N, 1]."""
        return codes.to(torch.float32) * scales
