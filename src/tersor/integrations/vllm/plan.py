"""Which stored weight belongs to which layer of vLLM, and how is it represented? Made once, where vLLM starts.

vLLM calls layers by names of its own (`WeightsMapper`), and makes one layer of those that read the same activations
(`packed_modules_mapping`). A plan is a value: vLLM's main process makes it and hands it to every worker.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from tersor.checkpoint.config import QuantizationConfig, Represented
from tersor.checkpoint.conversion import make_conversion
from tersor.checkpoint.exports import get_export
from tersor.checkpoint.modules import Architecture
from tersor.checkpoint.names import (
    DENSE,
    LEVEL,
    MASK,
    MIXED,
    PACKED,
    SCALE,
    SPARSE,
    VALUES,
    ZERO_POINT,
    Storage,
    level_stem,
    stored_weights,
)
from tersor.checkpoint.source import Source
from tersor.errors import CheckpointError, UnsupportedError
from tersor.formats import SCALE_DTYPES, Mix, Scheme, Sparse
from tersor.integrations.transformers.architecture import read_architecture

WEIGHT = "weight"
"""Name of the tensor of a plain weight."""
_DTYPES = {PACKED: torch.int32, VALUES: torch.int32, ZERO_POINT: torch.uint8, MASK: torch.uint8, LEVEL: torch.uint8}
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.([^.]+)")
_ROUTERS = ("gate", "router", "shared_expert_gate")


@dataclass(frozen=True, slots=True)
class Stored:
    """A weight of a checkpoint.

    Attributes:
        stem: what its tensors are called before their own names.
        represented: how it is multiplied; `None` is plain.
        names: of its tensors.
    """

    stem: str
    represented: Represented | None
    names: frozenset[str] = frozenset({WEIGHT})

    def dtypes(self, plain: torch.dtype) -> dict[str, torch.dtype]:
        """Return name -> dtype of its tensors, that of a plain weight as vLLM would hold it."""
        found = {}
        for name in self.names:
            stem, _, last = name.rpartition(".")
            scheme = self.represented
            if isinstance(scheme, Mix) and stem:
                scheme = scheme.levels[int(stem.rpartition(".")[2])]
            scheme = scheme.scheme if isinstance(scheme, Sparse) else scheme
            if last == SCALE and isinstance(scheme, Scheme):
                found[name] = SCALE_DTYPES[scheme.scale_dtype]
            else:
                found[name] = plain if last == WEIGHT else _DTYPES[last]
        return found


@dataclass(frozen=True, slots=True)
class Plan:
    """How every weight of a model is stored.

    Attributes:
        stored: name of the layer -> its compressed weight, or one to compress; names are the checkpoint's, or vLLM's
            after `renamed`.
        embeddings: names of embeddings among them.
        everywhere: of a model without weights (`--load-format dummy`), what every linear layer gets; else `None`.
        digest: names all of this, for vLLM's own cache of compiled graphs.
    """

    stored: Mapping[str, Stored]
    embeddings: frozenset[str] = frozenset()
    everywhere: QuantizationConfig | None = None
    digest: str = field(default="", compare=False)

    def renamed(self, rename: Callable[[str], str | None]) -> Plan:
        """Return the plan with other names: `rename` takes and gives that of a weight; `None` is not in the model."""
        names = {name: rename(f"{name}.{WEIGHT}") for name in self.stored}
        called = {name: new.removesuffix(f".{WEIGHT}") for name, new in names.items() if new is not None}
        embeddings = frozenset(called[name] for name in self.embeddings if name in called)
        return replace(self, stored={new: self.stored[name] for name, new in called.items()}, embeddings=embeddings)

    def of_embedding(self, prefix: str) -> Stored | None:
        """Return the weight of an embedding; vLLM calls some of them by no name, which then is the only one."""
        if not prefix and len(self.embeddings) == 1:
            return self.stored[next(iter(self.embeddings))]
        return self.stored.get(prefix)

    def of_layer(self, prefix: str, merged: Mapping[str, Sequence[str]]) -> list[Stored] | None:
        """Return the weights of a layer, in order; `None` where none of them is compressed.

        Args:
            prefix: name of the layer.
            merged: last part of a name -> those of the layers that it is made of.
        """
        start, dot, last = prefix.rpartition(".")
        if prefix in self.stored:
            return [self.stored[prefix]]
        names = [f"{start}{dot}{name}" for name in merged.get(last, (last,))]
        if self.everywhere is not None:
            return self._random(names)
        found = [self.stored.get(name, Stored(name, None)) for name in names]
        return found if any(one.represented is not None for one in found) else None

    def of_experts(self, prefix: str, projections: Sequence[str]) -> dict[str, Stored] | None:
        """Return projection -> how those weights of all experts of a layer are stored; `None` where they are plain."""
        if self.everywhere is not None:
            found = self._random([f"{prefix}.0.{name}" for name in projections])
            return None if found is None else dict(zip(projections, found, strict=True))
        first = {name: self.stored.get(f"{prefix}.0.{name}") for name in projections}
        known = {name: stored for name, stored in first.items() if stored is not None}
        if known and len(known) < len(projections):
            raise UnsupportedError(f"{prefix}: some weights of its experts are plain: vLLM takes all or none packed")
        return {name: replace(stored, stem=f"{prefix}.*.{name}") for name, stored in known.items()} or None

    def _random(self, names: Sequence[str]) -> list[Stored] | None:
        assert self.everywhere is not None
        if names[0].rpartition(".")[2] in _ROUTERS:
            return None
        found = [Stored(name, self.everywhere.resolve(name)) for name in names]
        return found if any(one.represented is not None for one in found) else None


def of_checkpoint(source: Source, config: QuantizationConfig, *, trust_remote_code: bool = False) -> Plan:
    """Return the plan of a compressed checkpoint.

    Raises:
        CheckpointError: tensors that contradict quantization_config.
        UnsupportedError: a weight that vLLM's layers cannot hold.
    """
    architecture = read_architecture(source.directory, trust_remote_code=trust_remote_code)
    stems = stored_weights(source.tensors)
    if not stems:
        raise CheckpointError(f"{source.directory}: config.json says tersor, and no tensor is called *.{DENSE.marker}")
    found = {}
    for stem, module in architecture.modules_of(stems).items():
        represented = config.resolve(*architecture.names_of(module))
        if represented is None:
            raise CheckpointError(f"{source.directory}: {stem} is packed, and quantization_config says to ignore it")
        if module in architecture.stacks:
            raise UnsupportedError(
                f"{stem} is one tensor for all experts of a layer, which vLLM has loaders of its own for: run this "
                "model with tersor serve"
            )
        found[stem] = _stored(stem, stems[stem], represented, source)
    _check_experts(found.values())
    words = sorted((name, tensor.spec.dtype, tensor.spec.shape) for name, tensor in source.tensors.items())
    return Plan(found, _embeddings(found, architecture), digest=_digest(str(words)))


def while_loading(source: Source, config: QuantizationConfig, *, trust_remote_code: bool = False) -> Plan:
    """Return the plan of a plain checkpoint whose weights are packed as they are loaded, as `tersor quantize` would.

    Raises:
        InputError: patterns that find nothing, group sizes that do not divide, a broken checkpoint.
    """
    architecture = read_architecture(source.directory, trust_remote_code=trust_remote_code)
    conversion = make_conversion(
        source,
        architecture,
        scheme=config.scheme,
        ignore=config.ignore,
        overrides=config.overrides,
        export=get_export("tersor"),
        shard_bytes=1,
        provenance={},
    )
    found = {}
    for step in conversion.steps:
        if step.layer is None or not isinstance(step.scheme, Scheme):
            continue
        stem = step.layer.stem
        if len(step.source.spec.shape) != 2:
            raise UnsupportedError(
                f"{stem} is one tensor for all experts of a layer, which are not packed while vLLM loads them: name "
                "them in ignore, or run this model with tersor serve"
            )
        found[stem] = Stored(stem, step.scheme)
    _check_experts(found.values())
    words = sorted((name, stored.represented.key()) for name, stored in found.items() if stored.represented)
    return Plan(found, _embeddings(found, architecture), digest=_digest(str(words)))


def without_weights(config: QuantizationConfig) -> Plan:
    """Return the plan of a model whose weights are random."""
    return Plan({}, everywhere=config, digest=_digest(str(config.to_dict())))


def has_weights(directory: Path) -> bool:
    """Whether a directory holds weights; a model of random ones is a config.json alone."""
    patterns = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth")
    return any(next(directory.glob(pattern), None) for pattern in patterns)


def _stored(stem: str, storage: Storage, represented: Represented, source: Source) -> Stored:
    """Return a compressed weight, its names held against its representation."""
    if isinstance(represented, Sparse):
        fits = storage is SPARSE or (storage is DENSE and represented.scheme is not None)
        if storage is DENSE and represented.scheme is not None:  # which took fewer bytes
            represented = represented.scheme
    else:
        fits = storage is (MIXED if isinstance(represented, Mix) else DENSE)
    if not fits:
        stored = f"tensor {stem}.{storage.marker} is of a {storage.name} weight"
        raise CheckpointError(f"{stored}, and quantization_config says {represented.key()}")
    names = frozenset(name for name in storage.names if f"{stem}.{name}" in source.tensors)
    lacking = [name for name in _needed(represented, names) if name not in names]
    if lacking:
        raise CheckpointError(f"tensor {stem}.{lacking[0]} is missing beside {stem}.{storage.marker}")
    return Stored(stem, represented, names)


def _needed(represented: Represented, names: frozenset[str]) -> list[str]:
    """Return the names of tensors that a weight has to have beside those that it has."""
    if isinstance(represented, Scheme):
        return list(DENSE.names_of(represented))
    if isinstance(represented, Sparse):
        scales = () if represented.scheme is None else DENSE.names_of(represented.scheme)[1:]
        return [*SPARSE.names[:2], *scales]
    present = {level for level in range(len(represented.levels)) if f"{level_stem(level)}.{DENSE.marker}" in names}
    return [
        f"{level_stem(level)}.{name}" for level in sorted(present) for name in DENSE.names_of(represented.levels[level])
    ]


def _check_experts(stored: Iterable[Stored]) -> None:
    """Hold that the experts of every layer are stored alike, and not pruned: they run as one.

    Raises:
        UnsupportedError: they are not.
    """
    kinds: dict[tuple[str, str], tuple[Represented | None, str]] = {}
    for one in stored:
        found = _EXPERT.fullmatch(one.stem)
        if found is None:
            continue
        if isinstance(one.represented, Sparse):
            raise UnsupportedError(f"{one.stem} is pruned, and the experts of a layer are dense or mixed")
        first = kinds.setdefault((found[1], found[3]), (one.represented, one.stem))
        if first[0] != one.represented:
            raise UnsupportedError(
                f"{one.stem} is stored in another format than {first[1]}, and vLLM runs the experts of a layer as one"
            )


def _embeddings(stems: Iterable[str], architecture: Architecture) -> frozenset[str]:
    modules = architecture.modules_of(stems)
    return frozenset(stem for stem, module in modules.items() if module in architecture.embeddings)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
