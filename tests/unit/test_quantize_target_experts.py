"""A budget is spent over experts as well: levels follow from scores summed by the tokens that each expert sees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import calibrated, checkpoints
from transformers import AutoModelForCausalLM

from tersor.checkpoint.inspect import inspect
from tersor.compress import encode
from tersor.compress.salience import expected_kl
from tersor.convert import quantize
from tersor.convert.calibrate import expert_scores, scores
from tersor.convert.calibrate.text import read_windows
from tersor.convert.mix import mixable
from tersor.errors import InputError
from tersor.formats import get_scheme
from tersor.integrations.transformers.architecture import read_architecture

LEVELS = ["uint3:g32", "fp5_e2m2", "int8"]
KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 64},
    "gpt_oss": {"intermediate_size": 96},
    "llama4_text": {"intermediate_size": 64, "intermediate_size_mlp": 64},
}


def made(kind: str, folder: Path) -> Path:
    """Make a model and a text in a folder; return the folder."""
    calibrated.model(kind, folder / "model", **KINDS[kind])
    calibrated.text(folder / "text.txt")
    return folder


def run(folder: Path, **options: Any) -> Path:
    """Compress the model of a folder, and return the directory."""
    given: dict[str, Any] = {"levels": LEVELS, "target_bits": 5.0, "calibration": folder / "text.txt", **options}
    given.setdefault("algorithm", "rtn")
    quantize(folder / "model", folder / "mixed", calibration_tokens=96, calibration_window=32, **given)
    return folder / "mixed"


class Watched:
    """The experts of a layer computed pair by pair, so that the gradient of every product is there afterwards."""

    def __init__(self, experts: Any) -> None:
        self.seen: list[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.experts = experts
        experts.forward = self.forward

    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return the outputs of experts, and keep what was read and made."""
        own, out = self.experts, torch.zeros_like(x)
        for token, rank in ((token, rank) for token in range(len(x)) for rank in range(index.shape[1])):
            expert = int(index[token, rank])
            both = own.gate_up_proj[expert] @ x[token]
            both.retain_grad()
            gate, up = both.chunk(2)
            inner = torch.nn.functional.silu(gate) * up
            outer = own.down_proj[expert] @ inner
            outer.retain_grad()
            self.seen.append((expert, x[token].detach(), both, inner.detach(), outer))
            out = out.index_add(0, torch.tensor([token]), (weights[token, rank] * outer)[None])
        return out


def test_scores_are_the_expected_kl_summed_over_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, seen, whole = made("mixtral", tmp_path), {}, scores.Scoring.run

    def spying(self: scores.Scoring, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        seen.update(whole(self, *args, **kwargs))
        return seen

    monkeypatch.setattr(scores.Scoring, "run", spying)
    monkeypatch.setattr(expert_scores, "_DELTA_BYTES", 1)  # an expert at a time
    output = run(folder)
    found = json.loads((output / "tersor-mix.json").read_text())
    assert found["bits_per_weight"] <= 5.0 and found["loss_without_pairs_and_units"] <= found["loss"]

    name = "model.layers.1.mlp.experts"
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, experts_implementation="eager")
    experts = model.get_submodule(name)
    watched, scheme = Watched(experts), get_scheme("uint3", 32)
    deltas = {
        weight: [encode(one.detach(), scheme).dequantize() - one.detach() for one in getattr(experts, weight)]
        for weight in ("gate_up_proj", "down_proj")
    }
    totals = {"gate_up_proj": torch.zeros(128, dtype=torch.float64), "down_proj": torch.zeros(64, dtype=torch.float64)}
    windows = read_windows(str(folder / "text.txt"), calibrated.tokenizer(), 3, 32, calibrated.VOCABULARY)
    for number, window in enumerate(windows):
        watched.seen.clear()
        log_p = model(window[None]).logits[0].log_softmax(-1)
        labels = torch.multinomial(log_p.detach().exp(), 1, generator=torch.Generator().manual_seed(number))
        (-log_p.gather(1, labels).sum()).backward()
        for expert, x, both, inner, outer in watched.seen:
            pairs = (("gate_up_proj", x, both.grad), ("down_proj", inner, outer.grad))
            for weight, read, gradient in pairs:
                assert gradient is not None
                totals[weight] += expected_kl(read[None], gradient[None], deltas[weight][expert])
    for weight, total in totals.items():
        torch.testing.assert_close(seen[f"{name}.{weight}"][0], total / 96, rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize(("kind", "algorithm"), [("mixtral", "gptq"), ("gpt_oss", "gptq"), ("llama4_text", "rtn")])
def test_a_budget_covers_experts_whose_levels_are_alike(kind: str, algorithm: str, tmp_path: Path) -> None:
    folder = made(kind, tmp_path)
    output = run(folder, algorithm=algorithm)
    found, tensors = json.loads((output / "tersor-mix.json").read_text()), checkpoints.weights(output)
    stored = inspect(output, read_architecture)
    assert found["bits_per_weight"] <= 5.0
    assert stored.compressed_bits_per_weight == pytest.approx(found["bits_per_weight"], abs=0.08)
    shared = mixable(folder / "model").experts
    assert len(shared) == (2 if kind == "llama4_text" else 4)
    for own in shared.values():
        rows = {tuple(found["layers"][module]) for module in own.modules}
        assert len(rows) == 1
    levels = {name: tensor for name, tensor in tensors.items() if name.endswith("weight_level")}
    assert all(tensor.dim() == 1 for tensor in levels.values())
    ends = ("w1.weight_level", "w3.weight_level")
    alike = [tensor for name, tensor in levels.items() if "layers.0" in name and name.endswith(ends)]
    assert all(torch.equal(alike[0], other) for other in alike)
    text = torch.tensor([[int(word[1:]) for word in (folder / "text.txt").read_text().split()[:32]]])
    with torch.no_grad():
        one, other = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(text).logits
            for path in (output, folder / "model")
        )
    assert float((one - other).norm()) < 0.3 * float(other.norm())


def test_mixllms_score_of_experts_is_refused_before_the_work(tmp_path: Path) -> None:
    folder = made("mixtral", tmp_path)
    with pytest.raises(InputError, match="score 'mixllm' knows no experts: leave it out, or ignore them"):
        run(folder, score="mixllm")
    assert not (folder / "mixed.partial").exists()
