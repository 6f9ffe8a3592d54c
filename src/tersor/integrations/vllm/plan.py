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
from tersor.checkpoint.modules import Architecture, Linear
from tersor.checkpoint.names import (
    DENSE,
    LEVEL,
    MASK,
    MIXED,
    OUTLIERS,
    PACKED,
    SCALE,
    SPARSE,
    VALUES,
    ZERO_POINT,
    Storage,
    level_stem,
    stored_weights,
)
from tersor.checkpoint.released import DecodedTensor, read_released
from tersor.checkpoint.source import Source
from tersor.errors import CheckpointError, UnsupportedError
from tersor.formats import SCALE_DTYPES, Mix, Scheme, Sparse
from tersor.integrations.transformers.architecture import read_architecture
from tersor.integrations.vllm.stacks import DOWN, GATE, HANDED_WHOLE, UP, WEIGHT, Stack, check_whole, stack_of

_WORDS = dict.fromkeys((PACKED, VALUES, OUTLIERS), torch.int32)
_DTYPES = {**_WORDS, ZERO_POINT: torch.uint8, MASK: torch.uint8, LEVEL: torch.uint8}
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.([^.]+)")
_DOWN = (DOWN, "w2")
_ROUTERS = ("gate", "router", "shared_expert_gate")


@dataclass(frozen=True, slots=True)
class Stored:
    """A weight of a checkpoint.

    Attributes:
        stem: what its tensors are called before their own names.
        represented: how it is multiplied; `None` is plain.
        names: of its tensors.
        channels: input channels; 0 where no header says how many.
    """

    stem: str
    represented: Represented | None
    names: frozenset[str] = frozenset({WEIGHT})
    channels: int = 0

    def of_expert(self, number: int) -> Stored:
        """Return one of the experts that `stem` stands for with a `*`."""
        return replace(self, stem=self.stem.replace(".*.", f".{number}."))

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
        stacks: the tensor's name in the checkpoint, but for what is said of it behind the last dot -> what it holds.
        architecture: name of the model's class.
        everywhere: of a model without weights (`--load-format dummy`), what every linear layer gets; else `None`.
        digest: names all of this, for vLLM's own cache of compiled graphs.
    """

    stored: Mapping[str, Stored]
    embeddings: frozenset[str] = frozenset()
    stacks: Mapping[str, Stack] = field(default_factory=dict)
    architecture: str = ""
    everywhere: QuantizationConfig | None = None
    digest: str = field(default="", compare=False)

    def renamed(self, rename: Callable[[str], str | None]) -> Plan:
        """Return the plan with other names: `rename` takes and gives that of a weight; `None` is not in the model."""

        def new(name: str) -> str | None:
            found = rename(f"{name}.{WEIGHT}")
            return None if found is None else found.removesuffix(f".{WEIGHT}")

        stacks = {
            stem: replace(stack, experts=new(stack.experts) or stack.experts) for stem, stack in self.stacks.items()
        }
        called: dict[str, str] = {}
        for name, one in self.stored.items():
            if self.architecture in HANDED_WHOLE and one.stem in stacks:  # which names of single experts mislead
                called[name] = stacks[one.stem].experts + name.removeprefix(self.stacks[one.stem].experts)
            elif (found := new(name)) is not None:
                called[name] = found
        stored = {found: self.stored[name] for name, found in called.items()}
        embeddings = frozenset(called[name] for name in self.embeddings if name in called)
        return replace(self, stored=stored, embeddings=embeddings, stacks=stacks)

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
        for names in (projections, (GATE, UP, DOWN)):
            first = [self.stored.get(f"{prefix}.0.{name}") for name in names]
            known = [replace(one, stem=f"{prefix}.*.{name}") for name, one in zip(names, first, strict=True) if one]
            if len(known) == len(projections):
                return dict(zip(projections, known, strict=True))
        return None

    def handed_whole(self, prefix: str) -> tuple[Stack, ...]:
        """Return the tensors of all experts that a layer is handed whole, gate and up first; of most models none."""
        if self.architecture not in HANDED_WHOLE:
            return ()
        found = [stack for stack in self.stacks.values() if stack.experts == prefix]
        return tuple(sorted(found, key=lambda stack: -len(stack.projections)))

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
    found, stacks = {}, {}
    for stem, module in architecture.modules_of(stems).items():
        represented = config.resolve(*architecture.names_of(module))
        if represented is None:
            raise CheckpointError(f"{source.directory}: {stem} is packed, and quantization_config says to ignore it")
        one, linear = _stored(stem, stems[stem], represented, source), architecture.linears.get(module)
        if linear is not None:
            one = replace(one, channels=linear.shape[-1])
        if module in architecture.stacks:
            stacks[stem] = stack_of(stem, represented, architecture.stacks[module], source.tensors)
        found[stem] = one
    words = sorted((name, tensor.spec.dtype, tensor.spec.shape) for name, tensor in source.tensors.items())
    return _planned(found, stacks, architecture, source, str(words))


def while_loading(source: Source, config: QuantizationConfig, *, trust_remote_code: bool = False) -> Plan:
    """Return the plan of a checkpoint whose weights are packed as they are loaded, as `tersor quantize` would.

    Args:
        source: plain, or with experts in MXFP4 as gpt-oss is released.
        config: what is asked for.
        trust_remote_code: whether code of the model may run.

    Raises:
        InputError: patterns that find nothing, group sizes that do not divide, a broken checkpoint.
        UnsupportedError: a weight that vLLM's layers cannot hold.
    """
    released = read_released(source)
    if released is not None:
        source.tensors = released.tensors
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
    found, stacks = {}, {}
    for step in conversion.steps:
        layer = step.layer
        if layer is None or not isinstance(step.scheme, Scheme):
            if isinstance(step.source, DecodedTensor):
                raise UnsupportedError(f"{step.source.spec.name} is compressed, and what is left alone has to be plain")
            continue
        found[layer.stem] = Stored(layer.stem, step.scheme, channels=layer.shape[-1])
        if layer.stacked:
            linear = Linear(layer.shape, layer.transposed, rows=layer.rows)
            parts = step.source.parts if isinstance(step.source, DecodedTensor) else ()
            stacks[layer.stem] = stack_of(
                layer.stem, step.scheme, linear, source.tensors, [part.spec.name for part in parts]
            )
    words = sorted((name, stored.represented.key()) for name, stored in found.items() if stored.represented)
    return _planned(found, stacks, architecture, source, str(words))


def without_weights(directory: Path, config: QuantizationConfig, *, trust_remote_code: bool = False) -> Plan:
    """Return the plan of a model whose weights are random.

    Args:
        directory: of its config.json.
        config: what is asked for.
        trust_remote_code: whether code of the model may run.

    Raises:
        UnsupportedError: experts in one tensor for all of a layer that vLLM's layers cannot hold.
    """
    architecture = read_architecture(directory, trust_remote_code=trust_remote_code)
    names, stacks = set(architecture.missing(())), {}
    for stem, linear in architecture.stacks.items():
        represented = config.resolve(*architecture.names_of(stem))
        if represented is not None:
            stacks[stem] = stack_of(stem, represented, linear, names)
    digest = _digest(str(config.to_dict()))
    return Plan({}, stacks=stacks, architecture=architecture.name, everywhere=config, digest=digest)


def has_weights(directory: Path) -> bool:
    """Whether a directory holds weights; a model of random ones is a config.json alone."""
    patterns = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth")
    return any(next(directory.glob(pattern), None) for pattern in patterns)


def _planned(
    found: dict[str, Stored], stacks: dict[str, Stack], architecture: Architecture, source: Source, words: str
) -> Plan:
    """Return a plan of weights by stem, those of stacks under the names of their first expert."""
    modules = architecture.modules_of(found)
    embeddings = frozenset(stem for stem, module in modules.items() if module in architecture.embeddings)
    plain = [name.removesuffix(f".{WEIGHT}") for name in source.tensors if name.endswith(f".{WEIGHT}")]
    _check_experts(found, [stem for stem in plain if stem not in found])
    for stem in sorted(embeddings):
        represented = found[stem].represented
        if not isinstance(represented, Scheme) or represented.outliers is not None:
            raise UnsupportedError(f"{stem}: the rows of an embedding have one scheme, and keep no outliers")
    check_whole(stacks)
    for stem, stack in stacks.items():
        one = found.pop(stem)
        found |= {f"{stack.experts}.0.{name}": replace(one, stem=stem) for name in stack.projections}
    return Plan(found, embeddings, stacks, architecture.name, digest=_digest(words))


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
    return Stored(stem, represented, names, _channels(stem, represented, names, source))


def _channels(stem: str, represented: Represented, names: frozenset[str], source: Source) -> int:
    """Return the input channels of a weight by its words, or its mask: as many as fill them."""
    if isinstance(represented, Sparse):
        return 8 * source.tensors[f"{stem}.{MASK}"].spec.shape[-1]
    scheme, name = represented, PACKED
    if isinstance(represented, Mix):
        name = min(one for one in names if one.endswith(f".{PACKED}"))
        scheme = represented.levels[int(name.split(".")[1])]
    assert isinstance(scheme, Scheme)
    return 32 * source.tensors[f"{stem}.{name}"].spec.shape[-1] // scheme.format.bits


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


def _check_experts(stored: Mapping[str, Stored], plain: Iterable[str]) -> None:
    """Hold that the experts of every layer are stored alike, not pruned and without outliers: they run as one.

    Args:
        stored: compressed weights by stem.
        plain: stems of those that are not.

    Raises:
        UnsupportedError: they are not, or have no gate.
    """
    kinds: dict[str, dict[str, Stored]] = {}
    for one in stored.values():
        found = _EXPERT.fullmatch(one.stem)
        if found is None:
            continue
        _check_expert(one, kinds.setdefault(found[1], {}).setdefault(found[3], one))
    for experts, projections in kinds.items():
        read = [one for name, one in sorted(projections.items()) if name not in _DOWN]
        if len(projections) != 3 or len(read) != 2:
            raise UnsupportedError(f"{experts}: packed experts have gate, up and down, and these {sorted(projections)}")
        if read[0].represented != read[1].represented:
            _check_expert(read[1], read[0])
    for stem in plain:
        found = _EXPERT.fullmatch(stem)
        if found is not None and found[1] in kinds:
            raise UnsupportedError(f"{stem} is plain beside packed experts, and vLLM runs those of a layer as one")


def _check_expert(one: Stored, first: Stored) -> None:
    if isinstance(one.represented, Sparse):
        raise UnsupportedError(f"{one.stem} is pruned, and the experts of a layer are dense or mixed")
    if isinstance(one.represented, Scheme) and one.represented.outliers is not None:
        raise UnsupportedError(f"{one.stem} keeps outliers, and the experts of a layer keep none")
    if first.represented != one.represented:
        raise UnsupportedError(
            f"{one.stem} is stored in another format than {first.stem}, and vLLM runs the experts of a layer as one"
        )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
