"""Gradients on a GPU: slices decoded by the kernel, autocast, compilation, and a LoRA training that lowers the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny-lm"


def layer(oc: int, ic: int, name: str, group: int | None, dtype: torch.dtype) -> Any:
    from tersor.compress import quantize_rtn
    from tersor.formats import get_scheme
    from tersor.layouts import PackedWeight
    from tersor.nn import PackedLinear

    values = torch.randn(oc, ic, device="cuda", generator=torch.Generator("cuda").manual_seed(oc))
    weight = PackedWeight.from_encoded(quantize_rtn(values, get_scheme(name, group)))
    made = PackedLinear.from_packed(weight, torch.randn(oc, device="cuda", dtype=dtype), dtype)
    made.prepare(dtype)
    return made


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("name", "group", "shape"),
    [
        ("fp6_e3m2", None, (256, 512)),
        ("fp6_e3m2", None, (9000, 4096)),
        ("int4", 64, (200, 384)),
        ("uint4", 32, (136, 640)),
        ("uint8", None, (72, 256)),
        ("mxfp6_e2m3", None, (328, 1024)),
    ],
    ids=str,
)
def test_gradients_are_those_of_a_plain_linear(
    name: str, group: int | None, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    packed = layer(*shape, name, group, dtype)
    packed.bias.requires_grad_()
    x = torch.randn(2, 5, shape[1], device="cuda", dtype=dtype, requires_grad=True)
    above = torch.randn(2, 5, shape[0], device="cuda", dtype=dtype)
    found = torch.autograd.grad(packed(x), (x, packed.bias), above)
    weight = packed.packed_weight().dequantize(torch.float64)
    expected = above.double() @ weight
    scale = float(expected.abs().max())
    exact = {torch.float16: 2e-3, torch.bfloat16: 1.5e-2, torch.float32: 2e-3}[dtype]
    assert float((found[0].double() - expected).abs().max()) < exact * scale
    torch.testing.assert_close(found[1].double(), above.double().sum((0, 1)), rtol=2e-2, atol=5e-2)


def test_decoding_for_a_gradient_takes_bounded_memory() -> None:
    packed = layer(16384, 8192, "fp6_e3m2", None, torch.float16)
    x = torch.randn(4, 8192, device="cuda", dtype=torch.float16, requires_grad=True)
    y = packed(x)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y.sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 100 << 20  # the decoded weight is 256 MB


def test_a_gated_linear_has_the_gradient_of_its_definition() -> None:
    from tersor import ops
    from tersor.layouts import PackedWeight

    parts = [layer(200, 256, "fp6_e3m2", None, torch.float16).packed_weight() for _ in range(2)]
    weight = PackedWeight.gate_up(*parts).to_layout(parts[0].layout)
    x = torch.randn(3, 256, device="cuda", dtype=torch.float16, requires_grad=True)
    wide = x.detach().double().requires_grad_()
    gate, up = (part.dequantize(torch.float64) for part in parts)
    (torch.nn.functional.silu(wide @ gate.T) * (wide @ up.T)).sum().backward()
    ops.gated_linear(x, weight).sum().backward()
    assert x.grad is not None and wide.grad is not None
    assert float((x.grad.double() - wide.grad).abs().max()) < 5e-3 * float(wide.grad.abs().max())


def test_eight_bit_activations_pass_gradients_straight_through() -> None:
    packed = layer(256, 512, "fp6_e3m2", None, torch.float16)
    packed.multiply_with("fp8")
    x = torch.randn(80, 512, device="cuda", dtype=torch.float16, requires_grad=True)
    above = torch.randn(80, 256, device="cuda", dtype=torch.float16)
    (found,) = torch.autograd.grad(packed(x), x, above)
    expected = above.float() @ packed.packed_weight().dequantize()
    assert float((found.float() - expected).abs().max()) < 2e-3 * float(expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_takes_the_kernels_of_its_dtype(dtype: torch.dtype) -> None:
    packed = layer(256, 512, "fp6_e3m2", None, torch.float32)
    x = torch.randn(4, 512, device="cuda", requires_grad=True)
    with torch.autocast("cuda", dtype=dtype):
        y = packed(x)
    assert y.dtype == dtype and packed.layout == f"tiles_{str(dtype).removeprefix('torch.')}"
    y.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    expected = packed.packed_weight().dequantize().sum(0)
    assert float((x.grad - expected).abs().max()) < 2e-2 * float(expected.abs().max())


def test_compiled_gradients_are_the_eager_ones() -> None:
    packed = layer(256, 512, "fp6_e3m2", None, torch.float16)
    x = torch.randn(4, 512, device="cuda", dtype=torch.float16, requires_grad=True)
    (eager,) = torch.autograd.grad(packed(x).float().square().sum(), x)
    compiled = torch.compile(packed, fullgraph=True)
    (found,) = torch.autograd.grad(compiled(x).float().square().sum(), x)
    torch.testing.assert_close(found, eager, rtol=1e-2, atol=1e-1)


@pytest.mark.parametrize("fused", [False, True])
def test_lora_training_lowers_the_loss(fused: bool) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    import tersor
    from tersor.integrations.transformers import fuse

    model = AutoModelForCausalLM.from_pretrained(
        TINY, quantization_config=tersor.TersorConfig(), dtype=torch.bfloat16, device_map="cuda"
    )
    if fused:
        assert fuse.fuse(model)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear")).train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=5e-3)
    ids = torch.arange(64, device="cuda").view(2, 32) * 7 % 500
    losses = []
    for _ in range(8):
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 1
    adapted.eval()
    with torch.no_grad():
        trained = adapted(ids).logits.float()
        merged = adapted.merge_and_unload()(ids).logits.float()
    assert float((merged - trained).abs().max()) < 0.05 * float(trained.abs().max())
