"""What the host hands to the kernel of mixed weights, and where it launches a row set at a time instead."""

from __future__ import annotations

import struct

import pytest
import torch
from helpers.fakes import FakeGpu, pretended
from helpers.mixes import IC, levels, matrix, mixed

from tersor import ops
from tersor.errors import ShapeError
from tersor.formats import Activations, Assignment, Mix, get_scheme
from tersor.formats.mix import MOST_LEVELS
from tersor.layouts import MixedWeight
from tersor.ops import Gate, mixed_launch, row_sets

gpu = pretended("NVIDIA H200")
INTEGERS = Mix((get_scheme("uint4", 64), get_scheme("int8")))
OC = 300


def ready(mix: Mix, activations: Activations = Activations.NATIVE, ordered: bool = False) -> MixedWeight:
    """Return a weight as it lies on a GPU, of whose first level there are no rows."""
    drawn = levels(OC, mix=mix)
    level = bytes(max(1, one) for one in drawn.level)
    form = Assignment(mix, bytes(sorted(level)) if ordered else level)
    return laid_out(mixed(matrix(OC), form), activations)


def laid_out(weight: MixedWeight, activations: Activations) -> MixedWeight:
    cpu = torch.device("cpu")
    return weight.to_layout(lambda scheme: ops.preferred_layout(scheme, torch.float16, cpu, activations))


def names(gpu: FakeGpu) -> list[str]:
    return [launch.kernel for launch in gpu.launches]


def test_one_launch_has_every_row_set_where_its_level_is(gpu: FakeGpu) -> None:
    mix = Mix((get_scheme("fp4_e2m1"), get_scheme("fp6_e2m3"), get_scheme("int8")))
    weight, x = ready(mix), torch.randn(2, 3, IC).half()
    bias, residual = torch.randn(OC).half(), torch.randn(2, 3, OC).half()
    y = ops.linear(x, weight, bias, residual=residual)
    assert y.shape == (2, 3, OC) and len(gpu.launches) == 1
    last = gpu.last
    pointers, shares = struct.unpack(f"@{2 * MOST_LEVELS}Q", last["sets"]), struct.unpack("@32i", last["shares"])
    held = [address for one in weight.sets for address in (one.data.data_ptr(), one.scale.data_ptr())]
    assert list(pointers) == [0, 0, *held, *[0] * (2 * MOST_LEVELS - 6)]
    assert shares[0:12:4] == (0, weight.sets[0].shape[0], weight.sets[1].shape[0])
    ends = shares[1::4]
    assert ends[0] == 0 < ends[1] < ends[2] and set(ends[3:]) == {ends[2]}
    assert ends[2] * last["splits"] == last.grid[0] and last.cluster == (
        (last["splits"], 1, 1) if last["splits"] > 1 else None
    )
    assert weight.features is not None
    assert (last["features"], last["bias"], last["residual"], last["y"]) == tuple(
        tensor.data_ptr() for tensor in (weight.features, bias, residual, y)
    )
    assert (last["ic"], last["n"], last["outputs"], last["x_rows"]) == (IC, 6, OC, 6)
    assert last["x_map"].address == x.data_ptr()


def test_weights_are_fetched_early_only_once_a_launch_has_used_them(gpu: FakeGpu) -> None:
    weight, x = ready(INTEGERS, ordered=True), torch.randn(3, IC).half()
    ops.linear(x, weight)
    ops.linear(x, weight)
    assert [launch.programmatic for launch in gpu.launches] == [False, True]
    assert gpu.last["features"] == 0
    weight.sets[0].data.add_(0)
    ops.linear(x, weight)
    assert not gpu.last.programmatic


def test_activations_become_bytes_once_for_all_row_sets(gpu: FakeGpu) -> None:
    mix = Mix((get_scheme("uint4", 32), get_scheme("uint4", 64), get_scheme("int8")))
    ops.linear(torch.randn(40, IC).half(), ready(mix, Activations.INT8))
    assert [name.split("_")[1] for name in names(gpu)] == ["quantize", "mixed"]
    assert gpu.last["x_scale"] == gpu.launches[0]["scales"]


def test_gate_and_up_have_as_many_columns_as_channels(gpu: FakeGpu) -> None:
    form = levels(77, mix=INTEGERS)
    both = laid_out(MixedWeight.gate_up(*(mixed(matrix(77, seed), form) for seed in (1, 2))), Activations.NATIVE)
    y = ops.gated_linear(torch.randn(4, IC).half(), both, gate=Gate.GELU)
    assert y.shape == (4, 77) and gpu.last["outputs"] == 77 and gpu.last.kernel.endswith("_g3")
    ops.linear(torch.randn(4, IC).half(), both)
    assert not any("mixed" in name for name in names(gpu)[1:])


@pytest.mark.parametrize("gpu", ["NVIDIA A100"], indirect=True)
def test_older_gpus_launch_a_row_set_at_a_time(gpu: FakeGpu) -> None:
    weight = ready(INTEGERS)
    ops.linear(torch.randn(4, IC).half(), weight)
    assert len(gpu.launches) == len(weight.sets) and not any("mixed" in name for name in names(gpu))


def test_who_asks_for_invariance_has_a_row_set_at_a_time(gpu: FakeGpu) -> None:
    weight, x = ready(INTEGERS), torch.randn(4, IC).half()
    with ops.using(batch_invariant=True):
        ops.linear(x, weight)
    assert len(gpu.launches) == len(weight.sets) and not any("mixed" in name for name in names(gpu))


def test_who_looks_on_sees_one_operator_that_launches_once_and_keeps_what_it_prepared(gpu: FakeGpu) -> None:
    weight, x = ready(INTEGERS), torch.randn(4, IC).half()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        for _ in range(2):
            ops.linear(x, weight)
    assert [event.count for event in seen.key_averages() if event.key == "tersor::mixed_linear"] == [2]
    first, second = gpu.launches
    assert "mixed" in first.kernel and first.kernel == second.kernel
    assert mixed_launch._by_form[row_sets.tensors_of(weight)[1]]._prepared.keys() == {(4, torch.float16, -1, 0)}


def test_tensors_of_other_dtypes_are_refused_before_a_launch(gpu: FakeGpu) -> None:
    weight, x = ready(INTEGERS), torch.randn(4, IC).half()
    for other, words in (
        ({"bias": torch.randn(OC)}, "bias is torch.float32 on cpu, expected torch.float16"),
        ({"residual": torch.randn(4, OC)}, "residual is torch.float32 on cpu, expected torch.float16"),
    ):
        with pytest.raises(ShapeError, match=words):
            ops.linear(x, weight, **other)
    assert not gpu.launches
