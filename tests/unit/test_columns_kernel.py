"""The kernel that goes over columns while codes are chosen, on a CPU as C++: its values are those of the torch code."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.emulated import COMPILER, Emulated

from tersor import compress, formats, ops
from tersor.compress import HESSIAN, OUTPUT_HESSIAN, sweeps
from tersor.compress.grid import Grid
from tersor.compress.hessian import INPUT_DAMPING, Hessian
from tersor.kernels import jit
from tersor.ops import columns, dispatch

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")

ROWS = 11
"""A CTA's warps have 8."""


def sweep_of(name: str, channels: int, descend: bool, size: int | None = 8, masked: bool = False) -> sweeps.Sweep:
    """Return a sweep over random rows, some scales of which are 0, in an order of columns that mixes the groups.

    With a mask, a third of the weights is zero.
    """
    scheme = formats.get_scheme(name, size)
    generator = torch.Generator().manual_seed(channels + descend)
    x = torch.randn(2 * channels, channels, generator=generator)
    hessian = Hessian.of(x.T @ x / len(x), INPUT_DAMPING, "hessian")
    grid = Grid.of(scheme, channels, torch.float32, torch.device("cpu"))
    target = torch.randn(channels, ROWS, generator=generator)
    scale = torch.rand(grid.groups, ROWS, generator=generator) / scheme.format.max * 2
    scale[0, 0] = 0
    zero_point = torch.zeros_like(scale)
    if scheme.has_zero_point:
        zero_point = torch.randint(0, int(scheme.format.max) + 1, scale.shape, generator=generator).float()
    groups = torch.div(hessian.order * grid.groups, channels, rounding_mode="floor")
    kept = (torch.rand(target.shape, generator=generator) > 0.3).float() if masked else None
    before = None
    if descend:
        low, high = (end.flatten() for end in grid.ends(zero_point[groups]))
        wanted = (target / scale[groups].clamp_min(0.1)).flatten()
        before = grid.nearest(wanted, low, high, torch.empty_like(wanted)).view(target.shape)
        before = before if kept is None else before * kept
        target = hessian.ordered @ (target - before * scale[groups])
    matrix = hessian.ordered if descend else hessian.moves
    values, changes = torch.full_like(target, 99.0), torch.full((sweeps.BLOCK, ROWS), 99.0)
    return sweeps.Sweep(target, before, scale, zero_point, groups, matrix, grid, values, changes, kept)


@needs_compiler
@pytest.mark.parametrize(
    ("name", "channels", "size", "descend"),
    [
        ("uint4", 128, 8, False),
        ("uint4", 40, 8, True),
        ("int3", 72, 8, False),
        ("fp6_e2m3", 128, 8, True),
        ("fp8_e4m3", 33, None, False),
    ],
)
def test_every_column_gets_the_value_that_the_torch_code_gives_it(
    name: str, channels: int, size: int | None, descend: bool, tmp_path: Path
) -> None:
    given, expected = (sweep_of(name, channels, descend, size) for _ in range(2))
    launch = columns.prepared(given, Emulated(columns.source_of(given), tmp_path, 900), 0)  # type: ignore[arg-type]
    launch(0, channels)
    expected.block(0, channels)
    assert torch.equal(given.values, expected.values)
    if name == "int3" and not descend:
        assert bool((given.values[:, 0][given.groups == 0] == 0).all())
    torch.testing.assert_close(given.changes[:channels], expected.changes[:channels], rtol=1e-4, atol=1e-5)
    assert bool((given.changes[channels:] == 99).all())


@needs_compiler
@pytest.mark.parametrize("descend", [False, True])
@pytest.mark.parametrize(("name", "size"), [("uint4", 8), ("int3", 8), ("fp6_e2m3", None)])
def test_what_a_mask_makes_zero_is_zero_and_moves_all_of_itself_on(
    name: str, size: int | None, descend: bool, tmp_path: Path
) -> None:
    given, expected, whole = (sweep_of(name, 136, descend, size, masked) for masked in (True, True, False))
    launch = columns.prepared(given, Emulated(columns.source_of(given), tmp_path, 900), 0)  # type: ignore[arg-type]
    for start, end in ((0, 128), (128, 136)):
        launch(start, end)
        for torch_code in (expected, whole):
            torch_code.block(start, end)
    assert given.kept is not None
    gone = given.kept == 0
    assert bool((given.values[gone] == 0).all()) and bool((whole.values[gone] != 0).any())
    assert torch.equal(given.values, expected.values)
    torch.testing.assert_close(given.changes[:8], expected.changes[:8], rtol=1e-4, atol=1e-5)
    assert bool((given.values != whole.values)[~gone].any())


@needs_compiler
def test_a_later_block_reads_and_writes_its_own_columns(tmp_path: Path) -> None:
    given, expected = (sweep_of("uint4", 192, True) for _ in range(2))
    launch = columns.prepared(given, Emulated(columns.source_of(given), tmp_path, 900), 0)  # type: ignore[arg-type]
    launch(128, 192)
    expected.block(128, 192)
    assert torch.equal(given.values, expected.values)
    assert bool((given.values[:128] == 99).all())


@needs_compiler
def test_weights_halfway_between_two_values_go_where_the_torch_code_takes_them(tmp_path: Path) -> None:
    for name in ("int4", "fp4_e3m0"):
        given, expected = (sweep_of(name, 64, False, None) for _ in range(2))
        grid = given.grid
        points = torch.cat([grid.middles, grid.table, torch.tensor([-1e30, 1e30, 0.5, -1.5])])[: 64 * ROWS]
        for one in (given, expected):
            one.scale.fill_(0.5)
            one.matrix.fill_diagonal_(1.0).triu_().tril_()
            one.given.copy_(points.repeat(64 * ROWS // len(points) + 1)[: 64 * ROWS].view(64, ROWS) / 2)
        launch = columns.prepared(given, Emulated(columns.source_of(given), tmp_path, 900), 0)  # type: ignore[arg-type]
        launch(0, 64)
        expected.block(0, 64)
        assert torch.equal(given.values, expected.values)
        assert torch.equal(given.changes[:64], expected.changes[:64])


@needs_compiler
@pytest.mark.parametrize("outliers", [None, formats.Outliers(2, "float16")], ids=["plain", "outliers"])
def test_a_weight_of_several_blocks_gets_the_codes_that_the_torch_code_gives_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, outliers: formats.Outliers | None
) -> None:
    generator = torch.Generator().manual_seed(1)
    weight, x = (torch.randn(rows, 160, generator=generator) for rows in (ROWS, 600))
    gradients = torch.randn(600, ROWS, generator=generator)
    moments = {HESSIAN: x.T @ x / 600, OUTPUT_HESSIAN: gradients.T @ gradients / 600}
    scheme = replace(formats.get_scheme("uint4", 32), outliers=outliers)
    expected = compress.encode(weight, scheme, "gptq", moments)
    blocks = []

    def serve(sweep: sweeps.Sweep) -> sweeps.Block:
        launch = columns.prepared(sweep, Emulated(columns.source_of(sweep), tmp_path, 900), 0)  # type: ignore[arg-type]
        return lambda start, end: blocks.append(launch(start, end))

    monkeypatch.setitem(sweeps._servers, "cpu", serve)
    found = compress.encode(weight, scheme, "gptq", moments)
    assert len(blocks) == 2 * (1 + 3 + 1 + 2 + 2)  # alone, in one block of rows, and polished: two blocks of columns
    assert torch.equal(found.codes, expected.codes) and torch.equal(found.scale, expected.scale)
    assert (found.outliers is None) == (outliers is None)


def test_on_a_device_without_kernels_the_torch_code_goes_over_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "get", lambda *_: pytest.fail("asked for a kernel"))
    assert columns.serve(sweep_of("int4", 16, False)) is None
    ops.load_columns([formats.get("int4")], torch.device("cpu"))


def test_kernels_are_loaded_ahead_that_the_sweeps_of_a_format_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "kernel_chip", lambda device: True)
    loaded = set()
    monkeypatch.setattr(jit, "get", lambda source, device: loaded.add(source))
    names = ("uint4", "int3", "fp5_e2m2", "fp4_e3m0", "fp8_e4m3")
    ops.load_columns(map(formats.get, names), torch.device("cuda"))
    sweeps_of_them = [sweep_of(name, 16, descend) for name in names for descend in (False, True)]
    assert loaded == {columns.source_of(sweep) for sweep in sweeps_of_them} and len(loaded) == 8
    for sweep in sweeps_of_them:
        if sweep.grid.scheme.format.kind == "float":
            assert columns.source_of(sweep).parameters["MIDDLES"] == len(sweep.grid.middles)


def test_a_device_is_served_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, "_servers", dict(sweeps._servers))
    sweeps.serve_with("cuda", columns.serve)
    with pytest.raises(ValueError, match="served by"):
        sweeps.serve_with("cuda", lambda sweep: None)
    asked = []
    sweeps.serve_with("cpu", lambda sweep: asked.append(sweep))
    sweep = sweep_of("int4", 16, False)
    hessian = Hessian.of(torch.eye(16), INPUT_DAMPING, "hessian")
    sweeps.round_columns(sweep.given, sweep.scale, sweep.zero_point, sweep.grid, hessian, sweep.groups)
    assert len(asked) == 1
