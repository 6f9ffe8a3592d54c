"""A router hands its logits on to packed experts, which choose by them in the launch that multiplies.

transformers' blocks give what a router returns, weights and numbers of the chosen experts, to the experts as they are.
Where a block does nothing else with them, and the router chooses as `ops.route` can, both places hold the logits
instead; the router still returns them as its logits, which hooks record.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any

import torch
from torch import nn

from tersor.integrations.transformers.experts import PackedExperts
from tersor.integrations.transformers.fused_experts import FusedExperts
from tersor.integrations.transformers.router_form import RouterForm, is_router, router_form

_RESULTS = 3
"""What a router returns: logits, weights, numbers."""


class Chooser:
    """Stands for the forward of a router whose experts choose by its logits.

    Attributes:
        router: the module, which keeps its weight and its class.
        form: how it chooses.
        block, name: the module that holds the experts, and what it calls them.
        experts: those that choose by logits; a block that has got others gives them what the router returns.
    """

    def __init__(self, router: nn.Module, form: RouterForm, block: nn.Module, name: str) -> None:
        """Stand in front of a router of a block, whose experts are called so."""
        self.router, self.form = router, form
        self.block, self.name, self.experts = block, name, block.get_submodule(name)
        router.forward = self

    def __call__(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the logits [T, E] of hidden states [..., H] three times; with gradients what the router returns."""
        others = self.block._modules.get(self.name) is not self.experts
        if others or torch.is_grad_enabled() or hidden_states.dtype is torch.float64:
            returned: tuple[torch.Tensor, ...] = type(self.router).forward(self.router, hidden_states)
            return returned
        return (self.form.logits(self.router, hidden_states),) * _RESULTS

    @property
    def options(self) -> dict[str, Any]:
        """How experts are chosen, as `ops.routed_experts` has it."""
        return self.form.options(self.router)

    def route(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the index int32 [T, K] of logits [T, E] and the weights float32 [T, K]."""
        return self.form.route(self.router, logits)

    def release(self) -> None:
        """Let the router run its own forward again."""
        if vars(self.router).get("forward") is self:
            del self.router.forward


def choose_by_logits(model: nn.Module) -> None:
    """Let the experts of a model that run as one operator choose by logits, wherever that computes the same."""
    for name, experts in list(model.named_modules()):
        if not isinstance(experts, PackedExperts | FusedExperts) or experts.chooser is not None or not experts.joins:
            continue
        owner, _, own = name.rpartition(".")
        block = model.get_submodule(owner)
        form = experts.form
        for child, router in block.named_children():
            patched = "forward" in vars(router)  # by accelerate, to move what it is given
            if not patched and is_router(router, form.count, form.hidden) and hands_on(type(block), child, own):
                found = router_form(router)
                experts.chooser = None if found is None else Chooser(router, found, block, own)


def hands_on(block: type[nn.Module], router: str, experts: str) -> bool:
    """Whether a block gives what its router returns to its experts, and does nothing else with it.

    Args:
        block: its class.
        router, experts: names of the two in it.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(block.forward)))
    except (OSError, TypeError, SyntaxError):
        return False
    routed, given = _calls(tree, router), _calls(tree, experts)
    targets = [
        node.targets[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and node.value in routed
    ]
    if len(routed) != 1 or len(given) != 1 or len(targets) != 1 or not isinstance(targets[0], ast.Tuple):
        return False
    names = [one.id for one in targets[0].elts if isinstance(one, ast.Name)]
    if len(names) != _RESULTS or len(set(names)) != _RESULTS:
        return False
    _, weights, index = names
    arguments = given[0].args
    handed = [one.id if isinstance(one, ast.Name) else "" for one in arguments[1:]]
    uses = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id in (weights, index)]
    return handed == [index, weights] and not given[0].keywords and len(uses) == 2 * len(handed)


def _calls(tree: ast.AST, name: str) -> list[ast.Call]:
    """Return where the module called `name` of a block is called."""
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == name
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "self"
    ]
