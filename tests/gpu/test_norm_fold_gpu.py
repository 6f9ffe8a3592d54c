"""Norms in the products around them on a GPU: every tile and every way to split, against float64 and plain products."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import pytest
import torch

from tersor import formats, hardware, ops
from tersor.compress import Encoded
from tersor.kernels import dense as family
from tersor.kernels import jit, tune
from tersor.kernels.dense import Norm
from tersor.kernels.tune import MOST_NORMED, sm90
from tersor.layouts import PackedWeight
from tersor.layouts.gated import gated_rows, separate
from tersor.layouts.packing import Packing, scales_in_block
from tersor.models.config import DecoderConfig
from tersor.models.random import random_decoder
from tersor.ops import current, fold, prepared

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs compute capability 9.0"
)

DTYPES = (torch.float16, torch.bfloat16)
TILES = [tile for tile in sm90.tiles(0) if tile.tokens <= MOST_NORMED]
CHANNELS, INNER = 456, 1032
REPEATS = 20


def random_weight(oc: int, ic: int, name: str, dtype: torch.dtype, group: int | None = None) -> PackedWeight:
    """A weight of random codes and scales in its kernels' layout, such that sums of random activations are about 1."""
    scheme, generator = formats.get_scheme(name, group), torch.Generator().manual_seed(oc)
    codes = torch.randint(0, 1 << scheme.format.bits, (oc, ic), dtype=torch.uint8, generator=generator)
    wanted = (torch.rand(oc, scheme.groups(ic), generator=generator) + 0.5) / (scheme.format.max * ic**0.5)
    weight = PackedWeight.from_encoded(Encoded(scheme, codes, formats.store_scales(wanted, scheme), None, 0.0, 0.0))
    weight = PackedWeight(scheme, (oc, ic), weight.data.cuda(), weight.scale.cuda())
    return weight.to_layout(ops.preferred_layout(scheme, dtype, weight.data.device))


def tokens(n: int, channels: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, channels, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def norm_of(channels: int, dtype: torch.dtype) -> ops.FoldedNorm:
    """A norm with weights of either sign, some above 1."""
    return ops.FoldedNorm.of(tokens(1, channels, dtype, 9)[0], 1e-5)


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Leave no prepared call behind."""
    yield
    prepared.forget()


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill all new memory with NaN."""
    empty = current.empty
    monkeypatch.setattr(current, "empty", lambda size, stride, dtype: empty(size, stride, dtype).fill_(torch.nan))


def configs(weight: PackedWeight, n: int, tile: sm90.Tile) -> Iterator[tune.LinearConfig]:
    """Yield configurations of a tile: whole, split through memory or a cluster, with CTAs of one item or several."""
    chip = hardware.of_device(0)
    problem = family.problem_of(weight.scheme, weight.shape, n)
    count = -(-weight.shape[0] // tile.rows)
    for splits, ctas in ((1, count), (1, 2), (2, 2 * count), (3, 2)):
        yield sm90.config(problem, tile, 0, splits, min(ctas, count * splits), chip)
    for splits in range(2, tile.gathered + 1):
        yield sm90.config(problem, tile, 0, splits, splits * count, chip, True)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize(("name", "group", "dtype"), [("fp6_e3m2", None, DTYPES[0]), ("int4", 128, DTYPES[1])])
def test_every_tile_has_the_norm_behind_in_every_part(
    tile: sm90.Tile, name: str, group: int | None, dtype: torch.dtype
) -> None:
    if tile not in sm90.tiles(scales_in_block(group)):
        pytest.skip("not a tile for scales in groups")
    inner = 1024 if group else INNER
    weight, norm = random_weight(CHANNELS, inner, name, dtype, group), norm_of(CHANNELS, dtype)
    bias = tokens(1, CHANNELS, dtype, 5)[0]
    for n in (1, tile.tokens - 3, tile.tokens):
        x, residual = tokens(n, inner, dtype), tokens(n, CHANNELS, dtype, 3)
        for config, (added, shift) in itertools.product(configs(weight, n, tile), ((residual, bias), (None, None))):
            with ops.using(config=config):
                assert fold._prepared(x, weight, False, Norm.OUT) is not None
                plain = ops.linear(x, weight, shift, residual=added)
                first, *others = (ops.linear_norm_out(x, weight, norm, shift, residual=added) for _ in range(REPEATS))
            y, scaled, squares = first.x, first.scaled, first.squares
            assert torch.equal(y, plain), config
            assert torch.equal(scaled, (y.float() * norm.weight).to(dtype)), config
            exact = torch.nn.functional.pad(y.double().square(), (0, -CHANNELS % 64)).unflatten(1, (-1, 64)).sum(-1)
            torch.testing.assert_close(squares.double(), exact, rtol=1e-5, atol=0)
            for other in others:
                assert torch.equal(other.x, y) and torch.equal(other.scaled, scaled), config
                assert torch.equal(other.squares, squares), config


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tile_divides_by_the_norm_ahead_in_every_part(tile: sm90.Tile, gated: bool, dtype: torch.dtype) -> None:
    channels, inner = gated_rows(CHANNELS // 2), 2888
    weight, norm = random_weight(channels, inner, "fp6_e3m2", dtype), norm_of(inner, dtype)
    matrix = weight.to_layout("stream").dequantize().double()
    bias = tokens(1, channels, dtype, 5)[0]
    for n in (1, tile.tokens - 3, tile.tokens):
        x = tokens(n, inner, dtype) * torch.linspace(0.1, 20, n, device="cuda").to(dtype)[:, None]
        nothing = random_weight(inner, 64, "fp6_e3m2", dtype)
        rows = ops.linear_norm_out(torch.zeros(n, 64, dtype=dtype, device="cuda"), nothing, norm, residual=x)
        assert torch.equal(rows.x, x)
        given = rows.scaled.double() * rows.factors.double()
        exact, allowed = given @ matrix.T + bias.double(), formats.product_tolerance(given, matrix, dtype)
        allowed += bias.abs().double() * torch.finfo(dtype).eps
        if gated:
            (gate, up), (error, other) = separate(exact.T), separate(allowed.T)
            exact = (torch.nn.functional.silu(gate) * up).T
            allowed = (1.1 * error * (up.abs() + other) + other * gate.abs()).T
            allowed += exact.abs() * torch.finfo(dtype).eps + torch.finfo(dtype).smallest_normal
        for config in configs(weight, n, tile):
            with ops.using(config=config):
                assert fold._prepared(x, weight, gated, Norm.IN) is not None
                first, *others = (ops.linear_norm_in(rows, weight, bias, gate=int(gated)) for _ in range(REPEATS))
            worst = float(((first.double() - exact).abs() / allowed).max())
            assert worst <= 1, f"{n} tokens, {config}: error is {worst:.2f} of what is allowed"
            assert all(torch.equal(first, other) for other in others), config


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_few_tokens_go_from_product_to_product_in_a_graph(dtype: torch.dtype) -> None:
    """Each kernel starts before the one ahead has ended; the norm's own kernel gives the same up to rounding."""
    first, second = random_weight(2048, 1024, "fp6_e3m2", dtype), random_weight(1024, 2048, "fp6_e3m2", dtype)
    weight, residual = tokens(1, 2048, dtype, 9)[0], tokens(MOST_NORMED, 2048, dtype, 4)
    norm, sources = ops.FoldedNorm.of(weight, 1e-5), set()
    for n in range(1, MOST_NORMED + 1):
        for packed, kind in ((first, Norm.OUT), (second, Norm.IN)):
            problem = family.problem_of(packed.scheme, packed.shape, n)
            config, target = tune.choose_normed(problem, hardware.of_device(0)), str(dtype).removeprefix("torch.")
            assert config is not None
            sources.add(family.fused_source(Packing.of(packed.scheme, target), target, config, norm=kind))
    jit.compile_many(list(sources), jit.arch_for((9, 0)), os.cpu_count())
    for n in range(1, MOST_NORMED + 1):
        x, added = tokens(n, 1024, dtype, n), residual[:n]
        assert ops.folds_norm(x, first, second)

        def chain(x: torch.Tensor = x, added: torch.Tensor = added) -> torch.Tensor:
            for _ in range(4):
                rows = ops.linear_norm_out(x, first, norm, residual=added)
                added, x = rows.x, ops.linear_norm_in(rows, second)
            return x

        plain, stream = x, added
        for _ in range(4):
            stream = ops.linear(plain, first, residual=stream)
            plain = ops.linear(ops.rms_norm(stream, weight, 1e-5), second)
        expected = chain()
        torch.testing.assert_close(
            expected.float(), plain.float(), rtol=0, atol=8 * torch.finfo(dtype).eps * float(plain.abs().max())
        )
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = chain()
        for _ in range(5):
            y.fill_(torch.nan)
            graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, expected), n


SMALL = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_decoders_logits_are_those_of_norms_that_are_kernels(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = random_decoder(DecoderConfig.from_dict(SMALL), formats.get_scheme("fp6_e3m2"), "cuda", dtype)
    text = torch.randint(0, 512, (40,), device="cuda")
    row = torch.tensor([0, 40], dtype=torch.int32, device="cuda")
    rows = ops.Rows(row, row[1:], torch.zeros(1, 1, dtype=torch.int32, device="cuda"), 40, 40)
    normed: list[torch.Tensor] = []
    norm = ops.rms_norm
    monkeypatch.setattr(ops, "rms_norm", lambda x, *rest, **more: normed.append(x) or norm(x, *rest, **more))

    def logits() -> torch.Tensor:
        normed.clear()
        with torch.inference_mode():
            return decoder(text, rows, decoder.caches(1), torch.arange(40, device="cuda")).float()

    folded = logits()
    assert len(normed) == 2  # behind the embedding and ahead of the head
    with ops.using(fold_norms=False):
        plain = logits()
    assert len(normed) == 9
    allowed = 8 * torch.finfo(dtype).eps * plain.square().mean().sqrt()
    assert (folded - plain).square().mean().sqrt() <= allowed
