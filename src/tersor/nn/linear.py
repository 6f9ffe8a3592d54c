"""A linear layer whose weight stays packed: what is on disk is what is in memory."""

from __future__ import annotations

import torch
from torch import nn

from tersor import ops
from tersor.formats import Scheme
from tersor.layouts import STREAM, PackedWeight
from tersor.nn.packed import MultipliedModule

_autocast = torch._C._is_any_autocast_enabled


class PackedLinear(MultipliedModule):
    """y[..., OC] = x[..., IC] @ W[OC, IC]^T + bias, with W packed.

    On a GPU the packed weight is kept in the layout its kernel reads; the state dict shows the stored stream all the
    same. Casting the module (`.half()`, `.to(dtype)`) casts the bias only: packed codes and scales stay as they are.

    Attributes:
        in_features, out_features: IC and OC.
        transposed: whether the module it replaced kept its weight as [IC, OC] (GPT-2's Conv1D).
        bias: [OC] or `None`.
    """

    bias: nn.Parameter | None
    keeps_outliers = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        bias: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make a layer with uninitialised codes and scales, to be filled from a state dict.

        Args:
            in_features, out_features: IC and OC.
            scheme: element format and scales.
            bias: whether there is one.
            device: of everything.
            dtype: of the bias and the decoded weight; torch's default when `None`.

        Raises:
            FormatError: the group size does not divide IC.
        """
        super().__init__((out_features, in_features), scheme, device=device, dtype=dtype)
        self.in_features = in_features
        self.out_features = out_features
        self.transposed = False
        self.register_parameter("bias", empty_bias(out_features, self.dtype, device) if bias else None)

    @classmethod
    def from_packed(
        cls, weight: PackedWeight, bias: torch.Tensor | None = None, dtype: torch.dtype | None = None
    ) -> PackedLinear:
        """Wrap a packed weight and a bias, without a copy."""
        oc, ic = weight.shape
        layer = cls(ic, oc, weight.scheme, device="meta", dtype=dtype)
        layer._set_weight(weight)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply.

        Args:
            x: [..., IC].

        Returns:
            [..., OC] in x's dtype, or that of torch.autocast; a bias of another dtype is cast.
        """
        dtype = x.dtype
        if _autocast():
            dtype = ops.activation_dtype(x)
        if torch.compiler.is_compiling():
            return ops.linear(x, self.packed_weight(), cast_bias(self.bias, dtype))
        weight = self._current()
        if self._ready_for is not dtype:
            self.prepare(dtype)
            weight = self._current()
        try:
            bias: torch.Tensor | None = self._parameters["bias"]  # the attribute costs a microsecond
        except KeyError:  # a parametrization has taken it
            bias = self.bias
        if bias is not None and bias.dtype is not dtype:
            bias = cast_bias(bias, dtype)
        return ops.linear(x, weight, bias)

    def extra_repr(self) -> str:
        """Say shape, scheme and layout."""
        words = [
            f"in_features={self.in_features}",
            f"out_features={self.out_features}",
            f"bias={self.bias is not None}",
            f"scheme={self.scheme.key()}",
            f"bits_per_weight={self.scheme.bits_per_weight(self.in_features):.3f}",
        ]
        if self.layout != STREAM:
            words.append(f"layout={self.layout}")
        return ", ".join(words)


def empty_bias(out_features: int, dtype: torch.dtype, device: torch.device | str | None) -> nn.Parameter:
    """Return a bias [OC] without values, to be filled from a state dict; it is not trained."""
    return nn.Parameter(torch.empty(out_features, dtype=dtype, device=device), requires_grad=False)


def cast_bias(bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Return a bias in the dtype of the activations it is added to."""
    return bias.to(dtype) if bias is not None and dtype.is_floating_point else bias
