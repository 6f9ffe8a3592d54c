"""Products of many tokens beside outliers: the weight decoded with them as C++ on a CPU, and when that is chosen."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.emulated import COMPILER, Emulated
from helpers.fakes import FakeGpu, pretended

from tersor import ops
from tersor.compress import encode
from tersor.formats import Outliers, Scheme, get_scheme, outlier_columns, outlier_values, outlier_words
from tersor.hardware import CHIPS
from tersor.kernels import dense, jit, tune
from tersor.kernels.tune import beside
from tersor.layouts import PackedWeight
from tersor.layouts.outliers import rounds_of
from tersor.layouts.packing import Packing
from tersor.ops import Gate, current, decompressed, mode, outlier_sums

gpu = pretended("NVIDIA H200")
H200 = CHIPS["NVIDIA H200"]
RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results" / "outliers_h200.json"
WAYS = (beside.gathered_seconds, beside.decoded_seconds)
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


def weight_of(
    form: str, size: int | None, share: str, target: str, shape: tuple[int, int], first: bool
) -> PackedWeight:
    """Return a random weight in kernel tiles whose outliers stand at random places, or in the first columns."""
    (oc, ic), generator = shape, torch.Generator().manual_seed(shape[1])
    of = replace(get_scheme(form, size, target), outliers=Outliers.parse(share, target))
    encoded = encode(torch.randn(shape, generator=generator).to(_DTYPES[target]), of)
    assert of.outliers is not None and encoded.outliers is not None
    if first:
        columns = torch.arange(of.outliers.per_row(ic)).repeat(oc, 1)
        zeros = torch.full_like(encoded.codes, of.format.zero_code)
        if encoded.zero_point is not None:
            zeros = encoded.zero_point.repeat_interleave(ic // encoded.zero_point.shape[1], dim=1)
        codes = encoded.codes.scatter(1, columns, zeros.gather(1, columns))
        values = torch.randn(columns.shape, generator=generator).to(_DTYPES[target])
        encoded = replace(encoded, codes=codes, outliers=outlier_words(columns, values))
    return PackedWeight.from_encoded(encoded).to_layout(f"tiles_{target}")


def decoded(weight: PackedWeight, slice_oc: int, folder: Path) -> torch.Tensor:
    """Return the weight as the kernel leaves it, `slice_oc` rows a launch."""
    (oc, ic), kept, target = weight.shape, weight.scheme.outliers, weight.packing.target
    assert kept is not None and weight.arranged is not None
    packing = Packing.of(weight.scheme.dense, target)
    function = Emulated(dense.dequantize_source(packing, rounds_of(kept, ic)), folder, 900)
    made = torch.full((oc, ic), torch.nan, dtype=_DTYPES[target])
    for first in range(0, oc, slice_oc):
        dense.launch_dequantize(
            function,  # type: ignore[arg-type]
            0,
            weight=weight.data.data_ptr(),
            scale=weight.scale.data_ptr(),
            scratch=made[first:].data_ptr(),
            first_block=first // 16,
            oc=min(slice_oc, oc - first),
            ic=ic,
            factor=packing.factor,
            kept=weight.arranged.data_ptr(),
            weight_oc=oc,
        )
    return made


@needs_compiler
@pytest.mark.parametrize(
    ("form", "size", "share", "target", "shape", "first"),
    [
        ("int4", 32, "3%", "float16", (200, 352), False),
        ("uint4", 128, "10%", "bfloat16", (70, 256), True),
        ("fp6_e2m3", None, "0.5%", "float16", (130, 264), False),
        ("uint3", None, "8%", "bfloat16", (64, 129), True),
        ("lut3", None, "2%", "bfloat16", (100, 256), False),
    ],
)
def test_a_weight_is_decoded_with_its_scales_and_its_outliers_exactly(
    form: str, size: int | None, share: str, target: str, shape: tuple[int, int], first: bool, tmp_path: Path
) -> None:
    weight = weight_of(form, size, share, target, shape, first)
    found, exact = decoded(weight, 64, tmp_path), weight.dequantize().double()
    assert weight.outliers is not None and weight.scheme.outliers is not None
    assert torch.equal(found, exact.to(_DTYPES[target]))  # each number rounded once
    if not weight.scheme.has_table:
        columns = outlier_columns(weight.outliers)
        assert torch.equal(found.gather(1, columns), outlier_values(weight.outliers, weight.scheme.outliers.dtype))


# When the weight is decoded


def problem_of(scheme: Scheme, shape: tuple[int, int], n: int) -> tuple[tune.LinearProblem, int]:
    """Return the problem of the dense part, and the rounds of a block."""
    assert scheme.outliers is not None
    packing = Packing.of(scheme.dense, "float16")
    return tune.LinearProblem.of(packing, shape, n), rounds_of(scheme.outliers, shape[1])


def test_both_ways_are_predicted_as_they_were_measured_and_the_shorter_one_is_chosen() -> None:
    rows = [row for row in json.loads(RESULTS.read_text())["rows"] if row["n"] >= 128]
    assert len(rows) >= 20
    for row in rows:
        problem, rounds = problem_of(Scheme.from_key(row["scheme"]), (row["oc"], row["ic"]), row["n"])
        gathered, decoded = (1e6 * (way(problem, rounds, H200) or 0) for way in WAYS)
        assert 0.82 < gathered / row["gathered"] < 1.05 and 0.93 < decoded / row["decoded"] < 1.18, row
        chosen = "decoded" if tune.decodes_beside(problem, rounds, H200) else "gathered"
        assert row[chosen] == min(row["gathered"], row["decoded"]), row


def test_a_weight_is_decoded_from_some_number_of_tokens_on_and_sooner_the_more_it_keeps() -> None:
    firsts = []
    for share in ("0.1%", "0.5%", "2%", "10%"):
        of = replace(get_scheme("int4", 128), outliers=Outliers.parse(share, "float16"))
        chosen = [tune.decodes_beside(*problem_of(of, (8192, 8192), n), H200) for n in range(16, 4097, 16)]
        first = chosen.index(True)
        assert not any(chosen[:4]) and all(chosen[first + 3 :])  # tiles are filled in steps
        firsts.append(16 * (first + 1))
    assert firsts == sorted(firsts, reverse=True) and 64 < firsts[-1] < 200 < firsts[1] < 600


def test_rows_that_cublas_is_slow_with_are_gathered() -> None:
    of = replace(get_scheme("fp6_e2m3"), outliers=Outliers.parse("0.5%", "float16"))
    for shape, decodes in (((8192, 8192), True), ((8190, 8192), False), ((8192, 8190), False)):
        assert tune.decodes_beside(*problem_of(of, shape, 4096), H200) == decodes


def test_a_step_knows_the_kernels_of_both_ways_ahead(gpu: FakeGpu) -> None:
    weight = weight_of("int4", 128, "0.5%", "float16", (128, 256), False)
    large = replace(weight, shape=(8192, 8192))  # no number of it is read
    for tokens, decodes in ((256, False), (2048, True)):
        sources, complete = outlier_sums.sources(large, torch.float16, tokens, H200)
        names = [source.name for source in sources]
        assert complete and len(names) == len(set(names)) and any("_64x8_" in name for name in names)
        assert ("tersor_dequantize_int4_float16_beside1" in names) == decodes
        assert ("tersor_epilogue_float16" in names) == decodes


# The call


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have more than 8 tokens count as many, cuBLAS split no sums, and a CPU's device be the current one."""
    monkeypatch.setattr(current, "device", lambda: -1)
    monkeypatch.setattr(tune, "decodes_beside", lambda problem, rounds, chip: problem.n > 8)
    monkeypatch.setattr(decompressed, "splits_sums", lambda rows, n, chip: False)
    yield
    ops.prepared.forget()


@needs_compiler
def test_products_of_a_decoded_weight_have_bias_residual_and_gate(
    gpu: FakeGpu, many: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, (oc, ic), generator = "bfloat16", (192, 256), torch.Generator().manual_seed(3)
    dtype = _DTYPES[target]
    weight, kernels = weight_of("fp6_e2m3", None, "2%", target, (oc, ic), False), []

    def get(source: jit.KernelSource, index: int) -> Emulated:
        kernels.append(source.name)
        return Emulated(source, tmp_path, 900)

    def product(
        a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype = dtype, **options: torch.Tensor
    ) -> torch.Tensor:
        return mm(a.to(out_dtype), b.to(out_dtype), **options)

    mm = torch.mm
    monkeypatch.setattr(torch, "mm", product)  # a CPU's makes no wider sums
    monkeypatch.setattr(jit, "get", get)
    x, bias, residual = (torch.randn(size, generator=generator).to(dtype) for size in ((3, 4, ic), (oc,), (3, 4, oc)))
    exact, eps = x.double() @ weight.dequantize().to(dtype).double().T, torch.finfo(dtype).eps
    decode, finish = f"tersor_dequantize_fp6_e2m3_{target}_beside4", f"tersor_epilogue_{target}"
    cancelling = (-exact).to(dtype)  # beside it a product that was rounded first would be far off
    for height in (80, oc):
        monkeypatch.setattr(beside, "SCRATCH_BYTES", 2 * height * ic)  # slices of 64 rows, or one
        for own_bias, added in ((None, None), (bias, None), (None, residual), (None, cancelling), (bias, residual)):
            kernels.clear()
            y = ops.linear(x, weight, own_bias, residual=added)
            wanted = exact + (0 if own_bias is None else bias.double()) + (0 if added is None else added.double())
            finished = added is not None or (own_bias is not None and height < oc)
            close = eps / 2 * 1.001 if finished else 2 * eps
            torch.testing.assert_close(y.double(), wanted, rtol=close, atol=2.0**-16)
            assert set(kernels) == ({decode, finish} if finished else {decode})
    gated = ops.gated_linear(x, weight, gate=Gate.SILU)
    torch.testing.assert_close(gated, Gate.SILU.of_rows(exact.to(dtype)), rtol=8 * eps, atol=8 * eps)


@pytest.mark.parametrize("captured", [False, True])
def test_a_slice_overwrites_the_last_one_and_memory_is_that_of_one_and_torchs(
    gpu: FakeGpu, many: None, captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that graphs take it from their own, and an engine's plan counts it when it measures a step."""
    weight, x = weight_of("int4", 64, "1%", "float16", (300, 256), False), torch.randn(9, 256).half()
    assert weight.arranged is not None
    monkeypatch.setattr(beside, "SCRATCH_BYTES", 2 * 100 * 256)
    with gpu.capturing(1) if captured else nullcontext():
        ops.linear(x, weight)
    assert not gpu.memory and {launch.kernel for launch in gpu.launches} == {"tersor_dequantize_int4_float16_beside3"}
    assert [(one["first_row_block"], one["rows"]) for one in gpu.launches] == [(0, 128), (8, 128), (16, 44)]
    assert len({one["scratch"] for one in gpu.launches}) == 1
    for one in gpu.launches:
        assert (one["weight"], one["scale"]) == (weight.data.data_ptr(), weight.scale.data_ptr())
        assert (one["kept"], one["weight_rows"], one["ic"]) == (weight.arranged.data_ptr(), 300, 256)
    ops.linear(x[:8], weight)
    assert gpu.last.kernel.startswith("tersor_linear_sm90_int4") and gpu.last.kernel.endswith("_beside3")


def test_sums_are_float32_where_cublas_may_split_those_of_the_last_slice(
    gpu: FakeGpu, many: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, x = weight_of("int4", 64, "1%", "float16", (160, 256), False), torch.randn(9, 256).half()
    monkeypatch.setattr(beside, "SCRATCH_BYTES", 2 * 64 * 256)  # slices of 64, 64 and 32 rows
    load = jit.get
    monkeypatch.setattr(jit, "get", lambda source, device: load(source, 0))
    monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype: torch.zeros(len(a), b.shape[1], dtype=out_dtype))
    monkeypatch.setattr(decompressed, "splits_sums", lambda rows, n, chip: rows < 64)
    ops.linear(x, weight)
    kernels = ["tersor_dequantize_int4_float16_beside3", "tersor_epilogue_float16"]
    assert [launch.kernel for launch in gpu.launches] == 3 * kernels


def test_slices_are_even_and_at_most_a_quarter_of_a_gigabyte() -> None:
    for oc, ic in ((8192, 8192), (28672, 8192), (57344, 8192), (8192, 28672), (128256, 8192), (100, 64)):
        rows = tune.slice_rows(oc, ic)
        slices = -(-oc // rows)
        assert 2 * (rows - 63) * ic <= 256 << 20 and (rows % 64 == 0 or rows == oc)
        assert slices == max(1, -(-2 * oc * ic // (256 << 20))) and oc - (slices - 1) * rows > rows - 64 * slices


def test_modes_and_measurements_say_who_serves(gpu: FakeGpu, many: None) -> None:
    weight, x = weight_of("int4", 64, "1%", "float16", (256, 256), False), torch.randn(40, 256).half()
    ops.set_batch_invariant(True)
    try:
        ops.linear(x, weight)
        assert not any("dequantize" in launch.kernel for launch in gpu.launches)
    finally:
        ops.set_batch_invariant(False)
    problem, rounds = problem_of(weight.scheme, (256, 256), 40)
    with mode.using(config=tune.choose_beside(problem, rounds, H200)):
        ops.linear(x, weight)
    assert gpu.last.kernel.startswith("tersor_linear_sm90_int4") and gpu.last.kernel.endswith("_beside3")
