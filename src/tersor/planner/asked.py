"""What is a plan asked for? A model, devices and work, at which prices, by which objective, and among which axes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from tersor.planner import served
from tersor.planner.cost import Kernels
from tersor.planner.links import Links
from tersor.planner.made import LATENCY
from tersor.planner.mesh import Axes, Mesh, factorisations
from tersor.planner.parts import Model, Workload
from tersor.planner.ways import DECODE, Setting

_MOST_TENSOR = 128


@dataclass(frozen=True)
class Asked:
    """What a plan is asked for.

    Attributes:
        model, mesh, workload: see there.
        kernels, links: prices.
        objective: `latency` or `throughput`.
        method: name of a search.
        served: whether the engine has to run the plan (`served`).
        data, pipeline, tensor: ranks along these axes, where they are not to be chosen.
    """

    model: Model
    mesh: Mesh
    workload: Workload
    kernels: Kernels
    links: Links
    objective: str = LATENCY
    method: str = "fast"
    served: bool = False
    data: int | None = None
    pipeline: int | None = None
    tensor: int | None = None

    def setting(self, axes: Axes) -> Setting:
        """Return the model on axes."""
        return Setting(self.model, axes, self.workload, self.kernels, self.links, self.served)

    def ruled(self, axes: Axes) -> Setting:
        """Return the same for plans by rule, which may be of what the engine does not run."""
        return replace(self.setting(axes), served=False)

    def value(self, axes: Axes, step: float) -> float:
        """Return what a bound of a step's seconds is a bound of: a step, or a device's seconds for a token."""
        if self.objective == LATENCY:
            return step
        if DECODE in self.workload.phases:
            return step * self.mesh.devices / (axes.data * self.workload.batch)
        return step / axes.pipeline * self.mesh.devices / (axes.data * self.workload.prompt)

    @property
    def free(self) -> bool:
        """Whether all that is known may be searched."""
        return not self.served and (self.data, self.pipeline, self.tensor) == (None, None, None)

    def candidates(self) -> Iterator[tuple[Axes, int]]:
        """Yield axes and micro-batches of a decode step: one, and as many as the engine makes (`served.under_way`)."""
        experts = max((kind.experts.count for kind in self.model.kinds if kind.experts), default=0)
        experts = 0 if self.served else experts  # of several replicas
        for found in factorisations(self.mesh, len(self.model.layers), _MOST_TENSOR, experts):
            axes = found if self.data is None or self.data > found.data else replace(found, data=self.data)
            wanted = (self.data, axes.data), (self.pipeline, axes.pipeline), (self.tensor, axes.tensor)
            if any(own not in (None, other) for own, other in wanted) or axes.data % axes.expert:
                continue
            parts = served.under_way(axes.pipeline, self.workload.batch, self.workload.phases)
            if parts == 1 or not self.served:
                yield axes, 1
            if parts > 1:
                yield axes, parts
