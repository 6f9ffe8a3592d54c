"""Checkpoints that others compressed, compressed again on a GPU: to the bytes of the CPU, and run there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import checkpoints, released
from transformers import AutoModelForCausalLM

from tersor.convert import quantize
from tersor.nn import PackedLinear

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("case", released.CASES)
def test_the_bytes_are_those_of_the_cpu(case: str, tmp_path: Path) -> None:
    settings, compress = released.CASES[case]
    packed, _ = released.save(tmp_path, settings, compress)
    on_gpu = quantize(packed, tmp_path / "cuda", device="cuda")
    on_cpu = quantize(packed, tmp_path / "cpu")
    assert checkpoints.bytes_of(tmp_path / "cuda") == checkpoints.bytes_of(tmp_path / "cpu")
    assert on_gpu.source_method == on_cpu.source_method != ""


@pytest.mark.parametrize("case", ["fp8 blocks", "gptq 4", "nf4 nested"])
def test_the_model_computes_there_what_the_cpu_computes(case: str, tmp_path: Path) -> None:
    settings, compress = released.CASES[case]
    packed, _ = released.save(tmp_path, settings, compress)
    quantize(packed, tmp_path / "out", device="cuda")
    ids = torch.randint(2, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        here = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        wanted = here(ids).logits
        there = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float16).cuda()
        found = there(ids.cuda()).logits.float().cpu()
    assert sum(isinstance(module, PackedLinear) for module in there.modules()) == 14
    assert float((found - wanted).norm()) <= 2e-2 * float(wanted.norm())  # of float16's rounding, layer after layer
