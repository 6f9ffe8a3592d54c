"""The one entry to compression: blocks do not show, recipes come by name, the caller's threads stay as they are."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from helpers import tiny_lm

from tersor import formats
from tersor.checkpoint.names import PACKED, SCALE, ZERO_POINT
from tersor.checkpoint.pack import pack
from tersor.compress import RECIPES, Recipe, Statistics, encode, encode_blocks, get_recipe, quantize_rtn
from tersor.compress.workers import worker_pool
from tersor.convert import quantize
from tersor.errors import InputError, NonFiniteError
from tersor.formats import Encoded, ScaleError, Scheme
from tersor.layouts import PackedWeight

UINT = formats.get_scheme("uint4", 16)
FP6 = formats.get_scheme("fp6_e3m2")


def weight(rows: int = 37, ic: int = 48) -> torch.Tensor:
    """Return the same random weight each time, float32 [rows, ic]."""
    return torch.randn(rows, ic, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scheme", [FP6, UINT], ids=lambda scheme: scheme.key())
@pytest.mark.parametrize("threads", [1, 3])
def test_blocks_give_what_the_whole_weight_gives(scheme: Scheme, threads: int) -> None:
    whole = quantize_rtn(weight(), scheme)
    codes = torch.zeros_like(whole.codes)

    def take(start: int, block: Encoded) -> None:
        codes[start : start + len(block.codes)] = block.codes
        assert torch.equal(block.scale, whole.scale[start : start + len(block.codes)])

    with threads_of_this_test(threads):
        sums = encode_blocks(weight(), scheme, take, block_elements=5 * 48)
    assert torch.equal(codes, whole.codes)
    assert sums == pytest.approx((whole.squared_error, whole.squared_norm), rel=1e-5)


class threads_of_this_test:
    """Set torch's threads for a test, and back."""

    def __init__(self, count: int) -> None:
        self.count, self.before = count, torch.get_num_threads()

    def __enter__(self) -> None:
        torch.set_num_threads(self.count)

    def __exit__(self, *error: object) -> None:
        torch.set_num_threads(self.before)


@pytest.mark.parametrize("scheme", [FP6, UINT], ids=lambda scheme: scheme.key())
def test_a_whole_weight_is_encoded_in_blocks_and_packed_alike(scheme: Scheme) -> None:
    large = weight(300, 1024)  # more than a block
    whole, encoded, packed = quantize_rtn(large, scheme), encode(large, scheme), pack(large, scheme)
    assert encoded.scheme == scheme and torch.equal(encoded.codes, whole.codes)
    assert torch.equal(encoded.dequantize(), whole.dequantize())
    stored = PackedWeight.from_encoded(whole)
    expected = {PACKED: stored.data, SCALE: stored.scale, ZERO_POINT: stored.zero_point}
    assert set(packed.tensors) == {name for name, tensor in expected.items() if tensor is not None}
    for name, tensor in packed.tensors.items():
        wanted = expected[name]
        assert wanted is not None and tensor.dtype == wanted.dtype and torch.equal(tensor, wanted)
    assert packed.squared_error == pytest.approx(encoded.squared_error)


def test_a_transposed_weight_and_float64_are_taken_as_they_are() -> None:
    expected = quantize_rtn(weight(), FP6)
    for given in (weight().double(), weight().T.contiguous().T):
        assert torch.equal(encode(given, FP6).codes, expected.codes)


def test_a_nan_is_named_by_its_place_in_the_whole_weight() -> None:
    bad = weight()
    bad[23, 7] = float("nan")
    with pytest.raises(NonFiniteError) as caught:
        encode_blocks(bad, FP6, lambda start, block: None, first_row=100, block_elements=48)
    assert caught.value.index == (123, 7)
    large = bad.double()
    large[23, 7] = 1e300  # beyond float32
    with pytest.raises(NonFiniteError) as caught:
        encode(large, FP6)
    assert caught.value.index == (23, 7)


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"unknown algorithm 'rnt', did you mean 'rtn'\? \(known: rtn, gptq\)"):
        get_recipe("rnt")
    with pytest.raises(InputError, match="unknown algorithm"):
        encode(weight(), FP6, "gpt")


def test_a_recipe_that_takes_whole_weights_and_statistics_gets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def recipe(rows: torch.Tensor, scheme: Scheme, statistics: Statistics) -> Encoded:
        seen.append((tuple(rows.shape), statistics["scale"].shape))
        return quantize_rtn(rows * statistics["scale"], scheme)

    monkeypatch.setitem(RECIPES, "scaled", Recipe(recipe, "scaled", needs=("scale",), all_rows=True))
    large = weight(300, 1024)
    statistics = {"scale": torch.full((1024,), 2.0)}
    encoded = encode(large, FP6, "scaled", statistics)
    assert seen == [((300, 1024), (1024,))]
    assert torch.equal(encoded.codes, quantize_rtn(large * 2, FP6).codes)
    with pytest.raises(InputError, match="algorithm 'scaled' needs statistics of the layer, and there are no scale"):
        encode(large, FP6, "scaled")


def test_conversion_uses_the_recipe_that_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []

    def recipe(rows: torch.Tensor, scheme: Scheme, statistics: Statistics) -> Encoded:
        shapes.append(tuple(rows.shape))
        return quantize_rtn(rows.float() / 2, scheme)

    monkeypatch.setitem(RECIPES, "half", Recipe(recipe, "halved", all_rows=True))
    report = quantize(tiny_lm.TINY, tmp_path / "out", algorithm="half")
    assert sorted(shapes) == sorted(row.shape for row in report.compressed)
    assert "scale a row, halved by Tersor" in (tmp_path / "out" / "README.md").read_text()


THREADS = """
import sys, threading
import torch
from tersor.convert import quantize
from tersor.checkpoint.pack import pack
from tersor.formats import get_scheme
from tersor.integrations.transformers import load

torch.set_num_threads(3)
counts = set()

def look():
    counts.add((threading.current_thread().name[:6], torch.get_num_threads()))

def spy(*call):
    look()
    fresh = threading.Thread(target=look, name="fresh")
    fresh.start()
    fresh.join()

waiting, done = threading.Event(), threading.Event()
def old():
    look()
    waiting.set()
    done.wait()
    look()
other = threading.Thread(target=old, name="other")
other.start()
waiting.wait()
quantize(sys.argv[1], sys.argv[2], progress=spy)
spy()
pack(torch.randn(1000, 1024), get_scheme("int4"))
spy()
load.load_model(sys.argv[2], "cpu")
spy()
done.set()
other.join()
print(sorted(counts))
"""


def test_the_callers_numbers_of_threads_stay_as_they_are(tmp_path: Path) -> None:
    """In the calling thread, in one that ran before, and in those that start while and after the library works."""
    done = subprocess.run(
        [sys.executable, "-c", THREADS, str(tiny_lm.TINY), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    assert done.stdout.strip() == str([("MainTh", 3), ("fresh", 3), ("other", 3)])


def test_workers_compute_on_one_thread_each() -> None:
    with threads_of_this_test(3), worker_pool(2, "test") as pool:
        barrier = threading.Barrier(2)

        def count(_: int) -> int:
            barrier.wait(timeout=60)
            return torch.get_num_threads()

        assert list(pool.map(count, range(2))) == [1, 1]
        assert torch.get_num_threads() == 3


def test_rows_that_underflow_are_named_by_their_place_in_the_whole_weight() -> None:
    small = weight()
    small[5], small[30] = 1e-9, -1e-12
    assert encode(small, FP6).underflowed == (5, 30)
    packed = pack(small, FP6, first_row=1000, block_elements=4 * 48)
    assert packed.underflowed == (1005, 1030)


def test_a_float64_row_that_float32_cannot_hold_is_named() -> None:
    wide = weight().double()
    wide[7] = 1e-200
    assert encode(wide, formats.get_scheme("fp6_e3m2", None, "float32")).underflowed == (7,)
    wide[9, 3] = -1e200
    with pytest.raises(NonFiniteError, match=r"holds -1e\+200 at \[9, 3\]"):
        encode(wide, FP6)


def test_a_scale_too_large_is_named_by_its_row_in_the_whole_weight() -> None:
    large = weight()
    large[33, 2] = 1e20
    with pytest.raises(ScaleError, match="in row 133 is beyond float16's largest"):
        encode_blocks(large, FP6, lambda start, block: None, first_row=100, block_elements=48)
