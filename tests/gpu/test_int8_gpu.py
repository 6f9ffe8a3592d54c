"""int8 activations on the integer tensor cores, bit for bit where sums are whole, against torch's int64 and float64."""

from __future__ import annotations

import pytest
import torch
from helpers.multiplied import multiplied

from tersor import formats, hardware, ops
from tersor.compress import quantize_rtn
from tersor.formats import Activations
from tersor.kernels import dense, jit, quantizing
from tersor.kernels.tune import sm90
from tersor.layouts import PackedWeight, StackedWeight, ratios
from tersor.ops import current, dispatch
from tersor.ops.norm import TARGETS

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs compute capability 9.0"
)

REPEATS = 60
"""Launches of one product, one upon the other."""
INT8, IN_GROUPS = Activations.INT8, Activations.INT8_GROUPS
IN_PIECES = sm90.Tile(256, 2, 1, 1, 1, IN_GROUPS)
ROWS = ("int8", "int4", "int3", "int7", "uint4", "uint7", "uint5", "uint1")
GROUPS = (("int8", 128), ("uint4", 128), ("uint4", 64), ("int4", 32), ("uint5", 160), ("uint7", 32), ("uint3", 256))


def packed(
    name: str, group_size: int | None, oc: int, ic: int, activations: Activations = INT8
) -> tuple[PackedWeight, PackedWeight]:
    """A random weight in the layout for such activations, and as it is stored."""
    torch.manual_seed(oc + ic)
    scheme = formats.get_scheme(name, group_size)
    stored = PackedWeight.from_encoded(quantize_rtn(torch.randn(oc, ic, device="cuda") + 0.1, scheme))
    return stored.to_layout(dispatch.kernel_layout(scheme, torch.float16, activations)), stored


def whole(stored: PackedWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole numbers [OC, IC], int64 on a CPU, and scales [OC, 1], float32, that a weight stands for."""
    if ratios.applies(stored.scheme):
        made, row_scale = ratios.whole_numbers(stored.codes(), *stored.stored_scales(), stored.scheme)
        return made.long().cpu(), row_scale
    (scale, zero_point), numbers = stored.stored_scales(), stored.scheme.format.decode(stored.codes())
    if zero_point is not None:
        numbers = numbers - zero_point.float()
    return numbers.long().cpu(), formats.scale_values(scale, stored.scheme)


def exact_rows(x: torch.Tensor, stored: PackedWeight) -> torch.Tensor:
    """What a product with one scale a row, or ratios to one, is, bit for bit: the whole sum, scaled twice, rounded."""
    codes, scale = INT8.quantize(x.float().cpu())
    numbers, row_scale = whole(stored)
    sums = codes.long() @ numbers.T
    return ((sums.float() * scale).cuda() * row_scale.view(1, -1)).to(x.dtype)


def check_groups(
    x: torch.Tensor,
    y: torch.Tensor,
    stored: PackedWeight,
    bias: torch.Tensor | None = None,
    activations: Activations = INT8,
) -> None:
    """Compare with a float64 product of the same quantised numbers: sums of groups are float32."""
    codes, scale = activations.quantize(x.float().cpu())
    quantised, values = activations.dequantize(codes, scale.double()).cuda(), multiplied(stored, activations)
    exact = quantised @ values.T
    allowed = 2.0**-20 * (quantised.abs() @ values.abs().T)
    if bias is not None:
        exact += bias.double()
    allowed += exact.abs() * torch.finfo(x.dtype).eps + torch.finfo(x.dtype).tiny
    worst = float(((y.double() - exact).abs() / allowed).max())
    assert worst <= 1, f"error is {worst:.2f} of what is allowed"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ROWS)
def test_products_with_one_scale_a_row_are_exact(name: str, dtype: torch.dtype) -> None:
    weight, stored = packed(name, None, 200, 1280)
    for n in (1, 7, 16, 17, 33, 65, 129, 300):
        x = torch.randn(n, 1280, device="cuda").to(dtype)
        assert torch.equal(ops.linear(x, weight), exact_rows(x, stored)), n


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "group_size", "activations"),
    [
        *((name, size, activations) for name, size in GROUPS for activations in (INT8, IN_GROUPS)),
        *((name, None, IN_GROUPS) for name in ("int8", "int4", "uint5")),
    ],
)
def test_products_with_scales_in_groups(
    name: str, group_size: int | None, activations: Activations, dtype: torch.dtype
) -> None:
    weight, stored = packed(name, group_size, 200, 1280, activations)
    bias = torch.randn(200, device="cuda").to(dtype)
    for n in (1, 7, 16, 17, 33, 65, 129, 300, 1027):
        x = torch.randn(n, 1280, device="cuda").to(dtype) * torch.logspace(-2, 2, 1280, device="cuda").to(dtype)
        check_groups(x, ops.linear(x, weight, bias), stored, bias, activations)
        if activations is INT8 and ratios.applies(stored.scheme):
            assert torch.equal(ops.linear(x, weight), exact_rows(x, stored)), n


def test_the_largest_sums_do_not_wrap() -> None:
    """As many channels as 32 bits certainly hold, all products as large as they are, of either sign."""
    ic, scheme = dispatch.MOST_WHOLE_CHANNELS, formats.get_scheme("int8")
    rows = torch.tensor([[127.0], [-128.0]], device="cuda").expand(2, ic)
    encoded = quantize_rtn(torch.ones(2, ic, device="cuda"), scheme)
    encoded.codes.copy_((rows + 128).to(torch.uint8))
    stored = PackedWeight.from_encoded(encoded)
    x = torch.tensor([[1.0], [-1.0]], device="cuda").bfloat16().expand(2, ic)
    y = ops.linear(x, stored.to_layout(dispatch.INT8_LAYOUT))
    assert torch.equal(y, exact_rows(x, stored)) and y.isfinite().all() and (y.abs() > 1e5).all()


def test_odd_sizes_and_strides() -> None:
    for oc, ic in ((1, 1), (65, 100), (777, 1001), (128, 8192)):
        weight, stored = packed("int8", None, oc, ic)
        wide = torch.randn(40, ic + 3, device="cuda").half()
        for x in (wide[:, :ic], wide[::3, 3:], torch.randn(ic, 9, device="cuda").half().T):
            assert torch.equal(ops.linear(x, weight), exact_rows(x, stored))
            in_groups, _ = packed("int8", None, oc, ic, IN_GROUPS)
            check_groups(x, ops.linear(x, in_groups), stored, None, IN_GROUPS)
    assert ops.linear(torch.empty(0, 8192, device="cuda").half(), weight).shape == (0, 128)


@pytest.mark.parametrize(("name", "group_size"), [("int8", None), ("uint4", 128)])
@pytest.mark.parametrize("tile", dict.fromkeys((*sm90.tiles(0, INT8), *sm90.tiles(0, IN_GROUPS), IN_PIECES)), ids=str)
def test_every_tile_in_turn_and_in_parts(tile: sm90.Tile, name: str, group_size: int | None) -> None:
    """A few CTAs that take several items each, split tiles among them; whole sums do not depend on that."""
    if group_size is not None and tile.activations is not INT8 and not (tile.grouped or tile.in_pieces):
        pytest.skip("scales in groups need a second set of sums")
    chip = hardware.of_device(0)
    oc, ic, n = 700, 1152, 3 * tile.tokens - 5
    weight, stored = packed(name, group_size, oc, ic, tile.activations)
    x = torch.randn(n, ic, device="cuda").half()
    problem = dense.problem_of(weight.scheme, (oc, ic), n, activations=tile.activations)
    for whole_tiles, splits, ctas in ((0, 1, 4), (0, 3, 8), (4, 2, 4)):
        config = sm90.config(problem, tile, whole_tiles, splits, ctas * tile.cluster, chip)
        with ops.using(config=config):
            first = ops.linear(x, weight)
            others = [ops.linear(x, weight) for _ in range(REPEATS)]
        if tile.activations is INT8:
            assert torch.equal(first, exact_rows(x, stored)), config
        else:
            check_groups(x, first, stored, None, tile.activations)
        different = sum(not torch.equal(first, other) for other in others)
        assert not different, f"{config}: {different} of {REPEATS} results differ"


@pytest.mark.parametrize("tile", [tile for tile in sm90.tiles(0, INT8) if tile.gathered > 1], ids=str)
def test_splits_of_a_cluster_add_up_exactly(tile: sm90.Tile) -> None:
    oc, ic = 700, 1152
    weight, stored = packed("int4", None, oc, ic)
    x = torch.randn(tile.tokens, ic, device="cuda").half()
    problem = dense.problem_of(weight.scheme, (oc, ic), tile.tokens, activations=INT8)
    for splits in range(2, tile.gathered + 1):
        ctas = -(-oc // tile.rows) * splits
        with ops.using(config=sm90.config(problem, tile, 0, splits, ctas, hardware.of_device(0), True)):
            assert torch.equal(ops.linear(x, weight), exact_rows(x, stored)), splits


@pytest.mark.parametrize("activations", [INT8, IN_GROUPS])
@pytest.mark.parametrize("group_size", [None, 128])
def test_gates_residuals_and_biases(group_size: int | None, activations: Activations) -> None:
    parts = [packed("uint4", group_size, 256, 512)[1], packed("uint4", group_size, 256, 512)[1]]
    stored = PackedWeight.gate_up(*parts)
    weight = stored.to_layout(dispatch.kernel_layout(stored.scheme, torch.float16, activations))
    for n in (3, 70, 200):
        x, residual = torch.randn(n, 512, device="cuda").half(), torch.randn(n, 256, device="cuda").half()
        y = ops.gated_linear(x, weight, residual=residual)
        with ops.using(reference=True):
            expected = ops.gated_linear(x, weight, residual=residual)
        torch.testing.assert_close(y, expected, rtol=2e-3, atol=2e-3)


def test_extremes_and_zeros() -> None:
    weight, stored = packed("int8", None, 128, 512)
    x = torch.randn(6, 512, device="cuda").half()
    x *= torch.tensor([[1e-7], [1e-4], [0.0], [1.0], [1e2], [6e2]], device="cuda").half()
    y = ops.linear(x, weight)
    assert torch.equal(y, exact_rows(x, stored)) and not y[2].any()


def scales_of(memory: torch.Tensor, tokens: int, channels: int, activations: Activations) -> torch.Tensor:
    """Scales as `Activations.quantize` has them, from where the quantiser wrote them."""
    if activations.group_size is None:
        return memory.view(tokens, 1)
    return memory.view(activations.scales(channels), quantizing.scales_stride(tokens))[:, :tokens].T


@pytest.mark.parametrize("activations", [INT8, IN_GROUPS])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels", [264, 4096, 5120, 14336])
def test_rows_become_int8_as_the_torch_code_says_alone_and_in_a_norm(
    channels: int, dtype: torch.dtype, activations: Activations
) -> None:
    product, _ = packed("int8", None, 200, channels, activations)
    weight = torch.randn(channels, device="cuda").to(dtype)
    for tokens in (1, 7, 985, 2500):
        x = (torch.randn(tokens, channels, device="cuda") * 3 + 1).to(dtype)
        x[tokens - 1] = 0
        assert ops.takes_quantized(x, (product,), weight) is activations
        plain = ops.rms_norm(x, weight, 1e-6)
        row = quantizing.codes_stride(channels)
        size = quantizing.quantized_bytes(tokens, channels, activations)
        memory = torch.full((size,), 255, dtype=torch.uint8, device="cuda")
        source = quantizing.quantize_source(TARGETS[dtype], activations)
        launch = quantizing.prepare_quantize(jit.get(source, 0), n=tokens, ic=channels, activations=activations)
        launch(stream=current.stream(0), x=plain.data_ptr(), x_stride=channels, codes=memory.data_ptr())
        codes = memory[: tokens * row].view(tokens, row)[:, :channels]
        scales = scales_of(memory[tokens * row :].view(torch.float32), tokens, channels, activations)
        expected, expected_scales = activations.quantize(plain.float().cpu())
        assert torch.equal(codes.contiguous().view(torch.int8).cpu(), expected)
        assert torch.equal(scales.cpu(), expected_scales)
        for _ in range(5):
            rows = ops.rms_norm_quantized(x, weight, 1e-6, activations=activations)
            assert torch.equal(rows.codes.cpu(), expected)
            assert torch.equal(rows.scales.view(tokens, -1).cpu(), expected_scales)
        assert torch.equal(ops.linear_quantized(rows, product), ops.linear(plain, product))


def test_experts_multiply_int8() -> None:
    """All experts at once give what one after the other does."""
    experts, hidden, inner = 8, 512, 256
    scheme = formats.get_scheme("uint4", 128)

    def stack(oc: int, ic: int) -> StackedWeight:
        parts = [PackedWeight.from_encoded(quantize_rtn(torch.randn(oc, ic) / 16, scheme)) for _ in range(experts)]
        made = StackedWeight.stack(parts).to_layout(dispatch.INT8_LAYOUT)
        return StackedWeight(made.scheme, made.shape, made.data.cuda(), made.scale.cuda(), None, made.layout)

    gate_up, down = stack(2 * inner, hidden), stack(hidden, inner)
    for tokens in (3, 200):
        x = torch.randn(tokens, hidden, device="cuda").half()
        index = torch.rand(tokens, experts, device="cuda").topk(2).indices.int()
        factors = torch.rand(tokens, 2, device="cuda")
        y = ops.experts(x, gate_up, down, index, factors)
        with ops.using(reference=True):
            expected = ops.experts(x, gate_up, down, index, factors)
        error = (y.float() - expected.float()).norm() / expected.float().norm()
        assert error < 5e-3, error
