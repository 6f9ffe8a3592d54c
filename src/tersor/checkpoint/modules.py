"""Which stored tensor is the weight of a linear layer, or of an embedding?

What layers a model has, an `Architecture` says; `tersor.integrations.transformers.architecture` builds one and asks it.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from tersor.checkpoint.header import TensorSpec
from tersor.errors import CheckpointError

_WEIGHT = ".weight"
ROUTER_NAMES = ("gate", "router", "shared_expert_gate")
_HEAD_NAMES = ("lm_head", "embed_out")


class Skipped(enum.Enum):
    """Why a layer is left alone unless an override asks for it; the value is the word that users read."""

    HEAD = "output head"
    ROUTER = "router"
    EMBEDDING = "embedding"
    TOWER = "outside the language model"


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer of a model, or one of each of its experts whose weights it keeps in one tensor.

    Attributes:
        shape: (OC, IC), or (E, OC, IC) of E experts.
        transposed: whether its weight is stored as [IC, OC] (GPT-2's Conv1D), or [E, IC, OC].
        tower: name of the part outside the language model that it is in (a vision tower, a projector), else empty.
        unpackable: name of its class where that computes more than a packed linear can, else an empty string.
        rows: of experts, where gate and up of a channel stand: `halves` or `pairs`, `plain` where there is one of them
            or a kernel does not take both.
    """

    shape: tuple[int, ...]
    transposed: bool = False
    tower: str = ""
    unpackable: str = ""
    rows: str = "plain"

    @property
    def stored(self) -> tuple[int, ...]:
        """Shape of the tensor that a checkpoint stores."""
        *experts, oc, ic = self.shape
        return (*experts, ic, oc) if self.transposed else self.shape


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
class Target:
    """Where a stored tensor goes in a model.

    Attributes:
        name: the tensor's name among the model's modules, which patterns are matched with; for a weight of one expert
            the name that it has where experts are kept apart.
        parameter: name of the parameter that it becomes, or a part of.
        conversion: names of the operations that change it while it is loaded, such as `Chunk`, else an empty string.
        experts: name of the module that holds the experts, where it is a weight of one of them.
        known: whether the model has such a parameter.
        parts: where rows of it become the weights of several layers, one after the other, their names.
        turned: where it is changed only by turning its last two axes, `always`, or `where needed` for its shape.
    """

    name: str
    parameter: str
    conversion: str = ""
    experts: str = ""
    known: bool = True
    parts: tuple[str, ...] = ()
    turned: str = ""


@dataclass(frozen=True, slots=True)
class LinearLayer:
    """A linear layer of the model, one of all its experts in one tensor, or an embedding, as the checkpoint stores it.

    Attributes:
        module: the layer's name in the model, which patterns are matched with.
        stem: the start of its tensors' names in the checkpoint: the weight is `stem + '.weight'`, or `stem` itself
            where a model keeps the weights of all experts in one parameter.
        shape: (OC, IC), or (E, OC, IC) of E experts in one tensor.
        transposed: whether its weight is stored as [IC, OC] (GPT-2's Conv1D), or [E, IC, OC].
        skipped: why the layer is left alone unless it is asked for; `None` where it is not.
        tower: name of the part outside the language model that the layer is in, else an empty string.
        obstacle: why the layer cannot be compressed, else an empty string.
        served: the name by which other engines know the layer: that of its expert as it is stored, else `module`.
        experts: of experts, the parameter that holds the weights of all of a layer in the model, with `rows` as in a
            `Linear`; else an empty string.
    """

    module: str
    stem: str
    shape: tuple[int, ...]
    transposed: bool = False
    skipped: Skipped | None = None
    tower: str = ""
    obstacle: str = ""
    served: str = ""
    experts: str = ""
    rows: str = "plain"

    def __post_init__(self) -> None:
        if not self.served:
            object.__setattr__(self, "served", self.module)

    @property
    def names(self) -> tuple[str, ...]:
        """What patterns are matched with: the layer's name and, of experts in one tensor, that of their module."""
        return (self.module, self.module.rpartition(".")[0]) if self.stacked else (self.module,)

    @property
    def stacked(self) -> bool:
        """Whether the tensor holds the weights of all experts of a layer."""
        return len(self.shape) == 3

    @property
    def embedding(self) -> bool:
        """Whether rows are looked up instead of multiplied."""
        return self.skipped is Skipped.EMBEDDING

    @property
    def word(self) -> str:
        """What a pattern has to spell to ask for a layer that is otherwise left alone."""
        name = self.tower if self.skipped is Skipped.TOWER else self.module
        return name.rpartition(".")[2]


@dataclass(frozen=True, slots=True)
class Architecture:
    """What a config.json builds.

    Attributes:
        name: name of the model's class.
        linears: module name -> linear layer.
        embeddings: module name -> embedding.
        experts: name of a module that holds the fused experts of a layer -> why they cannot be packed one by one, or an
            empty string.
        stacks: name of a parameter that holds the weights of all experts of a layer -> one such layer of each.
        modules: every module name.
        head: name of the output head, or an empty string.
        tied: whether the output head shares the embedding's weight.
        base: name of the module inside of which the model is but for its heads, or an empty string.
        find: stored tensor names -> where each goes in the model.
        missing: stored tensor names -> parameters of the model that none of them becomes.
    """

    name: str
    linears: dict[str, Linear]
    embeddings: dict[str, Embedding]
    experts: dict[str, str]
    stacks: dict[str, Linear]
    modules: frozenset[str]
    head: str
    tied: bool
    base: str
    find: Callable[[Iterable[str]], Mapping[str, Target]]
    missing: Callable[[Iterable[str]], list[str]]

    def modules_of(self, stems: Iterable[str]) -> dict[str, str]:
        """Return for stems of stored weights the modules that they stand for, named as patterns find them."""
        return {stem: target.name.removesuffix(_WEIGHT) for stem, (_, target) in self.weights_of(stems).items()}

    def names_of(self, module: str) -> tuple[str, ...]:
        """Return what patterns are matched with for a module, as `LinearLayer.names` does."""
        return (module, module.rpartition(".")[0]) if module in self.stacks else (module,)

    def weights_of(self, stems: Iterable[str]) -> dict[str, tuple[str, Target]]:
        """Return for stems of stored weights what each was called, `stem.weight` or `stem`, and where it goes."""
        targets = self.find([stem + _WEIGHT for stem in stems])
        lost = [name.removesuffix(_WEIGHT) for name, target in targets.items() if not target.known]
        whole = {stem: target for stem, target in self.find(lost).items() if target.parameter in self.stacks}
        found = {name.removesuffix(_WEIGHT): (name, target) for name, target in targets.items()}
        return {**found, **{stem: (stem, target) for stem, target in whole.items()}}

    def parts_of(self, spec: TensorSpec, target: Target) -> list[tuple[str, int]]:
        """Return name and rows of the layers' weights that a stored matrix is taken apart into while it is loaded."""
        if len(spec.shape) != 2 or not target.parts:
            return []
        linears = [self.linears.get(part.removesuffix(_WEIGHT)) for part in target.parts]
        rows = [linear.shape[0] for linear in linears if linear is not None and linear.shape[1] == spec.shape[1]]
        whole = len(rows) == len(target.parts) and sum(rows) == spec.shape[0]
        return list(zip(target.parts, rows, strict=True)) if whole else []

    def layer_of(self, spec: TensorSpec, target: Target, path: str) -> LinearLayer | None:
        """Return the linear layer or embedding whose weight a stored tensor is, or `None`.

        Args:
            spec: the tensor.
            target: where it goes, as `find` says.
            path: the file that holds it.

        Raises:
            CheckpointError: the tensor's shape is not the linear layer's.
        """
        matrix = (spec.shape[0], spec.shape[1]) if len(spec.shape) == 2 else None
        stem, module = spec.name.removesuffix(_WEIGHT), target.name.removesuffix(_WEIGHT)
        if target.parameter in self.stacks and (target.turned or not target.conversion):
            stack = self.stacks[target.parameter]
            if target.turned == "always" or (target.turned and spec.shape != stack.stored):
                stack = replace(stack, transposed=not stack.transposed)
            self._check_shape(spec, stack, path)
            found = LinearLayer(module, stem, stack.shape, stack.transposed, self.skipped(module), stack.tower)
            return replace(found, experts=target.parameter, rows=stack.rows)
        if not target.parameter.endswith(_WEIGHT) and not target.experts:
            return None
        if not target.conversion and not spec.name.endswith(_WEIGHT):
            return None
        if target.experts in self.experts and matrix:
            inside = f"{self.base}." if self.base and module.startswith(f"{self.base}.") else ""
            served = inside + stem.removeprefix(inside)
            obstacle = self.experts[target.experts]
            return LinearLayer(module, stem, matrix, obstacle=obstacle, served=served, experts=target.parameter)
        if target.conversion:
            parameter = target.parameter.removesuffix(_WEIGHT)
            linear = self.linears.get(parameter)
            if linear is None or matrix is None:
                return None
            obstacle = f"transformers changes it while loading ({target.conversion})"
            return LinearLayer(parameter, stem, matrix, False, self.skipped(parameter), linear.tower, obstacle)
        if module in self.linears:
            linear = self.linears[module]
            self._check_shape(spec, linear, path)
            obstacle = f"a {linear.unpackable}, which computes more than a linear layer" if linear.unpackable else ""
            skipped = self.skipped(module)
            return LinearLayer(module, stem, linear.shape, linear.transposed, skipped, linear.tower, obstacle)
        if module in self.embeddings and matrix:
            return LinearLayer(module, stem, matrix, skipped=Skipped.EMBEDDING)
        return None

    def _check_shape(self, spec: TensorSpec, linear: Linear, path: str) -> None:
        if spec.shape != linear.stored:
            raise CheckpointError(
                f"{path}: tensor {spec.name!r} has shape {list(spec.shape)}, and {self.name} with this config.json "
                f"wants {list(linear.stored)}"
            )

    def skipped(self, module: str) -> Skipped | None:
        """Say why a linear layer is left alone unless it is asked for; `None` where it is not."""
        leaf = module.rpartition(".")[2]
        if module == self.head or leaf in _HEAD_NAMES:
            return Skipped.HEAD
        linear = self.linears.get(module) or self.stacks.get(module)
        tower = linear.tower if linear is not None else ""
        if self.base and not module.startswith(self.base + ".") and tower in ("", module):
            return Skipped.HEAD
        if tower:
            return Skipped.TOWER
        return Skipped.ROUTER if leaf in ROUTER_NAMES else None

    def is_linear(self, spec: TensorSpec, layer: LinearLayer | None, target: Target) -> bool:
        """Whether a stored tensor is the weight of a linear layer, or of the experts of a layer."""
        if layer is not None:
            return not layer.embedding
        module, _, leaf = target.parameter.rpartition(".")
        matrices = len(spec.shape) > 1 and not leaf.endswith("bias")
        return matrices and (bool(target.experts) or module in self.experts)

    def describe(self, spec: TensorSpec, target: Target) -> str:
        """Say what a tensor is that is no linear weight, where that is worth a word."""
        module = target.name.removesuffix(_WEIGHT)
        leaf = module.rpartition(".")[2]
        if module in self.embeddings:
            return Skipped.EMBEDDING.value
        if leaf in _HEAD_NAMES:
            return Skipped.HEAD.value
        if leaf in ROUTER_NAMES and len(spec.shape) == 2:
            return Skipped.ROUTER.value
        if not target.known:
            return "not in the model that config.json describes"
        if self.is_linear(spec, None, target):
            changed = f", which transformers changes while loading ({target.conversion})" if target.conversion else ""
            return f"fused experts{changed}"
        return "" if len(spec.shape) < 2 or spec.name.endswith("bias") else "not a linear layer"
