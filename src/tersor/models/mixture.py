"""The experts of a layer: a router's logits choose, and all that is chosen runs at once where kernels have it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from tersor import ops
from tersor.hardware import has_grouped_kernel
from tersor.kernels.deciding import MOST_NORMED_CHANNELS
from tersor.layouts import Stacked
from tersor.models.config import Experts
from tersor.models.norm import NormWeights, gain_of
from tersor.models.weights import FeedForward, Product, Stack, tensors_of
from tersor.nn.experts import one_by_one
from tersor.ops import Gate, routing
from tersor.ops.tables import Tables

_BLOCK_TOKENS = 64
"""Of tables that are read here for their order alone."""


@dataclass(frozen=True, slots=True)
class Mixture:
    """Experts, of which a router chooses some for every token, and those that all tokens share.

    Attributes:
        form: how many, and how they are chosen.
        gate: how gate and up become one.
        router: gives a logit for each expert; what is plain of it may be float32 where the form is wide.
        gate_up: [E, gated_rows(F), H] packed with gate and up interleaved, if `down` is packed too; else [E, 2 F, H]
            with those of the gate first.
        down: [E, H, F].
        gate_up_bias, down_bias: [E, rows] in the order of the rows and [E, H], or `None`.
        choice_bias: [E], takes part in the choice alone, or `None`.
        shared: every token goes through it, or `None`.
        first: the first of the E experts that stacks and biases are of, where other ranks have others. What is chosen
            of those adds nothing here, and all ranks add up.
    """

    form: Experts
    gate: Gate
    router: Product
    gate_up: Stack
    down: Stack
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    choice_bias: torch.Tensor | None = None
    shared: FeedForward | None = None
    first: int = 0

    @property
    def held(self) -> int:
        """How many experts are here."""
        return self.down.shape[0]

    def __call__(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        norm: NormWeights | None = None,
        behind: ops.Gain | None = None,
    ) -> torch.Tensor | ops.Normed:
        """Return [T, H] of x [T, H], with `residual` added.

        Args:
            x: what experts and router read, before the norm where there is one.
            residual: [T, H] or `None`.
            norm: what x goes through first, or `None`.
            behind: what the result goes through next, or `None`: where a kernel does that at once, both are returned.
        """
        gain = None if norm is None else gain_of(norm, MOST_NORMED_CHANNELS)
        if norm is not None and gain is None:
            x, norm = norm(x), None
        decided = self._decided(x, gain)
        if decided is not None:
            assert isinstance(self.gate_up, Stacked) and isinstance(self.down, Stacked)
            addend = residual if self.shared is None else self.shared(decided.x, residual)
            biases = {"gate_up_bias": self.gate_up_bias, "down_bias": self.down_bias}
            return ops.decided_experts(decided, self.gate_up, self.down, addend=addend, behind=behind, **biases)
        x = x if norm is None else norm(x)
        logits = self._logits(x)
        addend = residual if self.shared is None else self.shared(x, residual)
        if self.held < self.form.count:
            return self._some(x, logits, addend)
        if isinstance(self.gate_up, Stacked) and isinstance(self.down, Stacked):
            return ops.routed_experts(
                x,
                logits,
                self.gate_up,
                self.down,
                choice_bias=self.choice_bias,
                gate_up_bias=self.gate_up_bias,
                down_bias=self.down_bias,
                addend=addend,
                gate=self.gate,
                **self._choice(),
            )
        if isinstance(self.gate_up, torch.Tensor) and isinstance(self.down, torch.Tensor) and self._aligned:
            index, weights, tables = routing.route_tables(
                logits, block_tokens=_BLOCK_TOKENS, bias=self.choice_bias, **self._choice()
            )
            return self._grouped(x, index, weights, tables, self.gate_up, self.down, addend)
        index, weights = ops.route(logits, bias=self.choice_bias, **self._choice())
        y = one_by_one(x, index, weights, self.held, self._run)
        return y if addend is None else y + addend

    def _some(self, x: torch.Tensor, logits: torch.Tensor, addend: torch.Tensor | None) -> torch.Tensor:
        """Run the chosen experts that are here; of tokens that have none of these only the addend is left."""
        index, weights = ops.route(logits, bias=self.choice_bias, **self._choice())
        index = index - self.first  # those of other ranks are no experts here
        if isinstance(self.gate_up, Stacked) and isinstance(self.down, Stacked):
            biases = {"gate_up_bias": self.gate_up_bias, "down_bias": self.down_bias}
            return ops.experts(x, self.gate_up, self.down, index, weights, addend=addend, gate=self.gate, **biases)
        if isinstance(self.gate_up, torch.Tensor) and isinstance(self.down, torch.Tensor) and self._aligned:
            tables = routing.tables(index, self.held, _BLOCK_TOKENS)
            return self._grouped(x, index, weights, tables, self.gate_up, self.down, addend)
        y = one_by_one(x, index, weights, self.held, self._run)
        return y if addend is None else y + addend

    def _decided(self, x: torch.Tensor, norm: ops.Gain | None) -> ops.Decision | None:
        """Return what one launch decides of x [T, H], before a norm if there is one; `None` where none does that."""
        router, gate_up, down = self.router, self.gate_up, self.down
        if not isinstance(router.weight, torch.Tensor) or self.held < self.form.count:
            return None
        if not isinstance(gate_up, Stacked) or not isinstance(down, Stacked):
            return None
        return ops.decide(
            x,
            (router.weight, router.bias),
            (gate_up, down),
            gate=self.gate,
            wide=self.form.wide,
            norm=norm,
            bias=self.choice_bias,
            **self._choice(),
        )

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the router makes of x [T, H]: [T, E], in float32 where its form is wide."""
        weight, wide = self.router.weight, self.form.wide
        if not isinstance(weight, torch.Tensor):
            return self.router(x.float() if wide else x)
        return ops.router_logits(x, weight, self.router.bias, wide=wide)

    @property
    def _aligned(self) -> bool:
        """Whether rows of plain weights are what torch's grouped product takes."""
        plain = [weight for weight in (self.gate_up, self.down) if isinstance(weight, torch.Tensor)]
        return all(weight.shape[2] * weight.itemsize % 16 == 0 for weight in plain)

    def _grouped(
        self,
        x: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        tables: Tables,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        addend: torch.Tensor | None,
    ) -> torch.Tensor:
        """Run plain experts by torch's grouped products over tokens that are sorted by expert."""
        top_k, count = self.form.top_k, self.held
        order = tables.order.long()
        experts = index.view(-1)[order]
        if count < self.form.count:  # pairs of no expert here are the last, and rows of theirs are read by nobody
            here = (experts >= 0) & (experts < count)
            experts, known = torch.where(here, experts, count), torch.where(here, experts, 0)
        else:
            known = experts
        numbers = torch.arange(count, dtype=experts.dtype, device=x.device)
        ends = torch.searchsorted(experts, numbers, right=True, out_int32=True)
        both = functional.grouped_mm(x[order // top_k], gate_up.transpose(1, 2), offs=ends)
        if self.gate_up_bias is not None:
            both = both + self.gate_up_bias[known]
        inner = ops.gated(both, self.gate)
        y = functional.grouped_mm(inner, down.transpose(1, 2), offs=ends)
        if self.down_bias is not None:
            y = y + self.down_bias[known]
        return routing.combine(y, weights, tables, addend)

    def _choice(self) -> dict[str, Any]:
        """Return the arguments of `ops.route` that say how experts are chosen."""
        form = self.form
        return {
            "top_k": form.top_k,
            "scoring": form.scoring,
            "normalize": form.normalize,
            "groups": form.groups,
            "top_groups": form.top_groups,
            "scale": form.scale,
        }

    def waits(self, dtype: torch.dtype) -> str:
        """Return why the host waits for the router's choice beside activations of `dtype`, or an empty string."""
        if isinstance(self.gate_up, Stacked) and isinstance(self.down, Stacked):
            x = torch.empty(1, self.gate_up.shape[2], dtype=dtype, device=self.down.device)
            return ops.experts_obstacle(x, self.gate_up, self.down)
        if not isinstance(self.gate_up, torch.Tensor) or not isinstance(self.down, torch.Tensor):
            return "only one of the two weights of its experts is packed"
        if not self._aligned:
            return "rows of the weights of its experts are no multiple of 16 bytes"
        if dtype is torch.bfloat16 and has_grouped_kernel(self.down):
            return ""
        return "torch has no kernel for the experts of such a device and dtype"

    def _run(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        inner = ops.gated(_product(self.gate_up, self.gate_up_bias, expert, x), self.gate)
        return _product(self.down, self.down_bias, expert, inner)

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield every tensor in memory."""
        yield from self.router.tensors()
        yield from tensors_of(self.gate_up, self.down, self.gate_up_bias, self.down_bias, self.choice_bias)
        yield from () if self.shared is None else self.shared.tensors()


def _product(stack: Stack, bias: torch.Tensor | None, expert: int, x: torch.Tensor) -> torch.Tensor:
    own = None if bias is None else bias[expert]
    if isinstance(stack, torch.Tensor):
        return functional.linear(x, stack[expert], own)
    return ops.linear(x, stack.expert(expert), own)
