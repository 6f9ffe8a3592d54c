"""Kernels of attention on a CPU: `ops.attend` through their own headers, every lane, copy and barrier emulated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.attention_cases import NAN, Case, Step, same_pages, tolerance
from helpers.emulated import COMPILER, Emulated, tensor_map
from helpers.sharing import share

from tersor import ops
from tersor.hardware import chip_named
from tersor.kernels import attention, attention_sm90, decode_attention, jit
from tersor.kernels.jit import KernelSource, nvrtc
from tersor.kernels.shared_attention import shared_source
from tersor.ops import current, dispatch, serve_attention
from tersor.ops.workspace import Workspace

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
H200 = chip_named("H200")


class Emulation(Workspace):
    """A device that is a CPU.

    Attributes:
        launched: names of the kernels, in order.
        arrived: counters of splits, zero between launches.
        splits: what a launch has at most, of either kind; `None` is what `grid_of` says.
        arch: its compute capability, times 100.
        chip: what is known of it.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.launched: list[str] = []
        self.arrived = torch.zeros(1 << 12, dtype=torch.int32)
        self.splits: int | None = None
        self.arch = 900
        self.chip = H200
        self._functions: dict[KernelSource, Emulated] = {}

    def get(self, source: KernelSource, index: int) -> Emulated:
        self.launched.append(source.name)
        if source not in self._functions:
            self._functions[source] = Emulated(source, self.folder, self.arch)
        return self._functions[source]

    def split_sums(self, index: int, stream: int, floats: int, counters: int) -> tuple[int, int, torch.Tensor]:
        assert counters <= len(self.arrived)
        partial = torch.full((floats,), NAN)
        return partial.data_ptr(), self.arrived.data_ptr(), partial

    def grid(self, kind: Any, problem: Any, sms: int) -> decode_attention.Grid:
        if self.splits is None:
            return grid_of(kind, problem, sms)
        return decode_attention.Grid.of(kind, problem, self.splits)

    def wide_grid(self, kind: Any, problem: Any, sms: int) -> attention_sm90.Grid:
        return wide_grid_of(kind, problem, 3, self.splits)  # three SMs, so that each has several tiles in turn


grid_of, wide_grid_of = decode_attention.grid_of, attention_sm90.grid_of
tokens_of_append = attention.tokens_of_append


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulated")


@pytest.fixture
def device(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    emulation = Emulation(folder)
    serve_attention._prepared.cache_clear()
    monkeypatch.setattr(dispatch, "environment_reason", lambda dtype, device: "")
    monkeypatch.setattr(serve_attention.hardware, "of_device", lambda index: emulation.chip)
    monkeypatch.setattr(jit, "get", emulation.get)
    monkeypatch.setattr(decode_attention, "grid_of", emulation.grid)
    monkeypatch.setattr(attention_sm90, "grid_of", emulation.wide_grid)
    monkeypatch.setattr(attention, "tokens_of_append", lambda tokens, sms: 5)
    monkeypatch.setattr(jit.tensor_map, "rows", tensor_map)
    monkeypatch.setattr(current, "stream", lambda index: 0)
    monkeypatch.setattr(current, "empty", lambda size, stride, dtype: torch.full(size, NAN, dtype=dtype))
    with ops.using(workspace=emulation, reference=False):
        yield emulation
    serve_attention._prepared.cache_clear()


def check(step: Step, emulation: Emulation) -> torch.Tensor:
    """Assert that a step gives what the reference gives, and pages as the reference leaves them."""
    expected, pages = step.expected()
    cache = step.copy_of_cache()
    found = ops.attend(*step.arguments(cache))
    error = (found.float() - expected).abs()
    assert emulation.launched and (error <= tolerance(step, expected)).all(), error.max()
    assert same_pages(cache, pages) > (0.999 if step.case.e4m3 else 0.99999)  # sums of a norm round in another order
    assert not emulation.arrived.any()
    return found


FEW = (
    Case(lengths=(5,)),
    Case(head_dim=128, heads=8, lengths=(200, 1, 64, 65, 0, 63), counts=(1,) * 6, tail=2),
    Case(heads=6, lengths=(200, 7, 130), counts=(3, 7, 5), dtype=torch.bfloat16, norms=True, sinks=True),
    Case(head_dim=80, heads=8, kv_heads=1, lengths=(100, 30), counts=(8, 4), rotary_dim=32),
    Case(head_dim=96, kv_heads=4, lengths=(100, 30), counts=(2, 1), e4m3=True, norms=True, rotary_dim=0),
    Case(head_dim=128, heads=16, lengths=(300, 64), counts=(1, 1), e4m3=True, sinks=True, dtype=torch.bfloat16),
    Case(head_dim=256, lengths=(100, 65), counts=(1, 2), form={"softcap": 5.0}),
    Case(head_dim=256, heads=20, kv_heads=1, lengths=(100, 65), counts=(2, 5), dtype=torch.bfloat16, e4m3=True),
    Case(heads=3, kv_heads=1, lengths=(200, 139, 40), counts=(1, 2, 1), form={"window": 70}),
    Case(heads=5, kv_heads=5, lengths=(129, 200), counts=(3, 1), form={"window": 3, "softcap": 2.0}, norms=True),
)
MANY = (
    Case(lengths=(100, 70, 40, 0), counts=(50, 1, 40, 20), tail=3),
    Case(head_dim=80, lengths=(120, 70), counts=(20, 1), e4m3=True, norms=True, sinks=True, form={"window": 50}),
    Case(head_dim=256, heads=2, kv_heads=1, lengths=(80,), counts=(20,), dtype=torch.bfloat16, e4m3=True),
)
OLDER = (
    Case(head_dim=128, heads=2, kv_heads=1, lengths=(140,), counts=(70,), dtype=torch.bfloat16, form={"softcap": 4.0}),
    MANY[2],
)
WIDE = (
    Case(head_dim=128, heads=4, kv_heads=1, lengths=(700,), counts=(9,), dtype=torch.bfloat16, sinks=True),
    Case(head_dim=80, heads=6, kv_heads=2, lengths=(300, 130), counts=(90, 60), form={"window": 70}),
    Case(head_dim=256, heads=2, kv_heads=2, lengths=(210, 9), counts=(150, 9), form={"softcap": 5.0}),
    Case(head_dim=128, heads=4, kv_heads=2, lengths=(400, 64), counts=(80, 64), dtype=torch.bfloat16, e4m3=True),
    Case(heads=3, kv_heads=1, lengths=(*(1,) * 33, 64, *(3,) * 3, 129), counts=(*(1,) * 33, 12, *(2,) * 3, 43)),
)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("case", FEW, ids=str)
def test_rows_of_few_tokens_are_those_of_the_reference(case: Case, splits: int, device: Emulation) -> None:
    device.splits = splits
    check(Step(case), device)
    assert all("decode" in name for name in device.launched)


def test_rows_of_one_token_are_those_of_the_reference_beside_a_prompt(device: Emulation) -> None:
    prefixes = (((0, 1, 2, *range(4, 10)), 1),)
    case = Case(lengths=(65, 200, 129, 170, *[66] * 6), counts=(1, 1, 1, 40, *[1] * 6), prefixes=prefixes)
    step = Step(case)
    step.rows.most_few = 1
    assert share(step.rows, step.form) is not None
    found = check(step, device)
    step.rows.settled = True
    assert torch.equal(check(step, device), found)
    assert [name for name in device.launched if "decode" in name] == ["tersor_attention_decode_1_shares_64_float16"]


@pytest.mark.parametrize("length", [700, 8500])
def test_many_splits_become_one_result(length: int, device: Emulation) -> None:
    device.splits = 64  # of which the device takes 11, and 34
    check(Step(Case(head_dim=32, heads=2, kv_heads=1, lengths=(length,), counts=(1,), sinks=True)), device)


@pytest.mark.parametrize("case", MANY, ids=str)
def test_rows_of_many_tokens_and_few_beside_them_are_those_of_the_reference(case: Case, device: Emulation) -> None:
    check(Step(case), device)
    assert any("prefill" in name for name in device.launched)


@pytest.mark.parametrize("case", WIDE, ids=str)
def test_tiles_of_products_of_warpgroups_are_those_of_the_reference(case: Case, device: Emulation) -> None:
    device.splits = 1
    check(Step(case), device)
    assert any("sm90_prefill" in name for name in device.launched)


@pytest.mark.parametrize("case", [WIDE[0], WIDE[2]], ids=str)
def test_parts_of_what_a_tile_sees_become_one_result(case: Case, device: Emulation) -> None:
    device.splits = 4  # of which some tiles take fewer
    check(Step(case), device)


@pytest.mark.parametrize("case", OLDER, ids=str)
def test_rows_of_many_tokens_are_those_of_the_reference_where_warps_multiply(
    case: Case, device: Emulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_sm90, "takes", lambda kind, chip: False)
    monkeypatch.setattr(attention, "tokens_of_append", tokens_of_append)
    check(Step(case), device)
    assert not any("sm90_prefill" in name for name in device.launched)


SHARED = (
    (
        Case(
            heads=8,
            lengths=(65, 200, 129, 64, 0, 70, *[66] * 13),
            counts=(1,) * 19,
            prefixes=(((0, 1, 2, *range(6, 19)), 1),),
            tail=1,
            sinks=True,
        ),
        9,
        1,
    ),
    (Case(head_dim=128, heads=8, lengths=(70,) * 37, counts=(1,) * 37, prefixes=((tuple(range(37)), 1),)), 1, 3),
    (
        Case(
            head_dim=32,
            heads=16,
            kv_heads=1,
            lengths=(2113, 7, 2200, 2113, 2180),
            counts=(1, 3, 1, 1, 1),
            prefixes=(((0, 2, 3, 4), 20), ((0, 4), 33)),
            dtype=torch.bfloat16,
            norms=True,
        ),
        40,
        32,
    ),
    (
        Case(
            head_dim=96,
            heads=6,
            lengths=(300, 330, 90, 120, 260),
            counts=(1, 1, 1, 8, 1),
            prefixes=(((0, 1, 4), 2), ((0, 1), 4), ((2, 3), 1)),
            e4m3=True,
            dtype=torch.bfloat16,
            form={"softcap": 4.0},
        ),
        3,
        2,
    ),
    (
        Case(
            heads=9,
            kv_heads=3,
            lengths=(3350, 3264),
            counts=(1, 1),
            prefixes=(((0, 1), 50),),
            dtype=torch.bfloat16,
            norms=True,
            rotary_dim=32,
        ),
        1,
        1,
    ),
    (Case(head_dim=256, heads=32, kv_heads=1, lengths=(200, 130), counts=(1, 1), prefixes=(((0, 1), 2),)), 1, 1),
    (Case(lengths=(65, 70), counts=(1, 1), sinks=True), 1, 0),
)
"""Cases, CTAs, and into how many items what is read together is cut."""


@pytest.mark.parametrize(("case", "ctas", "items"), SHARED, ids=lambda one: str(one)[:30])
def test_rows_that_read_pages_together_are_those_of_the_reference(
    case: Case, ctas: int, items: int, device: Emulation
) -> None:
    device.chip = replace(H200, sms=-(-ctas // 2))
    step = Step(case)
    found = share(step.rows, step.form, ctas)
    assert (len(found.items) if found else 0) == items
    check(step, device)
    assert sum("shared" in name for name in device.launched) == 1


@pytest.mark.parametrize("case", [SHARED[3][0], SHARED[5][0]], ids=str)
def test_rows_that_read_pages_together_are_those_of_the_reference_where_warps_multiply(
    case: Case, device: Emulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_sm90, "takes", lambda kind, chip: False)
    step = Step(case)
    assert share(step.rows, step.form, 2) is not None
    check(step, device)
    assert any("shared" in name for name in device.launched)
    assert not any("sm90_shared" in name for name in device.launched)


def test_a_layer_whose_window_hides_pages_reads_every_row_for_itself(device: Emulation) -> None:
    case = Case(lengths=(130, 140), counts=(1, 1), prefixes=(((0, 1), 2),), form={"window": 139})
    for window, names in ((139, 1), (140, 2)):
        step = Step(replace(case, form={"window": window}))
        share(step.rows, step.form)
        device.launched.clear()
        serve_attention._prepared.cache_clear()
        check(step, device)
        assert len(device.launched) == names
    with ops.using(batch_invariant=True):
        device.launched.clear()
        check(step, device)
        assert not any("shared" in name for name in device.launched)


@pytest.mark.parametrize("case", [FEW[4], MANY[1]], ids=str)
def test_pages_of_8_bits_are_as_exact_where_no_instruction_reads_them(
    case: Case, device: Emulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.arch = 800
    monkeypatch.setattr(attention_sm90, "takes", lambda kind, chip: False)
    check(Step(case), device)


@pytest.mark.parametrize(
    ("name", "arch", "case"),
    [
        ("RTX 3090", 860, FEW[6]),  # one stage of a ring alone has room beside heads of 256
        ("A100", 800, replace(OLDER[0], head_dim=256)),
        ("RTX 5090", 1200, MANY[2]),
        ("B200", 1000, FEW[5]),
    ],
    ids=str,
)
def test_other_gpus_give_what_the_reference_gives_with_rings_of_their_own(
    name: str, arch: int, case: Case, device: Emulation
) -> None:
    device.arch, device.chip = arch, chip_named(name)
    check(Step(case), device)
    assert not any("sm90" in launched for launched in device.launched)


def test_rows_that_are_settled_give_the_same_bits(device: Emulation) -> None:
    step = Step(FEW[1])
    found = check(step, device)
    step.rows.settled = True
    assert torch.equal(check(step, device), found)


def test_a_row_has_the_same_bits_in_any_batch_where_that_is_asked_for(device: Emulation) -> None:
    case = Case(head_dim=128, heads=8, lengths=(700, 3, 65), counts=(1, 3, 1))
    with ops.using(batch_invariant=True):
        step = Step(case)
        together = check(step, device)
        rows, qkv = step.rows, step.qkv
        step.rows = ops.Rows(torch.tensor([0, 1], dtype=torch.int32), rows.lengths[:1], rows.pages[:1], 1, 700)
        step.qkv = qkv[:1]
        alone = check(step, device)
    assert torch.equal(alone[0], together[0])


def test_texts_grow_step_by_step_over_the_same_pages(device: Emulation) -> None:
    step = Step(Case(lengths=(62, 127), counts=(1, 1)))
    used = set(step.rows.pages.flatten().tolist())
    free = [page for page in range(1, step.cache.pages.shape[0]) if page not in used]
    step.rows.pages[0, 1], step.rows.pages[1, 2] = free[0], free[1]
    step.rotary = torch.randn(200, 64, generator=torch.Generator().manual_seed(1))
    for turn in range(4):
        step.qkv = torch.randn(step.qkv.shape, generator=torch.Generator().manual_seed(turn)).half()
        check(step, device)
        ops.attend(*step.arguments())
        step.rows.lengths += 1
        step.rows.most_length += 1


@pytest.mark.parametrize("tiles", [1, 4])
def test_every_kernel_waits_for_the_one_ahead_and_lets_the_next_start(tiles: int) -> None:
    kind = attention.Kind(head_dim=64, dtype="float16")
    sources = [module.prefill_source(kind, H200) for module in (attention, attention_sm90)]
    sources += [attention.append_source(kind), shared_source(kind, H200)]
    sources += [decode_attention.decode_source(kind, tiles, H200, shares) for shares in (False, True)]
    for source in sources:
        text = nvrtc.compile_source(source, "compute_90a").data
        assert b"griddepcontrol.wait" in text and b"griddepcontrol.launch_dependents" in text
