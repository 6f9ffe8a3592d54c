"""A pipeline of a module: every rank holds its part of one stage, and stages hand values on, and gradients back.

Micro-batches go one forward, one backward (1F1B, as Megatron's and PipeDream's), so that a stage keeps as many as there
are stages from it to the last. A value goes from the stage that makes it to every later one that reads it, past those
between (the skips of a UNet, the encoder of a decoder), from each rank to the one at the same place of the other stage.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh

from tersor.errors import InputError, LostError
from tersor.nn.spread import Spread, tensors_in
from tersor.planner.graph.pipeline import StagedPlan
from tersor.planner.graph.training import reached

Loss = Callable[[Any], torch.Tensor]


def _agree(plan: StagedPlan) -> None:
    """Hold that all ranks have the same stages, cuts and sends: else one would wait for what none sends.

    Raises:
        InputError: they have not.
    """
    said = repr([(sorted(stage.plan.choice.items()), sorted(stage.sends.items())) for stage in plan.stages])
    own = hashlib.sha256(said.encode()).hexdigest()
    everyone: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyone, own)
    others = [rank for rank, one in enumerate(everyone) if one != everyone[0]]
    if others:
        raise InputError(f"rank {others[0]} has another plan than rank 0: make it once and give it to all")


class Staged(nn.Module):
    """A rank's part of a stage of a module.

    Attributes:
        stage: which stage it is.
        own: the rank's part of it, whose parameters an optimiser trains.
    """

    def __init__(self, module: nn.Module, plan: StagedPlan, mesh: DeviceMesh) -> None:
        """Take this rank's slices of the parameters of its stage; all ranks of the default group have to.

        Args:
            module: what was planned.
            plan: its stages.
            mesh: the devices, with the stages first and then the axes of a stage, all of them named.

        Raises:
            InputError: the mesh has other axes than the plan, or ranks were given different plans.
        """
        super().__init__()
        wanted = (len(plan.stages), *(axis.ranks for axis in plan.stages[0].plan.space.mesh))
        names = mesh.mesh_dim_names
        if tuple(mesh.shape) != wanted or names is None:
            raise InputError(
                f"the plan is for a mesh of {list(wanted)} named axes, and this one has {list(mesh.shape)}"
            )
        for number, stage in enumerate(plan.stages):
            axes = tuple(axis.ranks for axis in stage.plan.space.mesh)
            if axes != wanted[1:]:
                raise InputError(f"stage {number} is for a mesh of {list(axes)}, and stage 0 of {list(wanted[1:])}")
        _agree(plan)
        self.stage = mesh.get_local_rank(names[0])
        self._plan, own = plan, plan.stages[self.stage].plan
        self.own = Spread(module, own.space, own.choice, mesh[names[1:]])
        ranks = mesh.mesh.reshape(len(plan.stages), -1)
        place = int((ranks[self.stage] == distributed.get_rank()).nonzero()[0])
        self._peers = [int(rank) for rank in ranks[:, place]]
        # Both directions have a group of their own: one that waits to send on would hold up what it is to send back.
        self._on, self._back = (distributed.new_group(mesh.mesh.flatten().tolist()) for _ in range(2))
        self._line = mesh.get_group(names[0])
        self._trained = reached(plan.graph, ())
        self._sends = plan.stages[self.stage].sends
        graph = own.space.graph
        self._forward_graph = graph
        self._handed = sorted(name for name in graph.inputs if name not in plan.graph.inputs)
        self._made = {name: stage for stage, one in enumerate(plan.stages) for name in one.sends}
        self._numbers = {name: number for number, name in enumerate(sorted(self._made))}
        held = [{value.name for value in one.plan.space.graph.parameters} for one in plan.stages]
        self._tied = sorted(name for name in set().union(*held) if sum(name in one for one in held) > 1)
        self._sent: list[tuple[Any, torch.Tensor]] = []

    @property
    def last(self) -> bool:
        """Whether the outputs are here."""
        return self.stage == len(self._plan.stages) - 1

    def forward(self, *batches: Any) -> list[Any]:
        """Return the outputs of every micro-batch on ranks of the last stage, nothing on others.

        Args:
            batches: of each, the inputs that the module was traced with, nested as they like, on every rank.
        """
        with torch.no_grad():
            outputs = [self._on_way(number, batch)[1] for number, batch in enumerate(batches)]
        self._finish()
        return [one[0] if len(one) == 1 else tuple(one) for one in outputs] if self.last else []

    def step(self, *batches: Any, loss: Loss | None = None) -> list[torch.Tensor]:
        """Run micro-batches forward and backward; gradients are of the mean of their losses.

        Args:
            batches: as `forward` takes them, of one size.
            loss: of the outputs of a micro-batch; default: the first output.

        Returns:
            The losses on ranks of the last stage, nothing on others.
        """
        count, ahead = len(batches), min(len(self._plan.stages) - self.stage - 1, len(batches))
        flying: dict[int, tuple[dict[str, torch.Tensor], list[torch.Tensor]]] = {}
        losses: list[torch.Tensor] = []

        def forward(number: int) -> None:
            inputs, outputs = self._on_way(number, batches[number])
            if self.last:
                made = outputs[0] if len(outputs) == 1 else tuple(outputs)
                one = loss(made) if loss is not None else outputs[0]
                losses.append(one.detach())
                outputs = [one / count]
            flying[number] = inputs, outputs

        for number in range(ahead):
            forward(number)
        for number in range(count):
            if number + ahead < count:
                forward(number + ahead)
            self._way_back(number, *flying.pop(number))
        self._finish()
        self._add_tied()
        return losses

    def _on_way(self, number: int, batch: Any) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
        """Run a micro-batch; return what was handed to this stage, and its outputs."""
        graph, names, tensors = self._forward_graph, self._plan.graph.inputs, tensors_in(batch)
        if len(tensors) != len(names):
            raise InputError(f"the plan is for {len(names)} inputs, and {len(tensors)} are given")
        given = dict(zip(names, tensors, strict=True))
        handed: dict[str, torch.Tensor] = {}
        for name in self._handed:
            handed[name] = self._receive(name, self._made[name], number, self._on)
            if name in self._trained and torch.is_grad_enabled():
                handed[name].requires_grad_()
        made = self.own(*(handed.get(name, given.get(name)) for name in graph.inputs))
        outputs = list(made) if isinstance(made, tuple) else [made]
        for name, output in sorted(zip(graph.outputs, outputs, strict=True), key=lambda pair: pair[0]):
            for to in self._sends.get(name, ()):
                self._send(name, output.detach(), to, number, self._on)
        return handed, outputs

    def _way_back(self, number: int, handed: dict[str, torch.Tensor], outputs: list[torch.Tensor]) -> None:
        """Run a micro-batch backward: gradients come from the stages that read outputs, and go to those that made."""
        roots: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        if self.last:
            roots = [(outputs[0], None)]
        else:
            for name, output in sorted(zip(self._forward_graph.outputs, outputs, strict=True), key=lambda one: one[0]):
                if name not in self._trained:
                    continue
                found = [self._receive(name, of, number, self._back) for of in self._sends[name]]
                roots.append((output, torch.stack(found).sum(dim=0) if len(found) > 1 else found[0]))
        roots = [pair for pair in roots if pair[0].requires_grad]
        if roots:
            torch.autograd.backward([root for root, _ in roots], [gradient for _, gradient in roots])
        for name, tensor in handed.items():
            if name in self._trained:
                gradient = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
                self._send(name, gradient, self._made[name], number, self._back)

    def _tag(self, name: str, number: int) -> int:
        return number * len(self._numbers) + self._numbers[name]

    def _send(self, name: str, tensor: torch.Tensor, stage: int, number: int, group: Any) -> None:
        tensor = tensor.contiguous()
        work = _reached(lambda: distributed.isend(tensor, self._peers[stage], group, self._tag(name, number)))
        self._sent.append((work, tensor))  # what is sent stays until it has gone

    def _receive(self, name: str, stage: int, number: int, group: Any) -> torch.Tensor:
        value = self._plan.graph.values[name]
        tensor = torch.empty(value.shape, dtype=value.dtype, device=self.own.device)
        _reached(lambda: distributed.recv(tensor, self._peers[stage], group, self._tag(name, number)))
        return tensor

    def _finish(self) -> None:
        """Wait until everything that was sent has gone."""
        for work, _ in self._sent:
            _reached(work.wait)
        self._sent.clear()

    def _add_tied(self) -> None:
        """Add up the gradients of parameters that several stages hold."""
        for name in self._tied:
            value = self._plan.graph.values[name]
            mine = self.own.gradient(name)
            whole = torch.zeros(value.shape, dtype=value.dtype, device=self.own.device) if mine is None else mine
            whole = whole.contiguous()
            _reached(lambda: distributed.all_reduce(whole, group=self._line))  # noqa: B023
            self.own.put_gradient(name, whole)


def _reached(call: Callable[[], Any]) -> Any:
    """Call what exchanges with another rank; one that cannot be reached is one clear line."""
    try:
        return call()
    except RuntimeError as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise LostError(f"a rank of the plan cannot be reached: {lines[0]}") from error
