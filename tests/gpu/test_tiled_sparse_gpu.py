"""Pruned weights in kernel tiles on a GPU, through `ops`, layers and models: against float64, and bit for bit."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from helpers import decoders, pruned
from helpers.allowance import within
from helpers.e4m3_sums import e4m3_dropped
from helpers.sparse_products import skewed_mask

from tersor import formats, hardware, models, ops
from tersor.compress import quantize_rtn
from tersor.compress.prune import Pattern
from tersor.convert import quantize
from tersor.formats import Plain, Scheme, get_scheme
from tersor.kernels.tune import sparse as tune
from tersor.layouts import SparseWeight, TiledSparseWeight
from tersor.layouts.gated import interleave
from tersor.nn import SparseLinear
from tersor.ops import Gate

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs compute capability 9.0"
)
CUDA = torch.device("cuda")
FORMATS = ("fp6_e3m2", "fp6_e2m3", "fp8_e4m3", "int8", "int4", "fp4_e2m1")
TOKENS = (1, 2, 3, 4, 7, 8, 9, 16, 17, 32, 33, 64, 65, 100, 128, 129, 200, 300)


def made(
    kept: torch.Tensor, values: Scheme | Plain | str, dtype: torch.dtype
) -> tuple[TiledSparseWeight, torch.Tensor]:
    """Return a weight in kernel tiles, and what it decodes to, float64."""
    chosen = get_scheme(values) if isinstance(values, str) else values
    weight, decoded = pruned.sparse(pruned.random(*kept.shape) * kept.shape[1] ** -0.5, kept, chosen)
    found = ops.preferred_sparse(weight.to(CUDA), dtype)
    assert isinstance(found, TiledSparseWeight)
    return found, decoded.double().cuda()


def rows(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Return random activations on the GPU."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def check(
    y: torch.Tensor, exact: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, dropped: torch.Tensor | float = 0.0
) -> None:
    """Hold a product against its exact numbers, rounded once; `dropped`: what its sums lose beside float32's."""
    allowed = formats.product_tolerance(x.double(), weight, torch.float32) + dropped
    info = torch.finfo(y.dtype)
    allowed = allowed + (exact.abs() + allowed) * info.eps / 2 * 1.001 + info.smallest_normal * info.eps
    within(y, exact, allowed, f"{len(x)} tokens")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("values", ["plain", *FORMATS])
@pytest.mark.parametrize("density", [0.0, 0.01, 0.1, 0.5, 0.94, 1.0])
def test_every_density_is_within_tolerance(dtype: torch.dtype, values: str, density: float) -> None:
    chosen = Plain(str(dtype)[6:]) if values == "plain" else get_scheme(values)
    weight, decoded = made(pruned.kept(301, 424, density), chosen, dtype)
    assert torch.equal(weight.dequantize(torch.float64), decoded)
    for n in (1, 16, 65, 150):
        x, bias = rows(n, 424, dtype=dtype), rows(301, dtype=dtype)
        residual = rows(n, 301, dtype=dtype, seed=1)
        check(ops.linear(x, weight), x.double() @ decoded.T, x, decoded)
        exact = x.double() @ decoded.T + bias.double() + residual.double()
        check(ops.linear(x, weight, bias, residual=residual), exact, x, decoded)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", TOKENS)
def test_every_number_of_tokens_is_within_tolerance(
    n: int, dtype: torch.dtype, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dense row, column, unit and block of channels, and nothing at all beside them, by the fused kernel."""
    monkeypatch.setattr(tune, "fused", lambda problem, chip: True)
    weight, decoded = made(skewed_mask(704, 3000), "fp6_e3m2", dtype)
    x, residual = rows(n, 3000, dtype=dtype), rows(n, 704, dtype=dtype, seed=1)
    y = ops.linear(x, weight, residual=residual)
    check(y, x.double() @ decoded.T + residual.double(), x, decoded)
    assert any("tersor_sparse_sm90" in name for name in launched)
    assert torch.equal(ops.linear(x, weight, residual=residual), y)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "decoded"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("algorithm", "pattern"), pruned.CHOICES)
def test_what_pruning_leaves_of_a_layer_is_within_tolerance(
    algorithm: str,
    pattern: Pattern,
    dtype: torch.dtype,
    fused: bool,
    launched: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Masks and codes as an algorithm chose them: some rows and columns are nearly whole, others nearly empty."""
    monkeypatch.setattr(tune, "fused", lambda problem, chip: fused)
    stored, exact = pruned.chosen(704, 1000, algorithm, pattern, get_scheme("fp6_e2m3"))
    weight, decoded = ops.preferred_sparse(stored.to(CUDA), dtype), exact.double().cuda()
    assert isinstance(weight, TiledSparseWeight) and torch.equal(weight.dequantize(torch.float64), decoded)
    wanted = decoded if fused else decoded.to(dtype).double()
    for n in (1, 16, 64, 100):
        x = rows(n, 1000, dtype=dtype)
        check(ops.linear(x, weight), x.double() @ wanted.T, x, wanted)
    assert any(("tersor_sparse_sm90" if fused else "tersor_decompress") in name for name in launched)


@pytest.mark.parametrize("shape", [(1, 8), (64, 128), (65, 136), (200, 264), (130, 5001), (3, 7), (1000, 33)])
def test_odd_shapes_and_strides_are_within_tolerance(shape: tuple[int, int]) -> None:
    weight, decoded = made(pruned.kept(*shape, 0.4), "fp8_e4m3", torch.bfloat16)
    for n in (1, 7, 70):
        x = rows(n, shape[1] + 3, dtype=torch.bfloat16)[:, 3:]
        check(ops.linear(x, weight), x.double() @ decoded.T, x, decoded)


@pytest.mark.parametrize("n", [1, 20, 130])
def test_gate_and_up_are_one_product(n: int) -> None:
    halves = [pruned.sparse(pruned.random(200, 512, seed) / 16, pruned.kept(200, 512, 0.5, seed), get_scheme("int8"))
              for seed in (1, 2)]  # fmt: skip
    both = SparseWeight.gate_up(halves[0][0], halves[1][0]).to(CUDA)
    weight = ops.preferred_sparse(both, torch.bfloat16)
    x, biases = rows(n, 512, dtype=torch.bfloat16), rows(2, 200, dtype=torch.bfloat16, seed=3)
    assert isinstance(weight, TiledSparseWeight)
    for gate in Gate:
        bias = interleave(biases[0], biases[1])
        found = ops.gated_linear(x, weight, bias, gate=gate)
        sums = [x.double() @ one.double().cuda().T + own.double() for (_, one), own in zip(halves, biases, strict=True)]
        torch.testing.assert_close(found.double(), gate.combine(*sums), rtol=2.0**-7, atol=1e-3)


@pytest.mark.parametrize("values", ["fp8_e4m3", "int8", "plain"])
@pytest.mark.parametrize("places", [0, 101])
def test_slices_are_decoded_for_cublas(
    values: str, places: int, monkeypatch: pytest.MonkeyPatch, launched: list[str]
) -> None:
    monkeypatch.setattr(tune, "fused", lambda problem, chip: False)
    monkeypatch.setattr(tune, "SCRATCH_BYTES", 1 << 20)
    dtype = torch.float16
    chosen = Plain("float16") if values == "plain" else get_scheme(values)
    weight, decoded = pruned.sparse(pruned.random(9000, 1001) / 32, skewed_mask(9000, 1001), chosen)
    held = TiledSparseWeight.of(weight.to(CUDA), "float16", places)
    exact_weight = decoded.to(dtype).double().cuda()
    for n in (3, 700):
        x, bias = rows(n, 1001, dtype=dtype), rows(9000, dtype=dtype)
        residual = rows(n, 9000, dtype=dtype, seed=1)
        exact = x.double() @ exact_weight.T
        check(ops.linear(x, held), exact, x, exact_weight)
        check(ops.linear(x, held, bias), exact + bias.double(), x, exact_weight)
        check(ops.linear(x, held, bias, residual=residual), exact + bias.double() + residual.double(), x, exact_weight)
        check(ops.linear(x, held, residual=residual), exact + residual.double(), x, exact_weight)
    assert any("tersor_decompress" in name for name in launched)
    x = rows(5, 1001, dtype=dtype).requires_grad_()
    ops.linear(x, held).backward(torch.ones(5, 9000, dtype=dtype, device="cuda"))
    wanted = torch.ones(5, 9000, dtype=torch.float64, device="cuda") @ exact_weight
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), wanted, rtol=2.0**-9, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("height", [4608, 2304], ids=["whole", "slices"])
def test_decoded_products_are_rounded_once_whatever_is_added(
    height: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, launched: list[str]
) -> None:
    """Slices are of so many tiles that cuBLAS splits no sums: it rounds, but where it would add a matrix to that."""
    monkeypatch.setattr(tune, "fused", lambda problem, chip: False)
    monkeypatch.setattr(tune, "slice_rows", lambda oc, ic, places, chip: height)
    weight, decoded = made(pruned.kept(4608, 1000, 0.3), "fp8_e4m3", dtype)
    wanted, x = decoded.to(dtype).double(), rows(1100, 1000, dtype=dtype, seed=1)
    bias, residual = rows(4608, dtype=dtype), rows(1100, 4608, dtype=dtype, seed=2)
    product = x.double() @ wanted.T
    cancelling = (-product).to(dtype)  # beside it a product that was rounded first would be far off
    for own_bias, added in ((None, None), (bias, None), (None, residual), (None, cancelling), (bias, residual)):
        launched.clear()
        y = ops.linear(x, weight, own_bias, residual=added)
        beside = sum(one.double() for one in (own_bias, added) if one is not None)
        check(y, product + beside, x, wanted)
        finished = added is not None or (own_bias is not None and height < 4608)
        assert any("tersor_epilogue" in name for name in launched) == finished
        assert sum("tersor_decompress" in name for name in launched) == 4608 // height


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_activations_in_e4m3_are_multiplied_for_any_number_of_tokens(dtype: torch.dtype, launched: list[str]) -> None:
    """Tokens are the same random numbers as rows, so that all products of some sums have one sign and lose most."""
    weight, decoded = pruned.sparse(pruned.random(704, 3000) / 50, skewed_mask(704, 3000), get_scheme("fp6_e3m2"))
    held, exact_weight = ops.preferred_sparse(weight.to(CUDA), dtype, "fp8"), decoded.double().cuda()
    for n in (1, 9, 64, 65, 300):
        x, residual = rows(n, 3000, dtype=dtype), rows(n, 704, dtype=dtype, seed=1)
        codes, scale = formats.Activations.E4M3.quantize(x.float().cpu())  # torch on a GPU multiplies by 1 / 448
        wide = (codes.double() * scale.double().view(-1, 1)).cuda()
        found = ops.linear(x, held, residual=residual)
        exact = wide @ exact_weight.T + residual.double()
        check(found, exact, wide, exact_weight, e4m3_dropped(wide, exact_weight))
    assert any("float8_e4m3fn" in name for name in launched)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "decoded"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [8, 100])
def test_what_is_not_finite_reaches_every_output_and_no_other_token(
    n: int, dtype: torch.dtype, fused: bool, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A NaN or an infinity meets the zero that a pruned weight is, also where a row is all zeros; -0.0 is a zero."""
    monkeypatch.setattr(tune, "fused", lambda problem, chip: fused)
    kept = pruned.kept(128, 512, 0.5)
    kept[9], kept[:, 100], kept[:, 7] = False, False, False
    weight, decoded = made(kept, "fp6_e3m2", dtype)
    x = rows(n, 512, dtype=dtype)
    x[6, 300] = 0
    clean = ops.linear(x, weight)
    x[2, 100], x[4, 7], x[5, 7], x[6, 300] = float("nan"), -float("inf"), float("inf"), -0.0
    y, wanted = ops.linear(x, weight), x.double() @ decoded.T
    assert torch.equal(y.isnan(), wanted.isnan()) and bool(y[[2, 4, 5]].isnan().all())
    others = [token for token in range(n) if token not in (2, 4, 5)]
    assert torch.equal(y[others], clean[others]) and bool(y[others].isfinite().all())
    assert not bool(y[others, 9].any())
    assert any(("tersor_sparse_sm90" if fused else "tersor_decompress") in name for name in launched)


def test_a_token_has_the_same_bits_beside_any_others() -> None:
    weight, _ = made(pruned.kept(1000, 2048, 0.5), "fp8_e4m3", torch.bfloat16)
    x = rows(300, 2048, dtype=torch.bfloat16)
    with ops.using(batch_invariant=True):
        whole = ops.linear(x, weight)
        for n in (1, 2, 31, 64, 65, 129):
            assert torch.equal(ops.linear(x[:n], weight), whole[:n])


@pytest.mark.alone
def test_a_model_of_eight_billion_weights_is_rearranged_in_seconds() -> None:
    kept = torch.rand(8192, 8192, device="cuda") < 0.5
    weight = SparseWeight.from_encoded(quantize_rtn(torch.randn(8192, 8192, device="cuda"), get_scheme("fp6")), kept)
    ops.preferred_sparse(weight, torch.float16)  # compiles and allocates what comes first
    torch.cuda.synchronize()
    started = time.perf_counter()
    found = ops.preferred_sparse(weight, torch.float16)
    torch.cuda.synchronize()
    assert isinstance(found, TiledSparseWeight)
    assert (time.perf_counter() - started) * 8e9 / kept.numel() < 20


def test_a_layer_moves_into_tiles_and_shows_what_is_stored() -> None:
    weight, decoded = pruned.sparse(pruned.random(200, 512), pruned.kept(200, 512, 0.4), get_scheme("fp6"))
    layer = SparseLinear.from_packed(weight, torch.zeros(200), torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.cuda()
    assert not layer.as_stored and "bfloat16 tiles" in repr(layer)
    after = layer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name].cpu(), before[name]) for name in before)
    x = rows(3, 512, dtype=torch.bfloat16)
    with torch.inference_mode():
        wanted = layer(x)
        check(wanted, x.double() @ decoded.double().cuda().T, x, decoded.double().cuda())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.mul_(2)
        graph.replay()
    assert torch.equal(y, wanted * 2)
    half = layer.half()
    x16 = rows(3, 512, dtype=torch.float16)
    check(half(x16), x16.double() @ decoded.double().cuda().T, x16, decoded.double().cuda())
    assert half.cpu().as_stored and torch.equal(half.stored_weight().values, weight.values)


@pytest.mark.parametrize(("format", "group_size"), [("bf16", None), ("fp6_e3m2", None), ("int4", 32)])
def test_a_pruned_model_gives_the_logits_of_a_cpu(
    format: str, group_size: int | None, tmp_path: Path, launched: list[str]
) -> None:
    """The last format has scales in groups, and no kernel: it is decoded a block of rows at a time."""
    source = pruned.saved("llama", tmp_path / "model", max_position_embeddings=256)
    quantize(source, tmp_path / "packed", format=format, group_size=group_size)
    tokens = torch.arange(5, 45)
    with torch.inference_mode():
        exact = decoders.whole(models.load(tmp_path / "packed", "cpu", dtype=torch.float32), tokens)
        found = decoders.whole(models.load(tmp_path / "packed", "cuda", dtype=torch.bfloat16), tokens)
    torch.testing.assert_close(found.float().cpu(), exact, rtol=0.05, atol=0.05 * float(exact.abs().max()))
    assert any("tersor_sparse_sm90" in name for name in launched) == (group_size is None)


def test_the_reason_says_who_serves() -> None:
    sparse = formats.Sparse(get_scheme("fp6_e3m2"))
    assert ops.explain_sparse(sparse, (8192, 8192), 0.5, 16).kernel == "fused"
    grouped = ops.explain_sparse(formats.Sparse(get_scheme("int4", 128)), (8192, 8192), 0.5, 16)
    assert grouped.kernel == "decompress + cuBLAS" and "groups" in grouped.why
    assert hardware.of_device(0).capability == (9, 0)
