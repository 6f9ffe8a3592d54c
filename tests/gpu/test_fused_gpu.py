"""Residuals, gated and stacked weights against float64, and rows that do not depend on the batch, bit for bit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tersor import formats, hardware, ops
from tersor.compress import Encoded
from tersor.convert import quantize
from tersor.engine import Sampling
from tersor.integrations.transformers import fuse, joined, load
from tersor.integrations.transformers.generate import Generator
from tersor.kernels import dense as family
from tersor.kernels import jit, tune
from tersor.kernels.tune import sm90
from tersor.layouts import PackedWeight, gated
from tersor.layouts.packing import LAYOUTS, Packing
from tersor.ops import Gate, dispatch, prepared

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DTYPES = (torch.float16, torch.bfloat16)
SCHEMES = (("fp6_e3m2", None), ("fp6_e2m3", 128), ("uint4", 64))
TOKENS = (1, 7, 8, 9, 16, 17, 33, 64, 65, 90, 129, 200, 300)
INVARIANT_TOKENS = (1, 7, 16, 17, 40, 64, 65, 90, 129, 200, 1000)


def random_weight(oc: int, ic: int, name: str, group: int | None, seed: int) -> PackedWeight:
    """A weight of random codes and scales, such that sums of random activations are about 1."""
    scheme = formats.get_scheme(name, group)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << scheme.format.bits, (oc, ic), dtype=torch.uint8, generator=generator)
    size = (oc, scheme.groups(ic))
    wanted = (torch.rand(size, generator=generator) + 0.5) / (scheme.format.max * ic**0.5)
    zero_point = torch.randint(0, 1 << scheme.format.bits, size, dtype=torch.uint8, generator=generator)
    scale = formats.store_scales(wanted, scheme)
    encoded = Encoded(scheme, codes, scale, zero_point if scheme.has_zero_point else None, 0.0, 0.0)
    weight = PackedWeight.from_encoded(encoded)
    zeros = None if weight.zero_point is None else weight.zero_point.cuda()
    return PackedWeight(scheme, (oc, ic), weight.data.cuda(), weight.scale.cuda(), zeros)


def tokens(n: int, ic: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, ic, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def ready(weight: PackedWeight, dtype: torch.dtype) -> PackedWeight:
    """The weight in the layout of its kernels."""
    packed = weight.to_layout(ops.preferred_layout(weight.scheme, dtype, weight.data.device))
    assert packed.layout != "stream"
    return packed


def decision(packed: PackedWeight, n: int, dtype: torch.dtype) -> dispatch.Decision:
    aligned = packed.shape[1] % 8 == 0
    device = torch.device("cuda", 0)
    return dispatch.decide(packed.scheme, packed.layout, packed.shape, n, dtype, device, aligned)


def compile_for(packed: PackedWeight, counts: tuple[int, ...], dtype: torch.dtype, gate: int) -> None:
    """Compile side by side what calls with so many tokens would compile one after the other."""
    target = LAYOUTS[packed.layout]
    configs = [decision(packed, n, dtype).config for n in counts]
    sources = {
        family.fused_source(Packing.of(packed.scheme, target), target, config, gate)
        for config in configs
        if config is not None
    }
    sources |= {
        family.dequantize_source(Packing.of(packed.scheme, target)),
        family.epilogue_source(Packing.of(packed.scheme, target), gate),
    }
    jit.compile_many(sources, jit.arch_for(torch.cuda.get_device_capability()), os.cpu_count())


def decoded(weight: PackedWeight, packed: PackedWeight, n: int, dtype: torch.dtype) -> torch.Tensor:
    """The weight that a product with n tokens multiplies, float64: cuBLAS gets scales in groups rounded with it."""
    rounded = weight.scheme.group_size is not None and decision(packed, n, dtype).kernel == dispatch.DEQUANTIZE
    return (weight.dequantize(dtype) if rounded else weight.dequantize()).double()


def check(y: torch.Tensor, exact: torch.Tensor, sums: torch.Tensor) -> None:
    """Compare with a float64 result; `sums` is what float32 arithmetic may err by before the one rounding."""
    info = torch.finfo(y.dtype)
    allowed = sums + (exact.abs() + sums) * info.eps / 2 + info.smallest_normal * info.eps
    assert torch.isfinite(y).all()
    worst = float(((y.double() - exact).abs() / allowed).max())
    assert worst <= 1, f"error is {worst:.2f} of what is allowed"


@pytest.fixture(autouse=True)
def usual() -> Iterator[None]:
    """Leave neither the mode nor a prepared call behind."""
    ops.set_batch_invariant(False)
    yield
    prepared.forget()


@pytest.fixture(params=["sm80", "sm90"])
def schedule(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test with the kernels of either generation; those of sm_80 run on a newer GPU, too."""
    chip = hardware.of_device(0)
    if request.param == "sm80":
        monkeypatch.setattr(hardware, "of_device", lambda index: replace(chip, capability=(8, 0)))
    elif chip.capability != (9, 0):
        pytest.skip("needs compute capability 9.0")
    prepared.forget()
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "group"), SCHEMES)
@pytest.mark.parametrize(("oc", "ic"), [(129, 640), (1, 1280), (400, 1920), (262, 4224)])
def test_residuals_are_added_before_the_rounding(
    oc: int, ic: int, name: str, group: int | None, dtype: torch.dtype, schedule: str
) -> None:
    weight = random_weight(oc, ic, name, group, seed=oc)
    packed = ready(weight, dtype)
    compile_for(packed, TOKENS, dtype, False)
    bias = tokens(1, oc, dtype, seed=1)[0]
    for n in TOKENS:
        x = tokens(n, ic, dtype, seed=n)
        exact_weight = decoded(weight, packed, n, dtype)
        product = x.double() @ exact_weight.T + bias.double()
        sums = formats.product_tolerance(x.double(), exact_weight, torch.float32)
        wide = tokens(n, oc + 3, dtype, seed=n + 1)
        # The second nearly cancels the product: a sum of rounded products would be far off.
        for residual in (wide[:, :oc], (-product).to(dtype), wide.T[:oc].T):
            y = ops.linear(x, packed, bias, residual=residual)
            check(y, product + residual.double(), sums + 2.0**-23 * (product.abs() + residual.abs()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "group"), SCHEMES)
@pytest.mark.parametrize(("channels", "ic"), [(129, 640), (3, 1280), (208, 1920), (136, 4224)])
def test_gated_linears(channels: int, ic: int, name: str, group: int | None, dtype: torch.dtype, schedule: str) -> None:
    gate, up = (random_weight(channels, ic, name, group, seed) for seed in (3, 4))
    packed = ready(PackedWeight.gate_up(gate, up), dtype)
    compile_for(packed, TOKENS, dtype, True)
    biases = tokens(2, channels, dtype, seed=5)
    bias = gated.interleave(*biases)
    for n in TOKENS:
        x = 4 * tokens(n, ic, dtype, seed=n)
        wide, parts, errors = x.double(), [], []
        for weight, part_bias in zip((gate, up), biases, strict=True):
            exact_weight = decoded(weight, packed, n, dtype)
            parts.append(wide @ exact_weight.T + part_bias.double())
            sums = formats.product_tolerance(wide, exact_weight, torch.float32)
            errors.append(sums + 2.0**-23 * parts[-1].abs())
        silu = torch.nn.functional.silu(parts[0])
        exact = silu * parts[1]
        # The slope of silu is less than 1.1; exp, a division and a product err by a few units in the last place.
        error = 1.1 * errors[0] * (parts[1].abs() + errors[1]) + silu.abs() * errors[1] + 2.0**-20 * exact.abs()
        check(ops.gated_linear(x, packed, bias), exact, error)
        residual = tokens(n, channels, dtype, seed=n + 1)
        y = ops.gated_linear(x, packed, bias, residual=residual)
        check(y, exact + residual.double(), error + 2.0**-23 * residual.double().abs())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", [Gate.GELU_TANH, Gate.GELU, Gate.CLAMPED])
@pytest.mark.parametrize(("name", "group"), [("fp6_e3m2", None), ("uint4", 64)])
def test_other_gates_are_those_of_the_decoded_product(
    name: str, group: int | None, gate: Gate, dtype: torch.dtype, schedule: str
) -> None:
    weights = [random_weight(129, 1280, name, group, seed) for seed in (3, 4)]
    packed = ready(PackedWeight.gate_up(*weights), dtype)
    counts = (1, 9, 64, 300)
    compile_for(packed, counts, dtype, int(gate))
    biases = tokens(2, 129, dtype, seed=5)
    for n in counts:
        x = 4 * tokens(n, 1280, dtype, seed=n)
        pairs = zip(weights, biases, strict=True)
        parts = [x.double() @ decoded(one, packed, n, dtype).T + bias.double() for one, bias in pairs]
        y = ops.gated_linear(x, packed, gated.interleave(*biases), gate=gate)
        torch.testing.assert_close(y.double(), gate.combine(*parts), rtol=torch.finfo(dtype).eps, atol=1e-3)


@pytest.mark.parametrize("gated_rows", [False, True])
@pytest.mark.parametrize("channels", [208, 129])
def test_tiles_of_every_width_end_the_same_sums_alike(channels: int, gated_rows: bool) -> None:
    """Residuals, gates and rounding do not depend on how many tokens a tile has: equal bit for bit."""
    chip, dtype = hardware.of_device(0), torch.float16
    if chip.capability != (9, 0):
        pytest.skip("needs compute capability 9.0")
    gate, up = (random_weight(channels, 1152, "fp6_e3m2", None, seed) for seed in (6, 7))
    packed = ready(PackedWeight.gate_up(gate, up) if gated_rows else gate, dtype)
    call = ops.gated_linear if gated_rows else ops.linear
    n = 250  # of every width there is a tile that is not full
    problem = family.problem_of(packed.scheme, packed.shape, n)
    tiles = [tile for tile in sm90.tiles(0) if not tile.few]
    configs = [sm90.config(problem, tile, 0, 1, 2 * tile.cluster, chip) for tile in tiles]
    packing = Packing.of(packed.scheme, LAYOUTS[packed.layout])
    sources = {family.fused_source(packing, "float16", config, gated_rows) for config in configs}
    jit.compile_many(sources, jit.arch_for(chip.capability), os.cpu_count())
    x, bias = tokens(n, 1152, dtype, seed=8), tokens(1, packed.shape[0], dtype, seed=9)[0]
    residual = tokens(n, channels, dtype, seed=10)
    found = []
    for config in configs:
        with ops.using(config=config):
            found.append((call(x, packed, bias), call(x, packed, bias, residual=residual)))
    different = [
        str(tile)
        for tile, pair in zip(tiles, found, strict=True)
        if not all(torch.equal(one, other) for one, other in zip(pair, found[0], strict=True))
    ]
    assert not different, different


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gate_far_from_zero_and_not_a_number(dtype: torch.dtype, schedule: str) -> None:
    """silu of -1000 is 0, of 1000 it is 1000; NaN and infinity reach the tokens that hold them and no others."""
    scheme = formats.get_scheme("int8", scale_dtype="float32")
    codes = torch.full((16, 128), 129, dtype=torch.uint8)  # every weight is 1
    encoded = Encoded(scheme, codes, torch.ones(16, 1), None, 0.0, 0.0)
    one = PackedWeight.from_encoded(encoded)
    one = PackedWeight(scheme, one.shape, one.data.cuda(), one.scale.cuda())
    packed = ready(PackedWeight.gate_up(one, one), dtype)
    for n in (4, 200):
        x = torch.zeros(n, 128, dtype=dtype, device="cuda")
        x[0, 0], x[1, 5], x[2, 0], x[3, 127] = -1000, 100, float("nan"), float("inf")
        y = ops.gated_linear(x, packed).float()
        assert (y[0] == 0).all() and (y[1] == torch.tensor(1e4).to(dtype).float()).all()
        assert torch.isnan(y[2]).all() and (y[3] == float("inf")).all() and (y[4:] == 0).all()


def test_stacked_weights_give_what_their_parts_give(schedule: str) -> None:
    """Tiles of 64 rows do not mix: stacked sizes that are multiples of them give the same sums where splits agree."""
    sizes, dtype = (256, 64, 64), torch.float16
    parts = [random_weight(oc, 1024, "fp6_e3m2", None, seed=oc + i) for i, oc in enumerate(sizes)]
    packed = ready(PackedWeight.stack(parts), dtype)
    for n in (1, 16, 50, 200):
        x = tokens(n, 1024, dtype)
        whole = ops.linear(x, packed).split(list(sizes), dim=1)
        for y, part in zip(whole, parts, strict=True):
            exact_weight = part.dequantize().double()
            sums = formats.product_tolerance(x.double(), exact_weight, torch.float32)
            check(y, x.double() @ exact_weight.T, sums)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "group"), SCHEMES)
@pytest.mark.parametrize(("oc", "ic"), [(256, 4096), (2048, 1032), (333, 2176)])
def test_rows_do_not_depend_on_the_batch(
    oc: int, ic: int, name: str, group: int | None, dtype: torch.dtype, schedule: str
) -> None:
    if group is not None and ic % group:
        ic = ic // group * group
    ops.set_batch_invariant(True)
    weight = random_weight(oc, ic, name, group, seed=7)
    packed = ready(weight, dtype)
    compile_for(packed, INVARIANT_TOKENS, dtype, False)
    chosen = [decision(packed, n, dtype) for n in INVARIANT_TOKENS]
    assert {found.kernel for found in chosen} == {dispatch.FUSED}
    assert len({found.config.n_tile for found in chosen if found.config is not None}) > 2
    x = tokens(1000, ic, dtype)
    residual = tokens(1000, oc, dtype, seed=1)
    bias = tokens(1, oc, dtype, seed=2)[0]
    whole = ops.linear(x, packed, bias, residual=residual)
    exact_weight = weight.dequantize().double()
    exact = x.double() @ exact_weight.T + bias.double() + residual.double()
    sums = formats.product_tolerance(x.double(), exact_weight, torch.float32)
    check(whole, exact, sums + 2.0**-22 * (exact.abs() + residual.double().abs() + bias.double().abs()))
    shifted = torch.empty(1000, ic + 3, dtype=dtype, device="cuda")[:, 1 : ic + 1]
    shifted.copy_(x)
    for n in INVARIANT_TOKENS:
        for part in (slice(0, n), slice(1000 - n, 1000)):
            expected = whole[part]
            assert torch.equal(ops.linear(x[part], packed, bias, residual=residual[part]), expected), n
            assert torch.equal(ops.linear(shifted[part], packed, bias, residual=residual[part]), expected), n


@pytest.mark.parametrize("n", [1, 16, 64, 65, 300])
def test_gated_rows_do_not_depend_on_the_batch(n: int, schedule: str) -> None:
    ops.set_batch_invariant(True)
    gate, up = (random_weight(200, 4096, "fp6_e3m2", None, seed) for seed in (3, 4))
    packed = ready(PackedWeight.gate_up(gate, up), torch.bfloat16)
    compile_for(packed, (n, 1000), torch.bfloat16, True)
    x = tokens(1000, 4096, torch.bfloat16)
    whole = ops.gated_linear(x, packed)
    assert torch.equal(ops.gated_linear(x[500 : 500 + n], packed), whole[500 : 500 + n])


def test_the_mode_has_splits_to_agree_on(schedule: str) -> None:
    """What the tests above compare is not trivial: their narrow weights are split."""
    ops.set_batch_invariant(True)
    packed = ready(random_weight(256, 4096, "fp6_e3m2", None, seed=7), torch.float16)
    found = decision(packed, 1, torch.float16).config
    assert found is not None and found.splits > 1
    assert found.schedule != tune.SM90 or found.few_tokens == 0


@pytest.mark.parametrize("n", [1, 16, 100])
def test_a_chain_with_residuals_under_programmatic_dependence(n: int) -> None:
    """Each linear's residual is what the kernel ahead wrote: replayed as a graph it must be the eager result."""
    weights = [ready(random_weight(1024, 1024, "fp6_e3m2", None, seed), torch.float16) for seed in range(4)]

    def chain(x: torch.Tensor) -> torch.Tensor:
        for weight in weights:
            x = ops.linear(x, weight, residual=x)
        return x

    x = tokens(n, 1024, torch.float16)
    expected = chain(x)
    for _ in range(3):
        assert torch.equal(chain(x), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(x)
    for _ in range(20):
        y.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, expected)


def test_compiled_without_graph_breaks() -> None:
    gate, up = (random_weight(64, 256, "fp6_e3m2", None, seed) for seed in (3, 4))
    packed = ready(PackedWeight.gate_up(gate, up), torch.float16)
    x, residual = tokens(4, 256, torch.float16), tokens(4, 64, torch.float16, seed=1)
    compiled = torch.compile(lambda x: ops.gated_linear(x, packed, residual=residual) + 1, fullgraph=True)
    assert torch.equal(compiled(x), ops.gated_linear(x, packed, residual=residual) + 1)


def test_a_fused_model_is_the_model(tmp_path: Path) -> None:
    """Joined layers of the bundled model: the stored tensors, logits up to rounding, the same text with a graph."""
    tiny = Path(__file__).resolve().parents[2] / "examples" / "tiny-lm"
    quantize(tiny, tmp_path / "packed", format="fp6_e3m2")
    plain, model = (load.load_model(tmp_path / "packed", "cuda", "float16") for _ in range(2))
    assert len(fuse.fuse(model)) == 2 * model.config.num_hidden_layers
    parts = [module for module in model.modules() if isinstance(module, joined.PackedPart)]
    assert all(part.join.weight is not None and part.join.weight.layout == "tiles_float16" for part in parts)
    ids = torch.randint(5, 8000, (2, 70), generator=torch.Generator().manual_seed(1)).cuda()
    with torch.inference_mode():
        for length in (1, 9, 70):
            exact, found = (which(input_ids=ids[:, :length]).logits.float() for which in (plain, model))
            assert (exact - found).abs().max() <= 0.02 * exact.abs().max()
    stored, shown = plain.state_dict(), model.state_dict()
    assert list(stored) == list(shown) and all(torch.equal(stored[key], shown[key]) for key in stored)
    tokenizer, options = load.load_tokenizer(tiny), Sampling(max_new_tokens=64, ignore_eos=True)
    streams = [Generator(model, tokenizer, cuda_graph=graph).stream("import os\n", options) for graph in (False, True)]
    texts = ["".join(stream) for stream in streams]
    assert texts[0] == texts[1] and streams[1].statistics.cuda_graph
    moved = model.cpu()
    shown = moved.state_dict()
    assert all(torch.equal(stored[key].cpu(), shown[key]) for key in stored)
