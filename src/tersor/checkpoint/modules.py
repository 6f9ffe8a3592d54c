"""Which stored tensor is the weight of a linear layer, or of an embedding?

What layers a model has, an `Architecture` says; `tersor.integrations.transformers.architecture` builds one and asks it.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

from tersor.checkpoint.header import TensorSpec
from tersor.errors import CheckpointError

ROUTER_NAMES = ("gate", "router", "shared_expert_gate")
_HEAD_NAMES = ("lm_head", "embed_out")
_EXPERT = re.compile(r"(?P<layer>.*\.\d+)\.[^.]+\.experts\.\d+\.(w1|w2|w3|gate_proj|up_proj|down_proj|gate_up_proj)")
_FUSED_EXPERTS = re.compile(r".*\.experts\.(gate_up_proj|gate_proj|up_proj|down_proj)(\.weight)?")


class Skipped(enum.Enum):
    """Why a layer is left alone unless an override asks for it; the value is the word that users read."""

    HEAD = "output head"
    ROUTER = "router"
    EMBEDDING = "embedding"


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer of a model.

    Attributes:
        shape: (OC, IC).
        transposed: whether its weight is stored as [IC, OC] (GPT-2's Conv1D).
    """

    shape: tuple[int, int]
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Embedding:
    """An embedding of a model.

    Attributes:
        shape: (rows, columns).
        unpackable: name of its class where that computes more than a packed embedding can, else an empty string.
    """

    shape: tuple[int, int]
    unpackable: str = ""


@dataclass(frozen=True, slots=True)
class LinearLayer:
    """A linear layer of the model, or an embedding, as the checkpoint stores it.

    Attributes:
        module: the layer's name in the model, which patterns are matched with.
        stem: the start of its tensors' names in the checkpoint: the weight is `stem + '.weight'`.
        shape: (OC, IC).
        transposed: whether its weight is stored as [IC, OC] (GPT-2's Conv1D).
        skipped: why the layer is left alone unless it is asked for; `None` where it is not.
    """

    module: str
    stem: str
    shape: tuple[int, int]
    transposed: bool = False
    skipped: Skipped | None = None

    @property
    def embedding(self) -> bool:
        """Whether rows are looked up instead of multiplied."""
        return self.skipped is Skipped.EMBEDDING


@dataclass(frozen=True, slots=True)
class Architecture:
    """What a config.json builds.

    Attributes:
        name: name of the model's class.
        linears: module name -> linear layer.
        embeddings: module name -> embedding.
        modules: every module name.
        base_prefix: the prefix that tells `model.layers.0` from `layers.0`.
        head: name of the output head, or an empty string.
        tied: whether the output head shares the embedding's weight.
    """

    name: str
    linears: dict[str, Linear]
    embeddings: dict[str, Embedding]
    modules: frozenset[str]
    base_prefix: str
    head: str
    tied: bool

    @property
    def transposes(self) -> bool:
        """Whether some layer stores its weight as [IC, OC]."""
        return any(linear.transposed for linear in self.linears.values())

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
            linear = self.linears[module]
            stored = linear.shape[::-1] if linear.transposed else linear.shape
            if spec.shape != stored:
                raise CheckpointError(
                    f"{path}: tensor {spec.name!r} has shape {list(spec.shape)}, and {self.name} with this "
                    f"config.json wants {list(stored)}"
                )
            return LinearLayer(module, stem, linear.shape, linear.transposed, self.skipped(module))
        if module in self.embeddings and len(spec.shape) == 2:
            return LinearLayer(module, stem, (spec.shape[0], spec.shape[1]), skipped=Skipped.EMBEDDING)
        match = _EXPERT.fullmatch(module)
        if match and match["layer"] in self.modules and len(spec.shape) == 2:
            return LinearLayer(module, stem, (spec.shape[0], spec.shape[1]))
        return None

    def skipped(self, module: str) -> Skipped | None:
        """Say why a linear layer is left alone unless it is asked for; `None` where it is not."""
        leaf = module.rpartition(".")[2]
        if module == self.head or leaf in _HEAD_NAMES:
            return Skipped.HEAD
        return Skipped.ROUTER if leaf in ROUTER_NAMES else None

    def describe(self, spec: TensorSpec) -> str:
        """Say what a tensor is that is no linear weight, where that is worth a word."""
        stem = spec.name.removesuffix(".weight")
        module = self.module_of(stem)
        leaf = stem.rpartition(".")[2]
        if module in self.embeddings:
            return Skipped.EMBEDDING.value
        if stem in _HEAD_NAMES:
            return Skipped.HEAD.value
        if leaf in ROUTER_NAMES and len(spec.shape) == 2:
            return Skipped.ROUTER.value
        if len(spec.shape) == 3 and _FUSED_EXPERTS.fullmatch(spec.name):
            return "fused experts"
        return "" if len(spec.shape) < 2 else "not a linear layer"
