"""What Python and the headers both count is counted alike: each fact is asserted where the header is compiled.

What a launch asks of shared memory is asserted by the kernels themselves (SHARED_BYTES), names of enumerations are
compared by tests/unit/test_decode_header.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import pytest

from tersor.formats import Activations, Scheme, get, get_scheme
from tersor.hardware import chip_named
from tersor.kernels import dense, tune
from tersor.kernels.jit import Function, KernelSource, nvrtc
from tersor.kernels.tune import sm80, sm90
from tersor.layouts import blocks, decode_groups
from tersor.layouts.packing import Packing

H200 = chip_named("H200")
ARCH = "compute_90a"
"""PTX: facts are checked, and nothing is made into machine code."""
EMPTY = 'extern "C" __global__ void TERSOR_ENTRY(int* x) { *x = 0; }'


def check(header: str, source: KernelSource, facts: Mapping[str, int | str]) -> None:
    """Compile a header with a kernel's parameters and assert every C++ expression to have its value.

    Raises:
        nvrtc.CompileError: one of them has not.
    """
    body = "" if header == source.header else EMPTY
    values = {name: value if isinstance(value, str) else int(value) for name, value in facts.items()}
    lines = [f'static_assert({name} == {value}, "{name} is not {value}");' for name, value in values.items()]
    texts = {"facts.cuh": "\n".join([f'#include "{header}"', body, *lines, ""])}
    arguments = "P" if body else source.arguments
    nvrtc.compile_source(KernelSource("tersor_test_facts", "facts.cuh", source.parameters, arguments, texts), ARCH)


class Launched:
    """Stands for a loaded kernel: keeps what it is launched with."""

    def launch(self, grid: Any, block: Any, *rest: Any) -> None:
        self.grid, self.block = grid, block


def fused(scheme: Scheme, tile: sm90.Tile) -> KernelSource:
    """The kernel of one tile of the sm90 schedule on an H200."""
    packing = Packing.of(scheme, decode_groups.FP8 if tile.e4m3 else "float16")
    size = (scheme.format.bits, packing.scale_row_bytes, H200)
    return dense.sm90_source(packing, "float16", tile, tile.slots(*size), tile.shared_bytes(*size))


def first(scheme: Scheme) -> KernelSource:
    """A kernel with the parameters of a scheme."""
    return next(dense.sources(Packing.of(scheme, "float16"), H200))


def test_a_wrong_fact_does_not_compile() -> None:
    source = first(get_scheme("fp6_e3m2"))
    with pytest.raises(nvrtc.CompileError, match="tile::kRows is not 17"):
        check("common/tile.cuh", source, {"tile::kRows": 17})


@pytest.mark.parametrize("bits", [1, 6, 7, 8])
def test_a_tile_has_the_same_rows_channels_and_bytes(bits: int) -> None:
    fmt = get(f"uint{bits}")
    source = first(Scheme(fmt))
    facts = {
        "tile::kRows": blocks.BLOCK_OC,
        "tile::kColumns": blocks.BLOCK_IC,
        "tile::kUnitRows": blocks.UNIT_OC,
        "tile::kUnitBlocks": blocks.UNIT_BLOCKS,
        "tile::kBytes": blocks.BLOCK_OC * blocks.BLOCK_IC * bits // 8,
        "decode::kWords": decode_groups.decode_group(fmt, "float16").words,
    }
    check("common/tile.cuh", source, facts)


@pytest.mark.parametrize("group_size", [None, 128, 64, 32, 16])
@pytest.mark.parametrize("name", ["fp6_e3m2", "uint4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scales_take_the_same_bytes(name: str, group_size: int | None, dtype: str) -> None:
    scheme = Scheme(get(name), group_size, dtype)
    packing = Packing.of(scheme, "float16")
    facts = {
        "scales::kBlockBytes": blocks.BLOCK_OC * packing.scale_row_bytes,
        "scales::kGroups": packing.scales_in_block,
    }
    if group_size is None:
        facts["scales::kRowWords * 4"] = packing.scale_bytes
    check("common/scales.cuh", first(scheme), facts)


def test_a_tile_of_the_sm90_schedule_has_the_same_rows_threads_and_pieces() -> None:
    for tile in (*sm90.tiles(0), *sm90.tiles(0, Activations.E4M3)):
        problem = tune.LinearProblem(oc=4096, ic=4096, n=1000, bits=6)
        config = sm90.config(problem, tile, 0, 2, 1, H200)
        facts = {
            "linear::kRows": tile.rows,
            "linear::kThreads": tile.threads,
            "linear::kFew": tile.few,
            "linear::kTurns": tile.turns,
            "linear::kSlotsOfBlock": tile.x_slots_of_block,
            "linear::kTokens / linear::kSlotBoxes": sm90.box_rows(config, problem.n),
            "linear::kPartBytes": tile.part_bytes,
            "linear::kSums * linear::kFinishers * 2": dense.parts(config, problem.n)[0] // dense.parts(config, 1)[1],
        }
        if tile.e4m3:
            facts["linear::kSettles"] = not tile.fast_sums
        header = "dense/sm90_multiply.cuh" if tile.e4m3 else "dense/sm90_pipeline.cuh"
        check(header, fused(get_scheme("fp6_e3m2"), tile), facts)


@pytest.mark.parametrize(("name", "operand"), [("fp6_e2m3", "kE4m3"), ("fp6_e3m2", "kE5m2")])
def test_weights_beside_8_bit_activations_are_of_the_type_that_their_table_makes(name: str, operand: str) -> None:
    assert f"k{decode_groups.decode_group(get(name), decode_groups.FP8).operand.capitalize()}" == operand
    source = fused(get_scheme(name), sm90.tiles(0, Activations.E4M3)[0])
    check("dense/sm90_multiply.cuh", source, {"linear::kOperand": f"wgmma::{operand}"})


def test_a_launch_has_the_threads_that_its_kernel_counts_on() -> None:
    packing = Packing.of(get_scheme("fp6_e3m2"), "float16")
    launched = Launched()
    function = cast(Function, launched)

    config = tune.choose(tune.LinearProblem(oc=4096, ic=4096, n=8, bits=6), chip_named("A100"))
    fused_launch = dense.prepare_fused(function, config, bf16=False, oc=4096, ic=4096, n=8, aligned=True, factor=1.0)
    addresses = ("weight", "scale", "x", "x_stride", "x_scale", "bias", "residual", "y", "partial", "arrived")
    fused_launch(stream=0, early=False, **dict.fromkeys(addresses, 0))
    assert launched.grid[0] * sm80.ROWS == 4096
    source = dense.fused_source(packing, "float16", config)
    check(source.header, source, {"linear::kThreads": launched.block[0], "linear::kRows": sm80.ROWS})

    dense.prepare_quantize(function, n=3, ic=100)(stream=0, x=0, x_stride=104, codes=0)
    source = dense.quantize_source("float16")
    check(source.header, source, {"quantize::kThreads": launched.block[0]})

    dense.launch_dequantize(function, 0, weight=0, scale=0, scratch=0, first_block=0, oc=64, ic=1024, factor=1.0)
    source = dense.dequantize_source(packing)
    blocks_of_cta = 8 // launched.grid[0]
    check(source.header, source, {"dequantize::kWarps": blocks_of_cta, "dequantize::kWarps * 32": launched.block[0]})

    dense.launch_epilogue(
        function, 0, sums=0, scale=0, bias=0, residual=0, y=0, first_oc=0, slice_oc=1024, oc=1024, n=2, factor=1.0
    )
    source = dense.epilogue_source(packing)
    outputs_of_cta = 1024 // launched.grid[0]
    check(source.header, source, {"epilogue::kThreads": outputs_of_cta, "1 * epilogue::kThreads": launched.block[0]})
