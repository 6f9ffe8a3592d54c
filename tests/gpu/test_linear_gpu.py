"""Kernels against the formats: every code exact, products within the tolerance of a float32 accumulation."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import replace

import pytest
import torch

from tersor import formats, hardware, ops
from tersor.compress import Encoded
from tersor.hardware import Chip
from tersor.kernels import dense as family
from tersor.kernels import jit, tune
from tersor.kernels.tune import sm90
from tersor.layouts import PackedWeight, decode_groups
from tersor.layouts.blocks import BLOCK_IC
from tersor.layouts.packing import LAYOUTS, Packing, scales_in_block
from tersor.ops import dispatch, prepared

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DTYPES = (torch.float16, torch.bfloat16)


FORMATS = ("fp6_e3m2", "fp6_e2m3", "fp5_e2m2", "fp5_e3m1", "fp4_e2m1", "int4", "int8")
"""The formats in most use."""
FULLY = ("fp6_e3m2", "int4")
"""Formats that are multiplied with scales of every group size; test_types_gpu.py has every format."""
PRODUCTS = [
    (name, group_size)
    for name in FORMATS
    for group_size in ((None, 128, 32, 64, 16, 80, 320) if name in FULLY else (None, 128))
]
SHAPES = ((129, 640), (1, 1280), (400, 1920))
TOKENS = (1, 7, 8, 9, 17, 33, 64, 65, 129, 300)
TILED = (
    ("fp6_e2m3", None, 1032, torch.bfloat16),
    ("int5", None, 1032, torch.float16),
    ("fp6_e3m2", 64, 1280, torch.float16),
    ("fp5_e2m2", 128, 1280, torch.bfloat16),
)
"""Weights for every tile: format, group size, channels, activations; those of five bits decode 16 registers at once."""
REPEATS = 30
"""Launches of one product, one upon the other: slots of the rings are refilled soonest with weights that lie in L2."""


def chips() -> dict[str, Chip]:
    """The GPU as if it were of the generation that the sm80 schedule is for, and as it is where it is newer."""
    chip = hardware.of_device(0)
    known = {"sm80": replace(chip, capability=(8, 0))}
    if chip.capability == (9, 0):
        known["sm90"] = chip
    return known


def problem_of(scheme: formats.Scheme, oc: int, ic: int, n: int) -> tune.LinearProblem:
    """The problem of contiguous activations [n, ic] and a weight [oc, ic]."""
    return family.problem_of(scheme, (oc, ic), n, aligned=ic % 8 == 0)


def sources() -> Iterable[jit.KernelSource]:
    """Yield the kernels that the larger tests below ask for."""
    by_rows = formats.get_scheme("fp6_e3m2")
    for dtype in DTYPES:
        for chip in chips().values():
            yield from ops.kernels_for(by_rows, dtype, chip)
    for name, group_size in PRODUCTS:
        scheme = formats.get_scheme(name, group_size)
        for target in decode_groups.PAIR_TARGETS:
            yield family.dequantize_source(Packing.of(scheme, target))
            for chip in chips().values():
                for problem in (problem_of(scheme, *shape, n) for shape in SHAPES for n in TOKENS):
                    if tune.fused(problem, chip):
                        yield family.fused_source(Packing.of(scheme, target), target, tune.choose(problem, chip))
    for name, group_size, ic, dtype in TILED if "sm90" in chips() else ():
        scheme = formats.get_scheme(name, group_size)
        target = LAYOUTS[ops.preferred_layout(scheme, dtype, torch.device("cuda", 0))]
        for tile in sm90.tiles(scales_in_block(group_size)):
            config = sm90.config(problem_of(scheme, 333, ic, 1), tile, 0, 1, tile.cluster, chips()["sm90"])
            yield family.fused_source(Packing.of(scheme, target), target, config)


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """Compile side by side what the tests below would compile one after the other."""
    arch = jit.arch_for(torch.cuda.get_device_capability(0))
    jit.compile_many(list(dict.fromkeys(sources())), arch, os.cpu_count())


def random_weight(oc: int, ic: int, scheme: formats.Scheme, seed: int = 0, all_codes: bool = False) -> PackedWeight:
    """A weight of random codes (every code, subnormals and extremes among them) and random scales."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << scheme.format.bits, (oc, ic), dtype=torch.uint8, generator=generator)
    if all_codes:
        codes.view(-1)[: 1 << scheme.format.bits] = torch.arange(1 << scheme.format.bits, dtype=torch.uint8)
    wanted = torch.rand(oc, scheme.groups(ic), generator=generator) * 0.02 + 1e-3
    encoded = Encoded(scheme, codes, formats.store_scales(wanted, scheme), None, 0.0, 0.0)
    weight = PackedWeight.from_encoded(encoded)
    return PackedWeight(scheme, (oc, ic), weight.data.cuda(), weight.scale.cuda())


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Leave no prepared call behind that a test made."""
    yield
    prepared.forget()


@pytest.fixture(params=["sm80", "sm90"])
def schedule(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test with the kernels of either generation; those of sm_80 run on a newer GPU, too."""
    chip = chips().get(request.param)
    if chip is None:
        pytest.skip("needs compute capability 9.0")
    monkeypatch.setattr(hardware, "of_device", lambda index: chip)
    prepared.forget()
    return request.param


def check(weight: PackedWeight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Run whatever kernel serves the call and compare with float64."""
    packed = weight.to_layout(ops.preferred_layout(weight.scheme, x.dtype, x.device))
    assert served_by(packed, x) != dispatch.REFERENCE
    y = ops.linear(x, packed, bias)
    exact_weight = weight.dequantize().double()
    if weight.scheme.group_size is not None and served_by(packed, x) != dispatch.FUSED:
        exact_weight = weight.dequantize(x.dtype).double()
    exact = x.double() @ exact_weight.T
    allowed = formats.product_tolerance(x.double(), exact_weight, x.dtype)
    if bias is not None:
        exact += bias.double()
        allowed += bias.abs().double() * torch.finfo(x.dtype).eps
    worst = ((y.double() - exact).abs() / allowed).max()
    assert torch.isfinite(y).all()
    assert worst <= 1, f"error is {float(worst):.2f} of what is allowed"
    return y


def served_by(packed: PackedWeight, x: torch.Tensor) -> str:
    """Return who serves the call: a fused kernel, decoded weights and cuBLAS, or the reference."""
    x = x if x.is_contiguous() or x.stride(1) == 1 else x.contiguous()
    stride = x.shape[1] if x.is_contiguous() else x.stride(0)
    aligned = x.data_ptr() % 16 == 0 and stride % 8 == 0
    return dispatch.decide(packed.scheme, packed.layout, packed.shape, x.shape[0], x.dtype, x.device, aligned).kernel


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*FORMATS, "fp4_e3m0", "fp4_e1m2", "fp3_e2m0", "fp8_e4m3"])
def test_every_code_decodes_exactly(name: str, dtype: torch.dtype, schedule: str) -> None:
    """Columns of the identity pick single weights out of the fused kernel: what it decoded, times the scale."""
    scheme = formats.get_scheme(name, scale_dtype="float32")
    weight = random_weight(48, 64, scheme, all_codes=True)
    weight = PackedWeight(scheme, weight.shape, weight.data, torch.full_like(weight.scale, 0.5))
    packed = weight.to_layout(ops.preferred_layout(scheme, dtype, weight.data.device))
    identity = torch.eye(64, dtype=dtype, device="cuda")
    fused = ops.linear(identity, packed)
    assert torch.equal(fused.float(), weight.dequantize().T)
    many = torch.cat((identity, identity))
    assert (served_by(packed, many) == dispatch.FUSED) == (schedule == "sm90")
    assert torch.equal(ops.linear(many, packed).float(), weight.dequantize().T.repeat(2, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "group_size"), PRODUCTS)
def test_products_are_within_tolerance(name: str, group_size: int | None, dtype: torch.dtype, schedule: str) -> None:
    scheme = formats.get_scheme(name, group_size)
    generator = torch.Generator(device="cuda").manual_seed(1)
    for oc, ic in SHAPES:
        weight = random_weight(oc, ic, scheme)
        for n in TOKENS:
            x = torch.randn(n, ic, dtype=dtype, device="cuda", generator=generator)
            check(weight, x, torch.randn(oc, dtype=dtype, device="cuda", generator=generator) if n % 2 else None)


def forced(problem: tune.LinearProblem, tile: sm90.Tile) -> Iterator[tune.LinearConfig]:
    """Yield configurations with a tile: CTAs of one item or many, whole tiles and split ones, up to a block each."""
    total = -(-problem.oc // (tile.rows * tile.cluster)) * -(-problem.n // tile.tokens)
    blocks = -(-problem.ic // BLOCK_IC)
    for whole, splits, most in (
        (0, 1, total),
        (0, 1, 1),
        (0, 2, 3),
        (min(2, total - 1), 3, 2),
        (0, 5, 7),
        (1, blocks, 66),
    ):
        if whole < total:
            clusters = min(most, whole + (total - whole) * splits)
            yield sm90.config(problem, tile, whole, splits, clusters * tile.cluster, chips()["sm90"])


@pytest.mark.parametrize("index", range(len(sm90.tiles(0))), ids=lambda index: str(sm90.tiles(0)[index]))
@pytest.mark.parametrize(("name", "group_size", "ic", "dtype"), TILED)
def test_every_tile_in_every_part(name: str, group_size: int | None, ic: int, dtype: torch.dtype, index: int) -> None:
    """Every tile of the sm90 schedule over several token tiles, with and without splits and whole tiles."""
    tile, scheme = sm90.tiles(0)[index], formats.get_scheme(name, group_size)
    if "sm90" not in chips():
        pytest.skip("needs compute capability 9.0")
    if tile not in sm90.tiles(scales_in_block(group_size)):
        pytest.skip("not a tile for scales in groups")
    weight = random_weight(333, ic, scheme)
    packed = weight.to_layout(ops.preferred_layout(scheme, dtype, weight.data.device))
    exact_weight = weight.dequantize().double()
    for n in (tile.tokens - 3, 2 * tile.tokens, 2 * tile.tokens + 1):
        x = torch.randn(n, ic, dtype=dtype, device="cuda")
        exact, allowed = x.double() @ exact_weight.T, formats.product_tolerance(x.double(), exact_weight, dtype)
        for config in forced(problem_of(scheme, 333, ic, n), tile):
            with ops.using(config=config):
                first, *others = (ops.linear(x, packed) for _ in range(REPEATS))
            worst = float(((first.double() - exact).abs() / allowed).max())
            assert worst <= 1, (
                f"{n} tokens, {config}, {config.whole_tiles} whole: error is {worst:.2f} of what is allowed"
            )
            different = sum(not torch.equal(first, other) for other in others)
            assert not different, f"{n} tokens, {config}: {different} of {REPEATS} results differ"


@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_sizes_strides_and_split_channels(dtype: torch.dtype, schedule: str) -> None:
    scheme = formats.get_scheme("fp6_e3m2")
    generator = torch.Generator(device="cuda").manual_seed(2)
    for oc, ic in ((63, 31), (17, 33), (256, 1000), (100, 129), (40, 9000), (2048, 2049)):
        weight = random_weight(oc, ic, scheme, seed=ic)
        for n in (1, 3, 16, 63, 64, 65, 200, 1000):
            wide = torch.randn(n, ic + 3, dtype=dtype, device="cuda", generator=generator)
            plain = check(weight, wide[:, :ic].contiguous(), None)
            shifted = check(weight, wide[:, :ic], None)
            transposed = check(weight, wide[:, :ic].T.contiguous().T, None)
            if n <= 64 and schedule == "sm80":  # elsewhere another alignment may choose another kernel
                assert torch.equal(shifted, plain)
            if n <= 64:
                assert torch.equal(transposed, plain)


def test_extreme_activations_propagate(schedule: str) -> None:
    """NaN and infinity reach exactly the rows of the tokens that hold them."""
    weight = random_weight(200, 304, formats.get_scheme("fp6_e2m3"))
    for n in (5, 100):
        x = torch.randn(n, 304, dtype=torch.float16, device="cuda")
        x[1, 7], x[3, 303] = float("nan"), float("inf")
        y = ops.linear(x, weight.to_layout("tiles_float16"))
        assert torch.isnan(y[1]).all()
        assert not torch.isfinite(y[3]).any()
        untouched = [row for row in range(n) if row not in (1, 3)]
        assert torch.isfinite(y[untouched]).all()


def test_no_tokens_and_more_dimensions() -> None:
    weight = random_weight(48, 96, formats.get_scheme("int4", 32)).to_layout("tiles_bfloat16")
    x = torch.randn(2, 3, 96, dtype=torch.bfloat16, device="cuda")
    assert ops.linear(x[:, :0], weight).shape == (2, 0, 48)
    assert torch.equal(ops.linear(x, weight).view(6, 48), ops.linear(x.view(6, 96), weight))


def test_repeated_runs_are_equal(schedule: str) -> None:
    """Split sums are added in a fixed order, whatever order the CTAs arrive in."""
    weight = random_weight(256, 8192, formats.get_scheme("fp6_e3m2")).to_layout("tiles_float16")
    x = torch.randn(16, 8192, dtype=torch.float16, device="cuda")
    first = ops.linear(x, weight)
    for _ in range(50):
        assert torch.equal(ops.linear(x, weight), first)


@pytest.mark.parametrize("n", [1, 16, 100])
def test_cuda_graph_replays_and_streams(n: int, schedule: str) -> None:
    weight = random_weight(256, 4096, formats.get_scheme("fp6_e3m2")).to_layout("tiles_float16")
    x = torch.randn(n, 4096, dtype=torch.float16, device="cuda")
    expected = ops.linear(x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.linear(ops.linear(x, weight)[:, :1].expand(n, 4096).contiguous() * 0 + x, weight)
    for _ in range(3):
        y.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, expected)
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    torch.cuda.synchronize()
    for stream in streams * 5:
        with torch.cuda.stream(stream):
            results.append(ops.linear(x, weight))
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)


def test_compiled_without_graph_breaks() -> None:
    weight = random_weight(128, 256, formats.get_scheme("fp6_e3m2")).to_layout("tiles_float16")
    x = torch.randn(4, 256, dtype=torch.float16, device="cuda")
    compiled = torch.compile(lambda x: ops.linear(x, weight) + 1, fullgraph=True)
    assert torch.equal(compiled(x), ops.linear(x, weight) + 1)


def test_layouts_are_undone_exactly_on_the_gpu() -> None:
    for name in FORMATS:
        weight = random_weight(70, 200, formats.get_scheme(name, 40 if name == "int4" else None))
        for layout in ("tiles_float16", "tiles_bfloat16"):
            back = weight.to_layout(layout).to_layout("stream") if name != "int4" else weight
            assert torch.equal(back.data, weight.data)
            assert torch.equal(back.scale, weight.scale)
