"""What does a checkpoint store of a weight? Names, shapes and dtypes of its tensors, said here and nowhere else.

A compressed weight `<stem>.weight` becomes several tensors `<stem>.<name>`. Which ones, its `Storage` says. Of a mixed
weight the rows of each level are a dense weight of their own, whose stem is `<stem>.levels.<level>`. A pruned weight
has a mask, and the values of what is left. The weights of all experts of a layer that a model keeps as one tensor
`<stem>`, with three axes, become the tensors of one weight with one axis more in front, but for the levels, which all
experts share.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch

from tersor.formats import MOST_LEVELS, SCALE_DTYPES, Assignment, Encoded, Pruned, Scheme, mask_bytes
from tersor.formats.scheme import ROW_ELEMENTS
from tersor.layouts import SparseWeight, stream

PACKED, SCALE, ZERO_POINT = "weight_packed", "weight_scale", "weight_zero_point"
"""Names of the tensors that stand for a dense weight, on disk and in a state dict."""

OUTLIERS = "weight_outliers"
"""Name of the tensor beside them that holds the weights which are kept as they are, where a scheme has outliers."""

LEVEL, LEVELS = "weight_level", "levels"
"""Name of the tensor that says the level of every output feature of a mixed weight, and of what holds its levels."""

MASK, VALUES = "weight_mask", "weight_values"
"""Names of the tensors that say which weights of a pruned one are left, and of their numbers."""

Form: TypeAlias = Scheme | Assignment | Pruned
"""What decides which tensors a weight has: its scheme, the levels of its output features, or what is left of its rows.
"""

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

SAFETENSORS_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
"""torch dtype -> its safetensors name."""

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
        return SAFETENSORS_DTYPES[self.dtype]


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
    def tensors(self, form: Any, oc: int, ic: int) -> dict[str, TensorForm]:
        """Return shape and dtype of every tensor of a weight [oc, ic], the marker first.

        Args:
            form: of the weight, of the kind that is stored so.
            oc, ic: its shape.

        Raises:
            FormatError: a group size does not divide `ic`.
            ShapeError: another number of output features has levels.
        """


class Dense(Storage):
    """Every weight has a code: the stored stream, scales, for `uint` formats zero points, and outliers where kept."""

    name = "dense"
    marker = PACKED
    names = (PACKED, SCALE, ZERO_POINT, OUTLIERS)

    def names_of(self, scheme: Scheme) -> tuple[str, ...]:
        """Return the names of the tensors that every weight in a scheme has, the marker first."""
        has = {ZERO_POINT: scheme.has_zero_point, OUTLIERS: scheme.outliers is not None}
        return tuple(name for name in self.names if has.get(name, True))

    def marker_form(self, scheme: Scheme, oc: int, ic: int) -> TensorForm:
        """Return shape and dtype of the marker of a weight [oc, ic]."""
        return TensorForm((oc, stream.row_words(ic, scheme.format.bits)), torch.int32)

    def tensors(self, form: Scheme, oc: int, ic: int) -> dict[str, TensorForm]:
        groups = (oc, form.groups(ic))
        forms = {
            PACKED: self.marker_form(form, oc, ic),
            SCALE: TensorForm(groups, SCALE_DTYPES[form.scale_dtype]),
            ZERO_POINT: TensorForm(groups, torch.uint8),
        }
        if form.outliers is not None:
            forms[OUTLIERS] = TensorForm((oc, form.outliers.per_row(ic)), torch.int32)
        return {name: forms[name] for name in self.names_of(form)}

    def pack(self, encoded: Encoded) -> dict[str, torch.Tensor]:
        """Return the tensors of rows of a weight, on the device of their codes, the marker first."""
        tensors = {PACKED: stream.pack(encoded.codes, encoded.scheme.format.bits), SCALE: encoded.scale}
        if encoded.zero_point is not None:
            tensors[ZERO_POINT] = encoded.zero_point
        if encoded.outliers is not None:
            tensors[OUTLIERS] = encoded.outliers
        return tensors

    def largest_weight(self, scheme: Scheme, marker: tuple[int, ...]) -> tuple[int, int]:
        """Return (OC, IC) of the largest weight whose marker has that shape, (0, 0) where none has."""
        if len(marker) != 2:
            return 0, 0
        return marker[0], marker[1] // scheme.format.bits * ROW_ELEMENTS


DENSE = Dense()


class Mixed(Storage):
    """A byte for every output feature says its level; the rows of each level are a dense weight, in their order."""

    name = "mixed"
    marker = LEVEL
    names = (LEVEL, *(f"{LEVELS}.{level}.{name}" for level in range(MOST_LEVELS) for name in Dense.names[:3]))

    def tensors(self, form: Assignment, oc: int, ic: int) -> dict[str, TensorForm]:
        form.check(oc)
        forms = {LEVEL: TensorForm((oc,), torch.uint8)}
        for level, (scheme, rows) in enumerate(zip(form.mix.levels, form.rows, strict=True)):
            if rows:
                dense = DENSE.tensors(scheme, rows, ic)
                forms |= {f"{level_stem(level)}.{name}": tensor for name, tensor in dense.items()}
        return forms

    def rows(self, stem: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[int, int]:
        """Return level -> its rows, of the levels that a weight has.

        Args:
            stem: of the weight.
            shapes: of all tensors of a checkpoint, by name.
        """
        markers = {level: f"{stem}.{level_stem(level)}.{PACKED}" for level in range(MOST_LEVELS)}
        return {level: shapes[name][-2] for level, name in markers.items() if len(shapes.get(name, ())) > 1}


MIXED = Mixed()


class SparseStorage(Storage):
    """A mask, the values of the weights left, row after row, and scales where values are codes."""

    name = "sparse"
    marker = MASK
    names = (MASK, VALUES, SCALE, ZERO_POINT)

    def tensors(self, form: Pruned, oc: int, ic: int) -> dict[str, TensorForm]:
        form.check(oc)
        forms = {
            MASK: TensorForm((oc, mask_bytes(ic)), torch.uint8),
            VALUES: TensorForm((form.words,), torch.int32),
        }
        scheme = form.sparse.scheme
        if scheme is None:
            return forms
        dense = DENSE.tensors(scheme, oc, ic)
        return forms | {name: dense[name] for name in (SCALE, ZERO_POINT) if name in dense}

    def pack(self, weight: SparseWeight) -> dict[str, torch.Tensor]:
        """Return the tensors of a weight, or of rows of one, the marker first."""
        tensors = {MASK: weight.mask, VALUES: weight.values, SCALE: weight.scale, ZERO_POINT: weight.zero_point}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}


SPARSE = SparseStorage()

STORAGES: tuple[Storage, ...] = (DENSE, MIXED, SPARSE)
"""Every kind of stored weight."""


def level_stem(level: int) -> str:
    """Return the stem of the rows of a level, behind that of their weight."""
    return f"{LEVELS}.{level}"


def stored_tensors(form: Form, oc: int, ic: int) -> dict[str, TensorForm]:
    """Return name -> shape and dtype of the tensors that stand for a weight [oc, ic] on disk.

    Raises:
        FormatError: a group size does not divide `ic`.
        ShapeError: another number of output features has levels, or counts.
    """
    if isinstance(form, Pruned):
        return SPARSE.tensors(form, oc, ic)
    return MIXED.tensors(form, oc, ic) if isinstance(form, Assignment) else DENSE.tensors(form, oc, ic)


def stored_forms(form: Form, shape: tuple[int, ...]) -> dict[str, TensorForm]:
    """Return name -> shape and dtype of the tensors that stand for a weight (OC, IC), or for those of experts.

    Args:
        form: of the weight.
        shape: (OC, IC), or (E, OC, IC) of E experts in one tensor.

    Raises:
        FormatError, ShapeError: as for `stored_tensors`.
    """
    *experts, oc, ic = shape
    tensors = stored_tensors(form, oc, ic)
    return {
        name: tensor if name == LEVEL else TensorForm((*experts, *tensor.shape), tensor.dtype)
        for name, tensor in tensors.items()
    }


def stored_weights(names: Iterable[str]) -> dict[str, Storage]:
    """Return stem -> storage of the compressed weights whose tensors have these names, in the order of the names.

    The rows of a level are a part of a mixed weight, and no weight of their own.
    """
    storages = {f".{storage.marker}": storage for storage in STORAGES}
    found: dict[str, Storage] = {}
    for name in names:
        stem, dot, own = name.rpartition(".")
        if dot + own in storages:
            found[stem] = storages[dot + own]
    mixed = {stem for stem, storage in found.items() if storage is MIXED}
    level = re.compile(rf"\.{LEVELS}\.\d+$")
    return {stem: storage for stem, storage in found.items() if level.sub("", stem) not in mixed or stem in mixed}
