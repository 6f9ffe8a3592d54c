"""Which tensors does a decoder's checkpoint have? Every one by name with its shape, held against what is stored."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from tersor.checkpoint.config import QuantizationConfig
from tersor.checkpoint.header import WEIGHT_DTYPES
from tersor.checkpoint.mixed import read_form
from tersor.checkpoint.names import DENSE, SPARSE, STORAGES, TORCH_DTYPES, Form, stored_forms
from tersor.checkpoint.source import StoredTensor
from tersor.errors import CheckpointError
from tersor.formats import Assignment, Pruned, Scheme
from tersor.models.config import DecoderConfig, Experts, Latent, Residual
from tersor.models.names import Names


@dataclass(frozen=True, slots=True)
class Expected:
    """What a checkpoint of a decoder holds.

    Attributes:
        matrices: module -> (OC, IC), or (E, OC, IC) of all experts of a layer in one: plain, `module.weight`, or
            packed.
        vectors: whole names of tensors that are always plain, and their shapes.
    """

    matrices: dict[str, tuple[int, ...]] = field(default_factory=dict)
    vectors: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @staticmethod
    def of(config: DecoderConfig, names: Names) -> Expected:
        """Return what the checkpoint of a decoder holds under these names."""
        found = Expected()
        found._outside(config, names)
        for index, layer in enumerate(config.layers):
            start = names.base + names.layer.format(layer=index)
            if config.latent is None:
                found._attention(config, names, start, index)
            else:
                found._latent(config, names, start, index, config.latent)
            norms = [names.input_norm, names.ffn_norm]
            if config.residual is Residual.BOTH:
                norms += [names.attention_out_norm, names.ffn_out_norm]
            for norm in norms:
                found._norm(config, start + norm)
            if layer.experts is None:
                found._feed_forward(config, start, names.gate_up, names.down, config.ffn, config.ffn_bias)
            else:
                found._experts(config, names, start, layer.experts)
        return found

    def _outside(self, config: DecoderConfig, names: Names) -> None:
        self.matrices[names.base + names.embedding] = (config.vocabulary, config.hidden)
        if config.positions:
            self.vectors[f"{names.base}{names.positions}.weight"] = (config.positions, config.hidden)
        if not config.tied:
            self.matrices[names.head] = (config.vocabulary, config.hidden)
        self._norm(config, names.base + names.norm)

    def _latent(self, config: DecoderConfig, names: Names, start: str, index: int, latent: Latent) -> None:
        form = config.layers[index].attention
        queries = form.heads * form.head_dim
        if latent.query:
            self.matrices[start + names.query_down] = (latent.query, config.hidden)
            self.vectors[f"{start}{names.query_norm}.weight"] = (latent.query,)
            self.matrices[start + names.query_up] = (queries, latent.query)
        else:
            self.matrices[start + names.query] = (queries, config.hidden)
        self.matrices[start + names.key_value_down] = (latent.key_value + latent.turned, config.hidden)
        self.vectors[f"{start}{names.key_value_norm}.weight"] = (latent.key_value,)
        self.matrices[start + names.key_value_up] = (form.heads * (latent.fixed + latent.value), latent.key_value)
        self._linear(start + names.out, (config.hidden, form.heads * latent.value), config.out_bias)

    def _attention(self, config: DecoderConfig, names: Names, start: str, index: int) -> None:
        form = config.layers[index].attention
        sizes = [heads * form.head_dim for heads in (form.heads, form.kv_heads, form.kv_heads)]
        rows = sizes if len(names.qkv) > 1 else [sum(sizes)]
        for name, count in zip(names.qkv, rows, strict=True):
            self._linear(start + name, (count, config.hidden), config.qkv_bias)
        self._linear(start + names.out, (config.hidden, sizes[0]), config.out_bias)
        if form.norm_eps is not None:
            for name in (names.q_norm, names.k_norm):
                self.vectors[f"{start}{name}.weight"] = (form.head_dim,)
        if config.sinks:
            self.vectors[start + names.sinks] = (form.heads,)

    def _feed_forward(
        self, config: DecoderConfig, start: str, gate_up: tuple[str, ...], down: str, ffn: int, biased: bool
    ) -> None:
        wide = ffn if config.gate is None or len(gate_up) > 1 else 2 * ffn
        for name in gate_up:
            self._linear(start + name, (wide, config.hidden), biased)
        self._linear(start + down, (config.hidden, ffn), biased)

    def _experts(self, config: DecoderConfig, names: Names, start: str, experts: Experts) -> None:
        self._linear(start + names.router, (experts.count, config.hidden), experts.router_bias)
        if experts.choice_bias:
            self.vectors[start + names.choice_bias] = (experts.count,)
        shapes = [(2 * experts.ffn, config.hidden), (config.hidden, experts.ffn)]
        if names.fused:
            for name, (oc, ic) in zip(names.fused, shapes, strict=True):
                self.matrices[start + name] = (experts.count, oc, ic)
                if experts.biased:
                    self.vectors[f"{start}{name}_bias"] = (experts.count, oc)
        else:
            shapes = [(experts.ffn, config.hidden)] * 2 + shapes[1:]
            for expert in range(experts.count):
                for name, shape in zip(names.expert, shapes, strict=True):
                    self.matrices[start + name.format(expert=expert)] = shape
        if experts.shared:
            self._feed_forward(config, start, names.shared_gate_up, names.shared_down, experts.shared, False)

    def _linear(self, module: str, shape: tuple[int, int], biased: bool) -> None:
        self.matrices[module] = shape
        if biased:
            self.vectors[f"{module}.bias"] = shape[:1]

    def _norm(self, config: DecoderConfig, module: str) -> None:
        for name in ("weight", "bias") if config.norm.centered else ("weight",):
            self.vectors[f"{module}.{name}"] = (config.hidden,)


def check(
    expected: Expected, stored: Mapping[str, StoredTensor], quantization: QuantizationConfig | None, names: Names
) -> dict[str, Form]:
    """Hold what a checkpoint should have against what is stored, before anything is read.

    Args:
        expected: of the decoder.
        stored: name -> tensor.
        quantization: of config.json, or `None`.
        names: of the architecture.

    Returns:
        The scheme of every module whose weight is packed, or the levels of its output features.

    Raises:
        CheckpointError: tensors are missing or left over, or have another shape or dtype; the line names one.
    """
    forms: dict[str, Form] = {}
    wanted: dict[str, tuple[tuple[int, ...], str]] = {}  # name -> shape, and dtype where only one is right
    for module, shape in expected.matrices.items():
        storage = next((one for one in STORAGES if f"{module}.{one.marker}" in stored), None)
        if quantization is None or storage is None:
            plain = plain_name(module, shape)
            wanted[plain] = (stored_shape(shape), "")
            continue
        called = names.pattern_name(module)
        represented = quantization.resolve(called, *([called.rpartition(".")[0]] if len(shape) == 3 else []))
        if represented is None:
            tensor = f"{module}.{storage.marker}"
            raise CheckpointError(f"tensor {tensor} is packed, and quantization_config leaves {called} alone")
        outside = module == names.base + names.embedding
        of_experts = in_experts(module, shape)
        if (storage is not DENSE and outside) or (storage is SPARSE and of_experts):
            raise CheckpointError(f"{module} is stored {storage.name}, and has one scheme in every decoder")
        form = forms[module] = read_form(stored, module, storage, represented)
        if isinstance(form, Assignment) and len(form.level) != shape[-2]:
            raise CheckpointError(f"{module} has levels of {len(form.level)} output features, and {shape[-2]} of them")
        if isinstance(form, Pruned) and form.rows != shape[0]:
            raise CheckpointError(f"{module} has a mask of {form.rows} output features, and {shape[0]} of them")
        if isinstance(form, Scheme) and form.outliers is not None and (outside or of_experts):
            raise CheckpointError(f"{module} is to keep outliers, which embeddings and experts do not")
        for name, tensor_form in stored_forms(form, shape).items():
            wanted[f"{module}.{name}"] = (tensor_form.shape, tensor_form.safetensors_dtype)
    wanted |= {name: (shape, "") for name, shape in expected.vectors.items()}
    _check_names(wanted, stored, names)
    for name, (shape, dtype) in wanted.items():
        spec = stored[name].spec
        right = spec.dtype == dtype if dtype else spec.dtype in WEIGHT_DTYPES and spec.dtype in TORCH_DTYPES
        if spec.shape != shape or not right:
            raise CheckpointError(
                f"{stored[name].file.path}: tensor {name!r} is {spec.dtype} {list(spec.shape)}, and the model of "
                f"config.json has {dtype or 'floats'} {list(shape)}"
            )
    return forms


def in_experts(module: str, shape: tuple[int, ...]) -> bool:
    """Whether a module is a weight of experts, of one or of all in one."""
    return len(shape) == 3 or ".experts." in module


def plain_name(module: str, shape: tuple[int, ...]) -> str:
    """Return what the plain weight of a module is called: that of all experts is named as the module."""
    return module if len(shape) == 3 else f"{module}.weight"


def stored_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a plain weight on disk: those of all experts in one are [E, IC, OC]."""
    return (shape[0], shape[2], shape[1]) if len(shape) == 3 else shape


def _check_names(wanted: Mapping[str, object], stored: Mapping[str, StoredTensor], names: Names) -> None:
    missing = [name for name in wanted if name not in stored]
    head = f"{names.head}.weight"  # a tied one may be stored all the same
    left = [name for name in stored if name not in wanted and name != head and not _ignored(name, names)]
    if missing:
        also = f", and it holds {left[0]!r}, which the model has not" if left else ""
        raise CheckpointError(f"the checkpoint lacks {_some(missing)} of the model of config.json{also}")
    if left:
        raise CheckpointError(f"the checkpoint holds {_some(left)}, which the model of config.json has not")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 1} more tensors" if len(names) > 1 else ""
    return f"tensor {names[0]!r}{more}"


def _ignored(name: str, names: Names) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in names.ignored)
