"""Who is timed? Each contender holds copies of a layer of experts, and runs it in one or several ways."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import torch

from tersor import ops
from tersor.bench.contenders import HUMMING, foreign, kernel_layout, label
from tersor.bench.experts import rivals
from tersor.bench.experts.geometry import Geometry
from tersor.bench.experts.layer import Layer
from tersor.compress import quantize_rtn
from tersor.formats import Activations, Scheme
from tersor.layouts import PackedWeight, StackedWeight
from tersor.layouts.gated import interleave

Forward: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(x [T, H], logits float32 [T, E]) -> [T, H], all of it on the device."""

TORCH = "torch"
RIVALS = (TORCH, HUMMING)


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One column of a comparison.

    Attributes:
        name: what rows call it.
        dtype: of the activations that it takes.
        expert_bytes: bytes of the weights of an expert.
        build: (a layer in any dtype, a number of copies) -> way -> the copies. It raises `UnfitError` for what it does
            not take, and so may the first call for a number of tokens.
        scheme, activations: what its weights and its activations are rounded to; `None` and `16bit` are the layer's.
    """

    name: str
    dtype: torch.dtype
    expert_bytes: Callable[[Geometry], int]
    build: Callable[[Layer, int], dict[str, list[Forward]]]
    scheme: Scheme | None = None
    activations: Activations | str = Activations.NATIVE


def contenders(
    schemes: Sequence[Scheme],
    dtype: torch.dtype,
    rivals: Sequence[str],
    activations: Sequence[Activations | str] = (Activations.NATIVE,),
) -> list[Contender]:
    """Return Tersor in every scheme and kind of activations, then the rivals: torch in bfloat16, and humming."""
    both = [(scheme, kind) for kind in activations for scheme in schemes]
    found = [tersor(scheme, dtype, kind) for scheme, kind in both]
    if TORCH in rivals:
        found.append(torch_itself())
    if HUMMING in rivals:
        found += [humming(scheme, dtype, kind) for scheme, kind in both]
    return found


@dataclass(frozen=True, slots=True)
class Packed:
    """A layer of experts as Tersor's kernels read it.

    Attributes:
        layer: sizes, and the bias of the choice; its weights are not read.
        gate_up: [E, gated_rows(F), H].
        down: [E, H, F].
        gate_up_bias: [E, gated_rows(F)], interleaved as `gate_up`, or `None`.
    """

    layer: Layer
    gate_up: StackedWeight
    down: StackedWeight
    gate_up_bias: torch.Tensor | None

    def copy(self) -> Packed:
        """Return the layer with packed weights in memory of their own."""
        return replace(self, gate_up=_copy(self.gate_up), down=_copy(self.down))


def forward(packed: Packed, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Run a layer by Tersor's operators: what is timed."""
    geometry = packed.layer.geometry
    with ops.using(early=True):
        return ops.routed_experts(
            x,
            logits,
            packed.gate_up,
            packed.down,
            geometry.top_k,
            scoring=geometry.scoring,
            normalize=geometry.normalize,
            choice_bias=packed.layer.choice_bias,
            groups=geometry.groups,
            top_groups=geometry.top_groups,
            scale=geometry.scale,
            gate_up_bias=packed.gate_up_bias,
            down_bias=packed.layer.down_bias,
            gate=geometry.gate,
        )


def tersor(scheme: Scheme, dtype: torch.dtype, activations: Activations | str = Activations.NATIVE) -> Contender:
    """Return Tersor's own operators, launched with programmatic dependence."""

    def build(layer: Layer, copies: int) -> dict[str, list[Forward]]:
        first = pack(layer.to(dtype), scheme, activations)
        return {"": [partial(forward, each) for each in [first, *(first.copy() for _ in range(copies - 1))]]}

    return Contender(
        name=label(scheme, activations),
        dtype=dtype,
        expert_bytes=lambda geometry: geometry.packed_bytes(scheme),
        build=build,
        scheme=scheme,
        activations=activations,
    )


def pack(layer: Layer, scheme: Scheme, activations: Activations | str = Activations.NATIVE) -> Packed:
    """Quantise a layer, and put it in the layout that kernels read, an expert at a time.

    Raises:
        UnfitError: no kernel serves the scheme.
    """
    layout = kernel_layout(scheme, layer.down.dtype, layer.down.device, activations)

    def packed(rows: torch.Tensor) -> PackedWeight:
        return PackedWeight.from_encoded(quantize_rtn(rows, scheme))

    gate_up, down = [], []
    for both, outer in zip(layer.gate_up, layer.down, strict=True):
        gate, up = both.chunk(2)
        gate_up.append(PackedWeight.gate_up(packed(gate), packed(up)).to_layout(layout))
        down.append(packed(outer).to_layout(layout))
    bias = layer.gate_up_bias
    if bias is not None:
        gate, up = bias.T.chunk(2)
        bias = interleave(gate, up).T.contiguous()
    return Packed(layer, StackedWeight.stack(gate_up), StackedWeight.stack(down), bias)


def torch_itself() -> Contender:
    """Return torch's operators in bfloat16: grouped products, or batched ones for few tokens, compiled or not."""
    dtype = torch.bfloat16

    def build(layer: Layer, copies: int) -> dict[str, list[Forward]]:
        torch.compiler.reset()  # what was compiled for other layers counts against a limit
        first = layer.to(dtype)
        layers = [first, *(first.copy() for _ in range(copies - 1))]
        eager = rivals.Around.eager()
        fused = rivals.compiled(rivals.batched_forward, coordinate_descent_tuning=True)
        grouped: list[Forward] = [
            partial(rivals.sorted_forward, each, rivals.grouped_mm(each), eager) for each in layers
        ]
        return _guarded(
            {
                "grouped_mm": grouped,
                "grouped_mm, compiled": _of_each(rivals.compiled(rivals.grouped_forward), layers),
                "batched_mm": _of_each(_few(rivals.batched_forward), layers),
                "batched_mm, compiled": _of_each(_few(fused), layers),
            }
        )

    return Contender(
        name=TORCH,
        dtype=dtype,
        expert_bytes=lambda geometry: geometry.parameters * dtype.itemsize,
        build=build,
    )


def humming(scheme: Scheme, dtype: torch.dtype, activations: Activations | str = Activations.NATIVE) -> Contender:
    """Return the grouped products of humming-kernels, with torch's operators around them."""

    def build(layer: Layer, copies: int) -> dict[str, list[Forward]]:
        torch.compiler.reset()
        first = layer.to(dtype)
        made = [foreign(partial(rivals.humming, first, scheme, activations)) for _ in range(copies)]
        arounds = {"grouped": rivals.Around.eager(), "grouped, compiled around": rivals.Around.compiled()}
        return _guarded(
            {
                way: [partial(rivals.sorted_forward, first, products, around) for products in made]
                for way, around in arounds.items()
            }
        )

    return Contender(
        name=f"{HUMMING} {label(scheme, activations)}",
        dtype=dtype,
        expert_bytes=lambda geometry: geometry.packed_bytes(scheme),
        build=build,
        scheme=scheme,
        activations=activations,
    )


def _of_each(run: Callable[..., torch.Tensor], layers: Sequence[Layer]) -> list[Forward]:
    return [partial(run, layer) for layer in layers]


def _few(run: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Refuse a way that copies weights for more tokens than there is memory for."""

    def refusing(layer: Layer, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        rivals.check_gathered(layer, len(x))
        return run(layer, x, logits)

    return refusing


def _guarded(ways: dict[str, list[Forward]]) -> dict[str, list[Forward]]:
    """Make whatever another package's code raises the reason why it is not timed."""

    def guard(call: Forward) -> Forward:
        return lambda x, logits: foreign(lambda: call(x, logits))

    return {way: [guard(call) for call in calls] for way, calls in ways.items()}


def _copy(weight: StackedWeight) -> StackedWeight:
    return replace(weight, data=weight.data.clone(), scale=weight.scale.clone())
