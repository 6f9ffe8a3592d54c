"""Norms and rows of tables on a GPU: kernels against the torch code that defines them, over what was poisoned."""

from __future__ import annotations

import importlib
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.chains import check_chain

from tersor import ops
from tersor.kernels import jit, norms, small
from tersor.ops import current, heads
from tersor.ops.attention_form import Rows
from tersor.ops.heads import LatentHeads

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DTYPES = (torch.float16, torch.bfloat16)
CHANNELS = (8, 256, 264, 2304, 4096, 4104, 5120, 8192, 16384)
TOKENS = (1, 2, 31, 300)
MANY = 2500


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """Compile side by side what the tests below would compile one after the other."""
    names = ("float16", "bfloat16")
    sources = {source for name in names for source in small.sources(name)}
    kinds = itertools.product(names, (False, True), CHANNELS)
    sources |= {norms.norm_source(*kind) for kind in kinds}
    jit.compile_many(list(sources), jit.arch_for(torch.cuda.get_device_capability()), os.cpu_count())


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results lie in memory full of NaN, or of -7."""

    def full(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        poison = torch.nan if dtype.is_floating_point else -7
        return torch.full(size, poison, dtype=dtype, device="cuda").as_strided(size, stride)

    monkeypatch.setattr(current, "empty", full)


def both(call: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel and what the torch code makes of a call."""
    with ops.using(reference=True):
        expected = call()
    return call(), expected


def served(monkeypatch: pytest.MonkeyPatch, name: str) -> list[bool]:
    """Note, for each call of a module of `ops`, whether a kernel served it."""
    asked: list[bool] = []
    module = importlib.import_module(f"tersor.ops.{name}")
    whole = module.kernel_serves

    def noted(*tensors: torch.Tensor | None, **most: Any) -> bool:
        asked.append(whole(*tensors, **most))
        return asked[-1]

    monkeypatch.setattr(module, "kernel_serves", noted)
    return asked


def norms_of(tokens: int, channels: int, dtype: torch.dtype) -> Iterator[Callable[[], torch.Tensor]]:
    """Every kind of norm of one size."""
    generator = torch.Generator(device="cuda").manual_seed(channels + tokens)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", generator=generator).to(dtype)

    x, residual, weight, bias = some(tokens, channels) * 3 + 1, some(tokens, channels), some(channels), some(channels)
    yield lambda: ops.rms_norm(x, weight, 1e-6)
    yield lambda: ops.rms_norm(x, weight, 1e-6, offset=1.0, residual=residual)
    yield lambda: ops.layer_norm(x, weight, bias, 1e-5)
    yield lambda: ops.layer_norm(x, weight, None, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", CHANNELS)
def test_norms_are_those_of_the_torch_code(channels: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = served(monkeypatch, "norm")
    for tokens in TOKENS:
        for call in norms_of(tokens, channels, dtype):
            y, expected = both(call)
            torch.testing.assert_close(y, expected, rtol=torch.finfo(dtype).eps, atol=2e-5)
            assert torch.equal(y, call()), "a launch that is repeated gives other bits"
    assert asked.count(True) == 2 * len(TOKENS) * 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [264, 2304, 4096, 5120, 8192])
def test_a_row_that_is_normalised_has_the_same_bits_alone_and_among_many(channels: int, dtype: torch.dtype) -> None:
    generator = torch.Generator(device="cuda").manual_seed(channels)
    x, residual = (torch.randn(2, MANY, channels, device="cuda", generator=generator) * 3 + 1).to(dtype)
    weight, bias = torch.randn(2, channels, device="cuda", generator=generator).to(dtype)

    def found(first: int, end: int) -> list[torch.Tensor]:
        """Every kind of norm of some rows."""
        own, added = x[first:end], residual[first:end]
        results = [ops.rms_norm(own, weight, 1e-6), ops.rms_norm(own, weight, 1e-6, offset=1.0, residual=added)]
        results += [ops.layer_norm(own, weight, bias, 1e-5), ops.layer_norm(own, weight, None, 1e-5)]
        if torch.cuda.get_device_capability() == (9, 0) and channels % 16 == 0:
            narrow = ops.rms_norm_quantized(own, weight, 1e-6), ops.layer_norm_quantized(own, weight, bias, 1e-5)
            results += [part for one in narrow for part in (one.codes.view(torch.uint8), one.scales)]
        return results

    together = found(0, MANY)
    for first, end in ((0, 1), (1, 2), (MANY // 2, MANY // 2 + 300), (MANY - 1, MANY)):
        for alone, many in zip(found(first, end), together, strict=True):
            assert torch.equal(alone, many[first:end])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("channels", [8, 768, 4096, 16384])
def test_rows_are_those_of_the_torch_code(
    channels: int, index: torch.dtype, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = served(monkeypatch, "lookup")
    generator = torch.Generator(device="cuda").manual_seed(channels)
    table = torch.randn(100, channels, device="cuda", generator=generator).to(dtype)
    learned = torch.randn(80, channels, device="cuda", generator=generator).to(dtype)
    for texts in (1, 7, 300):
        counts = torch.arange(texts) % 3
        lengths = torch.where(counts > 0, counts + torch.arange(texts) % 90, 0).int().cuda()
        starts = torch.cat([torch.zeros(1), counts.cumsum(0)]).int().cuda()
        tokens = int(starts[-1]) + 5  # the last ones are padding
        rows = Rows(starts, lengths, torch.zeros(texts, 1, dtype=torch.int32, device="cuda"), 2, 100)
        ids = torch.randint(-2, 103, (tokens,), device="cuda", generator=generator).to(index)
        for scale in (1.0, 12.5):
            y, expected = both(lambda: ops.lookup(ids, table, scale=scale))  # noqa: B023
            assert torch.equal(y, expected)
            y, expected = both(lambda: ops.lookup(ids, table, scale=scale, positions=learned, first=2, rows=rows))  # noqa: B023
            torch.testing.assert_close(y, expected, rtol=torch.finfo(dtype).eps, atol=0)
        y, expected = both(lambda: ops.gather_rows(table, ids))  # noqa: B023
        assert torch.equal(y, expected)
    assert asked.count(True) == 3 * 5


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_are_those_of_the_torch_code(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = served(monkeypatch, "pointwise")
    generator = torch.Generator(device="cuda").manual_seed(5)
    for tokens, channels in ((1, 16), (3, 4112), (300, 2 * 14336), (2, 256000)):
        x = (torch.randn(tokens, channels, device="cuda", generator=generator) * 6).to(dtype)
        x[0, 1] = torch.nan
        calls = [lambda gate=gate: ops.gated(x, gate) for gate in ops.Gate]  # noqa: B023
        for call in (*calls, lambda: ops.softcap(x, 30.0), lambda: ops.relu(x)):  # noqa: B023
            y, expected = both(call)
            torch.testing.assert_close(y, expected, rtol=torch.finfo(dtype).eps, atol=1e-4, equal_nan=True)
    assert asked.count(True) == 4 * 6
    odd = torch.randn(3, 12, device="cuda").to(dtype)
    assert ops.gated(odd, ops.Gate.SILU).shape == (3, 6) and not asked[-1]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("count", "fixed", "turned", "value"), [(16, 128, 64, 128), (3, 8, 32, 40), (128, 128, 64, 192)]
)
def test_heads_of_latent_vectors_are_those_of_the_torch_code(
    count: int, fixed: int, turned: int, value: int, interleaved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = served(monkeypatch, "heads")
    of = LatentHeads(heads=count, fixed=fixed, turned=turned, value=value, interleaved=interleaved)
    generator = torch.Generator(device="cuda").manual_seed(count)
    for tokens in TOKENS:
        down = torch.randn(tokens, count * of.width + turned + 8, device="cuda", generator=generator).half()
        both_parts = torch.randn(tokens, count * (fixed + value), device="cuda", generator=generator).half()
        queries, turning = down[:, : count * of.width], down[:, count * of.width : -8]
        y, expected = both(lambda: heads.side_by_side(queries, both_parts, turning, of))  # noqa: B023
        assert torch.equal(y, expected)
        mixed = y[:, -count * of.width :]
        y, expected = both(lambda: heads.values_of(mixed, of))  # noqa: B023
        assert torch.equal(y, expected)
    assert asked.count(True) == len(TOKENS) * (1 if value == of.width else 2)


@pytest.mark.parametrize("tokens", [1, 5])
def test_a_norm_reads_rows_that_are_longer(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    down, weight = (
        torch.randn(tokens, 1536 + 512 + 64, device="cuda").bfloat16(),
        torch.ones(512, device="cuda").bfloat16(),
    )
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda self: self if self.is_contiguous() else None)
    inner = down[:, 1536:2048]
    torch.testing.assert_close(
        ops.rms_norm(inner, weight, 1e-6), ops.rms_norm(inner.clone(), weight, 1e-6), rtol=0, atol=0
    )


def test_other_rows_are_served_by_the_torch_code(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = served(monkeypatch, "norm")
    for channels, dtype in ((12, torch.float16), (16392, torch.bfloat16), (64, torch.float32)):
        for call in norms_of(3, channels, dtype):
            y, expected = both(call)
            assert torch.equal(y, expected)
    x = torch.randn(3 * 64 + 1, device="cuda").half()[1:].view(3, 64)  # starts on 2 bytes
    assert ops.rms_norm(x, torch.ones(64, device="cuda").half(), 1e-6).isfinite().all()
    assert not any(asked)


def test_a_chain_that_is_replayed_as_a_graph_is_that_of_launches_that_wait() -> None:
    """Each step reads what the kernel just ahead wrote: a launch that does not wait would show."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    table = torch.randn(64, 2048, device="cuda", generator=generator).bfloat16()
    weight, bias = torch.randn(2, 2048, device="cuda", generator=generator).bfloat16()
    tokens = torch.randint(0, 64, (9,), device="cuda", generator=generator)

    def chain() -> torch.Tensor:
        x = ops.lookup(tokens, table, scale=2.0)
        for _ in range(10):
            y = ops.softcap(ops.relu(ops.rms_norm(x, weight, 1e-6)), 2.0)
            y = ops.gated(torch.cat((y, y), dim=1), ops.Gate.SILU)
            x = ops.rms_norm(ops.layer_norm(y, weight, bias, 1e-5), weight, 1e-6, residual=x)
            x = ops.gather_rows(x, tokens % 9)
        return x

    graph, result = check_chain(chain)
    before = result.clone()
    tokens.copy_((tokens + 1) % 64)
    graph.replay()
    assert torch.equal(result, chain()) and not torch.equal(result, before)


@pytest.mark.parametrize("rows", [1, 7, 300])
def test_tokens_are_resolved_and_kept_as_the_reference_does(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    counts = torch.randint(0, 4, (rows,), generator=generator)
    counts[rows // 2] = 600
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int().cuda()
    total = int(counts.sum()) + 3
    tokens = torch.randint(-rows, 1000, (total,), dtype=torch.int32, generator=generator).cuda()
    newest = torch.randint(0, 9999, (rows + 1,), generator=generator).cuda()
    lengths = torch.randint(1, 5000, (rows,), dtype=torch.int32, generator=generator).cuda()
    places = torch.randint(0, total, (rows + 2,), dtype=torch.int32, generator=generator).cuda()
    (found, drawn), (tokens_expected, drawn_expected) = (
        ops.resolve(tokens, newest, starts, lengths, places),
        reference(lambda: ops.resolve(tokens, newest, starts, lengths, places)),
    )
    assert torch.equal(found, tokens_expected) and torch.equal(drawn, drawn_expected)
    slots = torch.randperm(rows + 1, generator=generator)[:rows].int().cuda()
    results = torch.randint(-1, 9999, (rows,), generator=generator).cuda()
    expected = newest.clone()
    reference(lambda: ops.keep(expected, slots, results))
    ops.keep(newest, slots, results)
    assert torch.equal(newest, expected)


def reference(call: Callable[[], Any]) -> Any:
    """What the torch code makes of a call."""
    with ops.using(reference=True):
        return call()
