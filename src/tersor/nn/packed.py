"""What packed modules share: a weight as buffers, which no cast touches and the state dict shows as it is stored."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from tersor import ops
from tersor.checkpoint.names import OUTLIERS, PACKED, SCALE, ZERO_POINT, TensorForm, stored_forms
from tersor.errors import FormatError, UnsupportedError
from tersor.formats import Activations, Scheme
from tersor.layouts import STREAM, PackedWeight

guard = threading.RLock()
"""Held while a module's tensors become others: a thread that runs it meanwhile has the old ones, or the new ones."""

_ARRANGED = "weight_arranged"
_Self = TypeVar("_Self", bound="PackedModule")


def refuse_weight(module: nn.Module, name: str) -> None:
    """Hold that a parameter which a module is given is not its weight, which is decoded from packed codes.

    Raises:
        UnsupportedError: it is named `weight`.
    """
    if name == "weight":
        raise UnsupportedError(
            f"the weight of a {type(module).__name__} is packed and cannot be set: put a plain layer in its place, "
            "or train an adapter"
        )


def dtype_after(fn: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype) -> torch.dtype:
    """Return what a dtype of floats becomes by what `nn.Module._apply` applies: the same where that casts none."""
    cast = fn(torch.empty(0, dtype=dtype, device="cpu")).dtype
    return cast if cast.is_floating_point else dtype


def uncast(module: nn.Module, before: Mapping[str, torch.Tensor | None]) -> None:
    """Undo casts of buffers, which are moved alone.

    Args:
        module: whose buffers were applied something.
        before: those that no cast touches, by name, as they were.
    """
    for name, old in before.items():
        new = module._buffers[name]
        if old is not None and new is not None and new.dtype != old.dtype:
            module._buffers[name] = old.to(new.device)


class Counted(nn.Module):
    """Holds a compressed weight that is no `PackedModule`, and counts as one does.

    Attributes:
        shape: (OC, IC).
        stored_bits: bits that a checkpoint has for the weight, all of its tensors counted.
    """

    shape: tuple[int, ...]
    stored_bits: float
    in_state_dict = True


class PackedModule(nn.Module):
    """Holds a packed weight [OC, IC]; a subclass says what is computed with it.

    Attributes:
        shape: (OC, IC) of the weight, (E, OC, IC) of those of E experts.
        scheme: what codes and scales mean.
        dtype: of the decoded `weight`; follows `.half()`, `.to(dtype)` and the like.
        layout: the layout `weight_packed` is in now: `stream` or a kernel layout.
        weight_packed: int32 [OC, words] in the stored stream, flat in a kernel layout.
        weight_scale: [OC, G] in the scheme's scale dtype; uint8, flat, zero points included in a kernel layout.
        weight_zero_point: uint8 [OC, G] for `uint` formats in the stored stream, else `None`.
        weight_outliers: int32 [OC, K] where the scheme has outliers, the same in every layout, else `None`.
        weight_arranged: `PackedWeight.arranged`, which no state dict has.
    """

    weight_packed: torch.Tensor
    weight_scale: torch.Tensor
    weight_zero_point: torch.Tensor | None
    weight_outliers: torch.Tensor | None
    weight_arranged: torch.Tensor | None
    in_state_dict = True
    """Whether the weight is stored with this module; else another module's state dict holds it."""
    keeps_outliers = False
    """Whether the weight may have outliers beside its codes."""

    def __init__(
        self,
        shape: tuple[int, ...],
        scheme: Scheme,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make a module with uninitialised codes and scales, to be filled from a state dict.

        Args:
            shape: (OC, IC); (E, OC, IC) for a subclass that holds a weight of each of E experts.
            scheme: element format and scales.
            device: of everything.
            dtype: of the decoded weight; torch's default when `None`.

        Raises:
            FormatError: the group size does not divide IC, or outliers that such a module does not keep.
        """
        super().__init__()
        if scheme.outliers is not None and not self.keeps_outliers:
            raise FormatError(f"a {type(self).__name__} keeps no outliers, and its scheme is {scheme.key()}")
        self.shape = shape
        self.scheme = scheme
        self.dtype = dtype or torch.get_default_dtype()
        self.layout = STREAM
        self._ready_for: torch.dtype | None = None
        self._held: PackedWeight | None = None
        for name, form in self.own_tensors().items():
            tensor = torch.empty(form.shape, dtype=form.dtype, device=device)
            self.register_buffer(name, tensor, persistent=self.in_state_dict)
        if not scheme.has_zero_point:
            self.register_buffer(ZERO_POINT, None)
        if scheme.outliers is None:
            self.register_buffer(OUTLIERS, None)
        self.register_buffer(_ARRANGED, None, persistent=False)

    def own_tensors(self) -> dict[str, TensorForm]:
        """Return name -> shape and dtype of the tensors that stand for this module's weight on disk."""
        return stored_forms(self.scheme, self.shape)

    def packed_weight(self) -> PackedWeight:
        """Return the weight, sharing memory with the module's buffers: the same object until one of them changes."""
        return self._view() if torch.compiler.is_compiling() else self._current()

    def _current(self) -> PackedWeight:
        held, buffers = self._held, self._buffers
        if (
            held is None
            or held.data is not buffers[PACKED]
            or held.scale is not buffers[SCALE]
            or held.zero_point is not buffers[ZERO_POINT]
            or held.outliers is not buffers[OUTLIERS]
            or held.arranged is not buffers[_ARRANGED]
            or held.layout is not self.layout
        ):
            with guard:
                held = self._view()
                self._held, self._ready_for = held, None
        return held

    def _view(self) -> PackedWeight:
        oc, ic = self.shape
        data, scale = self.weight_packed, self.weight_scale
        beside = (self.weight_zero_point, self.layout, self.weight_outliers, self.weight_arranged)
        return PackedWeight(self.scheme, (oc, ic), data, scale, *beside)

    @property
    def stored_bits(self) -> float:
        """Bits that a checkpoint has for the weight, scales counted."""
        return self.scheme.bits_per_weight(self.shape[-1]) * math.prod(self.shape)

    @property
    def as_stored(self) -> bool:
        """Whether the buffers hold what is on disk."""
        return self.layout == STREAM

    def stored_weight(self) -> PackedWeight:
        """Return the weight as it is on disk, in the stored stream."""
        return self.packed_weight().to_layout(STREAM)

    @property
    def weight(self) -> torch.Tensor:
        """The decoded weight [OC, IC] in `dtype`, made anew on every access: for code that looks at weights."""
        return self.packed_weight().dequantize(self.dtype)

    def reset_parameters(self) -> None:
        """Refuse: a packed weight comes from a checkpoint or a plain layer.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(f"{type(self).__name__}: packed weights are not initialised: load or quantize them")

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter, as `nn.Module` does.

        Raises:
            UnsupportedError: it is named `weight`, which is decoded from packed codes.
        """
        refuse_weight(self, name)
        super().register_parameter(name, param)

    def prepare(self, dtype: torch.dtype) -> None:
        """Get ready for activations of `dtype` on the module's device: nothing to do for a weight in the stream."""

    def _set_weight(self, weight: PackedWeight) -> None:
        with guard:
            self.weight_packed = weight.data
            self.weight_scale = weight.scale
            self.weight_zero_point = weight.zero_point
            self.weight_outliers, self.weight_arranged = weight.outliers, weight.arranged
            self.layout = weight.layout
            self._ready_for = None

    def _apply(self: _Self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> _Self:
        before = {name: self._buffers[name] for name in (PACKED, SCALE, ZERO_POINT, OUTLIERS, _ARRANGED)}
        super()._apply(fn, recurse)
        uncast(self, before)
        self.dtype = dtype_after(fn, self.dtype)
        self._ready_for = None
        self.prepare(self.dtype)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.in_state_dict and not self.as_stored:
            stored = self.stored_weight()
            destination[prefix + PACKED], destination[prefix + SCALE] = stored.data, stored.scale
            if stored.zero_point is not None:
                destination[prefix + ZERO_POINT] = stored.zero_point
            if stored.outliers is not None:
                destination[prefix + OUTLIERS] = stored.outliers

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
        tensors = self.own_tensors()
        for name, form in tensors.items():
            given = state_dict.get(prefix + name)
            if given is not None and (given.dtype != form.dtype or tuple(given.shape) != form.shape):
                found = f"{given.dtype} {list(given.shape)}"
                wanted = f"{form.dtype} {list(form.shape)}"
                error_msgs.append(f"{prefix}{name} is {found}; {self.scheme.key()} stores {wanted}")
                return
        if not self.as_stored:
            self._set_empty()
        self._ready_for = None
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _set_empty(self) -> None:
        """Put uninitialised tensors of the stored shapes in the place of what the buffers hold."""
        for name, form in self.own_tensors().items():
            setattr(self, name, torch.empty(form.shape, dtype=form.dtype, device=self.weight_packed.device))
        self.weight_arranged, self.layout = None, STREAM

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ready_for": None, "_held": None}


class MultipliedModule(PackedModule):
    """Holds a packed weight that is multiplied with activations.

    Attributes:
        activations: what the weight is multiplied with; set by `multiply_with`.
    """

    activations: Activations = Activations.NATIVE

    def multiply_with(self, activations: Activations | str) -> None:
        """Choose what the weight is multiplied with from now on.

        Args:
            activations: `16bit`: as they come; `fp8`: quantised to e4m3 with a scale for each token (W6A8 and the
                like), `int8`: to int8 likewise, for integer weights (W8A8, W4A8), `int8:g128`: with a scale for
                each 128 channels of it; `8bit`: whichever `ops.activations_for` names. All take the 8-bit tensor
                cores of compute capability 9.0 and the reference elsewhere, where `8bit` is refused on a GPU; for how
                sums are added see docs/tiles.md.

        Raises:
            InputError: no such activations.
            UnsupportedError: weights of this scheme cannot be multiplied with 8-bit activations.
        """
        device = self.weight_packed.device
        chosen = ops.activations_for(activations, (self.scheme,), ops.kernel_chip(device))
        ops.preferred_layout(self.scheme, self.dtype, device, chosen)
        self.activations = chosen
        self._ready_for = None

    def prepare(self, dtype: torch.dtype) -> None:
        """Put the packed weight into the layout that serves activations of `dtype` on the module's device.

        Does nothing when it is there already, on the meta device, and while a CUDA graph is captured (every layout
        gives the right result; this one is fastest).
        """
        with guard:
            weight = self.packed_weight()
            device = weight.data.device
            if self._ready_for == dtype or device.type == "meta":
                return
            layout = ops.preferred_layout(self.scheme, dtype, device, self.activations)
            if layout != weight.layout:
                if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                    return
                self._set_weight(weight.to_layout(layout))
                self.packed_weight()  # what is held now is what is ready
            self._ready_for = dtype


def bits_per_weight(model: nn.Module) -> float | None:
    """Return the mean stored bits of a compressed weight, scales counted; None where none is compressed."""
    bits, weights = 0.0, 0
    for module in model.modules():
        if isinstance(module, PackedModule | Counted) and module.in_state_dict:
            bits += module.stored_bits
            weights += math.prod(module.shape)
    return bits / weights if weights else None
