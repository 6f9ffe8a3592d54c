"""Layers that read the same activations, with one packed weight: queries, keys and values; gate and up of an MLP.

The layers stay where they are and a state dict shows each as it is stored. Whatever touches their tensors (a move, a
cast, a load) first takes them apart; the next forward joins them again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import torch
from torch import nn

from tersor import ops
from tersor.formats import Activations
from tersor.layouts import STREAM, PackedWeight
from tersor.layouts.blocks import UNIT_OC
from tersor.nn.linear import PackedLinear, cast_bias
from tersor.nn.packed import MultipliedModule, PackedModule

JOINED = "joined"
"""The layout of a layer whose codes and scales a join holds."""

_guard = threading.RLock()
_Round: TypeAlias = tuple[torch.Tensor, tuple[int | None, torch.dtype], dict[int, torch.Tensor]]
"""Activations, their version and dtype in the product, and the results that no layer has taken yet, by index."""


class Join:
    """The packed weight of several layers of one scheme and IC.

    Attributes:
        parts: the layers, in order.
        gated: whether they are gate and up, interleaved for `ops.gated_linear`; otherwise they are stacked.
        weight: the joined weight; `None` while the layers are apart.
        bias: [sum of OC] of stacked layers, of which their own biases are views, or `None`.
    """

    def __init__(self, parts: Sequence[PackedPart], gated: bool) -> None:
        self.parts = tuple(parts)
        self.gated = gated
        self.weight: PackedWeight | None = None
        self.bias: torch.Tensor | None = None
        self._ready_for: torch.dtype | None = None
        self._biases: tuple[nn.Parameter | None, ...] = ()
        self._kept_apart = False
        self._shares = threading.local()

    def keep_apart(self) -> None:
        """Give every layer its own tensors back, and never join them again."""
        self._kept_apart = True
        self.dissolve()

    def ready(self, dtype: torch.dtype) -> PackedWeight | None:
        """Return the joined weight in the layout for activations of `dtype`, joining the layers if they are apart.

        Returns `None` where they have to stay apart: on several devices or the meta device, where they are multiplied
        in several ways, after `keep_apart`, and where they are apart while a CUDA graph is captured or a graph is
        traced.
        """
        if torch.compiler.is_compiling():
            return self.weight
        if self._ready_for is dtype and self._has_biases():
            return self.weight
        with _guard:
            return self._prepare(dtype)

    def _has_biases(self) -> bool:
        """Tell whether the layers' biases are those that were joined: someone may have put others in their place."""
        pairs = zip(self.parts, self._biases, strict=True)
        return all(part._parameters["bias"] is bias for part, bias in pairs)

    def _prepare(self, dtype: torch.dtype) -> PackedWeight | None:
        device = self.parts[0].weight_packed.device
        settings = {(part.weight_packed.device, part.dtype, part.activations) for part in self.parts}
        if self._kept_apart or len(settings) > 1 or device.type == "meta":
            return None
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return self.weight if self._biases and self._has_biases() else None
        if self.weight is None:
            weights = [part.packed_weight() for part in self.parts]
            self.weight = PackedWeight.gate_up(*weights) if self.gated else PackedWeight.stack(weights)
            for part in self.parts:
                part.give(device)
        if not self.gated:
            self._join_biases()
        self._biases = tuple(part.bias for part in self.parts)
        self.weight = self.weight.to_layout(
            ops.preferred_layout(self.weight.scheme, dtype, device, self.parts[0].activations)
        )
        self._ready_for = dtype
        return self.weight

    @torch.inference_mode(False)  # biases stay parameters that may be loaded at any time
    def _join_biases(self) -> None:
        given = [part.bias for part in self.parts if part.bias is not None]
        self.bias = torch.cat([bias.detach() for bias in given]) if given else None
        if self.bias is not None:
            for part, bias in zip(self.parts, self.bias.split([part.out_features for part in self.parts]), strict=True):
                if part.bias is not None:
                    part.bias.data = bias  # the parameter stays: an optimizer may have it

    def apart(self) -> Sequence[PackedWeight]:
        """Return the weights of the layers in the stored stream, made anew from the joined one."""
        assert self.weight is not None
        if self.gated:
            return self.weight.split_gate_up()
        return self.weight.split([part.out_features for part in self.parts])

    def dissolve(self) -> None:
        """Give every layer its own tensors back, in the stored stream."""
        with _guard:
            if self.weight is not None:
                for part, weight in zip(self.parts, self.apart(), strict=True):
                    part._set_weight(weight)
            self.weight, self.bias, self._ready_for, self._biases = None, None, None, ()
            self._shares = threading.local()

    def multiply(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """Return what layer `index` makes of x.

        The first layer that is asked multiplies for all of them; the others take their share if they are given the
        same tensor next, in the same thread, and nobody has written it in between. What is left of a round goes with
        its thread. A module that has queries, keys and values as one layer from the start needs none of this.
        """
        part, dtype = self.parts[index], ops.activation_dtype(x)
        weight = self.ready(dtype)
        if weight is None or self.gated:
            return ops.linear(x, part.packed_weight(), cast_bias(part.bias, dtype))
        if torch.compiler.is_compiling() or ops.gradient_wanted(x, *(part.bias for part in self.parts)):
            return self._alone(index, x, weight)
        version = None if x.is_inference() else x._version
        held: _Round | None = getattr(self._shares, "round", None)
        if held is not None and held[0] is x and held[1] == (version, dtype) and index in held[2]:
            y = held[2].pop(index)
            if not held[2]:
                del self._shares.round
            return y
        sizes = [part.out_features for part in self.parts]
        results = ops.linear(x, weight, cast_bias(self.bias, dtype)).split(sizes, dim=-1)
        self._shares.round = (x, (version, dtype), {other: y for other, y in enumerate(results) if other != index})
        return results[index]

    def _alone(self, index: int, x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
        """Multiply with one layer's rows of the joined weight: no trace or gradient goes from one layer to the next."""
        dtype = ops.activation_dtype(x)
        sizes = [part.out_features for part in self.parts]
        first = sum(sizes[:index])
        last = first + sizes[index]
        unit = 1 if weight.layout == STREAM else UNIT_OC
        if first % unit or last % unit:
            biases: list[torch.Tensor] = [part.bias for part in self.parts if part.bias is not None]
            return ops.linear(x, weight, cast_bias(torch.cat(biases), dtype) if biases else None)[..., first:last]

        return ops.linear(x, weight.rows(first, last), cast_bias(self.parts[index].bias, dtype))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_shares"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._shares = threading.local()


_Own = TypeVar("_Own", bound="Given")


class Given(MultipliedModule):
    """Holds packed rows whose codes and scales something else may hold, together with those of other layers.

    Whatever touches its tensors (a move, a cast, a load) first has all layers given their own back: `dissolve` of what
    stands first in `_place`. That is in a tuple, since it is not a submodule of this layer.
    """

    _place: tuple[Any, ...]

    def give(self, device: torch.device) -> None:
        """Let go of codes and scales, which something else has now."""
        self.weight_packed = torch.empty(0, dtype=torch.int32, device=device)
        self.weight_scale = torch.empty(0, dtype=torch.uint8, device=device)
        self.weight_zero_point = self.weight_outliers = self.weight_arranged = None
        self.layout = JOINED
        self._held = None

    def packed_weight(self) -> PackedWeight:
        """Return the weight; while something else holds it a copy of its rows, in the stored stream."""
        return self._own_rows() if self.layout == JOINED else super().packed_weight()

    def _own_rows(self) -> PackedWeight:
        """Return a copy of this layer's rows of what something else holds, in the stored stream."""
        raise NotImplementedError

    def multiply_with(self, activations: Activations | str) -> None:
        """Choose what the weight is multiplied with: the layers join again when all of them are told the same."""
        self._place[0].dissolve()
        super().multiply_with(activations)

    def _apply(self: _Own, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> _Own:
        self._place[0].dissolve()
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        self._place[0].dissolve()
        super()._load_from_state_dict(state_dict, prefix, *args)


class GivenLinear(Given, PackedLinear):
    """A packed linear layer whose codes and scales something else may hold, together with those of other layers."""


class PackedPart(GivenLinear):
    """A packed linear layer whose codes and scales a `Join` holds together with those of other layers."""

    _place: tuple[Join, int]

    @classmethod
    def of(cls, layer: PackedLinear) -> PackedPart:
        """Make one of a packed linear layer, without a copy; `place` makes it part of a join."""
        return moved(layer, cls)

    def plain(self) -> PackedLinear:
        """Return a layer of its own with the same weight."""
        return moved(self, PackedLinear)

    def place(self, join: Join, index: int) -> None:
        """Make this layer part `index` of a join."""
        self._place = (join, index)

    @property
    def join(self) -> Join:
        """What holds the codes and scales."""
        return self._place[0]

    def _own_rows(self) -> PackedWeight:
        join, index = self._place
        return join.apart()[index]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply x [..., IC]: returns [..., OC] in x's dtype, which may be a view into the results of all layers."""
        join, index = self._place
        return join.multiply(index, x)

    def prepare(self, dtype: torch.dtype) -> None:
        """Join this layer with the others, if they are on one device, in the layout for activations of `dtype`."""
        self.join.ready(dtype)


def moved(layer: PackedLinear, cls: type[Any]) -> Any:
    """Return a layer of another class with the weight, bias and flags of this one."""
    new = cls(layer.in_features, layer.out_features, layer.scheme, device="meta", dtype=layer.dtype)
    PackedModule._set_weight(new, layer.packed_weight())
    new.bias, new.transposed, new.activations = layer.bias, layer.transposed, layer.activations
    return new.train(layer.training)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), with gate and up as one gated linear.

    Attributes:
        gate_proj, up_proj: parts of one join.
        down_proj: any layer.
    """

    gate_proj: PackedPart
    up_proj: PackedPart

    def __init__(self, plain: Any) -> None:
        """Stand for an MLP whose `gate_proj` and `up_proj` are parts of a gated join; `plain` can be put back."""
        super().__init__()
        for name, child in plain.named_children():
            self.add_module(name, child)
        # In a tuple: its children would be in the state dict twice.
        self._plain = (plain,)
        self.train(plain.training)

    def plain(self) -> Any:
        """Return the module this one stands for, with the children that this one has now."""
        plain = self._plain[0]
        for name, child in self.named_children():
            setattr(plain, name, child)
        return plain.train(self.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return down(silu(gate(x)) * up(x)) of x [..., IC]."""
        weight = self._joined(x)
        if weight is None:
            hidden = nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)
        else:
            hidden = ops.gated_linear(x, weight)
        down: torch.Tensor = self.down_proj(hidden)  # type: ignore[operator]
        return down

    def _joined(self, x: torch.Tensor) -> PackedWeight | None:
        """Return the weight of gate and up for x, or `None` where they are apart or an adapter stands before one."""
        gate, up = self.gate_proj, self.up_proj
        if isinstance(gate, PackedPart) and isinstance(up, PackedPart):
            return gate.join.ready(ops.activation_dtype(x))
        return None
