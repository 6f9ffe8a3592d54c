"""Which stored tensor is the weight of a linear layer, or of an embedding?

The architecture is built without memory and asked.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tersor.checkpoint.header import TensorSpec
from tersor.errors import CheckpointError

_ROUTER_NAMES = ("gate", "router", "shared_expert_gate")
_EMBEDDING = "embedding"
_HEAD_NAMES = ("lm_head", "embed_out")
_EXPERT = re.compile(r"(?P<layer>.*\.\d+)\.[^.]+\.experts\.\d+\.(w1|w2|w3|gate_proj|up_proj|down_proj|gate_up_proj)")
_FUSED_EXPERTS = re.compile(r".*\.experts\.(gate_up_proj|gate_proj|up_proj|down_proj)(\.weight)?")


@dataclass(frozen=True, slots=True)
class LinearLayer:
    """A linear layer of the model, or an embedding, as the checkpoint stores it.

    Attributes:
        module: its name in the model, which patterns are matched with.
        stem: the start of its tensors' names in the checkpoint: the weight is `stem + '.weight'`.
        shape: (OC, IC).
        transposed: stored as [IC, OC] (GPT-2's Conv1D).
        spared: why it is left alone unless it is asked for (`output head`, `router`, `embedding`), or an empty
            string.
    """

    module: str
    stem: str
    shape: tuple[int, int]
    transposed: bool = False
    spared: str = ""

    @property
    def embedding(self) -> bool:
        """Whether rows are looked up instead of multiplied."""
        return self.spared == _EMBEDDING


@dataclass(frozen=True, slots=True)
class Architecture:
    """What a config.json builds.

    Attributes:
        name: class of the model.
        linears: module name -> ((OC, IC), transposed).
        embeddings: module name -> ((rows, columns), class name where it computes more than a packed one can, or an
            empty string).
        modules: every module name.
        base_prefix: the prefix that tells `model.layers.0` from `layers.0`.
        head: name of the output head, or an empty string.
        tied: whether the output head shares the embedding's weight.
    """

    name: str
    linears: dict[str, tuple[tuple[int, int], bool]]
    embeddings: dict[str, tuple[tuple[int, int], str]]
    modules: frozenset[str]
    base_prefix: str
    head: str
    tied: bool

    @property
    def transposes(self) -> bool:
        """Whether some layer stores its weight as [IC, OC]."""
        return any(transposed for _, transposed in self.linears.values())

    def module_of(self, stem: str) -> str:
        """Return the module a stored name stands for: with or without the base model's prefix."""
        prefix = self.base_prefix + "."
        for candidate in (stem, prefix + stem, stem.removeprefix(prefix)):
            if candidate in self.modules:
                return candidate
        if stem in _HEAD_NAMES and self.head:
            return self.head
        match = _EXPERT.fullmatch(stem)
        if match and match["layer"] not in self.modules and prefix + match["layer"] in self.modules:
            return prefix + stem
        return stem

    def linear_of(self, spec: TensorSpec, path: str) -> LinearLayer | None:
        """Return the linear layer or embedding whose weight a stored tensor is, or `None`.

        Raises:
            CheckpointError: the tensor's shape is not the linear layer's.
        """
        stem = spec.name.removesuffix(".weight")
        if stem == spec.name:
            return None
        module = self.module_of(stem)
        if module in self.linears:
            shape, transposed = self.linears[module]
            stored = shape[::-1] if transposed else shape
            if spec.shape != stored:
                raise CheckpointError(
                    f"{path}: tensor {spec.name!r} has shape {list(spec.shape)}, and {self.name} with this "
                    f"config.json wants {list(stored)}"
                )
            return LinearLayer(module, stem, shape, transposed, self.spared(module))
        if module in self.embeddings and len(spec.shape) == 2:
            return LinearLayer(module, stem, (spec.shape[0], spec.shape[1]), spared=_EMBEDDING)
        match = _EXPERT.fullmatch(module)
        if match and match["layer"] in self.modules and len(spec.shape) == 2:
            return LinearLayer(module, stem, (spec.shape[0], spec.shape[1]))
        return None

    def spared(self, module: str) -> str:
        """Say why a linear layer is left alone unless it is asked for, or return an empty string."""
        leaf = module.rpartition(".")[2]
        if module == self.head or leaf in _HEAD_NAMES:
            return "output head"
        return "router" if leaf in _ROUTER_NAMES else ""

    def describe(self, spec: TensorSpec) -> str:
        """Say what a tensor is that is no linear weight, where that is worth a word."""
        stem = spec.name.removesuffix(".weight")
        module = self.module_of(stem)
        leaf = stem.rpartition(".")[2]
        if module in self.embeddings:
            return _EMBEDDING
        if stem in _HEAD_NAMES:
            return "output head"
        if leaf in _ROUTER_NAMES and len(spec.shape) == 2:
            return "router"
        if len(spec.shape) == 3 and _FUSED_EXPERTS.fullmatch(spec.name):
            return "fused experts"
        return "" if len(spec.shape) < 2 else "not a linear layer"


def read_architecture(directory: Path) -> Architecture:
    """Build the model of a config.json on the meta device and list its layers.

    Raises:
        CheckpointError: transformers does not know the model type, or it is no causal language model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    with _quiet_transformers():
        try:
            config = AutoConfig.from_pretrained(directory)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        except Exception as error:
            raise CheckpointError(f"{directory}: {_reason(error)}") from None
    linears: dict[str, tuple[tuple[int, int], bool]] = {}
    embeddings: dict[str, tuple[tuple[int, int], str]] = {}
    names = []
    for name, module in model.named_modules():
        names.append(name)
        if isinstance(module, torch.nn.Linear):
            linears[name] = ((module.out_features, module.in_features), False)
        elif isinstance(module, Conv1D):
            linears[name] = ((module.nf, module.nx), True)
        elif isinstance(module, torch.nn.Embedding):
            kind = "" if packable_embedding(module) else type(module).__name__
            embeddings[name] = ((module.num_embeddings, module.embedding_dim), kind)
    output = model.get_output_embeddings()
    head = next((name for name, module in model.named_modules() if module is output), "")
    return Architecture(
        name=type(model).__name__,
        linears=linears,
        embeddings=embeddings,
        modules=frozenset(names),
        base_prefix=model.base_model_prefix,
        head=head,
        tied=bool(getattr(config.get_text_config(), "tie_word_embeddings", False)),
    )


def packable_embedding(module: Any) -> bool:
    """Whether an embedding only looks rows up, or multiplies them by one number that is known, as Gemma's do."""
    import torch

    if module.max_norm is not None:
        return False
    scaled = type(module).__name__.endswith("ScaledWordEmbedding") and hasattr(module, "scalar_embed_scale")
    return scaled or type(module).forward is torch.nn.Embedding.forward


def _reason(error: Exception) -> str:
    text = next(iter(str(error).strip().splitlines()), "").strip() or type(error).__name__
    if "trust_remote_code" in str(error) or "custom code" in str(error):
        return "the model needs Python code of its own (auto_map in config.json), which is not run"
    return f"transformers cannot build this model: {text}"


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep transformers' advice about the config off the terminal while it is only asked for shapes."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
