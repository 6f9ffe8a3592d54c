"""`tersor eval` on a GPU: logits are compared in the dtype that is served, whose distance to float32 is the floor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tersor import evaluate
from tersor.cli import main
from tersor.convert import quantize
from tersor.evaluate import quality
from tersor.evaluate.predictors import TransformersModel
from tersor.integrations.transformers import load

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny-lm"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("def square(x):\n    return x * x\n\n" * 60, encoding="utf-8")
    return path


@pytest.mark.parametrize("way", ["", "@kv-dtype=auto"], ids=["transformers", "engine"])
def test_six_bits_are_far_above_the_noise_of_the_served_dtype(
    way: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantize(TINY, tmp_path / "packed", format="fp6_e3m2")
    models = [f"{TINY}{way}", f"{tmp_path / 'packed'}{way}", f"{tmp_path / 'packed'}@activations=fp8"]
    options = ["--reference", str(TINY), "--text", str(text), "--window", "128", "--device", "cuda", "--json"]
    assert main.run(["eval", *models, *options]) == 0
    result = json.loads(capsys.readouterr().out)
    floor, (plain, packed, bytewise) = result["noise_floor"], result["models"]
    assert floor["rounding"] == "float32 in place of bfloat16"
    assert plain["kl"] == 0 < floor["kl"] < packed["kl"] / 5 and packed["kl"] < bytewise["kl"]


def test_a_large_vocabulary_is_compared_exactly_and_in_little_memory() -> None:
    generator = torch.Generator("cuda").manual_seed(1)
    logits = torch.randn(512, 128256, generator=generator, device="cuda", dtype=torch.bfloat16)
    other = logits + 0.125 * torch.randn_like(logits)
    targets = torch.randint(0, 128256, (512,), generator=generator, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    means, divergences = quality._compared(other, logits, targets)
    assert torch.cuda.max_memory_allocated() - before < 16 * 8 * quality.CHUNK
    rows = slice(100, 104)
    p, q = (one[rows].cpu().double().log_softmax(-1) for one in (other, logits))
    torch.testing.assert_close(divergences[rows], (q.exp() * (q - p)).sum(-1), rtol=1e-9, atol=1e-12)
    assert means[2] == pytest.approx(float(divergences.mean()), rel=1e-9)


def test_a_model_in_float32_has_the_noise_of_rounded_inputs() -> None:
    model = evaluate.engine_model(TINY, torch.device("cpu"))
    windows = torch.randint(2, 8192, (1, 64), generator=torch.Generator().manual_seed(1))
    on_cpu = evaluate.evaluate(evaluate.RoundedInputs(model), windows, reference=model)
    wide = TransformersModel(load.ready_model(TINY, "cuda", "float32"))
    on_gpu = evaluate.evaluate(evaluate.RoundedInputs(wide), windows, reference=wide)
    assert on_gpu.kl == pytest.approx(on_cpu.kl, rel=0.5)
