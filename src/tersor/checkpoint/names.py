"""What does a checkpoint store of a weight? Names, shapes and dtypes of its tensors, said here and nowhere else.

A compressed weight `<stem>.weight` becomes several tensors `<stem>.<name>`. Which ones, its `Storage` says: today every
weight is dense, and another kind of stored weight is another `Storage` in `STORAGES`. The weights of all experts of a
layer that a model keeps as one tensor `<stem>`, with three axes, become the same tensors with one axis more in front.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from tersor.formats import SCALE_DTYPES, Encoded, Scheme
from tersor.formats.scheme import ROW_ELEMENTS
from tersor.layouts import stream

PACKED, SCALE, ZERO_POINT = "weight_packed", "weight_scale", "weight_zero_point"
"""Names of the tensors that stand for a dense weight, on disk and in a state dict."""

TORCH_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
"""safetensors dtype name -> torch dtype, where torch has one."""

_SAFETENSORS_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

MERGED: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Name of the one layer that servers make of layers that read the same activations -> those layers, in order."""


@dataclass(frozen=True, slots=True)
class TensorForm:
    """Shape and dtype of one of the tensors that stand for a weight."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def safetensors_dtype(self) -> str:
        """What a safetensors file calls the dtype, such as `I32`."""
        return _SAFETENSORS_DTYPES[self.dtype]


class Storage(ABC):
    """A way to store a compressed weight [OC, IC].

    Attributes:
        name: what it is called.
        marker: name of the tensor that every weight stored this way has, and none stored another way.
        names: names of all tensors that a weight stored this way may have, the marker first.
    """

    name: ClassVar[str]
    marker: ClassVar[str]
    names: ClassVar[tuple[str, ...]]

    @abstractmethod
    def names_of(self, scheme: Scheme) -> tuple[str, ...]:
        """Return the names of the tensors that every weight in a scheme has, the marker first."""

    @abstractmethod
    def marker_form(self, scheme: Scheme, oc: int, ic: int) -> TensorForm:
        """Return shape and dtype of the marker of a weight [oc, ic]."""

    @abstractmethod
    def tensors(self, scheme: Scheme, oc: int, ic: int) -> dict[str, TensorForm]:
        """Return shape and dtype of every tensor of a weight [oc, ic], the marker first.

        Raises:
            FormatError: the group size does not divide `ic`.
        """

    @abstractmethod
    def pack(self, encoded: Encoded) -> dict[str, torch.Tensor]:
        """Return the tensors of rows of a weight, on the device of their codes, the marker first."""

    @abstractmethod
    def largest_weight(self, scheme: Scheme, marker: tuple[int, ...]) -> tuple[int, int]:
        """Return (OC, IC) of the largest weight whose marker has that shape, (0, 0) where none has."""


class Dense(Storage):
    """Every weight has a code: the stored stream, scales and, for `uint` formats, zero points."""

    name = "dense"
    marker = PACKED
    names = (PACKED, SCALE, ZERO_POINT)

    def names_of(self, scheme: Scheme) -> tuple[str, ...]:
        return self.names if scheme.has_zero_point else (PACKED, SCALE)

    def marker_form(self, scheme: Scheme, oc: int, ic: int) -> TensorForm:
        return TensorForm((oc, stream.row_words(ic, scheme.format.bits)), torch.int32)

    def tensors(self, scheme: Scheme, oc: int, ic: int) -> dict[str, TensorForm]:
        groups = (oc, scheme.groups(ic))
        forms = {
            PACKED: self.marker_form(scheme, oc, ic),
            SCALE: TensorForm(groups, SCALE_DTYPES[scheme.scale_dtype]),
            ZERO_POINT: TensorForm(groups, torch.uint8),
        }
        return {name: forms[name] for name in self.names_of(scheme)}

    def pack(self, encoded: Encoded) -> dict[str, torch.Tensor]:
        tensors = {PACKED: stream.pack(encoded.codes, encoded.scheme.format.bits), SCALE: encoded.scale}
        if encoded.zero_point is not None:
            tensors[ZERO_POINT] = encoded.zero_point
        return tensors

    def largest_weight(self, scheme: Scheme, marker: tuple[int, ...]) -> tuple[int, int]:
        if len(marker) != 2:
            return 0, 0
        return marker[0], marker[1] // scheme.format.bits * ROW_ELEMENTS


DENSE = Dense()

STORAGES: tuple[Storage, ...] = (DENSE,)
"""Every kind of stored weight."""


def stored_tensors(scheme: Scheme, oc: int, ic: int, storage: Storage = DENSE) -> dict[str, TensorForm]:
    """Return name -> shape and dtype of the tensors that stand for a weight [oc, ic] on disk.

    Raises:
        FormatError: the group size does not divide `ic`.
    """
    return storage.tensors(scheme, oc, ic)


def stored_forms(scheme: Scheme, shape: tuple[int, ...], storage: Storage = DENSE) -> dict[str, TensorForm]:
    """Return name -> shape and dtype of the tensors that stand for a weight (OC, IC), or for those of experts.

    Args:
        scheme: element format and scales.
        shape: (OC, IC), or (E, OC, IC) of E experts in one tensor.
        storage: how the weight is stored.

    Raises:
        FormatError: the group size does not divide IC.
    """
    *experts, oc, ic = shape
    forms = stored_tensors(scheme, oc, ic, storage)
    return {name: TensorForm((*experts, *form.shape), form.dtype) for name, form in forms.items()}


def stored_weights(names: Iterable[str]) -> dict[str, Storage]:
    """Return stem -> storage of the compressed weights whose tensors have these names, in the order of the names."""
    storages = {f".{storage.marker}": storage for storage in STORAGES}
    found = {}
    for name in names:
        stem, dot, own = name.rpartition(".")
        if dot + own in storages:
            found[stem] = storages[dot + own]
    return found
