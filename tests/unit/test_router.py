"""The logits of a router: by torch, by experts/router.cuh on a CPU as C++, and what a GPU is handed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import checkpoints
from helpers.emulated import COMPILER, Emulated
from helpers.fakes import FakeGpu, pretended
from safetensors.torch import load_file, save_file

from tersor import models, ops
from tersor.errors import ShapeError
from tersor.kernels import routing
from tersor.kernels.routing import Router
from tersor.models.mixture import Mixture

EXPERTS = 7

gpu = pretended("NVIDIA H200")
"""Tensors of the CPU pass for those of an H200, or of the chip a test names."""


def served(
    router: Router, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, folder: Path
) -> torch.Tensor:
    """What the kernel makes of a call, over NaN."""
    out = torch.full((len(x), len(weight)), torch.nan, dtype=torch.float32 if router.float_out else x.dtype)
    function = Emulated(routing.router_source(router, len(x)), folder, 900)
    launch = routing.prepare_router(function, router, tokens=len(x), experts=len(weight))  # type: ignore[arg-type]
    addresses = {"x": x.data_ptr(), "weight": weight.data_ptr(), "bias": 0 if bias is None else bias.data_ptr()}
    launch(stream=0, **addresses, out=out.data_ptr(), ready=True, early=True)
    return out


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("dtype", "wide", "channels", "few"), [(torch.bfloat16, False, 2880, (1, 6)), (torch.float16, True, 4104, (1,))]
)
def test_logits_are_those_of_torch_and_have_the_same_bits_beside_any_others(
    dtype: torch.dtype, wide: bool, channels: int, few: tuple[int, ...], tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(channels)
    x = torch.randn(19, channels, generator=generator).to(dtype)
    held = torch.float32 if wide else dtype
    weight = (torch.randn(EXPERTS, channels, generator=generator) / channels**0.5).to(held)
    bias = None if wide else torch.randn(EXPERTS, generator=generator).to(held)
    target = str(dtype).removeprefix("torch.")
    router = Router(target=target, float_weight=wide, float_out=wide, channels=channels)
    together = served(router, x, weight, bias, tmp_path)
    expected = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    assert together.dtype == ops.router_logits(x, weight, bias, wide=wide).dtype
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if wide else {"rtol": torch.finfo(dtype).eps, "atol": 1e-5}
    torch.testing.assert_close(together.double(), expected, **tolerance)
    for tokens in few:
        assert torch.equal(served(router, x[:tokens], weight, bias, tmp_path), together[:tokens]), tokens


def test_a_cta_has_more_experts_before_it_has_more_tokens_and_no_more_than_registers_hold() -> None:
    few = Router(target="bfloat16", float_weight=False, float_out=False, channels=2048)
    assert [few.share(tokens) for tokens in (1, 2, 3, 4, 5, 8, 16, 17, 64)] == [
        *((1, 1), (2, 1), (4, 1), (4, 1)),
        *((4, 2), (4, 2), (4, 4), (4, 8), (4, 8)),
    ]
    many = Router(target="bfloat16", float_weight=True, float_out=True, channels=routing.MOST_ROUTER_CHANNELS)
    assert [many.share(tokens) for tokens in (1, 4, 8, 64)] == [(1, 1), (1, 1), (1, 2), (1, 8)]
    assert many.pieces == 8 and few.pieces == 1


def test_logits_without_a_kernel_are_torchs_and_wide_ones_are_not_rounded() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(5, 64, generator=generator).bfloat16(), torch.randn(6, 64, generator=generator).bfloat16()
    bias = torch.randn(6, generator=generator).bfloat16()
    assert torch.equal(ops.router_logits(x, weight, bias), torch.nn.functional.linear(x, weight, bias))
    expected = torch.nn.functional.linear(x.float(), weight.float(), bias.float())
    for held in (torch.bfloat16, torch.float32):
        assert torch.equal(ops.router_logits(x, weight.to(held), bias.to(held), wide=True), expected)
    assert ops.router_logits(x[:0], weight, wide=True).shape == (0, 6)
    wanted = weight.float().requires_grad_()
    ops.router_logits(x.float(), wanted).sum().backward()
    assert wanted.grad is not None and torch.equal(wanted.grad[0], x.float().sum(0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(64)}, r"^router_logits: x is \[64\] torch.float32, expected \[T, H\]"),
        ({"weight": torch.zeros(6, 32)}, r"weight is \[6, 32\] .* on cpu, expected \[E, 64\] torch.float32 on cpu"),
        ({"x": torch.zeros(2, 64).half(), "wide": True}, None),
        ({"x": torch.zeros(2, 64).half()}, r"torch.float32 on cpu, expected \[E, 64\] torch.float16 on cpu"),
        (
            {"weight": torch.zeros(6, 64).half(), "x": torch.zeros(2, 64).bfloat16(), "wide": True},
            r"expected \[E, 64\] torch.bfloat16 or torch.float32 on cpu",
        ),
        ({"bias": torch.zeros(6).half()}, r"bias is \[6\] torch.float16 on cpu, expected \[6\] torch.float32 on cpu"),
    ],
)
def test_what_does_not_fit_is_one_line_that_names_both_sides(changes: dict[str, Any], message: str | None) -> None:
    given: dict[str, Any] = {"x": torch.zeros(2, 64), "weight": torch.zeros(6, 64), **changes}
    if message is None:
        assert ops.router_logits(**given).dtype == torch.float32
        return
    with pytest.raises(ShapeError, match=message):
        ops.router_logits(**given)


def test_a_gpu_gets_few_tokens_and_torch_many_and_settled_weights_are_read_early(gpu: FakeGpu) -> None:
    x, weight, bias = torch.randn(64, 32).half(), torch.randn(9, 32).half(), torch.randn(9).half()
    for tokens, grid in ((1, (9, 1, 1)), (3, (3, 3, 1)), (64, (3, 8, 1))):
        out = ops.router_logits(x[:tokens], weight, bias)
        launch = gpu.last
        assert (launch["x"], launch["weight"], launch["bias"]) == (x.data_ptr(), weight.data_ptr(), bias.data_ptr())
        assert (launch["out"], out.dtype, out.shape) == (out.data_ptr(), torch.float16, (tokens, 9))
        assert (launch["tokens"], launch["experts"], launch["channels"]) == (tokens, 9, 32)
        assert launch.grid == grid and launch.block == (32, 1, 1) and launch.programmatic
        assert launch["ready"] == (tokens > 1)
    weight.mul_(2)
    assert ops.router_logits(x, weight, wide=True).dtype == torch.float32
    assert gpu.last["ready"] == gpu.last["bias"] == 0
    launches = len(gpu.launches)
    torch.testing.assert_close(ops.router_logits(x.repeat(2, 1), weight)[:64], x @ weight.t())
    with ops.using(batch_invariant=True):
        ops.router_logits(x.repeat(2, 1), weight)
    assert len(gpu.launches) == launches + 1 and gpu.last.grid == (3, 16, 1) and gpu.last["tokens"] == 128
    launches += 1
    with ops.using(reference=True):
        ops.router_logits(x, weight)
    ops.router_logits(x[:, :20].contiguous(), weight[:, :20].contiguous())  # rows do not start on 16 bytes
    assert len(gpu.launches) == launches


@pytest.mark.parametrize("gpu", ["NVIDIA A100"], indirect=True)
def test_older_gpus_have_the_kernel_without_programmatic_launches(gpu: FakeGpu) -> None:
    ops.router_logits(torch.randn(2, 64).half(), torch.randn(6, 64), wide=True)
    assert not gpu.last.programmatic and gpu.last.kernel == "tersor_router_float_float16_float_1_2x1"


@pytest.mark.parametrize(("stored", "held"), [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)])
def test_a_wide_router_stays_in_16_bits_where_it_is_stored_in_the_dtype_of_activations(
    stored: torch.dtype, held: torch.dtype, tmp_path: Path
) -> None:
    path = checkpoints.save("deepseek_v3", tmp_path / "plain")
    tensors = load_file(path / "model.safetensors")
    written = {name: one.to(stored) if name.endswith(".gate.weight") else one for name, one in tensors.items()}
    save_file(written, path / "model.safetensors", {"format": "pt"})
    decoder = models.load(path, "cpu", torch.bfloat16)
    routers = [layer.ffn.router.weight for layer in decoder.layers if isinstance(layer.ffn, Mixture)]
    assert routers and all(isinstance(one, torch.Tensor) and one.dtype == held for one in routers)
