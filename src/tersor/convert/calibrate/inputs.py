"""What does a layer read? A block is run as far as the layer, and its input is taken."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tersor.convert.calibrate.tasks import Site
from tersor.integrations.transformers.blocks import BlockModel, Call
from tersor.integrations.transformers.experts_form import ExpertsForm, apply_gate, experts_form


@dataclass(frozen=True, slots=True)
class Group:
    """Sites of a block that read the same input, so that they are compressed together: q, k and v, or gate and up."""

    sites: tuple[Site, ...]

    @property
    def part(self) -> str:
        """As `Site.part`, of all of them."""
        return self.sites[0].part


class _Enough(Exception):
    """Ends a forward of which nothing more is needed."""


@contextlib.contextmanager
def watched(
    layer: nn.Module, modules: Iterable[str], take: Callable[[str, list[torch.Tensor]], object]
) -> Iterator[None]:
    """Call `take` with a module's name and the tensors that it is called with, before it computes."""

    def hook(name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            take(name, [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)])

        return look

    handles = [layer.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True) for name in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def find_groups(
    model: BlockModel, layer: nn.Module, sites: Iterable[Site], hidden: torch.Tensor, call: Call
) -> list[Group]:
    """Return a block's sites in the order in which they run, those with the same input in one group.

    A site that does not run is in no group.

    Args:
        model: runs the block.
        layer: the block.
        sites: where its layers read.
        hidden: [B, T, H], what the block reads.
        call: the rest of it.
    """
    seen: dict[str, torch.Tensor] = {}
    wanted = set(sites)
    with watched(layer, {site.module for site in wanted}, lambda name, tensors: seen.setdefault(name, tensors[0])):
        model.run(layer, hidden, call)
    groups: list[list[Site]] = []
    before: torch.Tensor | None = None
    for module, read in seen.items():
        parts = [part for part in ("", "in", "down") if Site(module, part) in wanted]
        for part in parts:
            # All that was read is still in memory, so that one address is one tensor.
            same = before is not None and (before.data_ptr(), before.numel()) == (read.data_ptr(), read.numel())
            if same and not part and not groups[-1][0].part:
                groups[-1].append(Site(module))
            else:
                groups.append([Site(module, part)])
        before = read
    return [Group(tuple(group)) for group in groups]


def inputs_of(
    model: BlockModel, layer: nn.Module, group: Group, hidden: torch.Tensor, call: Call
) -> list[torch.Tensor]:
    """Run a block until a group's input is there, and return the tensors that its first module is called with."""
    found: list[torch.Tensor] = []
    first = group.sites[0].module

    def take(name: str, tensors: list[torch.Tensor]) -> None:
        found.extend(tensors)
        raise _Enough

    with contextlib.suppress(_Enough), watched(layer, [first], take):
        model.run(layer, hidden, call)
    return found


class ExpertInputs:
    """What each expert of a layer reads, of the tokens that a router sends to it."""

    def __init__(self, experts: Any, part: str) -> None:
        """Take a module of experts as transformers writes it, and `in` or `down`.

        Raises:
            UnsupportedError: it computes something else than gate, up and down.
        """
        self._experts = experts
        self._part = part
        self._form = experts_form(experts)

    @property
    def form(self) -> ExpertsForm:
        """What the experts compute."""
        return self._form

    @property
    def count(self) -> int:
        """How many experts there are."""
        return self._form.count

    def weight(self, expert: int, name: str) -> torch.Tensor:
        """Return an expert's weight [OC, IC] of a name in `ExpertsForm.names`."""
        weight: torch.Tensor = getattr(self._experts, name)[expert]
        return weight.T if self._form.transposed else weight

    def tokens(self, tensors: list[torch.Tensor]) -> int:
        """Return of how many tokens a call is."""
        rows = tensors[0].numel() // self._form.hidden
        return rows // self._form.count if self._form.every_token else rows

    def rows(self, tensors: list[torch.Tensor], expert: int) -> torch.Tensor:
        """Return the numbers of an expert's tokens among those that the experts are called with.

        Args:
            tensors: what the experts are called with: hidden states [T, H], then the router's choice, int64 [T, K].
            expert: its number.
        """
        hidden = tensors[0].reshape(-1, self._form.hidden)
        if self._form.every_token:
            each = len(hidden) // self._form.count
            first = expert * each
            return first + hidden[first : first + each].any(dim=-1).nonzero().flatten()
        return (self._choice(tensors).reshape(len(hidden), -1) == expert).any(dim=-1).nonzero().flatten()

    def factors(self, tensors: list[torch.Tensor], expert: int, rows: torch.Tensor) -> torch.Tensor:
        """Return what the router multiplies an expert's output for these rows by, [N]."""
        if self._form.every_token:
            return tensors[0].new_ones(len(rows))
        chosen = self._choice(tensors)
        weights = next(tensor for tensor in tensors[1:] if tensor.is_floating_point()).reshape(chosen.shape)
        chosen, weights = (one.reshape(-1, chosen.shape[-1])[rows] for one in (chosen, weights))
        return (weights * (chosen == expert)).sum(dim=-1)

    @staticmethod
    def _choice(tensors: list[torch.Tensor]) -> torch.Tensor:
        return next(tensor for tensor in tensors[1:] if not tensor.is_floating_point())

    def of(self, tensors: list[torch.Tensor], expert: int, rows: torch.Tensor) -> torch.Tensor:
        """Return what an expert's layer reads of these rows, [N, IC]."""
        if self._part == "in":
            return tensors[0].reshape(-1, self._form.hidden)[rows]
        return self.activated(self.both(tensors, expert, rows))

    def both(self, tensors: list[torch.Tensor], expert: int, rows: torch.Tensor) -> torch.Tensor:
        """Return the output of an expert's gate and up for these rows, in the order of its weight."""
        both = tensors[0].reshape(-1, self._form.hidden)[rows] @ self.weight(expert, self._form.fused).T
        return both + getattr(self._experts, f"{self._form.fused}_bias")[expert] if self._form.biased else both

    def activated(self, both: torch.Tensor) -> torch.Tensor:
        """Return what the experts make of the output of gate and up."""
        if not self._form.gated:
            activated: torch.Tensor = self._experts.act_fn(both)
            return activated
        return apply_gate(self._experts)(both)
