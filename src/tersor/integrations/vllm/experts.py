"""The experts of a layer of vLLM with packed weights: all of them in two stacks, run as one operator."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tersor import ops
from tersor.errors import CheckpointError, ShapeError
from tersor.formats import Activations
from tersor.integrations.vllm import compat, memory
from tersor.integrations.vllm.arriving import Piece, Place, make_together, raise_missing
from tersor.integrations.vllm.handed import Handed
from tersor.integrations.vllm.plan import Stored
from tersor.integrations.vllm.stacks import BIAS, DOWN, GATE, UP, Stack
from tersor.layouts import MixedWeight, PackedWeight, Stacked, StackedMixedWeight, StackedWeight, sets_of
from tersor.layouts.shard import Part
from tersor.models.weights import Matrix

_SHARDS = ("w1", "w3", "w2")
"""What vLLM calls gate, up and down."""
_PREFIXES = {"w1": "w13_", "w3": "w13_", "w2": "w2_"}
_CALLED = {GATE: "w1", UP: "w3", DOWN: "w2"}
_TOGETHER = 256 << 20
"""Bytes of plain weights that are packed at once: many small matrices take as many launches as one."""


class Stacks(nn.Module):
    """The weights of all experts of a rank, as `ops.experts` takes them.

    Attributes:
        gate_up, down: gate and up interleaved, and down.
        gate_up_bias, down_bias: [E, rows] likewise and [E, H], or `None`.
    """

    gate_up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None

    def __init__(self, gate_up: Stacked, down: Stacked) -> None:
        """Hold the weights, whose tensors are buffers."""
        super().__init__()
        self.gate_up, self.down = gate_up, down
        self.hold(None, None)
        for name, weight in (("gate_up", gate_up), ("down", down)):
            for place, one in enumerate(sets_of(weight)):
                self.register_buffer(f"{name}_{place}_data", one.data, persistent=False)
                self.register_buffer(f"{name}_{place}_scale", one.scale, persistent=False)

    def hold(self, gate_up_bias: torch.Tensor | None, down_bias: torch.Tensor | None) -> None:
        """Hold biases in place of those that are held."""
        for name, bias in (("gate_up_bias", gate_up_bias), ("down_bias", down_bias)):
            self.register_buffer(name, bias, persistent=False)


class TersorExpertsMethod(compat.FusedMoEMethodBase):
    """Waits for the stored weights of a layer's experts, and runs tokens through those that the router chose."""

    def __init__(
        self,
        moe: Any,
        stored: Mapping[str, Stored],
        projections: Sequence[str],
        activations: Activations,
        stacks: Sequence[Stack] = (),
    ) -> None:
        """Take what is known of the experts.

        Args:
            moe: vLLM's configuration of the layer.
            stored: projection -> how that weight of every expert is stored.
            projections: names of gate, up and down.
            activations: what weights are multiplied with.
            stacks: the tensors of all experts that are handed over as they are, gate and up first, or none.
        """
        super().__init__(moe)
        self._stacks = tuple(stacks)
        self._stored = {shard: stored[name] for shard, name in zip(_SHARDS, projections, strict=True)}
        self._activations = activations

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Let a layer wait for the tensors of its experts; it holds none of its own.

        Raises:
            UnsupportedError: experts that kernels do not compute, or ranks that cut them elsewhere than at a quantum.
        """
        random, handed = compat.draws_weights(), bool(self._stacks)
        layer.tersor_gate = compat.experts_gate(layer, random or (handed and all(one.biased for one in self._stacks)))
        inner = intermediate_size_per_partition
        span = compat.expert_columns(layer, inner)
        device, whole = torch.empty(0).device, inner * layer.moe_config.moe_parallel_config.tp_size
        memory.reuse_segments(device)
        up = Place(whole, hidden_size, Part((span or (0, inner),)), params_dtype, device)
        down = Place(hidden_size, whole, Part(((0, hidden_size),), span), params_dtype, device)
        places = {"w1": up, "w3": up, "w2": down}
        numbers = range(extra_weight_attrs.get("global_num_experts", num_experts))
        called = {compat.local_expert(layer, number): number for number in numbers}
        experts = [
            {shard: Piece(one.of_expert(called[index]), places[shard]) for shard, one in self._stored.items()}
            for index in range(num_experts)
        ]
        finish = functools.partial(self._finish, layer, params_dtype)
        layer.tersor_arrivals = arrivals = _Arrivals(experts, finish, random)
        loader = functools.partial(_loader, layer, arrivals)
        if handed:
            local = functools.partial(compat.local_expert, layer)
            take = functools.partial(_take, arrivals)
            layer.tersor_handed = Handed(self._stacks, local, span, take, params_dtype, device)
            loader = functools.partial(_whole_loader, layer.tersor_handed, self._stacks)
        compat.expect(layer, self._tensors(params_dtype), loader)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that every weight has arrived.

        Raises:
            CheckpointError: one has not; the line names a tensor.
        """
        arrivals, handed = (layer.__dict__.pop(f"tersor_{what}", None) for what in ("arrivals", "handed"))
        if arrivals is None:
            return
        arrivals.close()
        compat.expect_no_more(layer, self._tensors(layer.params_dtype))
        if compat.draws_weights():
            if compat.biased(layer):
                layer.tersor.hold(*_zeros(layer.tersor, layer.params_dtype))
        elif handed is not None:
            raise_missing(handed.missing())
            layer.tersor.hold(*handed.biases())

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return [T, H] of x [T, H]: each token's experts, weighted and added; those of other ranks add nothing."""
        index, local = topk_ids, layer.expert_map
        if local is not None:
            index = local[index.long()]
        if index.dtype not in (torch.int32, torch.int64):
            index = index.to(torch.int64)
        held = layer.tersor
        if layer.apply_router_weight_on_input:  # of one expert a token
            x, topk_weights = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)
        biases = {"gate_up_bias": held.gate_up_bias, "down_bias": held.down_bias}
        return ops.experts(x, held.gate_up, held.down, index, topk_weights, gate=layer.tersor_gate, **biases)

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """Return nothing: vLLM's own kernels of experts are not used."""
        return

    def maybe_make_prepare_finalize(self, routing_tables: Any = None) -> None:
        """Return nothing, likewise (0.26 and 0.27 ask)."""
        return

    def maybe_roundup_sizes(
        self, hidden_size: int, intermediate_size_per_partition: int, act_dtype: torch.dtype, moe_parallel_config: Any
    ) -> tuple[int, int]:
        """Return the sizes as they are."""
        return hidden_size, intermediate_size_per_partition

    def _tensors(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """Return name -> dtype of a layer's parameters."""
        found: dict[str, torch.dtype] = {}
        for stack in self._stacks:
            names = dict.fromkeys(stack.parts, torch.uint8) or self._stored[_CALLED[stack.projections[0]]].dtypes(dtype)
            found |= {f"{stack.stem}_{name}": own for name, own in {**names, BIAS: dtype}.items()}
        if found:
            return found
        for shard, stored in self._stored.items():
            found |= {_PREFIXES[shard] + name: own for name, own in stored.dtypes(dtype).items()}
        return found

    def _finish(self, layer: Any, dtype: torch.dtype, experts: list[dict[str, Matrix]]) -> None:
        def stack(make: Callable[[dict[str, Matrix]], Matrix]) -> Stacked:
            return _ready(_stacked([make(expert) for expert in experts]), dtype, self._activations)

        down = stack(lambda expert: expert.pop("w2"))
        layer.tersor = Stacks(stack(_gate_up), down)


class _Arrivals:
    """The weights of all experts of a rank on their way."""

    def __init__(
        self,
        experts: list[dict[str, Piece]],
        finish: Callable[[list[dict[str, Matrix]]], None],
        random: bool,
    ) -> None:
        self._experts, self._finish, self._random = experts, finish, random
        self._left = sum(map(len, experts))
        self._kept: list[Piece] = []
        self._bytes = 0

    def take(self, expert: int, shard: str, name: str, tensor: torch.Tensor) -> None:
        """Take a tensor of one of an expert's weights."""
        piece = self._experts[expert][shard]
        if not piece.keep(name, tensor):
            return
        self._kept.append(piece)
        self._bytes += 0 if piece.plain is None else piece.plain.nbytes
        self._left -= 1
        if self._bytes >= _TOGETHER or piece.plain is None or not self._left:
            make_together(self._kept)
            self._kept, self._bytes = [], 0
        if not self._left:
            self._hand_over()

    def close(self) -> None:
        """Say that nothing more arrives, as `Gathering.close` does."""
        if not self._experts:
            return
        pieces = [piece for expert in self._experts for piece in expert.values()]
        if self._random:
            for piece in pieces:
                piece.draw()
        raise_missing([name for piece in pieces for name in piece.missing])
        self._hand_over()

    def _hand_over(self) -> None:
        weights = [
            {shard: piece.weight for shard, piece in expert.items() if piece.weight is not None}
            for expert in self._experts
        ]
        self._experts = []
        self._finish(weights)


def _loader(layer: Any, arrivals: _Arrivals, name: str) -> Any:
    """Return what vLLM hands the tensors of a name to, with expert and shard; it says whether this rank has it."""

    def load(
        param: Any,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        expert = compat.local_expert(layer, expert_id)
        if expert >= 0:
            arrivals.take(expert, shard_id, name.removeprefix(_PREFIXES[shard_id]), loaded_weight)
        return expert >= 0 if return_success else None

    load.supports_moe_loading = True  # type: ignore[attr-defined]
    return load


def _take(arrivals: _Arrivals, expert: int, projection: str, own: str, tensor: torch.Tensor) -> None:
    arrivals.take(expert, _CALLED[projection], own, tensor)


def _whole_loader(handed: Handed, stacks: Sequence[Stack], name: str) -> Any:
    """Return what vLLM hands a tensor of all experts to."""
    stack = next(stack for stack in stacks if name.startswith(f"{stack.stem}_"))

    def load(param: Any, loaded_weight: torch.Tensor) -> None:
        handed.load(stack, name.removeprefix(f"{stack.stem}_"), loaded_weight)

    return load


def _zeros(held: Stacks, dtype: torch.dtype) -> list[torch.Tensor]:
    stacks = (held.gate_up, held.down)
    return [torch.zeros(*stack.shape[:2], dtype=dtype, device=stack.device) for stack in stacks]


def _gate_up(expert: dict[str, Matrix]) -> Matrix:
    gate, up = expert.pop("w1"), expert.pop("w3")
    if isinstance(gate, MixedWeight) and isinstance(up, MixedWeight):
        return MixedWeight.gate_up(gate, up)
    if isinstance(gate, PackedWeight) and isinstance(up, PackedWeight) and gate.scheme == up.scheme:
        return PackedWeight.gate_up(gate, up)
    raise CheckpointError("gate and up of experts are stored in different formats, and run as one product")


def _stacked(weights: Sequence[Matrix]) -> Stacked:
    first = weights[0]
    if isinstance(first, PackedWeight):
        return StackedWeight.stack([weight for weight in weights if isinstance(weight, PackedWeight)])
    mixed = [weight for weight in weights if isinstance(weight, MixedWeight)]
    try:
        return StackedMixedWeight.stack(mixed)
    except ShapeError as error:
        raise CheckpointError(f"the experts of one layer run as one product: {error}") from None


def _ready(weight: Stacked, dtype: torch.dtype, activations: Activations) -> Stacked:
    device = weight.device

    def of(one: StackedWeight) -> StackedWeight:
        return one.to_layout(ops.preferred_layout(one.scheme, dtype, device, activations))

    if isinstance(weight, StackedWeight):
        return of(weight)
    sets = tuple(map(of, weight.sets))
    return StackedMixedWeight(weight.mix, weight.shape, sets, weight.features, weight.places, weight.gated)
