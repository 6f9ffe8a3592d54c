"""A linear layer whose weight stays packed: what is on disk is what is in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from tersor import ops
from tersor.formats import SCALE_DTYPES, Scheme
from tersor.layouts import STREAM, PackedWeight
from tersor.layouts.stream import row_words

PACKED, SCALE, ZERO_POINT = "weight_packed", "weight_scale", "weight_zero_point"
"""Names of the tensors that stand for one weight, on disk and in a state dict."""


class PackedLinear(nn.Module):
    """y[..., OC] = x[..., IC] @ W[OC, IC]^T + bias, with W packed.

    On a GPU the packed weight is kept in the layout its kernel reads; the state dict shows the stored stream all the
    same. Casting the module (`.half()`, `.to(dtype)`) casts the bias only: packed codes and scales stay as they are.

    Attributes:
        in_features, out_features: IC and OC.
        scheme: what codes and scales mean.
        dtype: of the decoded `weight`; follows `.half()`, `.to(dtype)` and the like.
        layout: the layout `weight_packed` is in now: `stream` or a kernel layout.
        transposed: whether the module it replaced kept its weight as [IC, OC] (GPT-2's Conv1D).
        weight_packed: int32 [OC, words] in the stored stream, flat in a kernel layout.
        weight_scale: [OC, G] in the scheme's scale dtype; float32, flat in a kernel layout.
        weight_zero_point: uint8 [OC, G] for `uint` formats, else `None`.
        bias: [OC] or `None`.
    """

    weight_packed: torch.Tensor
    weight_scale: torch.Tensor
    weight_zero_point: torch.Tensor | None
    bias: nn.Parameter | None

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
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.scheme = scheme
        self.dtype = dtype or torch.get_default_dtype()
        self.transposed = False
        self.layout = STREAM
        self._ready_for: tuple[torch.dtype, torch.device] | None = None
        for name, (shape, tensor_dtype) in self.stored_tensors(in_features, out_features, scheme).items():
            self.register_buffer(name, torch.empty(shape, dtype=tensor_dtype, device=device))
        if not scheme.has_zero_point:
            self.register_buffer(ZERO_POINT, None)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=self.dtype, device=device), requires_grad=False)
        else:
            self.register_parameter("bias", None)

    @staticmethod
    def stored_tensors(ic: int, oc: int, scheme: Scheme) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
        """Return name -> (shape, dtype) of the tensors that stand for a weight [oc, ic] on disk.

        Raises:
            FormatError: the group size does not divide `ic`.
        """
        groups = (oc, scheme.groups(ic))
        tensors: dict[str, tuple[tuple[int, int], torch.dtype]] = {
            PACKED: ((oc, row_words(ic, scheme.format.bits)), torch.int32),
            SCALE: (groups, SCALE_DTYPES[scheme.scale_dtype]),
        }
        if scheme.has_zero_point:
            tensors[ZERO_POINT] = (groups, torch.uint8)
        return tensors

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

    def packed_weight(self) -> PackedWeight:
        """Return the weight, sharing memory with the module's buffers."""
        return PackedWeight(
            self.scheme,
            (self.out_features, self.in_features),
            self.weight_packed,
            self.weight_scale,
            self.weight_zero_point,
            self.layout,
        )

    @property
    def weight(self) -> torch.Tensor:
        """The decoded weight [OC, IC] in `dtype`, made anew on every access: for code that looks at weights."""
        return self.packed_weight().dequantize(self.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply.

        Args:
            x: [..., IC].

        Returns:
            [..., OC] in x's dtype.
        """
        if not torch.compiler.is_compiling():
            self.prepare(x.dtype)
        return ops.linear(x, self.packed_weight(), self.bias)

    def prepare(self, dtype: torch.dtype) -> None:
        """Put the packed weight into the layout that serves activations of `dtype` on the module's device.

        Does nothing when it is there already, on the meta device, and while a CUDA graph is captured (every layout
        gives the right result; this one is fastest).
        """
        wanted = (dtype, self.weight_packed.device)
        if self._ready_for == wanted or wanted[1].type == "meta":
            return
        layout = ops.preferred_layout(self.scheme, dtype, wanted[1])
        if layout != self.layout:
            if wanted[1].type == "cuda" and torch.cuda.is_current_stream_capturing():
                return
            self._set_weight(self.packed_weight().to_layout(layout))
        self._ready_for = wanted

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

    def _set_weight(self, weight: PackedWeight) -> None:
        self.weight_packed = weight.data
        self.weight_scale = weight.scale
        self.weight_zero_point = weight.zero_point
        self.layout = weight.layout
        self._ready_for = None

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedLinear:
        before = {name: self._buffers[name] for name in (PACKED, SCALE, ZERO_POINT)}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        cast = fn(torch.empty(0, dtype=self.dtype, device="cpu")).dtype
        self.dtype = cast if cast.is_floating_point else self.dtype
        self._ready_for = None
        self.prepare(self.dtype)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.layout != STREAM:
            stored = self.packed_weight().to_layout(STREAM)
            destination[prefix + PACKED], destination[prefix + SCALE] = stored.data, stored.scale

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        tensors = self.stored_tensors(self.in_features, self.out_features, self.scheme)
        for name, (shape, dtype) in tensors.items():
            given = state_dict.get(prefix + name)
            if given is not None and (given.dtype != dtype or tuple(given.shape) != shape):
                kind = f"{given.dtype} {list(given.shape)}"
                error_msgs.append(f"{prefix}{name} is {kind}; {self.scheme.key()} stores {dtype} {list(shape)}")
                return
        if self.layout != STREAM:
            for name, (shape, dtype) in tensors.items():
                setattr(self, name, torch.empty(shape, dtype=dtype, device=self.weight_packed.device))
            self.layout = STREAM
        self._ready_for = None
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ready_for": None}
