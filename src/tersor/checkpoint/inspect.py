"""What is in a checkpoint? Format, bits and bytes of every layer, without reading a weight."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from tersor.checkpoint.config import QUANT_METHOD, QuantizationConfig
from tersor.checkpoint.header import DTYPE_BITS
from tersor.checkpoint.modules import Architecture
from tersor.checkpoint.source import Source, open_source, quantization_of
from tersor.errors import CheckpointError
from tersor.formats import Scheme
from tersor.layouts import stream

_PACKED, _SCALE, _ZERO_POINT = ".weight_packed", ".weight_scale", ".weight_zero_point"
_ROW_ELEMENTS = 32

ReadArchitecture: TypeAlias = Callable[[Path], Architecture]


@dataclass(frozen=True, slots=True)
class Item:
    """A tensor, or a compressed weight with its scales.

    Attributes:
        name: of the tensor; of a compressed weight what it was called before.
        shape: of the tensor; of a compressed weight (OC, IC).
        format: key of the scheme, or the safetensors dtype.
        bits_per_weight: bits stored for each element, scales counted.
        nbytes: bytes on disk.
        compressed: whether it is a compressed weight.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    bits_per_weight: float
    nbytes: int
    compressed: bool

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a checkpoint holds.

    Attributes:
        model: its name.
        architecture: the class config.json names, or an empty string.
        method: `quant_method` of its quantization_config, or `None`.
        provenance: what Tersor wrote about how it was made.
        items: in the order of the bytes on disk.
        files: names of its safetensors files.
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


def inspect(model: str | os.PathLike[str], read_architecture: ReadArchitecture) -> Inspection:
    """List what a checkpoint directory (or Hub id) holds.

    Args:
        model: a checkpoint directory, or a Hub id that is downloaded.
        read_architecture: builds the model of a directory's config.json and lists its layers; asked only where weights
            are packed.

    Raises:
        CheckpointError: not a whole checkpoint, or one whose tensors and quantization_config disagree.
        InputError: a quantization_config of a newer version, or one that is malformed.
    """
    with open_source(model) as source:
        raw = quantization_of(source.config)
        method = str(raw.get("quant_method")) if raw is not None else None
        config = QuantizationConfig.from_dict(raw) if method == QUANT_METHOD else None
        items = (
            _packed_items(source, config, read_architecture(source.directory))
            if config is not None
            else _plain_items(source)
        )
        names = source.config.get("architectures")
        return Inspection(
            model=source.label,
            architecture=str(names[0]) if isinstance(names, list) and names else "",
            method=method,
            provenance=config.provenance if config is not None else {},
            items=tuple(items),
            files=tuple(file.path.name for file in source.files),
        )


def _plain_items(source: Source) -> Iterator[Item]:
    for tensor in source.tensors.values():
        spec = tensor.spec
        yield Item(spec.name, spec.shape, spec.dtype, DTYPE_BITS[spec.dtype], spec.nbytes, False)


def _packed_items(source: Source, config: QuantizationConfig, architecture: Architecture) -> Iterator[Item]:
    stems = [name.removesuffix(_PACKED) for name in source.tensors if name.endswith(_PACKED)]
    companions = {stem + suffix for stem in stems for suffix in (_SCALE, _ZERO_POINT)}
    for item in _plain_items(source):
        if item.name.endswith(_PACKED):
            yield _compressed(source, item.name.removesuffix(_PACKED), config, architecture)
        elif item.name not in companions:
            yield item


def _compressed(source: Source, stem: str, config: QuantizationConfig, architecture: Architecture) -> Item:
    module = architecture.module_of(stem)
    scheme = config.resolve(module)
    if scheme is None:
        raise CheckpointError(f"{source.directory}: {stem} is packed, and quantization_config says to ignore it")
    suffixes = (_PACKED, _SCALE, _ZERO_POINT) if scheme.has_zero_point else (_PACKED, _SCALE)
    missing = [stem + suffix for suffix in suffixes if stem + suffix not in source.tensors]
    if missing:
        raise CheckpointError(f"{source.directory}: {missing[0]} is missing beside {stem}{_PACKED}")
    packed = source.tensors[stem + _PACKED].spec
    oc, words = packed.shape if len(packed.shape) == 2 else (0, 0)
    ic = _input_channels(architecture, module, words, scheme)
    if packed.dtype != "I32" or words != stream.row_words(ic, scheme.format.bits):
        raise CheckpointError(
            f"{source.directory}: {packed.name} has dtype {packed.dtype} and shape {list(packed.shape)}, which is "
            f"not {scheme.key()} for {ic} input channels"
        )
    nbytes = sum(source.tensors[stem + suffix].spec.nbytes for suffix in suffixes)
    return Item(f"{stem}.weight", (oc, ic), scheme.key(), 8 * nbytes / max(1, oc * ic), nbytes, True)


def _input_channels(architecture: Architecture, module: str, words: int, scheme: Scheme) -> int:
    """Return IC: what the architecture says, or all that fit in a row (for experts, which it keeps fused)."""
    if module in architecture.linears:
        return architecture.linears[module][0][1]
    if module in architecture.embeddings:
        return architecture.embeddings[module][0][1]
    return words // scheme.format.bits * _ROW_ELEMENTS
