"""Kernels of sampling, norms and rows on a CPU: operators through their own headers, every thread emulated."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.emulated import COMPILER, Emulated
from helpers.sampling_rows import logits_of, moved, plain, random_rows

from tersor import ops
from tersor.hardware import chip_named
from tersor.kernels import jit
from tersor.kernels.jit import KernelSource
from tersor.ops import Allowed, SamplingRows, current, dispatch, mode
from tersor.ops.attention_form import Rows
from tersor.ops.workspace import Workspace

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
POISON = -7


class Emulation(Workspace):
    """A device that is a CPU; rows' counters are zero between launches."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.arrived = folder, torch.zeros(1 << 10, dtype=torch.int32)
        self._functions: dict[KernelSource, Emulated] = {}
        self.launched: list[str] = []

    def get(self, source: KernelSource, index: int) -> Emulated:
        """Return a kernel as plain C++."""
        self.launched.append(source.header)
        if source not in self._functions:
            self._functions[source] = Emulated(source, self.folder, 900)
        return self._functions[source]

    def split_sums(self, index: int, stream: int, floats: int, counters: int) -> tuple[int, int, None]:
        """Return the counters."""
        assert counters <= len(self.arrived)
        return 0, self.arrived.data_ptr(), None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where libraries of this module's kernels are."""
    return tmp_path_factory.mktemp("emulated")


@pytest.fixture
def emulation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulation]:
    """Serve calls on the CPU by kernels, but where the mode asks for the reference; memory is poisoned."""
    made = Emulation(folder)

    def empty(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.full(size, POISON, dtype=dtype).as_strided(size, stride)

    def kernel_chip(device: torch.device) -> object:
        return None if mode.current().reference else chip_named("H200")

    monkeypatch.setattr(jit, "get", made.get)
    monkeypatch.setattr(dispatch, "kernel_chip", kernel_chip)
    monkeypatch.setattr(current, "empty", empty)
    monkeypatch.setattr(current, "stream", lambda index: 0)
    with ops.using(workspace=made):
        yield made
    assert not made.arrived.any()


def check(logits: torch.Tensor, rows: SamplingRows) -> None:
    """Assert that kernels draw what the reference draws, and find the log probabilities that it finds."""
    slots = len(rows.temperature)
    asks = torch.randint(-1, 21, (slots,), generator=torch.Generator().manual_seed(slots)).int()
    with ops.using(reference=True):
        expected, of_them = ops.draw_with_logprobs(logits, moved(rows, "cpu"), asks)
    tokens, found = ops.draw_with_logprobs(logits.clone(), rows, asks)
    assert torch.equal(tokens, expected)
    assert torch.equal(found.tokens, of_them.tokens) and torch.equal(found.ranks, of_them.ranks)
    torch.testing.assert_close(found.chosen, of_them.chosen, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.values, of_them.values, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("emulation")
@pytest.mark.parametrize(
    ("count", "vocabulary", "dtype", "spread"),
    [
        (24, 1000, torch.bfloat16, 3.0),
        (24, 1003, torch.float32, 1.0),
        (12, 7, torch.float32, 2.0),
        (12, 70, torch.bfloat16, 0.0),
    ],
)
def test_tokens_are_those_of_the_reference_for_rows_of_every_kind(
    count: int, vocabulary: int, dtype: torch.dtype, spread: float
) -> None:
    check(logits_of(count, vocabulary, dtype, spread, 1), random_rows(count, vocabulary, 1))


@pytest.mark.usefixtures("emulation")
def test_rows_find_their_options_in_their_slots() -> None:
    rows = random_rows(30, 500, 3)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))[:9]
    rows.slots, rows.positions = order.int(), rows.positions[order]
    check(logits_of(9, 500, torch.bfloat16, 1.0, 3), rows)


@pytest.mark.usefixtures("emulation")
@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0.99},
        {"top_p": 0.6, "min_p": 0.9},
        {"top_k": 9000},
        {"top_k": 9500, "top_p": 0.7},
        {"min_p": 1e-4},
        {"top_p": 0.0},
    ],
)
def test_rows_of_which_most_is_kept_are_drawn_by_several_ctas(options: dict[str, float]) -> None:
    check(logits_of(2, 10000, torch.bfloat16, 0.4, 5), plain(2, temperature=1.3, **options))


@pytest.mark.usefixtures("emulation")
@pytest.mark.parametrize("top_p", [0.02, 0.6, 0.98])
def test_the_bin_where_top_p_ends_may_have_more_tokens_than_there_are_candidates(top_p: float) -> None:
    """Rows: all equal; two values of which one has most tokens; more values than bins tell apart; most are below."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.full((4, 10000), 0.75)
    logits[1, ::8] = 2.0
    logits[2] = torch.rand(10000, generator=generator) * 1e-10
    logits[3] = torch.randn(10000, generator=generator) * 0.3 - 2.0
    logits[3, ::8] = torch.rand(1250, generator=generator) * 1e-3
    check(logits, plain(4, top_p=top_p))


@pytest.mark.usefixtures("emulation")
@pytest.mark.parametrize("options", [{"top_p": 0.5}, {"top_k": 5001}, {"top_p": 0.6}])
def test_what_is_kept_ends_at_one_token_more_or_less(options: dict[str, float]) -> None:
    """Two logits that differ have one weight; a token of many equal ones is asked for; light ones sum up to a heavy."""
    logits = torch.full((8, 10000), -torch.inf)
    if "top_k" in options:
        logits[:, ::2], logits[:, 1::2] = 1.0, 0.99
    elif options["top_p"] == 0.5:
        logits[:, 5], logits[:, 7000] = -1e-9, 0.0
    else:
        logits[:, 8000], logits[:, :9000:30] = 5.9, 0.0  # 2^31.5 in units of 2^-40 of the greatest
    check(logits, plain(8, **options))


@pytest.mark.usefixtures("emulation")
def test_top_p_sees_allowed_tokens_only() -> None:
    """Rows: one token is allowed; none is; every other one; the only one that is has a penalty."""
    logits = logits_of(4, 10000, torch.bfloat16, 0.3, 6)
    bits = torch.zeros(4, 313, dtype=torch.int32)
    bits[0, 200], bits[2], bits[3, 3] = 1 << 9, 0x55555555, 1
    rows = plain(4, top_p=0.9, min_p=0.01)
    rows.allowed = Allowed(bits=bits, rows=torch.arange(4, dtype=torch.int32))
    rows.listed = random_rows(4, 10000, 6).listed
    assert rows.listed is not None
    rows.listed.tokens[rows.listed.starts[3]], rows.listed.biases[rows.listed.starts[3]] = 96, -1.0
    check(logits, rows)


def test_norms_and_rows_are_those_of_the_torch_code(emulation: Emulation) -> None:
    dtype, generator = torch.bfloat16, torch.Generator().manual_seed(0)
    for tokens, channels in ((3, 264), (1, 5120)):
        x, residual = (torch.randn(2, tokens, channels, generator=generator) * 3 + 1).to(dtype)
        weight, bias = torch.randn(2, channels, generator=generator).to(dtype)
        calls = [
            lambda: ops.rms_norm(x, weight, 1e-6),  # noqa: B023
            lambda: ops.rms_norm(x, weight, 1e-6, offset=1.0, residual=residual),  # noqa: B023
            lambda: ops.layer_norm(x, weight, bias, 1e-5),  # noqa: B023
        ]
        for call in calls:
            with ops.using(reference=True):
                expected = call()
            torch.testing.assert_close(call(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5)
    table, learned = torch.randn(2, 20, 264, generator=generator).to(dtype)
    ids = torch.tensor([0, 19, -1, 20, 4, 4, 5, 6])
    starts, lengths = torch.tensor([0, 3, 3, 5, 6, 6]).int(), torch.tensor([7, 0, 2, 40, 0]).int()
    rows = Rows(starts, lengths, torch.zeros(5, 1, dtype=torch.int32), 3, 40)
    for options in ({}, {"scale": 2.5}, {"positions": learned, "first": 2, "rows": rows}):
        with ops.using(reference=True):
            expected = ops.lookup(ids, table, **options)
        assert torch.equal(ops.lookup(ids, table, **options), expected)
    assert ops.gather_rows(table, ids.int())[[2, 3]].eq(0).all()
    assert set(emulation.launched) == {"small/norm.cuh", "small/rows.cuh"}
