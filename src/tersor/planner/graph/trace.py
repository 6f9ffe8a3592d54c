"""A module with example inputs becomes a graph: torch.export, a few decompositions, and the rules' names.

Decompositions stop at operators whose rule knows more than that of their pieces: a linear, attention, norms. The loss
over classes is taken apart further than torch does, so that its mean over rows can be cut.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tersor.errors import InputError
from tersor.planner.graph.ir import Call, Graph, Operator, Slot, Value
from tersor.planner.graph.names import Named, settle
from tersor.planner.graph.rules import signature_of

KEPT = (
    "linear.default",
    "layer_norm.default",
    "rms_norm.default",
    "group_norm.default",
    "scaled_dot_product_attention.default",
    "gelu.default",
    "silu.default",
    "softmax.int",
    "log_softmax.int",
)
"""Operators of aten that are not taken apart."""


def trace(module: torch.nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Graph:
    """Return the graph of what a module computes of these inputs; their sizes are what it is planned for.

    Nothing is computed: parameters may be on the meta device.

    Raises:
        InputError: torch.export cannot trace the module, or a size depends on data.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(module, tuple(args), dict(kwargs or {}), strict=False)
            program = program.run_decompositions(_decompositions())
    except Exception as error:  # whatever the module's own code and torch raise
        raise InputError(f"cannot trace {type(module).__name__}: {_first_line(error)}") from error
    return _Reader(program).graph()


def _first_line(error: Exception) -> str:
    """Return the first line of an error that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _decompositions() -> Any:
    table = torch.export.default_decompositions()
    aten = torch.ops.aten
    for name in KEPT:
        packet, overload = name.split(".")
        table.pop(getattr(getattr(aten, packet), overload), None)
    table[aten.nll_loss_forward.default] = _nll_loss
    return table


def _nll_loss(
    scores: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, reduction: int, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of log probabilities [rows, classes] or [classes] as a gather and sums: (loss, weight of all rows)."""
    known = target != ignore_index
    safe = torch.where(known, target, torch.zeros_like(target))
    picked = -torch.gather(scores, -1, safe.unsqueeze(-1)).squeeze(-1)
    weights = known.to(scores.dtype)
    if weight is not None:
        weights = weights * torch.index_select(weight, 0, safe.flatten()).view_as(safe)
    losses, total = picked * weights, weights.sum()
    if reduction == 0:
        return losses, total
    return (losses.sum() / total if reduction == 1 else losses.sum()), total


class _Reader:
    """Reads an exported program node by node."""

    def __init__(self, program: Any) -> None:
        self.program = program
        self.values: dict[str, Value] = {}
        self.named: list[tuple[str, str, Named]] = []
        self.of_node: dict[str, list[str]] = {}
        self.constants: dict[str, torch.Tensor] = {}
        self.inputs: list[str] = []
        self.tensors: dict[int, str] = {}

    def graph(self) -> Graph:
        """Return the graph."""
        outputs: list[str] = []
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                self._placeholder(node)
            elif node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                wanted = set(self.program.graph_signature.user_outputs)
                outputs = [
                    self.of_node[item.name][0]
                    for item in _nodes(node.args)
                    if item.name in wanted and self.of_node.get(item.name)
                ]
            else:
                raise InputError(f"cannot plan {node.name}: {node.op} of {node.target}")
        parts = settle(
            [named for _, _, named in self.named], {name: value.shape for name, value in self.values.items()}
        )
        values = {
            name: Value(name, value.shape, value.dtype, value.role, parts[name], value.path)
            for name, value in self.values.items()
        }
        operators = tuple(operator_of(name, path, named) for name, path, named in self.named)
        return Graph(operators, values, tuple(self.inputs), tuple(dict.fromkeys(outputs)), self.constants)

    def _placeholder(self, node: Any) -> None:
        signature, name = self.program.graph_signature, node.name
        fake = node.meta.get("val")
        if not isinstance(fake, torch.Tensor):
            self.of_node[name] = []
            return
        role, path = "input", ""
        if name in signature.inputs_to_parameters:
            role, path = "parameter", signature.inputs_to_parameters[name]
            first = self.tensors.setdefault(id(self.program.state_dict[path]), name)
            if first != name:  # one parameter under two names
                self.of_node[name] = [first]
                return
        elif name in signature.inputs_to_buffers:
            role, path = "buffer", signature.inputs_to_buffers[name]
        elif name in signature.inputs_to_lifted_tensor_constants:
            role, path = "constant", signature.inputs_to_lifted_tensor_constants[name]
            self.constants[name] = self.program.constants[path]
        else:
            self.inputs.append(name)
        self._value(name, fake, role, path)
        self.of_node[name] = [name]

    def _value(self, name: str, fake: torch.Tensor, role: str = "activation", path: str = "") -> None:
        if not all(isinstance(size, int) for size in fake.shape):
            raise InputError(f"cannot plan {name}: its sizes {list(fake.shape)} depend on data")
        self.values[name] = Value(name, tuple(fake.shape), fake.dtype, role, (), path)

    def _call(self, node: Any) -> None:
        if getattr(node.target, "__name__", "") == "getitem" and isinstance(node.args[1], int):
            made = self.of_node[node.args[0].name]
            self.of_node[node.name] = [made[node.args[1]]]
            return
        fake = node.meta.get("val")
        tensors = list(fake) if isinstance(fake, (tuple, list)) else [fake]
        if not tensors or not all(isinstance(item, torch.Tensor) for item in tensors):
            if any(isinstance(item, (torch.SymInt, torch.SymFloat, torch.SymBool)) for item in tensors):
                raise InputError(f"cannot plan {node.name}: {node.target} reads numbers out of data")
            self.of_node[node.name] = []
            return
        inputs: list[str] = []

        def read(item: Any) -> Any:
            if isinstance(item, torch.fx.Node):
                inputs.append(self.of_node[item.name][0])
                return Slot(len(inputs) - 1)
            if isinstance(item, (list, tuple)):
                return type(item)(read(inner) for inner in item) if not isinstance(item, torch.Size) else item
            return item

        args = tuple(read(item) for item in node.args)
        kwargs = {key: read(item) for key, item in node.kwargs.items() if key not in ("device", "pin_memory")}
        names = [node.name] if len(tensors) == 1 and fake is tensors[0] else []
        names = names or [f"{node.name}.{index}" for index in range(len(tensors))]
        for name, tensor in zip(names, tensors, strict=True):
            self._value(name, tensor)
        self.of_node[node.name] = names
        shapes = tuple(self.values[name].shape for name in inputs)
        call = Call(node.target, args, kwargs, shapes, tuple(self.values[name].shape for name in names))
        self.named.append((node.name, _path(node), Named.begin(call, (*inputs, *names), signature_of(call))))


def operator_of(name: str, path: str, named: Named) -> Operator:
    """Return the operator of a call whose names are settled."""
    dims, sizes, cuts, sums = named.final()
    rule, count = named.signature, len(named.call.inputs)
    return Operator(
        name=name,
        kind=rule.kind,
        inputs=named.operands[:count],
        outputs=named.operands[count:],
        dims=dims,
        sizes=sizes,
        cuts=cuts,
        sums=sums,
        addends=rule.addends,
        linear=rule.linear,
        saves=rule.saves,
        flops=rule.flops,
        call=named.call,
        path=path,
        note=rule.note,
    )


def _nodes(items: Any) -> list[Any]:
    """Return the nodes among nested outputs."""
    if isinstance(items, torch.fx.Node):
        return [items]
    if isinstance(items, (list, tuple)):
        return [node for item in items for node in _nodes(item)]
    return []


def _path(node: Any) -> str:
    """Return the path of the innermost module whose call a node belongs to."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(list(stack.values())))[0] if stack else ""
    return re.sub(r"@\d+$", "", re.sub(r"^L\['self'\]\.?", "", path))
