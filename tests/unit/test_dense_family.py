"""The dense family of kernels: what Python passes is what the headers take."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from helpers.fakes import argument_names

from tersor import formats
from tersor.formats import Activations
from tersor.hardware import CHIPS
from tersor.kernels import dense, tune
from tersor.kernels.jit import KernelSource
from tersor.kernels.tune import sm90
from tersor.layouts.packing import Packing
from tersor.ops import current, dequantized

H200 = CHIPS["NVIDIA H200"]
FP6 = Packing.of(formats.get_scheme("fp6_e3m2"), "float16")


def sources() -> dict[str, KernelSource]:
    """One kernel of each schedule."""
    problem = dense.problem_of(FP6.scheme, (4096, 4096), 8)
    return {
        "sm80": dense.fused_source(FP6, "float16", tune.choose(problem, CHIPS["NVIDIA A100"])),
        "sm90": dense.fused_source(FP6, "float16", tune.choose(problem, H200)),
    }


@pytest.mark.parametrize("schedule", ["sm80", "sm90"])
def test_a_launch_puts_every_named_argument_where_the_header_has_it(
    schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every argument has a value of its own, so two that change places are seen."""
    from types import SimpleNamespace

    from tersor.kernels.jit import tensor_map

    launched: list[tuple[object, ...]] = []
    monkeypatch.setattr(tensor_map, "rows", lambda x, n, ic, x_stride, element, box: ("map", x, n, ic, x_stride, box))
    chip = H200 if schedule == "sm90" else CHIPS["NVIDIA A100"]
    config = tune.choose(dense.problem_of(FP6.scheme, (4096, 2048), 8), chip)
    function = SimpleNamespace(launch=lambda grid, block, shared, stream, args, *more: launched.append((stream, args)))
    launch = dense.prepare_fused(
        function,  # type: ignore[arg-type]
        config,
        bf16=False,
        oc=4096,
        ic=2048,
        n=8,
        aligned=True,
        factor=0.5,
    )
    given = dict(
        zip(("weight", "scale", "x", "x_stride", "x_scale", "bias", "residual", "y"), range(10, 18), strict=True)
    )
    names = ("norm_weight", "scaled", "squares", "norm_scale", "norm_eps")
    norms = dict(zip(names, (30, 31, 32, 33.0, 34.0), strict=True))
    launch(stream=3, **given, partial=20, arrived=21, early=True, **norms, kept=40)
    ((stream, args),) = launched
    assert stream == 3
    found = dict(zip(argument_names(sources()[schedule]), args, strict=True))  # type: ignore[arg-type]
    fixed = {"oc": 4096, "ic": 2048, "n": 8, "factor": 0.5, "partial": 20, "arrived": 21}
    if schedule == "sm90":
        x_rows = sm90.box_rows(config, 8)
        fixed |= {"x_map": ("map", 12, 8, 2048, 13, x_rows), "x_rows": x_rows}
        fixed |= {"whole_tiles": config.whole_tiles, "splits": config.splits, **norms, "kept": 40}
        taken = ("weight", "scale", "bias", "x_scale", "residual", "y")
    else:
        fixed |= {"x_aligned": True}
        taken = ("weight", "scale", "x", "x_stride", "bias", "residual", "y")
    assert found == {**fixed, **{name: given[name] for name in taken}}


def test_a_weight_packed_for_other_activations_than_the_tiles_has_no_kernel() -> None:
    tile = sm90.tiles(0, Activations.E4M3)[0]
    slots = tile.slots(6, 0, H200)
    with pytest.raises(ValueError, match="packed for float16 activations does not meet"):
        dense.sm90_source(FP6, "float16", tile, slots, tile.shared_bytes(6, 0, H200))


@pytest.mark.parametrize("activations", list(Activations))
@pytest.mark.parametrize("group_size", [None, 128, 32])
def test_beyond_a_decode_batch_a_choice_depends_on_the_tiles_that_tokens_fill(
    activations: Activations, group_size: int | None
) -> None:
    """So a server that sees every number of tokens chooses once for each 16 of them, and loses next to nothing."""
    scheme = formats.get_scheme("int6" if activations.dtype is torch.int8 else "fp6_e3m2", group_size)
    for shape in ((4096, 4096), (10240, 8192), (100, 1000)):
        for n in (*range(257, 1300, 37), 511, 512, 513, 4095, 4096, 4097, 8191):
            problem = dense.problem_of(scheme, shape, n, activations=activations)
            chosen = tune.choose(problem, H200)
            assert chosen in tune.candidates(problem, H200)
            least = tune.seconds(problem, tune.predict(problem, H200), H200)
            assert tune.seconds(problem, chosen, H200) <= 1.02 * least


@pytest.mark.parametrize("gate", [0, 1])
def test_tokens_beyond_those_of_a_grid_are_finished_by_further_launches(
    gate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA has no grid of more than 65,535 CTAs along its second dimension."""
    monkeypatch.setattr(current, "stream", lambda index: 0)
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype: mm(a.to(out_dtype), b.to(out_dtype)))
    launches: list[tuple[tuple[int, int, int], tuple[Any, ...]]] = []

    class Finish:
        def launch(self, grid: tuple[int, int, int], block: object, shared: int, stream: int, args: Any) -> None:
            launches.append((grid, args))

    n, oc, finish = 2 * 65535 + 3, 32, cast("Any", Finish())
    outputs = oc // 2 if gate else oc
    residual = torch.zeros(n, outputs, dtype=torch.float16)
    slices = [(0, torch.ones(16, 8).half()), (16, torch.ones(16, 8).half())]
    y = dequantized.finished(torch.ones(n, 8).half(), slices, finish, 0, None, oc, residual, gate, 1.0)
    assert y.shape == (n, outputs)
    assert [grid[1] for grid, _ in launches] == [65535, 65535, 3] * 2
    for place, (_, (sums, _, _, added, into, first, columns, *_)) in enumerate(launches):
        at = place % 3 * 65535
        assert (first, columns) == (place // 3 * 16, 16) and sums - launches[place // 3 * 3][1][0] == at * 16 * 4
        assert added - residual.data_ptr() == into - y.data_ptr() == at * outputs * 2
