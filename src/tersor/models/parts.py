"""What does the planner have to know of a decoder? Made of its config and of headers; no weight is read.

A Tersor checkpoint gives every weight its own scheme; a directory with a config.json alone, or the name of a well-known
geometry, stands for plain weights, or for those of one format that is tried out.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tersor import files
from tersor.checkpoint.names import Form
from tersor.checkpoint.source import CONFIG_NAME, INDEX_NAME, Source, open_source, read_config
from tersor.errors import UnsupportedError
from tersor.formats import Scheme
from tersor.models.config import DecoderConfig, Layer, supported
from tersor.models.expected import Expected
from tersor.models.geometries import GEOMETRIES
from tersor.models.load import described
from tersor.models.names import NAMES, Names
from tersor.planner.parts import Experts, Kind, Model, Weight

_QUERY, _KEY = "query", "key"


def model_of(model: str, scheme: Scheme | None = None, revision: str | None = None) -> Model:
    """Return what a plan has to know of a model.

    Args:
        model: a directory with a checkpoint, or with a config.json alone; a Hub id; or a name of `GEOMETRIES`.
        scheme: of all linears and the head of a model without a checkpoint; `None` is plain.
        revision: of a Hub id.

    Raises:
        CheckpointError: no model.
        UnsupportedError: an architecture that the engine does not have, or a format asked for of a checkpoint.
    """
    if model.lower() in GEOMETRIES and not files.mode_of(Path(model)):
        return of_config(GEOMETRIES[model.lower()], model.lower(), scheme)
    directory = files.user_path(model)
    weights = [directory / name for name in (INDEX_NAME, "model.safetensors")]
    if files.mode_of(directory / CONFIG_NAME) and not any(files.mode_of(path) for path in weights):
        return of_config(read_config(directory), directory.resolve().name, scheme)
    if scheme is not None:
        raise UnsupportedError(f"{model} is a checkpoint, whose weights have their own formats: leave --format out")
    with open_source(model, revision) as source:
        config, names, expected, forms = described(source)
        return parts_of(config, names, expected, forms, source.label, digest_of(source))


def digest_of(source: Source) -> str:
    """Return what identifies a checkpoint for a plan: its config, and the names and headers of its tensors."""
    tensors = {name: [tensor.spec.dtype, list(tensor.spec.shape)] for name, tensor in sorted(source.tensors.items())}
    return _digest(source.config, tensors)


def of_config(raw: Mapping[str, Any], label: str, scheme: Scheme | None = None) -> Model:
    """Return what a plan has to know of the model of a config.json, all of whose linears have one scheme.

    Raises:
        UnsupportedError: the engine does not have it.
    """
    why = supported(raw)
    if why:
        raise UnsupportedError(f"{label}: {why}")
    config = DecoderConfig.from_dict(raw)
    names = NAMES[config.architecture]
    expected, forms = Expected.of(config, names), forms_of(config, names, scheme)
    return parts_of(config, names, expected, forms, label, _digest(raw, None if scheme is None else scheme.key()))


def forms_of(config: DecoderConfig, names: Names, scheme: Scheme | None) -> dict[str, Form]:
    """Return the scheme of every linear of a model that has one for all; none where it is `None`."""
    if scheme is None:
        return {}
    kept = {names.base + names.embedding} if not config.tied else set()
    matrices = Expected.of(config, names).matrices
    return {module: scheme for module in matrices if module not in kept and not module.endswith(names.router)}


def parts_of(
    config: DecoderConfig, names: Names, expected: Expected, forms: Mapping[str, Form], label: str, digest: str
) -> Model:
    """Return what a plan has to know of a decoder.

    Args:
        config, names, expected, forms: as `models.load.described` returns them.
        label: what it is called.
        digest: what identifies it.
    """
    reader = _Reader(config, names, expected, forms)
    kinds: dict[Kind, list[int]] = {}
    for index, layer in enumerate(config.layers):
        kinds.setdefault(reader.layer(index, layer), []).append(index)
    embedding = names.base + names.embedding
    outside = sum(
        math.prod(shape) for name, shape in expected.vectors.items() if names.layer.partition("{")[0] not in name
    )
    return Model(
        label=label,
        digest=digest,
        architecture=config.architecture,
        hidden=config.hidden,
        vocabulary=config.vocabulary,
        context=config.context,
        gated=config.gate is not None,
        kinds=tuple(_with_layers(kind, layers) for kind, layers in kinds.items()),
        embedding=Weight(embedding, config.vocabulary, config.hidden, forms.get(embedding)),
        head=None if config.tied else Weight(names.head, config.vocabulary, config.hidden, forms.get(names.head)),
        vectors=outside,
        head_name=names.head,
    )


class _Reader:
    """Makes kinds of a decoder's layers."""

    def __init__(self, config: DecoderConfig, names: Names, expected: Expected, forms: Mapping[str, Form]) -> None:
        self._config, self._names, self._expected, self._forms = config, names, expected, forms
        self._vectors: dict[str, int] = {}
        for name, shape in expected.vectors.items():
            if name.removesuffix(".bias").removesuffix("_bias") in expected.matrices:
                continue  # of a weight
            start = name[: len(names.base)] + self._start_of(name)
            self._vectors[start] = self._vectors.get(start, 0) + math.prod(shape)

    def layer(self, index: int, layer: Layer) -> Kind:
        """Return the kind that a layer is, without its number."""
        config, names, form = self._config, self._names, layer.attention
        start = names.base + names.layer.format(layer=index)
        pattern = names.base + names.layer
        if config.latent is None:
            whole: tuple[Weight, ...] = ()
            qkv = tuple(self._weight(start, name) for name in names.qkv)
            fields = ((_QUERY, form.head_dim), (_KEY, form.head_dim), (_KEY, form.head_dim))
            per_head = tuple((one,) for one in fields) if len(qkv) > 1 else (fields,)
            value = form.head_dim
        else:
            latent, value = config.latent, config.latent.value
            queries = names.query_up if latent.query else names.query
            downs = [names.query_down] if latent.query else []
            whole = tuple(self._weight(start, name) for name in (*downs, names.key_value_down))
            qkv = (self._weight(start, queries), self._weight(start, names.key_value_up))
            per_head = (((_QUERY, latent.fixed + latent.turned),), ((_QUERY, latent.fixed + latent.value),))
        experts = None if layer.experts is None else self._experts(start, layer)
        return Kind(
            layers=(),
            start=pattern,
            heads=form.heads,
            kv_heads=form.kv_heads,
            head_dim=form.head_dim,
            value_dim=value,
            window=form.window or 0,
            whole=whole,
            qkv=qkv,
            per_head=per_head,
            out=self._weight(start, names.out),
            ffn=0 if experts else config.ffn,
            gate_up=() if experts else tuple(self._weight(start, name) for name in names.gate_up),
            down=None if experts else self._weight(start, names.down),
            experts=experts,
            vectors=self._vectors.get(start, 0),
        )

    def _experts(self, start: str, layer: Layer) -> Experts:
        names, own = self._names, layer.experts
        assert own is not None
        if names.fused:
            gate_up: tuple[Weight, ...] = (self._weight(start, names.fused[0]),)
            down = self._weight(start, names.fused[1])
        else:
            gate, up, last = (self._weight(start, name, own.count) for name in names.expert)
            gate_up, down = (gate, up), last
        shared: tuple[Weight, ...] = ()
        if own.shared:
            shared = tuple(self._weight(start, name) for name in (*names.shared_gate_up, names.shared_down))
        return Experts(
            top_k=own.top_k,
            ffn=own.ffn,
            router=self._weight(start, names.router),
            gate_up=gate_up,
            down=down,
            interleaved=bool(names.fused),
            shared=shared,
            shared_ffn=own.shared,
        )

    def _weight(self, start: str, name: str, experts: int = 0) -> Weight:
        """Return a weight of a layer; of experts with a name each the first one's form stands for all."""
        module = start + name.format(expert=0)
        *copies, oc, ic = self._expected.matrices[module]
        biased = f"{module}.bias" in self._expected.vectors or f"{module}_bias" in self._expected.vectors
        return Weight(name, oc, ic, self._forms.get(module), copies[0] if copies else experts or 1, biased)

    def _start_of(self, name: str) -> str:
        """Return the part of a name that says the layer, behind the base; empty where it is in none."""
        prefix = self._names.layer.partition("{")[0]
        rest = name[len(self._names.base) :]
        if not rest.startswith(prefix):
            return ""
        return prefix + rest.removeprefix(prefix).partition(".")[0] + "."


def _with_layers(kind: Kind, layers: list[int]) -> Kind:
    return replace(kind, layers=tuple(layers))


def _digest(config: Mapping[str, Any], tensors: object) -> str:
    text = json.dumps([dict(config), tensors], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
