"""How do the experts of a model run in a decode step that is to be a CUDA graph?

A graph can hold no step in which the host waits for the router's choice. transformers runs the experts of a plain
mixture in one of several ways (`config._experts_implementation`): one expert after the other (`eager`), which waits; by
torch's grouped product (`grouped_mm`), which waits where torch has no kernel for it; by a batched product of copied
weights (`batched_mm`), which never does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from tersor.hardware import has_grouped_kernel
from tersor.integrations.transformers.experts import PackedExperts
from tersor.integrations.transformers.experts_form import is_experts
from tersor.integrations.transformers.fused_experts import FusedExperts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GROUPED, BATCHED, EAGER = "grouped_mm", "batched_mm", "eager"


class StepExperts:
    """How the experts of a model run in decode steps.

    Attributes:
        obstacle: why the host waits for the router's choice in a step, or an empty string.
    """

    def __init__(self, model: PreTrainedModel, graph: bool) -> None:
        """Look at the experts of a model: their kind, dtype and device, and what its config says of them.

        Args:
            model: a causal language model of transformers.
            graph: whether steps are to be a graph; else experts run as they are.
        """
        self.obstacle = ""
        self._configs: list[Any] = []
        for name, module in model.named_modules() if graph else ():
            why = ""
            if isinstance(module, PackedExperts | FusedExperts):
                why = module.waits(model.dtype)
            elif is_experts(module) and isinstance(module.down_proj, torch.Tensor):
                why = self._plain(module)
            if why and not self.obstacle:
                self.obstacle = f"{name} runs one expert after the other: {why}"

    def _plain(self, experts: Any) -> str:
        config = getattr(experts, "config", None)
        way = getattr(config, "_experts_implementation", EAGER)
        if not hasattr(experts, "has_gate"):
            return f"{type(experts).__name__} has no other way"
        if way == EAGER:
            return f"load the model with experts_implementation={GROUPED!r}"
        new = all(config is not known for known in self._configs)
        if new and way == GROUPED and not has_grouped_kernel(experts.down_proj):
            self._configs.append(config)
        return ""

    @contextmanager
    def step(self) -> Iterator[None]:
        """Run experts in a way that does not wait, where the model's own way would and another is there."""
        for config in self._configs:
            config._experts_implementation = BATCHED
        try:
            yield
        finally:
            for config in self._configs:
                config._experts_implementation = GROUPED
