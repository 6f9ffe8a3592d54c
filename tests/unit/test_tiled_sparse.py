"""Pruned weights in kernel tiles: the way there and back, products, the layer of one, and kernels named ahead."""

from __future__ import annotations

import copy
import pickle
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import pruned
from helpers.emulated import COMPILER, Emulated, tensor_map
from torch.nn import functional

from tersor import formats, hardware, ops
from tersor.errors import FormatError, ShapeError, TersorError
from tersor.formats import Activations, Plain, Scheme, Sparse, get_scheme
from tersor.hardware import CHIPS, chip_named
from tersor.kernels import jit
from tersor.kernels.tune import sparse as tune
from tersor.layouts import SparseWeight, TiledSparseWeight
from tersor.layouts.gated import interleave
from tersor.layouts.sparse_packing import FP8
from tersor.layouts.tiled_sparse import packing_of, tiles_reason
from tersor.nn import SparseLinear
from tersor.ops import Gate, current, dispatch, needed_sparse, sparse_layout, tensors, tiled_sparse

H200 = chip_named("H200")
VALUES = [Plain("float16"), Plain("bfloat16"), *map(get_scheme, ("fp6_e3m2", "fp8_e4m3", "int8", "int4", "fp4_e2m1"))]


def made(
    oc: int = 70, ic: int = 224, density: float = 0.5, values: Scheme | Plain | None = None, seed: int = 0
) -> tuple[SparseWeight, torch.Tensor]:
    """Return a pruned weight, and what it decodes to."""
    chosen = values or get_scheme("fp6")
    return pruned.sparse(pruned.random(oc, ic, seed), pruned.kept(oc, ic, density, seed), chosen)


def target_of(values: Scheme | Plain) -> str:
    return values.dtype if isinstance(values, Plain) else "float16"


def tiled(weight: SparseWeight, dtype: torch.dtype = torch.float16) -> TiledSparseWeight:
    return TiledSparseWeight.of(weight, str(dtype).removeprefix("torch."), min(2, -(-weight.shape[1] // 128)))


@pytest.mark.parametrize("values", VALUES, ids=lambda values: values.key())
@pytest.mark.parametrize("density", pruned.DENSITIES)
def test_tiles_lead_back_to_every_stored_byte(values: Scheme | Plain, density: float) -> None:
    weight, decoded = made(131, 300, density, values)
    found = TiledSparseWeight.of(weight, target_of(values), 3)
    again = found.stored()
    for name in ("mask", "values", "scale", "zero_point", "starts"):
        old, new = getattr(weight, name), getattr(again, name)
        assert (old is None and new is None) or torch.equal(old, new), name
    assert again.form == weight.form and packing_of(found.key) == (weight.sparse, found.packing)
    assert torch.equal(found.dequantize(), decoded)
    assert torch.equal(found.dequantize(torch.float64, (65, 130)), decoded[65:130].double())
    assert found.nbytes == sum(one.nbytes for one in found.tensors()) > 0


def test_a_representation_without_a_kernel_is_said() -> None:
    assert "groups" in tiles_reason(Sparse(get_scheme("int4", 32)), "float16")
    assert "zero points" in tiles_reason(Sparse(get_scheme("uint4")), "bfloat16")
    assert "do not meet" in tiles_reason(Sparse(Plain("float32")), "float16")
    with pytest.raises(FormatError, match="no packing"):
        packing_of("sparse:int8:row:float16@float16@7")
    why = sparse_layout.chip_reason(Sparse(get_scheme("int8")), (64, 64), torch.float16, CHIPS["NVIDIA A100"])
    assert "compute capability 9.0, this is 8.0" in why


@pytest.mark.parametrize("values", VALUES[1:4], ids=lambda values: values.key())
def test_a_product_is_that_of_the_decoded_weight(values: Scheme | Plain) -> None:
    weight, decoded = made(values=values)
    held = TiledSparseWeight.of(weight, target_of(values), 2)
    x, bias, residual = pruned.random(6, 224, 5).view(2, 3, 224), pruned.random(1, 70, 6)[0], pruned.random(6, 70, 7)
    found = ops.linear(x, held, bias, residual=residual.view(2, 3, 70))
    assert torch.equal(found, ops.linear(x, weight, bias, residual=residual.view(2, 3, 70)))
    with ops.using(batch_invariant=True):
        assert torch.equal(ops.linear(x, held)[1, 2], ops.linear(x[1, 2], held))
    x[1, 1, 7] = float("inf")
    wanted = functional.linear(x, decoded)
    assert torch.equal(ops.linear(x, held).isnan(), wanted.isnan())


def test_gates_gradients_and_traces_go_through_tiles() -> None:
    (first, one), (second, two) = made(11, 128), made(11, 128, 0.3, seed=3)
    both, x = tiled(SparseWeight.gate_up(first, second)), pruned.random(4, 128, 5)
    bias = interleave(*pruned.random(2, 11, 6))
    for gate in Gate:
        plain = ops.gated_linear(x, SparseWeight.gate_up(first, second), bias, gate=gate)
        torch.testing.assert_close(ops.gated_linear(x, both, bias, gate=gate), plain)
    held, wide = tiled(first), x.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ops.linear(x, held), (wide,), check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: ops.linear(x, held).square(), (wide,), fast_mode=True)
    traced = torch.compile(lambda x: ops.linear(x, held), backend="eager", fullgraph=True)
    assert torch.equal(traced(x), ops.linear(x, held)) and not torch.equal(one, two)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.linear(x, held).dtype == torch.bfloat16


def test_tiles_of_another_weight_are_refused() -> None:
    held = tiled(made()[0])
    tiles = held.tiles
    parts = (tiles.mask, tiles.layers, held.scale, tiles.starts, tiles.marks)
    with pytest.raises(ShapeError, match="are not those of a pruned weight"):
        torch.ops.tersor.tiled_sparse_linear(torch.zeros(1, 224), *parts, None, held.key, 140, 224)
    with pytest.raises(ShapeError, match="x has shape"):
        ops.linear(torch.zeros(1, 223), held)
    with pytest.raises(ShapeError, match="one a row"):
        TiledSparseWeight.of(replace(made()[0], scale=torch.ones(70, 2)), "float16", 1)


@pytest.fixture
def in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """16-bit activations find pruned weights in tiles, as on a GPU; others as they are stored."""

    def preferred(weight: Any, dtype: torch.dtype, activations: Activations = Activations.NATIVE) -> Any:
        stored = weight.stored() if isinstance(weight, TiledSparseWeight) else weight
        if dtype not in (torch.float16, torch.bfloat16) or tiles_reason(stored.sparse, str(dtype)[6:]):
            return stored
        if isinstance(weight, TiledSparseWeight) and weight.packing.target == str(dtype)[6:]:
            return weight
        return tiled(stored, dtype)

    monkeypatch.setattr(ops, "preferred_sparse", preferred)


def test_a_layer_keeps_tiles_and_shows_what_is_stored(in_tiles: None) -> None:
    weight, decoded = made()
    layer = SparseLinear.from_packed(weight, torch.zeros(70), torch.float32)
    before = layer.state_dict()
    half = copy.deepcopy(layer).half()
    assert layer.as_stored and not half.as_stored and "float16 tiles" in repr(half)
    assert half.packed_weight() is half.packed_weight() and torch.equal(half.weight, decoded.half())
    after = half.state_dict()
    assert set(after) == set(before) == {*layer.own_tensors(), "bias"}
    assert all(torch.equal(after[name], before[name]) for name in layer.own_tensors())
    x = pruned.random(3, 224).half()
    wanted = ops.linear(x, weight, torch.zeros(70).half())
    assert torch.equal(half(x), wanted) and torch.equal(pickle.loads(pickle.dumps(half))(x), wanted)
    assert half.weight_row_scale is not None and half.weight_row_scale.dtype == torch.float32
    assert "bfloat16 tiles" in repr(half.bfloat16())
    assert torch.equal(half(x), wanted) and "float16 tiles" in repr(half)
    other, another = pruned.sparse(pruned.random(70, 224, 9), weight.kept(), get_scheme("fp6"))
    half.load_state_dict({**SparseLinear.from_packed(other).state_dict(), "bias": torch.zeros(70)}, assign=True)
    assert half.as_stored and torch.equal(half.stored_weight().dequantize(), another)
    assert torch.equal(half(x), ops.linear(x, other, torch.zeros(70).half())) and not half.as_stored
    wide = half.float()
    assert wide.as_stored and torch.equal(wide.stored_weight().values, other.values)
    traced = torch.compile(copy.deepcopy(half).half(), backend="eager", fullgraph=True)
    assert torch.equal(traced(x), ops.linear(x, other, torch.zeros(70).half()))


@pytest.mark.timeout(30)
def test_a_thread_that_asks_while_tiles_are_made_gets_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, decoded = made()
    layer = SparseLinear.from_packed(weight, None, torch.float32)
    put, found, threads = torch.nn.Module.__setattr__, [], list[threading.Thread]()

    def ask() -> None:
        try:
            found.append(layer.packed_weight().dequantize())
        except TersorError as error:
            found.append(error)

    def asked(module: torch.nn.Module, name: str, value: object) -> None:
        if module is layer and name == "weight_scale":
            threads.append(threading.Thread(target=ask))
            threads[-1].start()
            threads[-1].join(0.2)
        put(module, name, value)

    monkeypatch.setattr(torch.nn.Module, "__setattr__", asked)
    layer._set_weight(tiled(weight))
    for thread in threads:
        thread.join()
    assert len(found) == 1 and torch.equal(found[0], decoded)


def test_up_to_64_tokens_are_fused_and_more_by_what_is_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = tune.SparseProblem(
        oc=8192, ic=8192, n=1, bits=8, instructions=126, places=132, nbytes=8192 * 8192 * 5 // 8
    )
    for n in (1, 8, 9, 33, 64):
        config = tune.choose(replace(problem, n=n), H200)
        assert tune.fused(replace(problem, n=n), H200) and n <= config.tile.tokens <= max(8, 2 * n)
    many = replace(problem, n=4096)
    monkeypatch.setattr(tune, "COSTS", tune.SparseCosts(tensor=0.3))
    monkeypatch.setattr(tune.seconds, "__defaults__", (tune.COSTS,))
    monkeypatch.setattr(tune.compute_seconds, "__defaults__", (tune.COSTS,))
    assert not tune.fused(many, H200)
    reason, chosen = sparse_layout.decide(many, H200)
    assert reason.kernel == dispatch.DECOMPRESS and chosen is None and "4096 tokens" in reason.why
    invariant = {tune.choose(replace(many, n=n, batch_invariant=True), H200).tile for n in (1, 40, 900)}
    assert len(invariant) == 1 and tune.fused(replace(many, batch_invariant=True), H200)
    assert tune.choose(replace(many, n=900, batch_invariant=True), H200).places == 132


def test_slices_are_whole_tiles_that_fill_multiprocessors() -> None:
    for oc, ic, places in ((8192, 8192, 132), (49152, 12288, 0), (300, 1400, 11), (7168, 28672, 132)):
        rows, tiles = tune.slice_rows(oc, ic, places, H200), -(-oc // 256)
        ctas = 4 * (places or tiles) * rows // (256 * tiles)
        assert rows % 256 == 0 and (rows >= oc or ctas >= H200.sms)
        assert rows <= 256 * tiles and rows * ic * 2 <= max(256 << 20, oc * ic * 2 // 3) + 512 * ic
        assert (rows >= oc) == (oc * ic * 2 <= 256 << 20)


def test_places_are_multiprocessors_or_fewer_where_there_is_little_to_do() -> None:
    assert tune.places(28672, 7168, 8, H200) == tune.places(8192, 8192, 16, H200) == H200.sms
    assert tune.places(256, 256, 8, H200) <= 2
    uneven, even = (
        tune.SparseProblem(oc=oc, ic=7168, n=16, bits=8, instructions=126, places=132, nbytes=oc * 7168 * 5 // 8)
        for oc in (28672, 33792)
    )
    assert tune.choose(uneven, H200).places == 132
    assert tune.choose(even, H200).places == 0  # 132 tiles of 256 rows are one for each multiprocessor as they are


@pytest.mark.parametrize("values", ["fp8_e4m3", "int8"])
def test_kernels_are_named_without_any_number_of_a_weight(values: str) -> None:
    representation, shape = Sparse(get_scheme(values)), (2048, 1024)
    ahead = set(needed_sparse.of_shape(representation, shape, torch.float16, 1, 700, H200))
    weight, _ = made(*shape, values=get_scheme(values))
    held = TiledSparseWeight.of(weight, "float16", *sparse_layout.cut_of(representation, shape, torch.float16, H200))
    exact = set(needed_sparse.linear(held, torch.float16, 1, 700, H200))
    assert exact and exact <= ahead and ahead == set(needed_sparse.linear(weight, torch.float16, 1, 700, H200))
    problem = sparse_layout.problem_of(held.packing, shape, 1, held.tiles.places, held.tiles.nbytes)
    tiles = tune.asked(replace(problem, n=700), H200)
    assert {tune.choose(replace(problem, n=n), H200).tile for n in range(1, 701)} == tiles
    assert not list(needed_sparse.linear(held, torch.float16, 0, 8, CHIPS["NVIDIA A100"]))
    with ops.using(reference=True):
        assert not list(needed_sparse.linear(held, torch.float16, 0, 8, H200))


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_the_front_launches_the_kernel_and_the_one_that_decodes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On a CPU that passes for an H200: who asks `ops` gets what the emulated kernels compute."""
    monkeypatch.setattr(jit.tensor_map, "rows", tensor_map)
    monkeypatch.setattr(jit, "get", lambda source, device: Emulated(source, tmp_path, 900))
    monkeypatch.setattr(hardware, "of_device", lambda index: replace(H200, sms=1))
    monkeypatch.setattr(sparse_layout, "reason", lambda *of: "")
    monkeypatch.setattr(current, "device", lambda: -1)
    monkeypatch.setattr(current, "stream", lambda index: 0)
    monkeypatch.setattr(tensors, "output", lambda shape, n, oc, dtype: torch.full((*shape[:-1], oc), 7.0, dtype=dtype))
    weight, decoded = made(70, 256)
    held = TiledSparseWeight.of(weight, "float16", 0)
    x, bias, residual = (
        pruned.random(9, 256, 5).half(),
        pruned.random(1, 70, 6)[0].half(),
        pruned.random(9, 70).half(),
    )
    wanted = functional.linear(x.double(), decoded.double(), bias.double()) + residual.double()
    tiled_sparse.forget()
    found = ops.linear(x.view(3, 3, 256), held, bias, residual=residual.view(3, 3, 70))
    torch.testing.assert_close(found.view(9, 70).double(), wanted, rtol=2**-10, atol=1e-3)
    strided = torch.zeros(9, 257).half()[:, 1:]
    strided.copy_(x)
    assert torch.equal(ops.linear(strided, held, bias, residual=residual), found.view(9, 70))
    monkeypatch.setattr(tune, "FEW", 8)
    with ops.using(batch_invariant=True):
        whole = ops.linear(x, held, bias, residual=residual)
        assert torch.equal(whole[8:], ops.linear(x[8:], held, bias, residual=residual[8:]))
        torch.testing.assert_close(whole.double(), wanted, rtol=2**-10, atol=1e-3)
    monkeypatch.setattr(tune, "fused", lambda problem, chip: False)
    tiled_sparse.forget()
    many = ops.linear(x, held, bias)
    torch.testing.assert_close(many.double(), wanted - residual.double(), rtol=2**-9, atol=5e-2)
    tiled_sparse.forget()


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(("values", "dtype"), [("fp6_e3m2", torch.float16), ("int4", torch.bfloat16)])
def test_the_front_quantises_activations_ahead_of_the_kernel(
    values: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(jit.tensor_map, "rows", tensor_map)
    monkeypatch.setattr(jit, "get", lambda source, device: Emulated(source, tmp_path, 900))
    monkeypatch.setattr(hardware, "of_device", lambda index: replace(H200, sms=1))
    monkeypatch.setattr(sparse_layout, "reason", lambda *of: "")
    monkeypatch.setattr(current, "device", lambda: -1)
    monkeypatch.setattr(current, "stream", lambda index: 0)
    monkeypatch.setattr(current, "empty", lambda shape, stride, dtype: torch.empty(shape, dtype=dtype))
    monkeypatch.setattr(tensors, "output", lambda shape, n, oc, dtype: torch.full((*shape[:-1], oc), 7.0, dtype=dtype))
    weight, decoded = made(70, 264, values=get_scheme(values))
    held = TiledSparseWeight.of(weight, FP8, 0)
    x, bias = pruned.random(9, 264, 5).to(dtype), pruned.random(1, 70, 6)[0].to(dtype)
    codes, scale = Activations.E4M3.quantize(x.float())
    wanted = (codes.double() * scale.double().view(-1, 1)) @ decoded.double().T + bias.double()
    tiled_sparse.forget()
    torch.testing.assert_close(ops.linear(x, held, bias).double(), wanted, rtol=2**-8, atol=2e-3)
    tiled_sparse.forget()


def test_kernels_for_activations_in_e4m3_are_named_of_a_weight_that_is_described() -> None:
    representation, shape = Sparse(get_scheme("fp6_e3m2")), (2048, 1024)
    weight, _ = made(*shape, values=get_scheme("fp6_e3m2"))
    described = TiledSparseWeight.described(weight.form, shape, FP8)
    ahead = set(needed_sparse.linear(described, torch.bfloat16, 1, 700, H200))
    held = TiledSparseWeight.of(weight, FP8, *sparse_layout.cut_of(representation, shape, torch.bfloat16, H200))
    exact = set(needed_sparse.linear(held, torch.bfloat16, 1, 700, H200))
    assert exact and exact <= ahead and all("float8_e4m3fnbfloat16" in one.name for one in exact if "sm90" in one.name)
    problem = sparse_layout.problem_of(held.packing, shape, 5000, held.tiles.places, held.tiles.nbytes)
    assert tune.fused(problem, H200) and tune.choose(problem, H200).tile.tokens <= 128


def test_formats_that_kernels_expand_are_those_with_one_scale_a_row() -> None:
    for name in set(formats.scheme_names()) - set(formats.LUTS):  # pruned weights have no tables
        scheme = get_scheme(name)
        known = scheme.group_size is None and scheme.format.kind != "uint"
        assert (tiles_reason(Sparse(scheme), "float16") == "") == known
