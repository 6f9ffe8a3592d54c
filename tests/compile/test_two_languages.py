"""What Python and the headers both count is counted alike: each fact is asserted where the header is compiled.

What a launch asks of shared memory is asserted by the kernels themselves (SHARED_BYTES), names of enumerations are
compared by tests/unit/test_decode_header.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from tersor.compress import sweeps
from tersor.engine.shared_pages import shared_size
from tersor.formats import Activations, Scheme, get, get_scheme
from tersor.hardware import chip_named
from tersor.kernels import (
    attention,
    attention_sm90,
    columns,
    deciding,
    decode_attention,
    dense,
    norms,
    quantizing,
    routing,
    shared_attention,
    small,
    tune,
)
from tersor.kernels import experts as of_experts
from tersor.kernels.jit import KernelSource, nvrtc, tensor_map
from tersor.kernels.tune import experts_sm80, sm80, sm90
from tersor.kernels.tune.experts_problem import ExpertsProblem
from tersor.layouts import decode_groups
from tersor.layouts.blocks import BLOCK_IC, BLOCK_OC, UNIT_OC
from tersor.layouts.packing import BYTEWISE, Packing
from tersor.ops.attention_form import PAGE

H200 = chip_named("H200")
ARCH = "compute_90a"
"""PTX: facts are checked, and nothing is made into machine code."""
EMPTY = 'extern "C" __global__ void TERSOR_ENTRY(int* x) { *x = 0; }'
PROBLEM = attention.Problem(
    rows=3,
    tokens=700,
    heads=24,
    kv_heads=2,
    rotary_dim=0,
    window=None,
    softcap=None,
    scale=1.0,
    eps=0.0,
    offset=0.0,
    most_queries=500,
    most_pages=20,
    table_stride=20,
    invariant=False,
)


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


def packing(scheme: Scheme, target: str = "float16") -> Packing:
    """A scheme in kernel tiles."""
    return Packing.of(scheme, target)


class Launched:
    """Stands for a loaded kernel: keeps what it is launched with."""

    source: KernelSource

    def launch(self, grid: Any, block: Any, *rest: Any) -> None:
        self.grid, self.block, self.shared = grid, block, rest[0]


def sm90_sources(scheme: Scheme, chip_name: str = "H200") -> dict[sm90.Tile, KernelSource]:
    """Every tile of a scheme with its kernel, those for 8-bit activations too."""
    chip, native = chip_named(chip_name), packing(scheme)
    kind = Activations.E4M3 if scheme.format.kind == "float" else Activations.INT8
    bytewise = packing(scheme, BYTEWISE[kind])
    found = (*dense.sources(native, chip), *dense.quantized_sources(bytewise, "float16", chip))
    named = {source.name: source for source in found if source.header == "dense/sm90_linear.cuh"}
    groups = native.scales_in_block
    every = (*sm90.tiles(groups), *sm90.tiles(groups, kind))
    assert len(named) == len(every)
    return dict(zip(every, named.values(), strict=True))


def test_a_wrong_fact_does_not_compile() -> None:
    source = next(dense.sources(packing(get_scheme("fp6_e3m2")), H200))
    with pytest.raises(nvrtc.CompileError, match="tile::kRows is not 17"):
        check("common/tile.cuh", source, {"tile::kRows": 17})


@pytest.mark.parametrize("bits", [1, 6, 7, 8])
def test_a_tile_has_the_same_rows_channels_and_bytes(bits: int) -> None:
    fmt = get(f"uint{bits}")
    source = next(dense.sources(packing(Scheme(fmt)), H200))
    facts = {
        "tile::kRows": BLOCK_OC,
        "tile::kColumns": BLOCK_IC,
        "tile::kUnitRows": UNIT_OC,
        "tile::kBytes": BLOCK_OC * BLOCK_IC * bits // 8,
        "decode::kWords": decode_groups.decode_group(fmt, "float16").words,
    }
    check("common/tile.cuh", source, facts)


@pytest.mark.parametrize("group_size", [None, 128, 64, 32, 16])
@pytest.mark.parametrize("name", ["fp6_e3m2", "uint4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scales_take_the_same_bytes(name: str, group_size: int | None, dtype: str) -> None:
    scheme = Scheme(get(name), group_size, dtype)
    facts = (
        {"scales::kRowWords * 4": packing(scheme).scale_bytes, "scales::kBlockBytes": 0}
        if group_size is None
        else {"scales::kBlockBytes": BLOCK_OC * packing(scheme).scale_row_bytes, "scales::kGroups": 128 // group_size}
    )
    check("common/scales.cuh", next(dense.sources(packing(scheme), H200)), facts)


def test_a_block_has_as_many_columns_and_a_cta_as_many_rows() -> None:
    launched = Launched()
    pointers = ("given", "before", "scale", "zero_point", "groups", "kept", "matrix", "table", "values", "changes")
    launch = columns.prepare_columns(
        launched,
        stream=0,
        **dict.fromkeys(pointers, 0),
        stride=256,
        rows=81,
        low=-8.0,
        high=7.0,  # type: ignore[arg-type]
    )
    launch(128, 256)
    facts = {
        "columns::kColumns": sweeps.BLOCK,
        "(81 + columns::kWarps - 1) / columns::kWarps": launched.grid[0],
        "32 * columns::kWarps": launched.block[0],
    }
    check("calibrate/columns.cuh", columns.columns_source(False, 14), facts)
    assert columns.MOST_COLUMNS == sweeps.BLOCK
    widest = get("fp8_e4m3").values().unique()
    assert len(widest) - 1 == columns.MOST_MIDDLES


def test_a_tile_of_the_sm90_schedule_has_the_same_rows_threads_and_pieces() -> None:
    for tile, source in sm90_sources(get_scheme("fp6_e3m2")).items():
        problem = tune.LinearProblem(oc=4096, ic=4096, n=4 * tile.tokens, bits=6)
        config = sm90.config(problem, tile, 0, 2, 1, H200)
        facts = {
            "linear::kRows": tile.rows,
            "linear::kThreads": tile.threads,
            "linear::kComputeRegisters": tile.registers,
            "linear::kFew": tile.few,
            "linear::kTurns": tile.turns,
            "linear::kSlotsOfBlock": tile.x_slots_of_block,
            "linear::kTokens / linear::kSlotBoxes": sm90.box_rows(config, problem.n),
            "linear::kPartBytes": tile.part_bytes,
            "linear::kSums * linear::kFinishers * 2": dense.parts(config, problem.n)[0] // dense.parts(config, 1)[1],
        }
        if tile.bytewise:
            facts["linear::kSettles"] = not tile.fast_sums
        check("dense/sm90_multiply_bytes.cuh" if tile.bytewise else "dense/sm90_pipeline.cuh", source, facts)


@pytest.mark.parametrize(("name", "operand"), [("fp6_e2m3", "kE4m3"), ("fp6_e3m2", "kE5m2"), ("int4", "kInt8")])
def test_weights_beside_8_bit_activations_are_of_the_type_that_their_table_makes(name: str, operand: str) -> None:
    target = decode_groups.INT8 if name == "int4" else decode_groups.FP8
    assert f"k{decode_groups.decode_group(get(name), target).operand.capitalize()}" == operand
    source = next(source for tile, source in sm90_sources(get_scheme(name)).items() if tile.bytewise)
    check("dense/sm90_multiply_bytes.cuh", source, {"linear::kOperand": f"wgmma::{operand}"})


def test_a_launch_has_the_threads_that_its_kernel_counts_on() -> None:
    scheme, launched = get_scheme("fp6_e3m2"), Launched()
    for n, schedule, chip in ((8, tune.SM80, chip_named("A100")), (8, tune.SM90, H200)):
        config = tune.choose(tune.LinearProblem(oc=4096, ic=4096, n=n, bits=6), chip)
        assert config.schedule == schedule
        source = dense.fused_source(packing(scheme), "float16", config)
        if schedule == tune.SM80:
            run = dense.prepare_fused(launched, config, bf16=False, oc=4096, ic=4096, n=n, aligned=True, factor=1.0)  # type: ignore[arg-type]
            places = ("weight", "scale", "x", "x_stride", "x_scale", "bias", "residual", "y", "partial", "arrived")
            run(stream=0, early=False, **dict.fromkeys(places, 0))
            assert launched.grid[0] * sm80.ROWS == 4096
            check(source.header, source, {"linear::kThreads": launched.block[0], "linear::kRows": sm80.ROWS})
        else:
            check("dense/sm90_pipeline.cuh", source, {"linear::kThreads": sm90.tile_of(config).threads})
    of = packing(scheme)
    problem = ExpertsProblem.of(of, (8, 512, 512), 4, 2)
    config = experts_sm80.config(problem, 16, 2, chip_named("A100"))
    assert config.floats // config.counters == 2 * sm80.ROWS * 16 and config.grid == (8, 512 // sm80.ROWS, 2)
    run = of_experts.prepare(
        launched, config, bf16=False, oc=512, ic=512, tokens=4, top_k=2, gathers=True, most_blocks=8, factor=1.0
    )  # type: ignore[arg-type]
    places = ("weight", "scale", "bias", "x", "x_stride", "x_scale", "order", "blocks", "y", "partial", "arrived")
    run(stream=0, early=False, **dict.fromkeys(places, 0))
    source = of_experts.source(of, "float16", config, 1, False)
    check(source.header, source, {"linear::kThreads": launched.block[0], "linear::kTokens": 16})
    quantizing.prepare_quantize(launched, n=3, ic=32768, activations=Activations.E4M3)(
        stream=0, x=0, x_stride=32768, codes=0
    )  # type: ignore[arg-type]
    source = quantizing.quantize_source("float16", Activations.E4M3)
    check(source.header, source, {"quantize::kMostThreads": launched.block[0]})
    dense.launch_dequantize(launched, 0, weight=0, scale=0, scratch=0, first_block=0, oc=64, ic=1000, factor=1.0)  # type: ignore[arg-type]
    source = dense.dequantize_source(packing(scheme))
    check(
        source.header,
        source,
        {"32 * dequantize::kWarps": launched.block[0], "8 / dequantize::kWarps": launched.grid[0]},
    )
    dense.launch_epilogue(
        launched, 0, sums=0, scale=0, bias=0, residual=0, y=0, first_oc=0, slice_oc=1024, oc=1024, n=2, factor=1.0
    )  # type: ignore[arg-type]
    source = dense.epilogue_source(packing(scheme))
    check(
        source.header, source, {"epilogue::kThreads": launched.block[0], "1024 / epilogue::kThreads": launched.grid[0]}
    )


def routed(experts: int, tokens: int) -> Launched:
    """How `tokens` tokens of which each gets one of so many experts are routed."""
    launched, choice = Launched(), routing.Choice(experts=experts, top_k=1)
    places = ("logits", "bias", "index", "weights", "order", "position", "blocks", "arrived")
    launch = routing.prepare_route(launched, choice, tokens=tokens, block_tokens=8, scale=1.0)  # type: ignore[arg-type]
    launch(stream=0, stride=experts, early=False, **dict.fromkeys(places, 0))
    return launched


def test_launches_around_experts_count_threads_pairs_and_limits_as_the_kernels_do() -> None:
    for experts in (256, routing.MOST_EXPERTS):
        source = routing.route_source(routing.Choice(experts=experts, top_k=1), "float32")
        many = routed(experts, 10000).block[0]
        check(source.header, source, {"route::kMostThreads": many, f"route::kMostThreads > {experts}": True})
    few, pairs = routing.FEW_TOKENS, routing.WARP_PAIRS
    assert [routed(256, n).grid[0] for n in (few, few + 1)] == [1, 3]
    assert [routed(256, n).shared > 0 for n in (pairs, pairs + 1)] == [False, True]
    facts = {"route::kFewTokens": few, "tables::kWarpPairs": pairs}
    inputs = ("kFloat16", "kBfloat16", "kFloat32", "kInt32", "kInt64")
    facts |= {f"route::{name}": number for name, number in zip(inputs, routing.INPUTS.values(), strict=True)}
    most = routing.Choice(
        experts=routing.MOST_EXPERTS, top_k=routing.MOST_TOP_K, groups=routing.MOST_GROUPS, top_groups=2
    )
    source = routing.route_source(most, "float32")
    check(source.header, source, facts)

    launched = Launched()
    launch = routing.prepare_tables(launched, experts=routing.MOST_EXPERTS, pairs=33, block_tokens=8)  # type: ignore[arg-type]
    launch(stream=0, index=0, order=0, position=0, blocks=0, early=False)
    threads = launched.block[0]
    assert threads > routing.MOST_EXPERTS and launched.shared == threads // 8 * (routing.MOST_EXPERTS + 1)
    launched, source = Launched(), routing.combine_source("float16")
    launch = routing.prepare_combine(launched, tokens=3, top_k=2, channels=4096, aligned=True)  # type: ignore[arg-type]
    launch(stream=0, y=0, weights=0, position=0, blocks=0, addend=0, out=0, ready=False, early=False)
    facts = {"combine::kThreads": launched.block[0], "4096 / combine::kThreads / combine::kChannels": launched.grid[1]}
    check(source.header, source, facts)


def test_warps_that_normalise_rows_are_as_many_as_the_kernel_counts_on() -> None:
    launched, source = Launched(), norms.norm_source("float16", False, 5120, Activations.E4M3, 3)
    sizes = {"rows": 2112, "channels": 5120, "eps": 0.0, "offset": 0.0, "sms": 132, "sm_threads": 2048}
    places = dict.fromkeys(("x", "stride", "weight", "bias", "residual", "out", "out_stride"), 0)
    norms.prepare_norm(launched, **sizes, warps=3)(stream=0, **places, ready=False, early=False)  # type: ignore[arg-type]
    facts = {"32 * norms::kRows": launched.block[0], "norms::kOfLane * 256": 5120}
    assert launched.grid == (264, 1, 1)
    check(source.header, source, facts)


def test_a_launch_that_decides_counts_threads_tokens_and_channels_as_the_kernel_does() -> None:
    choice = routing.Choice(experts=deciding.MOST_EXPERTS, top_k=routing.MOST_TOP_K)
    widths = {deciding.MOST_NORMED_CHANNELS: True, deciding.MOST_CHANNELS: False}
    for channels, gains in widths.items():
        router = routing.Router(target="float16", float_weight=False, float_out=False, channels=channels)
        decider, launched = deciding.Decider(router=router, choice=choice, norms=gains), Launched()
        numbers = {"tokens": deciding.MOST_TOKENS, "block_tokens": 8, "scale": 1.0, "eps": 0.0, "offset": 0.0}
        launch = deciding.prepare(launched, decider, **numbers)  # type: ignore[arg-type]
        places = ("x", "weight", "bias", "preferred", "gain", "normed", "index", "weights", "logits")
        tables = dict.fromkeys(("order", "position", "blocks"), 0)
        launch(stream=0, ready=False, early=False, **dict.fromkeys(places, 0), **tables)
        source, (rows, tokens) = deciding.source(decider, deciding.MOST_TOKENS), decider.share(deciding.MOST_TOKENS)
        assert launched.grid[0] == deciding.MOST_EXPERTS // rows * deciding.MOST_TOKENS // tokens + 1
        facts: dict[str, int | str] = {"decide::kMostThreads": launched.block[0], "ROWS": rows, "TOKENS": tokens}
        check(source.header, source, facts | {"decide::kFewTokens": deciding.MOST_TOKENS})
    assert not replace(decider, norms=True).fits(1) and not decider.fits(deciding.MOST_TOKENS + 1)
    norm = small.norm_threads(deciding.MOST_NORMED_CHANNELS)
    assert norm == 32 * 16 and small.norm_pieces(deciding.MOST_NORMED_CHANNELS) == 1  # decide::kNormWarps
    assert small.norm_pieces(deciding.MOST_SUMMED_CHANNELS) == 2


@pytest.mark.parametrize("e4m3", [False, True])
@pytest.mark.parametrize("head_dim", [80, 128, 256])
def test_launches_of_attention_count_pages_queries_and_threads_as_the_kernels_do(
    head_dim: int, e4m3: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = attention.Kind(head_dim=head_dim, dtype="bfloat16", e4m3=e4m3)
    problem = PROBLEM
    places = ("qkv", "pages_of_layer", "scales", "starts", "lengths", "table", "rotary", "sinks", "out")
    common = {
        "stream": 0,
        "stride": 0,
        "norms": (0, 0),
        "wide_sinks": False,
        "early": False,
        **dict.fromkeys(places, 0),
    }
    grid = decode_attention.grid_of(kind, problem, H200.sms)
    source, launched = decode_attention.decode_source(kind, problem.query_tiles(kind), H200), Launched()
    launched.source = source
    parts = {"partial": 0, "shared": 0, "settled": False}
    decode_attention.prepare_decode(launched, problem, grid)(**common, **parts, arrived=0)  # type: ignore[arg-type]
    queries = attention.FEW_QUERIES * 24 // 2
    facts = {
        "pages::kTokens": attention.PAGE,
        "pages::kMostFew": attention.FEW_QUERIES,
        "pages::kRowStride": kind.row_stride,
        "pages::kQueryStride": kind.query_stride,
        "tile::kBytes": kind.tokens_of_16,
        "decode::kThreads": launched.block[0],
        f"({queries} + decode::kQueries - 1) / decode::kQueries * 2": launched.grid[1],
    }
    assert PAGE == attention.PAGE and launched.grid[0] == grid.splits > 1 and launched.grid[2] == 3
    check(source.header, source, facts)
    append, product = Launched(), Launched()
    append.source, product.source = attention.append_source(kind), attention.prefill_source(kind, H200)
    read = {name: at for name, at in common.items() if name not in ("sinks", "wide_sinks", "out")}
    seen = {name: at for name, at in common.items() if name not in ("qkv", "stride", "rotary", "norms")}
    attention.prepare_append(append, problem, 132)(**read, out=0)  # type: ignore[arg-type]
    attention.prepare_prefill(product, problem)(**seen)  # type: ignore[arg-type]
    each = attention.tokens_of_append(problem.tokens, 132)
    assert each > 1 and append.grid[0] == -(-problem.tokens // each)
    assert product.grid[0] == problem.tiles(64 * kind.row_tiles)
    check(append.source.header, append.source, {"append::kThreads": append.block[0]})
    facts = {
        "prefill::kThreads": product.block[0],
        "prefill::kQueries": 64 * kind.row_tiles,
        "prefill::kSlotBytes * 2": (kind.row_stride + (4 if e4m3 else 0)) * 2 * PAGE,
    }
    check(product.source.header, product.source, facts)
    monkeypatch.setattr(tensor_map, "rows", lambda *sizes: str(sizes).encode())
    for chip in (H200, chip_named("A100")):
        shared = Launched()
        shared.source = shared_attention.shared_source(kind, chip)
        launch = shared_attention.prepare_shared(shared, kind, problem, grid, 32, chip.sms)  # type: ignore[arg-type]
        launch(**read, **parts, page_count=5)  # type: ignore[arg-type]
        facts = {
            "shared::kThreads": shared.block[0],
            "shared::kQueries": attention.SHARED_QUERIES,
            "SHARED_BYTES": shared.shared,
            "1 + 3 * 7 + plan::kItemNumbers * 39": shared_size(7),
        }
        check(shared.source.header, shared.source, facts)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_tiles_of_warpgroups_count_queries_and_threads_as_the_kernel_does(
    head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, launched = attention.Kind(head_dim=head_dim, dtype="bfloat16"), Launched()
    launched.source = attention_sm90.prefill_source(kind, H200)
    monkeypatch.setattr(tensor_map, "rows", lambda *sizes: str(sizes).encode())
    grid = attention_sm90.grid_of(kind, PROBLEM, 7, splits=3)
    launch = attention_sm90.prepare_prefill(launched, kind, PROBLEM, grid)  # type: ignore[arg-type]
    places = ("pages_of_layer", "scales", "starts", "lengths", "table", "sinks", "out", "partial", "taken")
    launch(stream=0, page_count=5, wide_sinks=False, early=False, **dict.fromkeys(places, 0))
    facts = {
        "prefill::kThreads": launched.block[0],
        "prefill::kQueries": attention_sm90.QUERIES,
        "pages::kTokens": PAGE,
        "prefill::kSharedBytes": launched.shared,
        "prefill::kGroups * 128 * prefill::kPartFours * 4": grid.floats // ((grid.counters - 1) // 2 * 3),
    }
    assert launched.grid == (7, 1, 1)
    check(launched.source.header, launched.source, facts)
