"""What one launch decides ahead of experts: experts/decide.cuh on a CPU as C++, and what a GPU is handed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import decoders
from helpers.emulated import COMPILER, Emulated
from helpers.fakes import FakeGpu, pretended
from helpers.small_decoders import config_of

from tersor import ops
from tersor.compress.rtn import quantize_rtn
from tersor.errors import ShapeError
from tersor.formats import get_scheme
from tersor.kernels import deciding, norms, routing
from tersor.kernels.deciding import Decider
from tersor.kernels.routing import Choice, Router
from tersor.layouts import PackedWeight, StackedWeight
from tersor.models.config import Experts, Norm
from tersor.models.mixture import Mixture
from tersor.models.norm import NormWeights, gain_of
from tersor.models.random import random_decoder
from tersor.models.weights import Product
from tersor.ops import routing_reference, serve_routing
from tersor.ops.tables import Tables, elements

BLOCK = 8
NORM: dict[str, Any] = {"eps": 1e-5, "offset": 1.0, "sms": 132, "sm_threads": 2048}

gpu = pretended("NVIDIA H200")
"""Tensors of the CPU pass for those of an H200, or of the chip a test names."""

GROUPED = Choice(experts=24, top_k=3, sigmoid=True, biased=True, groups=4, top_groups=2)
CASES: dict[str, tuple[Decider, torch.dtype, tuple[int, ...]]] = {
    "normed": (
        Decider(
            router=Router(target="bfloat16", float_weight=False, float_out=False, channels=2120),
            choice=Choice(experts=33, top_k=4),
            norms=True,
        ),
        torch.bfloat16,
        (1, 11),
    ),
    "wide, in groups": (
        Decider(
            router=Router(target="float16", float_weight=True, float_out=True, channels=72), choice=GROUPED, norms=False
        ),
        torch.float16,
        (13,),
    ),
}


def addresses(**tensors: torch.Tensor | None) -> dict[str, int]:
    return {name: 0 if one is None else one.data_ptr() for name, one in tensors.items()}


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("name", CASES)
def test_one_launch_gives_the_bits_of_three_and_leaves_its_words_zero(name: str, tmp_path: Path) -> None:
    decider, dtype, counts = CASES[name]
    router, choice = decider.router, decider.choice
    generator = torch.Generator().manual_seed(1)
    held = torch.float32 if router.float_weight else dtype
    made = torch.float32 if router.float_out else dtype
    weight = (torch.randn(choice.experts, router.channels, generator=generator) / router.channels**0.5).to(held)
    weight[choice.experts // 2] = weight[3]  # equal logits
    bias = torch.randn(choice.experts, generator=generator).to(held) if decider.norms else None
    preferred = torch.randn(choice.experts, generator=generator) if choice.biased else None
    gain = torch.randn(router.channels, generator=generator).to(dtype) if decider.norms else None
    words = torch.zeros(19 * choice.experts, dtype=torch.int32)
    for tokens in counts:
        x = 3 * torch.randn(tokens, router.channels, generator=generator).to(dtype)
        x[-1, 0] = torch.nan if tokens == 11 else -0.0
        numbers: dict[str, Any] = {"tokens": tokens, "block_tokens": BLOCK, "scale": 2.5}
        found = results(tokens, choice, dtype, router.channels)
        launch = deciding.prepare(
            Emulated(deciding.source(decider, tokens), tmp_path, 900),  # type: ignore[arg-type]
            decider,
            **numbers,
            eps=1e-5,
            offset=1.0,
        )
        normed, chosen, factors, memory = found
        order, position, blocks = Tables(memory, tokens * choice.top_k, choice.experts, BLOCK).addresses
        tables = {"order": order, "position": position, "blocks": blocks}
        given = addresses(x=x, weight=weight, bias=bias, preferred=preferred, gain=gain, normed=normed, index=chosen)
        launch(stream=0, **given, **addresses(weights=factors, logits=words), **tables, ready=True, early=True)
        expected = results(tokens, choice, dtype, router.channels)
        rows = x
        if gain is not None:
            norm = Emulated(norms.norm_source(router.target, False, router.channels), tmp_path, 900)
            run = norms.prepare_norm(norm, rows=tokens, channels=router.channels, **NORM)  # type: ignore[arg-type]
            rows = expected[0]
            beside = addresses(weight=gain, bias=None, residual=None, out=rows)
            strides = {"stride": router.channels, "out_stride": router.channels}
            run(stream=0, x=x.data_ptr(), **strides, **beside, ready=True, early=True)
        logits = torch.full((tokens, choice.experts), torch.nan, dtype=made)
        product = Emulated(routing.router_source(router, tokens), tmp_path, 900)
        run = routing.prepare_router(product, router, tokens=tokens, experts=choice.experts)  # type: ignore[arg-type]
        run(stream=0, **addresses(x=rows, weight=weight, bias=bias, out=logits), ready=True, early=True)
        index, weights, sorted_by = serve_routing.route(logits, preferred, choice, 2.5, BLOCK)
        assert sorted_by is not None
        assert torch.equal(normed.view(torch.int16), expected[0].view(torch.int16))
        assert torch.equal(chosen, index)
        torch.testing.assert_close(factors, weights, rtol=2e-6, atol=1e-12, equal_nan=True)
        count = int(Tables(sorted_by, tokens * choice.top_k, choice.experts, BLOCK).blocks[0, 0])
        end = len(memory) - len(Tables(memory, tokens * choice.top_k, choice.experts, BLOCK).blocks.view(-1))
        written = end + 4 * (count + 1)
        pairs = 2 * tokens * choice.top_k
        assert torch.equal(memory[:pairs], sorted_by[:pairs]) and (memory[written:] == -7).all()
        assert torch.equal(memory[end:written], sorted_by[end:written])
        assert not words.any()


def results(
    tokens: int, choice: Choice, dtype: torch.dtype, channels: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Poisoned memory for normed rows, index, weights and tables."""
    memory = torch.full((elements(tokens * choice.top_k, choice.experts, BLOCK),), -7, dtype=torch.int32)
    index = torch.full((tokens, choice.top_k), -7, dtype=torch.int32)
    return torch.full((tokens, channels), 7.0, dtype=dtype), index, torch.full(index.shape, torch.nan), memory


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_a_sum_that_is_normed_has_the_bits_of_two_launches(tmp_path: Path) -> None:
    tokens, top_k, channels, dtype, target = 2, 9, 4104, torch.bfloat16, "bfloat16"
    generator = torch.Generator().manual_seed(0)
    index = torch.tensor([*range(top_k - 1), 99, *range(top_k)], dtype=torch.int32).view(tokens, top_k)
    tables = routing_of(index, 16)
    y = torch.randn(tokens * top_k, channels, generator=generator).to(dtype)
    y[-1] = torch.nan  # of the pair without an expert
    weights = torch.rand(tokens, top_k, generator=generator)
    gain = torch.randn(channels, generator=generator).to(dtype)
    addends = torch.randn(tokens, channels, generator=generator).to(dtype)
    _, position, blocks = tables.addresses
    sizes = {"tokens": tokens, "top_k": top_k, "channels": channels}
    once = deciding.prepare_combine(
        Emulated(deciding.combine_source(target, channels), tmp_path, 900),  # type: ignore[arg-type]
        **sizes,
        eps=1e-5,
        offset=1.0,
    )
    combine = Emulated(routing.combine_source(target), tmp_path, 900)
    first = routing.prepare_combine(combine, **sizes, aligned=True)  # type: ignore[arg-type]
    norm = Emulated(norms.norm_source(target, False, channels), tmp_path, 900)
    second = norms.prepare_norm(norm, rows=tokens, channels=channels, **NORM)  # type: ignore[arg-type]
    for addend in (None, addends):
        out, normed, expected, expected_normed = (torch.full_like(addends, 7.0) for _ in range(4))
        given: dict[str, Any] = {"stream": 0, **addresses(y=y, weights=weights, addend=addend), "ready": True}
        given |= {"position": position, "blocks": blocks, "early": True}
        once(**given, **addresses(gain=gain, out=out, normed=normed))
        first(**given, **addresses(out=expected))
        places = addresses(x=expected, weight=gain, bias=None, residual=None, out=expected_normed)
        second(stream=0, stride=channels, out_stride=channels, **places, ready=True, early=True)
        assert torch.equal(out, expected) and out.isfinite().all()
        assert torch.equal(normed.view(torch.int16), expected_normed.view(torch.int16))


def routing_of(index: torch.Tensor, experts: int) -> Tables:
    return Tables(routing_reference.tables(index, experts, BLOCK), index.numel(), experts, BLOCK)


def layer(dtype: torch.dtype, experts: int = 4, hidden: int = 64, inner: int = 40) -> Mixture:
    """Packed experts behind a plain router, in the layout of a GPU."""
    scheme = get_scheme("fp6_e3m2")

    def stacked(rows: int, ic: int) -> StackedWeight:
        weights = [quantize_rtn(torch.randn(rows, ic) / ic**0.5, scheme) for _ in range(experts)]
        return StackedWeight.stack([PackedWeight.from_encoded(weight) for weight in weights])

    layout = f"tiles_{str(dtype).removeprefix('torch.')}"
    gate_up = StackedWeight.gate_up(stacked(inner, hidden), stacked(inner, hidden)).to_layout(layout)
    form = Experts(count=experts, top_k=2, ffn=inner)
    router = Product(torch.randn(experts, hidden).to(dtype))
    return Mixture(form, ops.Gate.SILU, router, gate_up, stacked(hidden, inner).to_layout(layout))


def norm_of(hidden: int, dtype: torch.dtype, centered: bool = False) -> NormWeights:
    return NormWeights(Norm(eps=1e-6, offset=0.5, centered=centered), torch.ones(hidden, dtype=dtype))


def test_experts_of_few_tokens_are_four_launches_with_the_norms_around_them(gpu: FakeGpu) -> None:
    torch.manual_seed(0)
    mixture, around = layer(torch.float16), (norm_of(64, torch.float16), norm_of(64, torch.float16))
    x = torch.randn(6, 64).half()
    for settled in (False, True):
        gpu.launches.clear()
        y = mixture(x, residual=x, norm=around[0], behind=gain_of(around[1]))
        first, *_, last = gpu.launches
        assert isinstance(y, ops.Normed) and len(gpu.launches) == 4 and first.programmatic and last.programmatic
        assert first.kernel == "tersor_decide_norm_softmax_float16_float16_2_of_4_1_4x2"
        assert (first["x"], first["gain"], first["weight"]) == (
            x.data_ptr(),
            around[0].weight.data_ptr(),
            mixture.router.weight.data_ptr(),  # type: ignore[union-attr]
        )
        assert (first["tokens"], first["channels"], first["eps"]) == (6, 64, pytest.approx(1e-6))
        assert first.grid == (4, 1, 1) and first.block == (6 * 32, 1, 1)  # one CTA for each 4 x 2, and one that chooses
        assert any(start <= first["logits"] < start + size for start, (_, size) in gpu.memory.items())
        assert (last["addend"], last["gain"]) == (x.data_ptr(), around[1].weight.data_ptr())
        assert (last["out"], last["normed"], last["offset"]) == (y.x.data_ptr(), y.y.data_ptr(), 0.5)
        assert (last["weights"], last["position"]) == (first["weights"], first["position"])
        assert bool(first["ready"]) == bool(last["ready"]) == settled


@pytest.mark.parametrize(
    ("tokens", "way", "launches"),
    [
        (deciding.MOST_TOKENS, {}, 4),
        (deciding.MOST_TOKENS + 1, {}, 6),
        (3, {"reference": True}, 0),
        (3, {"batch_invariant": True}, 5),  # tokens are put in order first
    ],
)
def test_what_no_launch_decides_goes_one_way_after_the_other(
    tokens: int, way: dict[str, bool], launches: int, gpu: FakeGpu
) -> None:
    torch.manual_seed(0)
    mixture, norm = layer(torch.float16), norm_of(64, torch.float16)
    with ops.using(**way):
        mixture(torch.randn(tokens, 64).half(), norm=norm, behind=gain_of(norm))
    kernels = [one.kernel for one in gpu.launches]
    assert len(kernels) == launches and kernels.count("tersor_rms_norm_float16_1") == (launches == 6)
    assert [name for name in kernels if "_decide_" in name] == kernels[:1] * (launches in (4, 5))


def test_a_layer_norm_goes_ahead_of_what_decides_and_a_packed_router_decides_nothing(gpu: FakeGpu) -> None:
    torch.manual_seed(0)
    mixture, norm = layer(torch.float16), norm_of(64, torch.float16, centered=True)
    x = torch.randn(2, 64).half()
    assert isinstance(mixture(x, norm=norm, behind=gain_of(norm)), torch.Tensor)
    assert [one.kernel.split("_")[1] for one in gpu.launches][:2] == ["layer", "decide"]
    assert gpu.launches[1]["gain"] == 0 and gpu.launches[1]["x"] == gpu.launches[0]["out"]
    with pytest.raises(ShapeError, match=r"^router_logits: weight is \[4, 64\] torch.float32"):
        ops.decide(x, (torch.zeros(4, 64), None), (mixture.gate_up, mixture.down), 2)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["qwen3-moe", "deepseek-v3"])
def test_a_decoder_has_each_norm_once_whoever_computes_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = random_decoder(config_of(name), get_scheme("fp6_e3m2"), "cpu", torch.float32)
    generator = torch.Generator().manual_seed(0)
    for one in (norm.weight for layer in decoder.layers for norm in layer.norms):
        one.copy_(torch.randn(len(one), generator=generator))
    texts = decoders.texts(256)
    expected = torch.cat(decoders.logits(decoder, texts))
    calls: list[bool] = []

    def decide(
        x: torch.Tensor,
        router: tuple[torch.Tensor, torch.Tensor | None],
        experts: Any,
        top_k: int,
        *,
        norm: ops.Gain,
        gate: ops.Gate,
        wide: bool,
        **choice: Any,
    ) -> ops.Decision:
        rows = ops.rms_norm(x, norm.weight, norm.eps, offset=norm.offset)
        index, weights = ops.route(ops.router_logits(rows, *router, wide=wide), top_k, **choice)
        return ops.Decision(rows, index, weights, None, gate)  # type: ignore[arg-type]

    def decided(found: ops.Decision, *stacks: Any, behind: ops.Gain | None, **beside: Any) -> Any:
        calls.append(behind is not None)
        y = ops.experts(found.x, *stacks, found.index, found.weights, gate=found.chosen, **beside)  # type: ignore[arg-type]
        return y if behind is None else ops.Normed(y, ops.rms_norm(y, behind.weight, behind.eps, offset=behind.offset))

    monkeypatch.setattr(ops, "decide", decide)
    monkeypatch.setattr(ops, "decided_experts", decided)
    assert torch.equal(torch.cat(decoders.logits(decoder, texts)), expected)
    mixtures = sum(isinstance(layer.ffn, Mixture) for layer in decoder.layers)
    assert calls and calls.count(False) * mixtures == len(calls)  # the last layer's alone is not normed


@pytest.mark.parametrize("gpu", ["NVIDIA A100"], indirect=True)
def test_older_gpus_decide_in_one_launch_that_is_not_programmatic(gpu: FakeGpu) -> None:
    torch.manual_seed(0)
    norm = norm_of(64, torch.float16)
    layer(torch.float16)(torch.randn(2, 64).half(), norm=norm, behind=gain_of(norm))
    assert [one.kernel.split("_")[1] for one in gpu.launches] == ["decide", "experts", "experts", "combine"]
    assert not gpu.launches[0].programmatic and not gpu.last.programmatic
