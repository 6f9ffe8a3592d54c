"""Serve the experts of a layer by kernels: the routed tokens of all experts in one product, then the other, then a sum.

No count of tokens is read by the host and every grid is fixed, so a call can be captured in a CUDA graph and replayed
with other tokens that go to other experts. Any GPU that has kernels takes 16-bit activations so, compute capability 9.0
8-bit ones, too.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from tersor import hardware
from tersor.formats import Activations
from tersor.kernels.tune import SM80, SM90
from tersor.kernels.tune import experts as tune
from tersor.kernels.tune.experts_problem import most_blocks
from tersor.layouts import Stacked, StackedMixedWeight, StackedWeight, packing, sets_of
from tersor.layouts.gated import gated_channels
from tersor.layouts.packing import target_of
from tersor.ops import current, dispatch, grouped_mixed, mixed, mode, tensors
from tersor.ops.dispatch import overflow_reason, unsupported_reason
from tersor.ops.gates import Gate
from tersor.ops.grouped_mixed import MixedProduct
from tersor.ops.quantizing import Quantize
from tersor.ops.settled import settled
from tersor.ops.tables import Tables

if TYPE_CHECKING:
    from tersor.kernels.experts import ExpertsLaunch, GatherLaunch

_MOST_PREPARED = 512
_FETCHED = 0.5
"""Of L2, what the weights of the second product may take that the first one has it fetch."""
_ALIGNED = 8
"""Elements of 16 bits in the 16 bytes on which the copy engine wants rows to start."""


def obstacle(x: torch.Tensor, gate_up: Stacked, down: Stacked) -> str:
    """Return why no kernel takes all experts of a call at once, or an empty string."""
    for weight in (*sets_of(gate_up), *sets_of(down)):
        why = unsupported_reason(weight.scheme, x.dtype, x.device)
        if why:
            return why
    chip = dispatch.kernel_chip(x.device)
    assert chip is not None  # since the device is supported
    return misfit(gate_up, down, x.dtype, chip)


def misfit(gate_up: Stacked, down: Stacked, dtype: torch.dtype, chip: hardware.Chip) -> str:
    """Return why no kernel of a chip takes all experts of a call with activations of a dtype, or an empty string."""
    wanted = f"tiles_{target_of(Activations.NATIVE, dtype)}"
    named = [(name, weight) for name, of in (("gate and up", gate_up), ("down", down)) for weight in sets_of(of)]
    for name, weight in named:
        native = activations_of(weight) is Activations.NATIVE
        if not native and tune.schedule(chip) == SM80:
            return "8-bit activations need compute capability 9.0, this is {}.{}".format(*chip.capability)
        if activations_of(weight).group_size is not None:
            return "activations with a scale a token and group meet experts one after the other"
        if native and weight.layout != wanted:
            return f"{name} lie in {weight.layout}, {dtype} activations need {wanted}"
        why = overflow_reason(weight.scheme, weight.layout, weight.shape[2])
        if why:
            return why
    hidden, inner = gate_up.shape[2], down.shape[2]
    if hidden % _ALIGNED or inner % _ALIGNED:
        return f"rows of {hidden} and {inner} channels do not start on 16 bytes"
    return ""


@dataclass(frozen=True, slots=True)
class Product:
    """One of the two products, ready to be launched."""

    config: tune.EitherConfig
    launch: ExpertsLaunch
    quantize: Quantize | None


Launches: TypeAlias = tuple[Product, ...] | MixedProduct
"""Those of a product: one, one for every level of a mix, or the one of all levels."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """How calls of one kind of experts, dtype, device and number of tokens are served.

    Attributes:
        block_tokens: tokens of a block of the routing tables.
        up, down: the products, of a mix one, or one for every level where no launch has them all.
        gather: launches what puts tokens in order; `None` where the first product fetches or quantises them.
        fetches: whether the first product has L2 fetch the weights of the second.
    """

    block_tokens: int
    up: Launches
    down: Launches
    gather: GatherLaunch | None
    fetches: bool = False


_prepared: OrderedDict[Any, Prepared] = OrderedDict()
_guard = threading.Lock()


def prepared(x: torch.Tensor, gate_up: Stacked, down: Stacked, top_k: int, gate: Gate) -> Prepared | None:
    """Return what serves a call, made at its first use; `None` where there is an `obstacle`."""
    now = mode.current()
    key = (
        *(_kind(gate_up), _kind(down)),
        *(x.shape[0], top_k, x.dtype, x.get_device(), gate, now.key),
    )
    with _guard:
        found = _prepared.get(key)
        if found is not None:
            _prepared.move_to_end(key)
            return found
    if obstacle(x, gate_up, down):
        return None
    made = _make(x, gate_up, down, top_k, gate, now.batch_invariant)
    with _guard:
        _prepared[key] = made
        if len(_prepared) > _MOST_PREPARED:
            _prepared.popitem(last=False)
    return made


def _kind(weight: Stacked) -> Any:
    """Return what decides how a weight is multiplied."""
    if isinstance(weight, StackedMixedWeight):
        return tuple((one.scheme, one.shape, one.layout) for one in weight.sets)
    return weight.scheme, weight.shape, weight.layout


def forget() -> None:
    """Drop every prepared call."""
    with _guard:
        _prepared.clear()


def configs(
    gate_up: Stacked, down: Stacked, tokens: int, top_k: int, batch_invariant: bool, chip: hardware.Chip
) -> tuple[tune.Configs, tune.Configs]:
    """Choose how both products run, set by set: in blocks of as many tokens, of the least predicted time together."""
    problems = (problems_of(weight, tokens, top_k, batch_invariant) for weight in (gate_up, down))
    return tune.choose_sets(*problems, chip)


def problems_of(weight: Stacked, tokens: int, top_k: int, batch_invariant: bool) -> tune.Problems:
    """Return the problems that tokens make with the row sets of a weight."""
    return tuple(
        tune.ExpertsProblem.of(one.packing, one.shape, tokens, top_k, activations_of(one), batch_invariant)
        for one in sets_of(weight)
    )


def activations_of(weight: StackedWeight) -> Activations:
    """Return what weights in a kernel layout are multiplied with."""
    return packing.activations_of(weight.layout)


def product_of(
    weight: StackedWeight,
    config: tune.EitherConfig,
    gate: int,
    tokens: int,
    top_k: int,
    dtype: torch.dtype,
    index: int,
    tables_ready: bool = False,
) -> Product:
    """Return one of the two products, ready to be launched.

    Args:
        weight: of all experts, in a kernel layout.
        config: how the kernel runs.
        gate: EPILOGUE of cuda/common/gate.cuh; 0 for the second product.
        tokens, top_k: T and K.
        dtype: of activations as they come, and of the result.
        index: the CUDA device.
        tables_ready: whether the routing tables were there before the kernel ahead started.
    """
    from tersor.kernels import experts, jit

    result = target_of(Activations.NATIVE, dtype)
    assert result is not None
    oc, ic = weight.matrix
    native, pairs = config.activations is Activations.NATIVE, tokens * top_k
    source = experts.source(weight.packing, result, config, gate, tables_ready and native)
    launch = experts.prepare(
        jit.get(source, index),
        config,
        bf16=result == "bfloat16",
        oc=oc,
        ic=ic,
        tokens=tokens,
        top_k=top_k,
        gathers=config.gathers and gate > 0,
        most_blocks=most_blocks(pairs, weight.experts, config.block_tokens),
        factor=weight.packing.factor,
    )
    return Product(config, launch, Quantize.of(result, config.activations, pairs, ic, index, config.block_tokens))


def _make(x: torch.Tensor, gate_up: Stacked, down: Stacked, top_k: int, gate: Gate, batch_invariant: bool) -> Prepared:
    from tersor.kernels import experts, jit

    index, tokens = x.get_device(), x.shape[0]
    chip = dispatch.kernel_chip(x.device)
    assert chip is not None
    chosen = configs(gate_up, down, tokens, top_k, batch_invariant, chip)
    native = all(one.activations is Activations.NATIVE for one in chosen[0])

    def launches(weight: Stacked, of: tune.Configs, ending: int, ready: bool) -> Launches:
        problems = problems_of(weight, tokens, top_k, batch_invariant)
        if isinstance(weight, StackedMixedWeight) and tune.together(problems, chip):
            whole = [one for one in of if isinstance(one, tune.ExpertsConfig)]
            return grouped_mixed.product_of(weight, problems, whole, ending, x.dtype, index, chip, ready)
        return tuple(
            product_of(one, config, ending, tokens, top_k, x.dtype, index, ready)
            for one, config in zip(sets_of(weight), of, strict=True)
        )

    ups, downs = launches(gate_up, chosen[0], int(gate), False), launches(down, chosen[1], 0, native)
    gather = None
    if any(one.activations is Activations.NATIVE and not one.gathers for one in chosen[0]):
        function = jit.get(experts.gather_source(), index)
        gather = experts.prepare_gather(function, pairs=tokens * top_k, ic=gate_up.shape[2], top_k=top_k)
    fetches = False
    if isinstance(gate_up, StackedWeight) and isinstance(down, StackedWeight):
        most = min(tokens * top_k, down.experts) * _expert_bytes(down)
        fetches = native and tune.schedule(chip) == SM90 and most <= chip.l2_bytes * _FETCHED
    return Prepared(chosen[0][0].block_tokens, ups, downs, gather, fetches)


def _expert_bytes(weight: StackedWeight) -> int:
    """Return the bytes of the packed codes of one expert."""
    return weight.data.nbytes // weight.experts


def products(
    x: torch.Tensor,
    gate_up: Stacked,
    down: Stacked,
    tables: Tables,
    top_k: int,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    chosen: Prepared,
) -> torch.Tensor:
    """Run every pair through its expert.

    Of a mix all levels are one launch, whose results go where they belong; or every level is one, and what they give is
    gathered once. Both are as many whatever is routed.

    Args:
        x: [T, H], on the current device.
        gate_up, down: as in `ops.experts`, in the layouts that `chosen` was made for.
        tables: of the pairs, with blocks of `chosen.block_tokens`.
        top_k: K.
        gate_up_bias, down_bias: as in `ops.experts`.
        chosen: what serves such calls.

    Returns:
        [P, H] in x's dtype: the outputs of the experts in the order of the places; that of a pair without an expert is
        undefined.
    """
    pairs, hidden, room = x.shape[0] * top_k, gate_up.shape[2], chosen.block_tokens
    if x.stride(1) != 1 or x.stride(0) % _ALIGNED or x.stride(0) < hidden or x.data_ptr() % 16:
        x = tensors.aligned_rows(x, hidden)
    given = _Given(x, pairs, room, tables.addresses[0], top_k, chosen.gather)
    behind = down if chosen.fetches and isinstance(down, StackedWeight) else None
    inner = _product(given, gate_up, gate_up_bias, chosen.up, tables, pairs + room, True, behind)
    passed = _Given(inner, pairs, room)
    return _product(passed, down, down_bias, chosen.down, tables, pairs, False)


class _Given:
    """What a product reads, made for its first row set that reads it so: as it is, in order, or quantised."""

    def __init__(
        self, x: torch.Tensor, pairs: int, room: int, order: int = 0, top_k: int = 1, gather: GatherLaunch | None = None
    ) -> None:
        """Take activations.

        Args:
            x: [T, IC], or [P + room, IC] in the order of the places.
            pairs: P.
            room: rows behind those of pairs that a tile may read.
            order: address of the order of pairs, 0 where x has it.
            top_k: pairs of a row.
            gather: launches what puts rows in order.
        """
        self.x, self._pairs, self._room, self._order, self._top_k, self._gather = x, pairs, room, order, top_k, gather
        self._ordered: torch.Tensor | None = None
        self._codes: dict[Activations, tuple[torch.Tensor, int]] = {}

    def for_product(self, product: Product | MixedProduct) -> tuple[torch.Tensor, int, int]:
        """Return what a row set reads, the stride of its rows, and the address of the scales or 0."""
        kind = product.config.activations
        if product.quantize is not None:
            if kind not in self._codes:
                x = self.x
                stream, pairs = current.stream(x.get_device()), (self._order, self._top_k)
                self._codes[kind] = product.quantize(stream, x.data_ptr(), x.stride(0), *pairs)
            codes, scale = self._codes[kind]
            return codes, product.quantize.stride, scale
        if self._gather is None or product.config.gathers:
            return self.x, self.x.stride(0), 0
        if self._ordered is None:
            ic, stream = self.x.shape[1], current.stream(self.x.get_device())
            self._ordered = current.empty((self._pairs + self._room, ic), (ic, 1), self.x.dtype)
            own = {"x": self.x.data_ptr(), "x_stride": self.x.stride(0), "y": self._ordered.data_ptr()}
            self._gather(stream=stream, order=self._order, **own)
        return self._ordered, self._ordered.stride(0), 0


def _product(
    given: _Given,
    weight: Stacked,
    bias: torch.Tensor | None,
    launches: Launches,
    tables: Tables,
    rows: int,
    gated: bool,
    behind: StackedWeight | None = None,
) -> torch.Tensor:
    """Launch a product: returns [rows, channels], in the order of channels."""
    if isinstance(launches, MixedProduct):
        assert isinstance(weight, StackedMixedWeight)
        x, stride, scale = given.for_product(launches)
        channels = gated_channels(weight.shape[1]) if gated else weight.shape[1]
        y = current.empty((rows, channels), (channels, 1), given.x.dtype)
        grouped_mixed.run(launches, weight, bias, x.data_ptr(), stride, scale, tables, y)
        return y
    biases: Sequence[torch.Tensor | None] = [bias] * len(launches)
    if isinstance(weight, StackedMixedWeight) and bias is not None:
        biases = mixed.by_set(weight.expert(0), bias)
    made = []
    for one, own, launch in zip(sets_of(weight), biases, launches, strict=True):
        x, stride, scale = given.for_product(launch)
        channels = gated_channels(one.shape[1]) if gated else one.shape[1]
        made.append(current.empty((rows, channels), (channels, 1), given.x.dtype))
        run(launch, one, own, x.data_ptr(), stride, scale, tables, made[-1], behind)
    return weight.of_channels(made) if isinstance(weight, StackedMixedWeight) else made[0]


def run(
    product: Product,
    weight: StackedWeight,
    bias: torch.Tensor | None,
    x: int,
    x_stride: int,
    x_scale: int,
    tables: Tables,
    y: torch.Tensor,
    behind: StackedWeight | None = None,
) -> None:
    """Launch a product on the current device and stream.

    Args:
        product: of `product_of`.
        weight: as there.
        bias: [E, OC] in y's dtype, or `None`.
        x, x_stride, x_scale: as in `kernels.experts.prepare`.
        tables: of the pairs, with blocks of as many tokens as the product's.
        y: at least [P, outputs], written.
        behind: the weight of the next product, which this one has L2 fetch, or `None`.
    """
    now, config, index = mode.current(), product.config, y.get_device()
    stream, partial, arrived = current.stream(index), 0, 0
    if config.floats:
        partial, arrived, _parts = now.workspace.split_sums(index, stream, config.floats, config.counters)
    if bias is not None:
        bias = bias.contiguous()
    order, _, blocks = tables.addresses
    product.launch(
        stream=stream,
        weight=weight.data.data_ptr(),
        scale=weight.scale.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        x=x,
        x_stride=x_stride,
        x_scale=x_scale,
        order=order,
        blocks=blocks,
        y=y.data_ptr(),
        partial=partial,
        arrived=arrived,
        early=settled(weight.data, weight.scale) and now.early,
        following=0 if behind is None else behind.data.data_ptr(),
        following_bytes=0 if behind is None else _expert_bytes(behind),
    )
