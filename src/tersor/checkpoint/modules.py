"""Which stored tensor is the weight of a linear layer, or of an embedding?

The architecture is built without memory and asked.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

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
        skipped: why it is left alone unless it is asked for (`output head`, `router`, `embedding`), or an empty
            string.
    """

    module: str
    stem: str
    shape: tuple[int, int]
    transposed: bool = False
    skipped: str = ""

    @property
    def embedding(self) -> bool:
        """Whether rows are looked up instead of multiplied."""
        return self.skipped == _EMBEDDING


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
            return LinearLayer(module, stem, shape, transposed, self.skipped(module))
        if module in self.embeddings and len(spec.shape) == 2:
            return LinearLayer(module, stem, (spec.shape[0], spec.shape[1]), skipped=_EMBEDDING)
        match = _EXPERT.fullmatch(module)
        if match and match["layer"] in self.modules and len(spec.shape) == 2:
            return LinearLayer(module, stem, (spec.shape[0], spec.shape[1]))
        return None

    def skipped(self, module: str) -> str:
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
