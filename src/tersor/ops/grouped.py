"""Serve the experts of a layer by kernels: the routed tokens of all experts in one product, then the other, then a sum.

No count of tokens is read by the host and every grid is fixed, so a call can be captured in a CUDA graph and replayed
with other tokens that go to other experts. Any GPU that has kernels takes 16-bit activations so, compute capability 9.0
8-bit ones, too.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tersor import hardware
from tersor.formats import Activations
from tersor.kernels.tune import SM80, SM90
from tersor.kernels.tune import experts as tune
from tersor.kernels.tune.experts_problem import most_blocks
from tersor.layouts import StackedWeight, packing
from tersor.layouts.gated import gated_channels
from tersor.layouts.packing import target_of
from tersor.ops import current, dispatch, mode, tensors
from tersor.ops.dispatch import overflow_reason, unsupported_reason
from tersor.ops.gates import Gate
from tersor.ops.settled import settled
from tersor.ops.tables import Tables

if TYPE_CHECKING:
    from tersor.kernels.dense import QuantizeLaunch
    from tersor.kernels.experts import ExpertsLaunch, GatherLaunch

_MOST_PREPARED = 512
_FETCHED = 0.5
"""Of L2, what the weights of the second product may take that the first one has it fetch."""
_ALIGNED = 8
"""Elements of 16 bits in the 16 bytes on which the copy engine wants rows to start."""


def obstacle(x: torch.Tensor, gate_up: StackedWeight, down: StackedWeight) -> str:
    """Return why no kernel takes all experts of a call at once, or an empty string."""
    why = unsupported_reason(gate_up.scheme, x.dtype, x.device) or unsupported_reason(down.scheme, x.dtype, x.device)
    if why:
        return why
    chip = dispatch.kernel_chip(x.device)
    assert chip is not None  # since the device is supported
    return misfit(gate_up, down, x.dtype, chip)


def misfit(gate_up: StackedWeight, down: StackedWeight, dtype: torch.dtype, chip: hardware.Chip) -> str:
    """Return why no kernel of a chip takes all experts of a call with activations of a dtype, or an empty string."""
    wanted = f"tiles_{target_of(Activations.NATIVE, dtype)}"
    for name, weight in (("gate and up", gate_up), ("down", down)):
        native = activations_of(weight) is Activations.NATIVE
        if not native and tune.schedule(chip) == SM80:
            return "8-bit activations need compute capability 9.0, this is {}.{}".format(*chip.capability)
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
    quantize: QuantizeLaunch | None
    codes_stride: int


@dataclass(frozen=True, slots=True)
class Prepared:
    """How calls of one kind of experts, dtype, device and number of tokens are served.

    Attributes:
        block_tokens: tokens of a block of the routing tables.
        up, down: the products.
        gather: launches what puts tokens in order; `None` where the first product fetches or quantises them.
        fetches: whether the first product has L2 fetch the weights of the second.
    """

    block_tokens: int
    up: Product
    down: Product
    gather: GatherLaunch | None
    fetches: bool = False


_prepared: OrderedDict[Any, Prepared] = OrderedDict()
_guard = threading.Lock()


def prepared(x: torch.Tensor, gate_up: StackedWeight, down: StackedWeight, top_k: int, gate: Gate) -> Prepared | None:
    """Return what serves a call, made at its first use; `None` where there is an `obstacle`."""
    now = mode.current()
    key = (
        *(gate_up.scheme, gate_up.shape, gate_up.layout, down.scheme, down.shape, down.layout),
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


def forget() -> None:
    """Drop every prepared call."""
    with _guard:
        _prepared.clear()


def configs(
    gate_up: StackedWeight, down: StackedWeight, tokens: int, top_k: int, batch_invariant: bool, chip: hardware.Chip
) -> tuple[tune.EitherConfig, tune.EitherConfig]:
    """Choose how both products run: in blocks of as many tokens, of the least predicted time together."""
    problems = [
        tune.ExpertsProblem.of(weight.packing, weight.shape, tokens, top_k, activations_of(weight), batch_invariant)
        for weight in (gate_up, down)
    ]
    return tune.choose_pair(problems[0], problems[1], chip)


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
    from tersor.kernels import dense, experts, jit

    result = target_of(Activations.NATIVE, dtype)
    assert result is not None
    oc, ic = weight.matrix
    native, pairs = config.activations is Activations.NATIVE, tokens * top_k
    quantize = None
    if not native:
        quantize = dense.prepare_quantize(
            jit.get(dense.quantize_source(result, config.activations), index), n=pairs, ic=ic
        )
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
    return Product(config, launch, quantize, dense.codes_stride(ic))


def _make(
    x: torch.Tensor, gate_up: StackedWeight, down: StackedWeight, top_k: int, gate: Gate, batch_invariant: bool
) -> Prepared:
    from tersor.kernels import experts, jit

    index, tokens = x.get_device(), x.shape[0]
    chip = dispatch.kernel_chip(x.device)
    assert chip is not None
    pair = configs(gate_up, down, tokens, top_k, batch_invariant, chip)
    native = pair[0].activations is Activations.NATIVE
    up = product_of(gate_up, pair[0], int(gate), tokens, top_k, x.dtype, index)
    down_product = product_of(down, pair[1], 0, tokens, top_k, x.dtype, index, native)
    gather = None
    if up.quantize is None and not up.config.gathers:
        function = jit.get(experts.gather_source(), index)
        gather = experts.prepare_gather(function, pairs=tokens * top_k, ic=gate_up.shape[2], top_k=top_k)
    most = min(tokens * top_k, down.experts) * _expert_bytes(down)
    fetches = native and tune.schedule(chip) == SM90 and most <= chip.l2_bytes * _FETCHED
    return Prepared(up.config.block_tokens, up, down_product, gather, fetches)


def _expert_bytes(weight: StackedWeight) -> int:
    """Return the bytes of the packed codes of one expert."""
    return weight.data.nbytes // weight.experts


def products(
    x: torch.Tensor,
    gate_up: StackedWeight,
    down: StackedWeight,
    tables: Tables,
    top_k: int,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    chosen: Prepared,
) -> torch.Tensor:
    """Run every pair through its expert.

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
    index, pairs, hidden = x.get_device(), x.shape[0] * top_k, gate_up.shape[2]
    stream = current.stream(index)
    if x.stride(1) != 1 or x.stride(0) % _ALIGNED or x.stride(0) < hidden or x.data_ptr() % 16:
        x = tensors.aligned_rows(x, hidden)
    order, block_tokens = tables.addresses[0], chosen.block_tokens
    given, stride, x_scale = x, x.stride(0), 0
    if chosen.up.quantize is not None:
        given, x_scale = _quantized(chosen.up, x, pairs, block_tokens, order, top_k)
        stride = chosen.up.codes_stride
    elif chosen.gather is not None:
        given, stride = current.empty((pairs + block_tokens, hidden), (hidden, 1), x.dtype), hidden
        chosen.gather(stream=stream, x=x.data_ptr(), x_stride=x.stride(0), order=order, y=given.data_ptr())
    channels = gated_channels(gate_up.shape[1])
    inner = current.empty((pairs + block_tokens, channels), (channels, 1), x.dtype)
    behind = down if chosen.fetches else None
    run(chosen.up, gate_up, gate_up_bias, given.data_ptr(), stride, x_scale, tables, inner, behind)
    passed, stride, x_scale = inner, channels, 0
    if chosen.down.quantize is not None:
        passed, x_scale = _quantized(chosen.down, inner, pairs, block_tokens)
        stride = chosen.down.codes_stride
    y = current.empty((pairs, hidden), (hidden, 1), x.dtype)
    run(chosen.down, down, down_bias, passed.data_ptr(), stride, x_scale, tables, y)
    return y


def _quantized(
    product: Product, x: torch.Tensor, pairs: int, block_tokens: int, order: int = 0, top_k: int = 1
) -> tuple[torch.Tensor, int]:
    """Launch the quantising of a product's activations; return their codes and the address of the scales."""
    assert product.quantize is not None
    row, stream = product.codes_stride, current.stream(x.get_device())
    codes = current.empty((pairs + block_tokens, row + 4), (row + 4, 1), torch.uint8)
    scale = product.quantize(
        stream=stream, x=x.data_ptr(), x_stride=x.stride(0), codes=codes.data_ptr(), order=order, top_k=top_k
    )
    return codes, scale


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
