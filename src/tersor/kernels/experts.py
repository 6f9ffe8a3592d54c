"""The experts' family: sm90_experts.cuh and sm80_experts.cuh, the product of all experts of a layer, and gather.cuh,
which may go before the first.

As in `kernels.dense` a kernel's source, its launch prepared for a problem, then the launch; routing tables and the sum
over a token's experts are those of `kernels.routing`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TypeAlias

from tersor.formats import Activations
from tersor.hardware import Chip
from tersor.kernels.jit import Function, KernelSource, tensor_map
from tersor.kernels.macros import sm80_macros, sm90_macros
from tersor.kernels.tune import experts as tune
from tersor.layouts.packing import Packing, activations_of

_GATHER_THREADS = 256
_SM80_THREADS = 256


@functools.cache
def source(packing: Packing, result: str, config: tune.EitherConfig, gate: int, tables_ready: bool) -> KernelSource:
    """Return the kernel for one packing, dtype of the result and configuration.

    Args:
        packing: of the weights, for the configuration's activations.
        result: dtype of the result, `float16` or `bfloat16`.
        config: how the kernel runs.
        gate: EPILOGUE of cuda/common/gate.cuh: how gate and up become one, or 0.
        tables_ready: whether the routing tables were there before the kernel ahead started; the sm80 schedule does not
            ask.

    Raises:
        ValueError: the packing is for other activations than the configuration.
    """
    if config.activations is not activations_of(packing.layout):
        raise ValueError(f"weights packed for {packing.target} activations do not meet those of {config}")
    if isinstance(config, tune.Sm80ExpertsConfig):
        return _sm80_source(packing, config.block_tokens, config.stages, config.shared_bytes, gate)
    tile, slots = config.tile, config.slots
    dtypes = f"{packing.target}_{result}" if config.activations is not Activations.NATIVE else result
    return KernelSource(
        name=(
            f"tersor_experts_sm90_{packing.scheme.format.name}_{dtypes}_{tile.rows}x{tile.tokens}"
            f"_k{tile.channel_groups}r{tile.resident}_g{gate}"
        ),
        header="experts/sm90_experts.cuh",
        parameters={
            **sm90_macros(packing, result, tile, slots, config.shared_bytes, gate, config.few_tokens),
            "GATHERS": 1,
            "GATHERS_TOKENS": config.gathers and gate > 0,
            "TABLES_READY": tables_ready,
        },
        arguments="TPPPPPPPPPPqiiiiiif",
    )


@functools.cache
def _sm80_source(packing: Packing, tokens: int, stages: int, shared_bytes: int, gate: int) -> KernelSource:
    """Return the mma.sync kernel; it checks that it has as much shared memory. The first product fetches tokens."""
    return KernelSource(
        name=f"tersor_experts_sm80_{packing.scheme.format.name}_{packing.target}_n{tokens}_g{gate}",
        header="experts/sm80_experts.cuh",
        parameters={
            **sm80_macros(packing, tokens, stages, shared_bytes, gate),
            "GATHERS_TOKENS": gate > 0,
        },
        arguments="PPPPPPPPPqiiiiif",
    )


@functools.cache
def gather_source() -> KernelSource:
    """Return the kernel that puts activations into the order of the pairs."""
    return KernelSource(name="tersor_gather", header="experts/gather.cuh", parameters={}, arguments="PPPqqii")


ExpertsLaunch: TypeAlias = Callable[..., None]
"""Launches the product on one prepared problem; takes keywords alone, those of `launch` in `prepare`."""


def prepare(
    function: Function,
    config: tune.EitherConfig,
    *,
    bf16: bool,
    oc: int,
    ic: int,
    tokens: int,
    top_k: int,
    gathers: bool,
    most_blocks: int,
    factor: float,
) -> ExpertsLaunch:
    """Return what launches the product of all experts, [E, oc, ic], on one problem.

    Args:
        function: the loaded kernel.
        config: how it runs.
        bf16: whether 16-bit activations and results are bfloat16.
        oc, ic: rows and input channels of an expert.
        tokens, top_k: T and K.
        gathers: whether activations are those of tokens, [T, ic]; else they are those of pairs in their order, [T * K,
            ic], and behind them are as many rows as a tile has tokens, which are not used.
        most_blocks: as many as the routing tables have room for.
        factor: what decoded sums are multiplied by, beside the scales.
    """
    run, shared = function.launch, config.shared_bytes
    if isinstance(config, tune.Sm80ExpertsConfig):  # reads the rows of activations that there are, and no others
        grid, block, may_be_early = config.grid, (_SM80_THREADS, 1, 1), config.early
        maps_rows, element, rows, box, splits = None, 0, 0, 0, config.splits
    else:
        tile = config.tile
        grid, block, may_be_early = (config.ctas, 1, 1), (tile.threads, 1, 1), True
        element = tensor_map.element(bf16, tile.bytewise)
        # The copy engine is slow where rows of a box are not there.
        rows, box = (tokens, 1) if gathers else (tokens * top_k + tile.tokens, tile.tokens)
        maps_rows, splits = tensor_map.rows, config.most_splits

    def launch(
        *,
        stream: int,
        weight: int,
        scale: int,
        bias: int,
        x: int,
        x_stride: int,
        x_scale: int,
        order: int,
        blocks: int,
        y: int,
        partial: int,
        arrived: int,
        early: bool,
        following: int = 0,
        following_bytes: int = 0,
    ) -> None:
        """Launch; what is not there has the address 0.

        Args:
            stream: handle of the stream.
            weight, scale: addresses of packed codes and scales of all experts.
            bias: address of [E, oc] in the dtype of the result.
            x, x_stride: address of the activations, and elements from one row to the next.
            x_scale: address of the float32 scales of quantised activations, one a pair; the sm80 schedule has none.
            order, blocks: addresses of the routing tables.
            y: address of [pairs, outputs] in the dtype of the result.
            partial, arrived: addresses of split sums (float32) and of their counters (uint32, zero).
            early: whether the launch may start before the kernel ahead has ended: not where that one wrote weights.
            following: address of the packed codes of the product behind, which this one has L2 fetch; the sm80 schedule
                does not.
            following_bytes: of them that are of one expert, a multiple of 16.
        """
        # fmt: off
        if maps_rows is None:
            arguments = (
                weight, scale, x, bias, order, blocks, y, partial, arrived,
                x_stride, oc, ic, top_k, most_blocks, splits, factor,
            )
            run(grid, block, shared, stream, arguments, early and may_be_early)
        else:
            mapped = (
                maps_rows(x, rows, ic, x_stride, element, box),
                weight, scale, bias, x_scale, order, blocks, y, partial, arrived, following, following_bytes,
                oc, ic, top_k, box, most_blocks, splits, factor,
            )
            run(grid, block, shared, stream, mapped, early and may_be_early)
        # fmt: on

    return launch


GatherLaunch: TypeAlias = Callable[..., None]
"""Launches the gathering of activations on one prepared problem: `launch` in `prepare_gather`."""


def prepare_gather(function: Function, *, pairs: int, ic: int, top_k: int) -> GatherLaunch:
    """Return what launches the gathering of activations: y[p] = x[order[p] / top_k], rows of whole 16 bytes."""
    grid, block, run = (pairs, 1, 1), (_GATHER_THREADS, 1, 1), function.launch
    stride = -(-ic // 8) * 8

    def launch(*, stream: int, x: int, x_stride: int, order: int, y: int) -> None:
        """Launch.

        Args:
            stream: handle of the stream.
            x, x_stride: address of 16-bit activations [T, ic], and elements from one token to the next.
            order: address of the pair at each place.
            y: address of [pairs, ic rounded up to 8].
        """
        run(grid, block, 0, stream, (x, order, y, x_stride, stride, ic, top_k), True)

    return launch


def sources(packing: Packing, result: str, chip: Chip, gate: int) -> Iterator[KernelSource]:
    """Yield every kernel that experts with weights of a packing can ask for on a chip, in its usual mode."""
    activations = activations_of(packing.layout)
    native = activations is Activations.NATIVE
    if activations.group_size is not None:
        return  # those meet experts one after the other
    problem = tune.ExpertsProblem.of(packing, (1, 128, 128), 1, 1, activations)
    for chosen in tune.shapes(problem, chip):
        yield source(packing, result, chosen, gate, False)
        yield source(packing, result, chosen, 0, native)
