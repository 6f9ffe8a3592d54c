"""What becomes of every tensor? Decided before the first weight is read: scheme, names, shapes, files."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tersor.checkpoint.config import Override, QuantizationConfig, Represented, finds
from tersor.checkpoint.exports import Export, Stored
from tersor.checkpoint.header import WEIGHT_DTYPES, TensorSpec
from tersor.checkpoint.modules import Architecture, LinearLayer, Skipped, Target
from tersor.checkpoint.names import Form
from tersor.checkpoint.pruned import (
    NEVER_SPARSE,
    NOT_PRUNED,
    FindPruned,
    check_keeps,
    left_of,
    narrowed,
    never_sparse,
)
from tersor.checkpoint.source import Source, StoredTensor
from tersor.checkpoint.writer import shard_names, split_into_shards
from tersor.errors import CheckpointError, FormatError, InputError
from tersor.formats import Assignment, Mix, Pruned, Scheme, Sparse

_GROUP_MULTIPLE = 8


@dataclass(frozen=True, slots=True)
class Step:
    """One tensor of the source and what is written for it.

    Attributes:
        source: the tensor and the file it is read from.
        layer: the linear layer, or the embedding asked for, whose weight the tensor is, or `None`.
        scheme: the scheme, the levels of output features, or what is left of rows, that the weight is compressed to, or
            `None`: the tensor is copied byte by byte.
        stored: the tensors that a compressed weight becomes.
        note: why the tensor is copied, where that is worth a word.
        linear: whether the tensor is the weight of a linear layer, or of several.
    """

    source: StoredTensor
    layer: LinearLayer | None
    scheme: Form | None
    stored: Stored | None
    note: str = ""
    linear: bool = False

    @property
    def one_scheme(self) -> Scheme | None:
        """The scheme of all output features, `None` where the tensor is copied."""
        assert not isinstance(self.scheme, Assignment | Pruned), "these are asked for by what is said of each weight"
        return self.scheme

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The tensors that are written for the source's."""
        return self.stored.specs if self.stored else (self.source.spec,)

    @property
    def output_bytes(self) -> int:
        """Bytes of the tensors that are written."""
        return sum(spec.nbytes for spec in self.outputs)


@dataclass(frozen=True, slots=True)
class Conversion:
    """Everything that will be written.

    Attributes:
        config: which module is stored how, as a loader will read it.
        steps: one step for each tensor of the source, in the order of the bytes on disk.
        shards: for each output file its name and the indices of its steps.
        head: module name of the output head, or an empty string.
    """

    config: QuantizationConfig
    steps: tuple[Step, ...]
    shards: tuple[tuple[str, tuple[int, ...]], ...]
    head: str

    @property
    def layers(self) -> list[tuple[LinearLayer, Scheme | None]]:
        """Every linear layer but mixed and pruned ones, and every embedding asked for, with its scheme."""
        return [
            (step.layer, step.scheme)
            for step in self.steps
            if step.layer is not None and not isinstance(step.scheme, Assignment | Pruned)
        ]

    @property
    def input_bytes(self) -> int:
        """Bytes of the source's tensors, those that are stored compressed as what they are decoded to."""
        return sum(step.source.spec.nbytes for step in self.steps)

    @property
    def output_bytes(self) -> int:
        """Bytes of tensors that will be written."""
        return sum(step.output_bytes for step in self.steps)


def make_conversion(
    source: Source,
    architecture: Architecture,
    *,
    scheme: Represented,
    ignore: Sequence[str],
    overrides: Sequence[Override],
    export: Export,
    shard_bytes: int,
    provenance: dict[str, str],
    assignments: Mapping[str, Assignment] | None = None,
    find_pruned: FindPruned | None = None,
) -> Conversion:
    """Decide what becomes of every tensor of a checkpoint.

    Args:
        source, architecture: the checkpoint, and what its config.json builds.
        scheme: of every linear layer that nothing else is said of, or the mix of their output features.
        ignore, overrides: patterns of layers to leave alone, and of layers with schemes of their own.
        export: the format of the output.
        shard_bytes: bytes of tensors in a file.
        provenance: what config.json says of how the checkpoint was made.
        assignments: module -> the levels of its output features, where `scheme` is a mix.
        find_pruned: asked of every linear layer, but experts, whose scheme may be sparse.

    Raises:
        CheckpointError: the checkpoint lacks tensors that the model needs, or has them in another shape.
        InputError: a pattern that finds nothing, a group size that does not divide, a scheme the export cannot say,
            or nothing to compress.
    """
    _check_complete(source, architecture)
    targets: dict[str, Target] = {}
    pairs = []
    for tensor, target in _taken_apart(source, architecture, ignore, overrides):
        targets[tensor.spec.name] = target
        pairs.append((tensor, architecture.layer_of(tensor.spec, target, str(tensor.file.path))))
    _check_patterns(architecture, [layer for _, layer in pairs if layer is not None], ignore, overrides)
    pairs = [
        (tensor, None if layer is not None and layer.embedding and not _asked(layer, overrides) else layer)
        for tensor, layer in pairs
    ]
    layers = [layer for _, layer in pairs if layer is not None]
    skipped = {layer.module for layer in layers if layer.obstacle or (layer.skipped and not _asked(layer, overrides))}
    config = QuantizationConfig(
        scheme, tuple(overrides), (*ignore, *_skipped_patterns(architecture, layers, skipped)), provenance
    )
    shared = math.gcd(*(layer.shape[-1] for layer in layers if layer.module not in skipped and not layer.embedding))
    steps = []
    for tensor, layer in pairs:
        chosen = config.resolve(*layer.names) if layer is not None else None
        target = targets[tensor.spec.name]
        linear = architecture.is_linear(tensor.spec, layer, target)
        if layer is None or chosen is None:
            note = _note(layer, skipped, ignore) if layer is not None else architecture.describe(tensor.spec, target)
            steps.append(Step(tensor, layer, None, None, note, linear))
            continue
        if layer.embedding:
            _check_embedding(tensor, layer, architecture)
        form: Form | None
        if isinstance(chosen, Sparse):
            if chosen.scheme is not None:
                _check_weight(tensor, layer, chosen.scheme, shared)
            form = left_of(tensor, layer, chosen, find_pruned)
            if form is None:
                note = NEVER_SPARSE if never_sparse(layer) else NOT_PRUNED
                steps.append(Step(tensor, layer, None, None, note, linear))
                continue
        else:
            if isinstance(chosen, Scheme):
                check_keeps(layer, chosen, export.name)
            form = _assigned(layer, chosen, assignments or {}) if isinstance(chosen, Mix) else chosen
            for level in form.mix.levels if isinstance(form, Assignment) else (form,):
                _check_weight(tensor, layer, level, shared)
        export.check_layer(layer)
        stored = _stored(export, layer, form)
        _check_names(stored.specs, source, tensor)
        steps.append(Step(tensor, layer, form, stored, linear=linear))
    _check_experts(steps)
    if not any(step.scheme for step in steps):
        reasons = Counter(step.note for step in steps if step.linear)
        why = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common()) or "the model has none"
        raise InputError(f"{source.directory}: no linear layer is left to compress ({why})")
    shards = split_into_shards([step.outputs for step in steps], shard_bytes)
    named = zip(shard_names(len(shards)), (tuple(indices) for indices in shards), strict=True)
    used = {config.resolve(*step.layer.names) for step in steps if step.layer and isinstance(step.scheme, Pruned)}
    conversion = Conversion(narrowed(config, used), tuple(steps), tuple(named), architecture.head)
    export.check_model(architecture, conversion.layers)
    return conversion


def _stored(export: Export, layer: LinearLayer, form: Form) -> Stored:
    if isinstance(form, Pruned):
        return export.store_sparse(layer, form)
    return export.store_mixed(layer, form) if isinstance(form, Assignment) else export.store(layer, form)


def _check_complete(source: Source, architecture: Architecture) -> None:
    missing = architecture.missing(source.tensors)
    if missing:
        shown = ", ".join(repr(name) for name in missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise CheckpointError(
            f"{source.directory} lacks {len(missing)} tensor{'s' * (len(missing) > 1)} that {architecture.name} needs "
            f"({shown}): the files are not complete, or config.json describes another model"
        )


def _taken_apart(
    source: Source, architecture: Architecture, ignore: Sequence[str], overrides: Sequence[Override]
) -> list[tuple[StoredTensor, Target]]:
    """Return the tensors of a checkpoint and where each goes, in parts where they become several layers' weights."""
    targets = architecture.find(source.tensors)
    found = []
    for name, tensor in source.tensors.items():
        parts, first = [], 0
        for part, rows in architecture.parts_of(tensor.spec, targets[name]):
            parts.append((tensor.part(part, first, rows), Target(part, part)))
            first += rows
        layers = [architecture.layer_of(part.spec, target, "") for part, target in parts]
        wanted = [
            layer is not None
            and not any(re.search(pattern, layer.module) for pattern in ignore)
            and (not layer.skipped or _asked(layer, overrides))
            for layer in layers
        ]
        found += parts if any(wanted) else [(tensor, targets[name])]
    return found


def _asked(layer: LinearLayer, overrides: Iterable[Override]) -> bool:
    """Tell whether an override names a layer that is otherwise left alone: spells the word for it."""
    return any(layer.word in override.pattern and finds(override.pattern, layer.names) for override in overrides)


def _check_patterns(
    architecture: Architecture,
    layers: Sequence[LinearLayer],
    ignore: Sequence[str],
    overrides: Sequence[Override],
) -> None:
    names = [*architecture.modules, *(layer.module for layer in layers)]
    example = next((layer.module for layer in layers if not layer.embedding), "model.layers.0.mlp.up_proj")
    for pattern in ignore:
        if not any(re.search(pattern, name) for name in names):
            raise InputError(f"ignore {pattern!r} matches no module (they are called like {example!r})")
    for override in overrides:
        pattern = override.pattern
        meant = [layer for layer in layers if finds(pattern, layer.names)]
        if any(not layer.obstacle and (not layer.skipped or _asked(layer, [override])) for layer in meant):
            continue
        embeddings = sorted(name for name in architecture.embeddings if re.search(pattern, name))
        if meant and meant[0].obstacle:
            why = f"finds only {meant[0].module}, which cannot be compressed: {meant[0].obstacle}"
        elif meant:
            name, word = meant[0].module, meant[0].word
            why = f"finds only {name} ({_reason(meant[0])}), left alone unless the pattern says {word!r}"
        elif architecture.head and re.search(pattern, architecture.head):
            why = f"finds only {architecture.head}, which has no weight of its own here: it is the embedding's"
        elif embeddings:
            why = f"finds only {embeddings[0]}, which has no weight of its own in the checkpoint"
        else:
            why = f"matches no linear layer (they are called like {example!r})"
        raise InputError(f"override {pattern!r} {why}")


def _skipped_patterns(architecture: Architecture, layers: Sequence[LinearLayer], skipped: set[str]) -> list[str]:
    """Return the patterns that keep a loader from packing the layers left alone here.

    A short pattern (`lm_head`, `\\.gate$`, `^model\\.vision_tower\\.`) where it finds nothing that is compressed, else
    the exact names.
    """
    stored = {layer.module for layer in layers}
    absent = {name for name in architecture.linears if name not in stored and architecture.skipped(name)}
    compressed = [layer.module for layer in layers if layer.module not in skipped]
    members: dict[str, list[str]] = {}
    for name in sorted(skipped | absent):
        members.setdefault(_short_pattern(architecture, name), []).append(name)
    patterns = []
    for short, names in sorted(members.items()):
        everywhere = all(re.search(short, name) for name in names)
        if not everywhere or any(re.search(short, name) for name in compressed):
            patterns += [rf"(^|\.){re.escape(name)}$" for name in names]
        else:
            patterns.append(short)
    return patterns


def _short_pattern(architecture: Architecture, module: str) -> str:
    """Return a pattern for layers that are left alone for the reason for which one is."""
    linear = architecture.linears.get(module) or architecture.stacks.get(module)
    leaf = re.escape(module.rpartition(".")[2])
    if module == architecture.head and "." not in module:
        return leaf
    if linear is not None and linear.tower:
        return rf"^{re.escape(linear.tower)}(\.|$)"
    inside = r"\.experts\.\d+" if re.search(r"\.experts\.\d+\.", module) else ""
    return rf"{inside}\.{leaf}$" if "." in module else rf"^{leaf}$"


def _note(layer: LinearLayer, skipped: set[str], ignore: Sequence[str]) -> str:
    if layer.module in skipped:
        return _reason(layer)
    return f"ignored by {next(pattern for pattern in ignore if finds(pattern, layer.names))!r}"


def _reason(layer: LinearLayer) -> str:
    """Return why a layer is left alone unless it is asked for, in words, or an empty string."""
    if layer.obstacle and layer.skipped is not Skipped.TOWER:
        return layer.obstacle
    return "" if layer.skipped is None else layer.skipped.value


def _assigned(layer: LinearLayer, mix: Mix, assignments: Mapping[str, Assignment]) -> Assignment:
    """Return the levels of a layer's output features.

    Raises:
        InputError: there are none, or they are not those of this layer and mix.
    """
    found = assignments.get(layer.module)
    if found is None:
        raise InputError(f"{layer.module} has no levels: score it, give it an override or ignore it")
    if found.mix != mix or len(found.level) != layer.shape[-2]:
        raise InputError(
            f"{layer.module}: {len(found.level)} output features at levels {found.key()}, expected {layer.shape[-2]} "
            f"at levels {mix.key()}"
        )
    return found


def _check_experts(steps: Iterable[Step]) -> None:
    """Hold that the experts of a layer have one mix: every output feature one level, and gate and up of a channel.

    Raises:
        InputError: levels, or the schemes of experts beside mixed ones, differ.
    """
    first: dict[str, tuple[str, Form]] = {}
    for step in steps:
        layer, form = step.layer, step.scheme
        if layer is None or form is None or not layer.experts:
            continue
        module, before = first.setdefault(layer.experts, (layer.module, form))
        if before != form and isinstance(before, Assignment) | isinstance(form, Assignment):
            raise InputError(
                f"{layer.module} and {module} are experts of one layer, which have one mix: give all of them the same "
                "levels"
            )
        if isinstance(form, Assignment) and layer.rows != "plain":
            level, half = form.level, len(form.level) // 2
            gate, up = (level[:half], level[half:]) if layer.rows == "halves" else (level[::2], level[1::2])
            if gate != up:
                raise InputError(f"{layer.module}: gate and up of a channel of experts have one level")


def _check_weight(tensor: StoredTensor, layer: LinearLayer, scheme: Scheme, shared: int) -> None:
    """Hold that a weight can be compressed; `shared` divides the input channels of every layer."""
    spec = tensor.spec
    if spec.dtype not in WEIGHT_DTYPES:
        raise CheckpointError(
            f"{tensor.file.path}: tensor {spec.name!r} has dtype {spec.dtype}: only {', '.join(WEIGHT_DTYPES)} "
            "weights can be compressed"
        )
    if not all(layer.shape):
        raise CheckpointError(f"{tensor.file.path}: tensor {spec.name!r} of shape {list(spec.shape)} is empty")
    size, ic = scheme.group_size, layer.shape[-1]
    if size is not None and ic % size:
        fitting = [divisor for divisor in range(_GROUP_MULTIPLE, shared + 1, _GROUP_MULTIPLE) if shared % divisor == 0]
        nearest = sorted(sorted(fitting, key=lambda divisor: abs(divisor - size))[:3])
        hint = f" (group sizes that do, for every layer: {', '.join(map(str, nearest))})" if nearest else ""
        raise FormatError(
            f"group size {size} does not divide the {ic} input channels of {spec.name!r}{hint}; give that layer an "
            "override or ignore it"
        )


def _check_embedding(tensor: StoredTensor, layer: LinearLayer, architecture: Architecture) -> None:
    embedding = architecture.embeddings[layer.module]
    if embedding.unpackable:
        raise InputError(
            f"{layer.module} ({embedding.unpackable}) computes more than a packed embedding can: leave it out of the "
            "overrides"
        )
    if layer.shape != embedding.shape:
        raise CheckpointError(
            f"{tensor.file.path}: tensor {tensor.spec.name!r} has shape {list(layer.shape)}, and "
            f"{architecture.name} with this config.json wants {list(embedding.shape)}"
        )


def _check_names(specs: Iterable[TensorSpec], source: Source, tensor: StoredTensor) -> None:
    for spec in specs:
        if spec.name in source.tensors and spec.name != tensor.spec.name:
            raise CheckpointError(f"{tensor.file.path}: the checkpoint already holds a tensor {spec.name!r}")
