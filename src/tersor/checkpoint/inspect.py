"""What is in a checkpoint? Format, bits and bytes of every layer, without reading a weight, but for masks and zeros."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from tersor.checkpoint.config import MIXED_FORMAT, QUANT_METHOD, QuantizationConfig
from tersor.checkpoint.header import DTYPE_BITS
from tersor.checkpoint.mixed import check_stored, read_form
from tersor.checkpoint.modules import Architecture
from tersor.checkpoint.names import DENSE, PACKED, Storage, level_stem, stored_forms, stored_weights
from tersor.checkpoint.released import compression_of, read_released
from tersor.checkpoint.released.parts import DecodedTensor
from tersor.checkpoint.source import Source, StoredTensor, open_source
from tersor.checkpoint.zeros import dense_left
from tersor.errors import CheckpointError, InputError
from tersor.formats import Assignment, Pruned, Scheme

ReadArchitecture: TypeAlias = Callable[[Path], Architecture]


@dataclass(frozen=True, slots=True)
class Item:
    """A tensor, or a compressed weight with its scales.

    Attributes:
        name: the tensor's name; that of a compressed weight is what it was called before.
        shape: the tensor's shape; that of a compressed weight is (OC, IC).
        format: key of the scheme, behind `sparse:` where a weight is pruned, `mixed`, or the safetensors dtype; of a
            weight that another method compressed what that is called.
        bits_per_weight: bits stored for each element, scales counted.
        nbytes: bytes on disk.
        compressed: whether the item is a compressed weight.
        levels: of a mixed weight, key of the scheme of every level that it has, and output features at that level.
        density: which part of a pruned weight is left, of one that is stored dense where zeros are counted.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    bits_per_weight: float
    nbytes: int
    compressed: bool
    levels: tuple[tuple[str, int], ...] = ()
    density: float | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a checkpoint holds.

    Attributes:
        model: name of the checkpoint: a Hub id, or the directory's name.
        architecture: the class that config.json names, or an empty string.
        method: `quant_method` of the quantization_config, or `None`.
        provenance: what Tersor wrote about how the checkpoint was made.
        items: tensors and compressed weights, in the order of the bytes on disk.
        files: names of the safetensors files.
    """

    model: str
    architecture: str
    method: str | None
    provenance: Mapping[str, str]
    items: tuple[Item, ...]
    files: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(item.nbytes for item in self.items)

    @property
    def parameters(self) -> int:
        """Elements of all items."""
        return sum(item.numel for item in self.items)

    @property
    def bits_per_weight(self) -> float:
        """Mean bits stored for an element."""
        return 8 * self.nbytes / self.parameters if self.parameters else 0.0

    @property
    def compressed_bits_per_weight(self) -> float | None:
        """Mean bits stored for an element of the compressed weights, `None` where there are none."""
        elements = sum(item.numel for item in self.items if item.compressed)
        stored = sum(item.nbytes for item in self.items if item.compressed)
        return 8 * stored / elements if elements else None

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "model": self.model,
            "architecture": self.architecture,
            "quant_method": self.method,
            "provenance": dict(self.provenance),
            "parameters": self.parameters,
            "bytes": self.nbytes,
            "bits_per_weight": self.bits_per_weight,
            "compressed_bits_per_weight": self.compressed_bits_per_weight,
            "files": list(self.files),
            "tensors": [dataclasses.asdict(item) for item in self.items],
        }


def inspect(
    model: str | os.PathLike[str],
    read_architecture: ReadArchitecture,
    revision: str | None = None,
    *,
    zeros: bool = False,
) -> Inspection:
    """List what a checkpoint directory (or Hub id) holds.

    Args:
        model: a checkpoint directory, or a Hub id that is downloaded.
        read_architecture: builds the model of a directory's config.json and lists its layers; asked only where weights
            are packed.
        revision: branch, tag or commit of a Hub id.
        zeros: whether weights that are stored dense are read, too, to say which part of each is left.

    Raises:
        CheckpointError: not a whole checkpoint, or one whose tensors and quantization_config disagree.
        InputError: a quantization_config of a newer version, or one that is malformed.
    """
    with open_source(model, revision) as source:
        raw = compression_of(source)
        method = str(raw.get("quant_method")) if raw is not None else None
        config = QuantizationConfig.from_dict(raw) if method == QUANT_METHOD else None
        items: Iterator[Item] = (
            _packed_items(source, config, read_architecture(source.directory))
            if config is not None
            else _released_items(source)
        )
        if zeros:
            items = (_counted(source, item) if config is not None or not item.compressed else item for item in items)
        names = source.config.get("architectures")
        return Inspection(
            model=source.label,
            architecture=str(names[0]) if isinstance(names, list) and names else "",
            method=method,
            provenance=config.provenance if config is not None else {},
            items=tuple(items),
            files=tuple(file.path.name for file in source.files),
        )


def _counted(source: Source, item: Item) -> Item:
    """Return the same with its density, where nothing but its numbers tells that."""
    if item.density is not None or item.levels:
        return item
    scheme = Scheme.from_key(item.format) if item.compressed else None
    return dataclasses.replace(item, density=dense_left(source, item.name, item.shape, scheme))


def _plain(tensor: StoredTensor) -> Item:
    spec = tensor.spec
    return Item(spec.name, spec.shape, spec.dtype, DTYPE_BITS[spec.dtype], spec.nbytes, False)


def _decoded(tensor: DecodedTensor, method: str) -> Item:
    name, shape = tensor.spec.name, tensor.spec.shape
    return Item(name, shape, method, 8 * tensor.nbytes / max(1, math.prod(shape)), tensor.nbytes, True)


def _plain_items(source: Source) -> Iterator[Item]:
    return map(_plain, source.tensors.values())


def _released_items(source: Source) -> Iterator[Item]:
    """Return weights that another method compressed as what they stand for; of one not read, tensors as stored."""
    try:
        released = read_released(source)
    except InputError:
        released = None
    if released is None:
        return _plain_items(source)
    method = released.method
    return (
        _decoded(tensor, method) if isinstance(tensor, DecodedTensor) else _plain(tensor)
        for tensor in released.tensors.values()
    )


def _packed_items(source: Source, config: QuantizationConfig, architecture: Architecture) -> Iterator[Item]:
    weights = stored_weights(source.tensors)
    found = architecture.weights_of(weights)
    parts = {f"{stem}.{name}": stem for stem, storage in weights.items() for name in storage.names}
    for item in _plain_items(source):
        stem = parts.get(item.name)
        if stem is None:
            yield item
        elif item.name == f"{stem}.{weights[stem].marker}":
            name, target = found[stem]
            module = target.name.removesuffix(".weight")
            yield _compressed(source, name, stem, module, weights[stem], config, architecture)


def _compressed(
    source: Source,
    name: str,
    stem: str,
    module: str,
    storage: Storage,
    config: QuantizationConfig,
    architecture: Architecture,
) -> Item:
    represented = config.resolve(*architecture.names_of(module))
    if represented is None:
        raise CheckpointError(f"{source.directory}: {stem} is packed, and quantization_config says to ignore it")
    form = read_form(source.tensors, stem, storage, represented)
    if isinstance(form, Assignment):
        if module in architecture.embeddings:
            raise CheckpointError(f"{source.directory}: {stem} is mixed, and {module} is no linear layer")
        return _mixed(source, name, stem, module, form, architecture)
    if isinstance(form, Pruned):
        if module not in architecture.linears:
            raise CheckpointError(f"{source.directory}: {stem} is sparse, and {module} is no linear layer")
        return _sparse(source, name, stem, form, architecture.linears[module].shape[-1])
    return _dense(source, name, stem, module, form, architecture)


def _sparse(source: Source, name: str, stem: str, form: Pruned, ic: int) -> Item:
    shape = (form.rows, ic)
    check_stored(source.tensors, stem, form, shape)
    nbytes = form.nbytes(ic)
    return Item(name, shape, form.key(), form.bits_per_weight(ic), nbytes, True, density=form.density(ic))


def _mixed(source: Source, name: str, stem: str, module: str, form: Assignment, architecture: Architecture) -> Item:
    level = next(number for number, rows in enumerate(form.rows) if rows)
    marker = source.tensors[f"{stem}.{level_stem(level)}.{PACKED}"].spec.shape
    _, largest = DENSE.largest_weight(form.mix.levels[level], marker[-2:])
    shape = (*marker[:-2], len(form.level), _input_channels(architecture, module, largest))
    check_stored(source.tensors, stem, form, shape)
    nbytes = sum(source.tensors[f"{stem}.{own}"].spec.nbytes for own in stored_forms(form, shape))
    levels = tuple((scheme.key(), rows) for scheme, rows in zip(form.mix.levels, form.rows, strict=True) if rows)
    return Item(name, shape, MIXED_FORMAT, 8 * nbytes / math.prod(shape), nbytes, True, levels)


def _dense(source: Source, name: str, stem: str, module: str, scheme: Scheme, architecture: Architecture) -> Item:
    marker = source.tensors[f"{stem}.{DENSE.marker}"].spec
    names = [f"{stem}.{own}" for own in DENSE.names_of(scheme)]
    missing = [own for own in names if own not in source.tensors]
    if missing:
        raise CheckpointError(f"{source.directory}: {missing[0]} is missing beside {marker.name}")
    experts = marker.shape[:-2]
    oc, largest = DENSE.largest_weight(scheme, marker.shape[-2:])
    ic = _input_channels(architecture, module, largest)
    form = DENSE.marker_form(scheme, oc, ic)
    if marker.dtype != form.safetensors_dtype or marker.shape != (*experts, *form.shape) or len(experts) > 1:
        raise CheckpointError(
            f"{source.directory}: {marker.name} has dtype {marker.dtype} and shape {list(marker.shape)}, which is "
            f"not {scheme.key()} for {ic} input channels"
        )
    nbytes = sum(source.tensors[own].spec.nbytes for own in names)
    shape = (*experts, oc, ic)
    return Item(name, shape, scheme.key(), 8 * nbytes / max(1, math.prod(shape)), nbytes, True)


def _input_channels(architecture: Architecture, module: str, largest: int) -> int:
    """Return IC: what the architecture says, or the largest there may be (for experts, which it keeps fused)."""
    if module in architecture.linears:
        return architecture.linears[module].shape[1]
    if module in architecture.stacks:
        return architecture.stacks[module].shape[-1]
    if module in architecture.embeddings:
        return architecture.embeddings[module].shape[1]
    return largest
