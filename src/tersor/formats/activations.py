"""What is a weight multiplied with? Activations as they come, or quantised first, each way with a name."""

from __future__ import annotations

import enum

import torch

from tersor.errors import InputError, did_you_mean

EIGHT_BIT = "8bit"
"""Stands for `int8` or `fp8`, whichever the formats of a model's weights take (`ops.activations_for`)."""


class Activations(str, enum.Enum):
    """What the activations of a linear are when they meet the weight; the value is the name that users give.

    A further way is a member here with its dtype, its `quantize` and its kernels.
    """

    NATIVE = "16bit"
    """Multiplied in the dtype they come in, float16 or bfloat16."""
    E4M3 = "fp8"
    """Quantised to float8_e4m3fn with one float32 scale a token, by the operator itself (W6A8 and the like)."""
    INT8 = "int8"
    """Quantised to symmetric int8 with one float32 scale a token, likewise; products with integer weights are added
    exactly (W8A8 and W4A8)."""
    INT8_GROUPS = "int8:g128"
    """The same with one scale a token and group of 128 input channels, as in MixLLM (arXiv 2412.14590, section 3.2)."""

    def __str__(self) -> str:
        return self.value

    @staticmethod
    def of(value: Activations | str) -> Activations:
        """Return the member that a name (`16bit`, `fp8`, `int8`, `int8:g128`) stands for.

        Raises:
            InputError: there is none; the message names the nearest.
        """
        try:
            return Activations(value)
        except ValueError:
            known = [member.value for member in Activations]
            near = did_you_mean(str(value), known)
            raise InputError(f"activations {value!r}{near}: use {', '.join(known[:-1])} or {known[-1]}") from None

    @staticmethod
    def check(value: Activations | str) -> str:
        """Return a name that users give: that of a member, or `8bit`, which stands for one of them.

        Raises:
            InputError: it is neither; the message names the nearest.
        """
        if value == EIGHT_BIT:
            return EIGHT_BIT
        known = [member.value for member in Activations]
        if value not in known:
            names = [known[0], EIGHT_BIT, *known[1:]]
            near = did_you_mean(str(value), names)
            raise InputError(f"activations {str(value)!r}{near}: use {', '.join(names[:-1])} or {names[-1]}")
        return str(Activations(value))

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of quantised codes; `None` where activations stay as they come."""
        return _CODES[self][0] if self in _CODES else None

    @property
    def group_size(self) -> int | None:
        """Input channels that share a scale of a token; `None` where all do."""
        return 128 if self is Activations.INT8_GROUPS else None

    @property
    def word(self) -> str:
        """The name in words that take no colon: `16bit`, `fp8`, `int8`, `int8_g128`."""
        return self.value.replace(":", "_")

    def scales(self, ic: int) -> int:
        """Return how many scales a token of `ic` input channels has."""
        return 1 if self.group_size is None else -(-ic // self.group_size)

    @property
    def bits(self) -> int:
        """Bits of one activation in the product."""
        return 16 if self.dtype is None else 8 * self.dtype.itemsize

    def quantize(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantise activations: one scale a token, its largest magnitude over the largest code, 448 or 127; or one for
        each group of a token's channels, of which the last may have fewer.

        A code is x times f, the largest code over the largest magnitude, rounded to the nearest code, ties to even. f
        is a float32, and so is the product for e4m3; for int8 it is exact. A token of zeros has scale 0 and codes 0.

        Args:
            x: float32 [N, IC].

        Returns:
            Codes [N, IC] in `dtype`, and scales, float32 [N, `scales(IC)`]: x is about codes * scales. A token, or a
            group, with an infinity or a NaN gets NaNs, in its codes or, of int8, which has none, as its scale.
        """
        if self not in _CODES:
            raise ValueError(f"activations {self.value} are not quantised")
        if self.group_size is not None:
            (n, ic), groups = x.shape, self.scales(x.shape[1])
            padded = torch.nn.functional.pad(x, (0, -ic % self.group_size))
            codes, scales = Activations.INT8.quantize(padded.reshape(n * groups, self.group_size))
            return codes.reshape(padded.shape)[:, :ic].contiguous(), scales.reshape(n, groups)
        dtype, most = _CODES[self]
        largest = torch.full_like(x[:, :1], most)  # a tensor: a GPU divides by a number through its reciprocal
        if self is Activations.INT8:
            return _whole(x, largest)
        magnitude = x.abs().nan_to_num(nan=0.0, posinf=float("inf")).amax(dim=1, keepdim=True)
        factor = torch.where(magnitude > 0, largest / magnitude, 0.0)
        return (x * factor).to(dtype), magnitude / largest

    def dequantize(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Return activations [N, IC], in the dtype of the scales, of codes [N, IC] and scales [N, `scales(IC)`]."""
        if self.group_size is not None:
            scales = scales.repeat_interleave(self.group_size, dim=1)[:, : codes.shape[1]]
        return codes.to(scales.dtype) * scales


_CODES: dict[Activations, tuple[torch.dtype, float]] = {
    Activations.E4M3: (torch.float8_e4m3fn, 448.0),
    Activations.INT8: (torch.int8, 127.0),
    Activations.INT8_GROUPS: (torch.int8, 127.0),
}
"""Way with quantised activations -> dtype of the codes, and the largest."""


def _whole(x: torch.Tensor, largest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int8 codes and scales; a token whose largest magnitude has no inverse in float32 has codes 0."""
    magnitude = x.abs().amax(dim=1, keepdim=True)  # NaN where there is one
    factor = largest / magnitude
    factor = torch.where(factor.isfinite(), factor, 0.0)
    codes = (x.double() * factor.double()).round().nan_to_num(nan=0.0)  # the product is exact
    return codes.to(torch.int8), torch.where(magnitude.isfinite(), magnitude / largest, float("nan"))
