"""experts/router.cuh on a CPU, as C++: logits of a router beside whatever other tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.emulated import COMPILER, Emulated

from tersor import ops
from tersor.kernels import routing
from tersor.kernels.routing import Router

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
EXPERTS = 7


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
