"""One command from a budget to a mix: features are scored on a text, levels assigned, codes chosen, all resumable."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import calibrated, checkpoints
from helpers.mixes import SMALL
from transformers import AutoModelForCausalLM

from tersor import compress
from tersor.checkpoint.inspect import inspect
from tersor.cli.main import main
from tersor.compress import encode
from tersor.compress.salience import expected_kl
from tersor.convert import quantize
from tersor.convert.calibrate import scores
from tersor.convert.calibrate.run import Run
from tersor.convert.calibrate.text import read_windows
from tersor.convert.mix import usual_mix
from tersor.errors import FormatError, InputError, TersorError
from tersor.formats import Mix
from tersor.integrations.transformers.architecture import read_architecture
from tersor.nn import MixedLinear

LEVELS = ["uint3:g32", "fp5_e2m2", "int8"]
TEXT: dict[str, Any] = {"calibration_tokens": 96, "calibration_window": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of wide layers, so that there are several units of rows, and a text."""
    made = tmp_path_factory.mktemp("target")
    calibrated.model("llama", made / "model", hidden_size=128, intermediate_size=192)
    calibrated.text(made / "text.txt")
    return made


def run(folder: Path, name: str, **options: Any) -> Path:
    """Compress the model of the folder, and return the directory."""
    fixed = {"levels": LEVELS, "target_bits": 5.0, "calibration": folder / "text.txt", "algorithm": "rtn"}
    given = {**fixed, **TEXT, **options}
    quantize(folder / "model", folder / name, **given)
    return folder / name


def log(output: Path) -> dict[str, Any]:
    """Return what a run wrote of its mix."""
    return json.loads((output / "tersor-mix.json").read_text())


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Module -> scores of its output features, of the run that a test makes."""
    found: dict[str, torch.Tensor] = {}
    whole = scores.Scoring.run

    def spying(self: scores.Scoring, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        found.update(whole(self, *args, **kwargs))
        return found

    monkeypatch.setattr(scores.Scoring, "run", spying)
    return found


def test_a_budget_of_bits_is_spent_by_scores_that_are_the_expected_kl(
    folder: Path, seen: dict[str, torch.Tensor]
) -> None:
    output = run(folder, "rounded")
    found = log(output)
    assert found["bits_per_weight"] <= 5.0 and found["bits_per_weight"] == pytest.approx(5.0, abs=0.2)
    assert found["loss_without_pairs_and_units"] <= found["loss_without_units"] <= found["loss"]
    assert sum(found["shares"]) == pytest.approx(1) and max(found["shares"]) < 0.95
    stored = inspect(output, read_architecture)
    items = [item for item in stored.items if item.levels]
    levels = {item.name.removesuffix(".weight"): sum(rows for _, rows in item.levels) for item in items}
    assert levels == {name: sum(rows) for name, rows in found["layers"].items()} and len(levels) == 14
    assert stored.compressed_bits_per_weight == pytest.approx(found["bits_per_weight"], abs=0.05)
    assert stored.provenance["target"] == "5 true bits a weight" and not (output / "calibration").exists()

    # The same by one backward pass of the whole model, of one layer.
    name = "model.layers.1.mlp.up_proj"
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    layer, total = model.get_submodule(name), torch.zeros(192, dtype=torch.float64)
    kept: dict[str, torch.Tensor] = {}
    layer.register_forward_hook(lambda _, given, out: (kept.update(x=given[0], y=out), out.retain_grad())[0])
    tokens = [int(word[1:]) for word in (folder / "text.txt").read_text().split()]
    delta = encode(layer.weight.detach(), SMALL.levels[0]).dequantize() - layer.weight.detach()
    windows = windows_of(folder, tokens)
    for number, window in enumerate(windows):
        log_p = model(window[None]).logits[0].log_softmax(-1)
        labels = torch.multinomial(log_p.detach().exp(), 1, generator=torch.Generator().manual_seed(number))
        model.zero_grad()
        (-log_p.gather(1, labels).sum()).backward()
        total += expected_kl(kept["x"][0].detach(), kept["y"].grad[0], delta)
    torch.testing.assert_close(seen[name][0], total / sum(map(len, windows)), rtol=1e-3, atol=1e-9)


def windows_of(folder: Path, tokens: Iterable[int]) -> list[torch.Tensor]:
    """Return the windows that calibration takes of the text: three of 32 tokens."""
    ids = read_windows(str(folder / "text.txt"), calibrated.tokenizer(), 3, 32, calibrated.VOCABULARY)
    assert set(ids.flatten().tolist()) <= {*tokens, 1}
    return list(ids)


def test_gptq_beneath_a_mix_loses_less_and_a_size_is_met(folder: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    text = torch.tensor([[int(word[1:]) for word in (folder / "text.txt").read_text().split()[:96]]])
    size = 240_000
    outputs = [run(folder, name, target_bits=None, target_size=size, algorithm=name) for name in ("rtn", "gptq")]
    errors = []
    for output in outputs:
        nbytes = sum(tensor.nbytes for tensor in checkpoints.weights(output).values())
        assert 0.97 * size < nbytes <= size
        model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
        assert sum(isinstance(module, MixedLinear) for module in model.modules()) == 14
        with torch.no_grad():
            errors.append(float((model(text).logits - plain(text).logits).square().mean()))
    assert errors[1] < 0.9 * errors[0]
    lines = json.loads((outputs[1] / "tersor-calibration.json").read_text())["layers"]
    assert len(lines) == 14 and all(line["objective_after"] <= line["objective_before"] for line in lines)


@pytest.mark.parametrize("effort", ["normal", "high"])
def test_an_interrupted_run_goes_on_with_the_same_scores_and_bytes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, effort: str
) -> None:
    monkeypatch.setitem(compress.RECIPES, "gptq", calibrated.quick(compress.RECIPES["gptq"]))
    options = {"algorithm": "gptq", "effort": effort}
    whole = run(folder, f"whole-{effort}", **options)
    block = Run._block

    def failing(self: Run, number: int, *args: Any) -> None:
        if number == 1:
            raise KeyboardInterrupt
        block(self, number, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "_block", failing)
        with pytest.raises(KeyboardInterrupt):
            run(folder, f"again-{effort}", **options)
    with monkeypatch.context() as patched:
        patched.setattr(scores.Scoring, "_score", lambda *args: pytest.fail("scored twice"))
        again = run(folder, f"again-{effort}", resume=True, **options)
    for name in ("model.safetensors", "config.json", "tersor-mix.json"):
        assert (again / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("effort", ["normal", "high"])
def test_scoring_that_was_interrupted_goes_on_at_its_block(
    folder: Path, monkeypatch: pytest.MonkeyPatch, effort: str
) -> None:
    monkeypatch.setitem(compress.RECIPES, "gptq", calibrated.quick(compress.RECIPES["gptq"]))
    options = {"algorithm": "gptq", "effort": effort}
    whole, name, calls = run(folder, f"scored-{effort}", **options), f"scored-again-{effort}", list[int]()
    score = scores.Scoring._score

    def failing(self: scores.Scoring, block: int, backward: Any) -> None:
        calls.append(block)
        if calls == [1, 0]:
            raise KeyboardInterrupt
        score(self, block, backward)

    with monkeypatch.context() as patched:
        patched.setattr(scores.Scoring, "_score", failing)
        with pytest.raises(KeyboardInterrupt):
            run(folder, name, **options)
        again = run(folder, name, resume=True, **options)
    assert calls == [1, 0, 0]
    for file in ("model.safetensors", "config.json", "tersor-mix.json"):
        assert (again / file).read_bytes() == (whole / file).read_bytes()


def test_what_cannot_be_met_is_said_before_anything_is_scored(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores.Scoring, "run", lambda *args, **kwargs: pytest.fail("scored"))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"target_bits": 2.0}, "2.000 bits a weight, is below what the smallest levels take: feasible are"),
        ({"target_bits": 12.0}, "above what the largest levels take"),
        ({"target_bits": None, "target_size": 10_000}, "below what the smallest levels take"),
        ({"target_bits": 4.5, "target_size": 10_000}, "keep one of them"),
        ({"target_bits": -1.0}, "target bits -1.0 is not a positive number"),
        ({"target_bits": None}, "levels need a target"),
        ({"target_latency": 1e-3}, "target bits and target latency are both given"),
        ({"target_bits": None, "target_latency": 1.0}, "above what the slowest levels take: feasible are"),
        ({"target_bits": None, "target_latency": 1e-3, "chip": "h300"}, "unknown chip 'h300'"),
        ({"target_bits": None, "target_latency": 1e-3, "batch": 0}, "batch 0 is not a positive number"),
        ({"batch": 4}, "batch and chip say for what a latency is predicted"),
        ({"levels": ["int8"]}, "at least two levels"),
        ({"format": "int4"}, "output features have levels in its place: leave it out, or make it one of them"),
        ({"score": "taylor"}, "unknown score 'taylor' "),
        (
            {"target_bits": None, "levels": [], "score": "mixllm"},
            "score 'mixllm' compares output features for a target",
        ),
        ({"target_shares": [0.5, 0.3, 0.2]}, "target bits and target shares are both given"),
        ({"target_bits": None, "target_shares": [0.5, 0.5]}, "shares .* of 3 levels: give one a level"),
        ({"target_bits": None, "target_shares": [0.5, 0.5, 0.2]}, "which add up to 1"),
        ({"target_bits": None, "target_size": 10_000}, "a budget of 1e-05 GB is below"),
        ({"levels": ["uint4:g48", "int8"]}, "group size 48 does not divide the 128"),
        ({"calibration": None, "calibration_tokens": None, "calibration_window": None}, "add --calibration FILE"),
        ({"dry_run": True}, "a dry run scores no output features"),
        ({"export": "humming"}, "humming cannot say a mix"),
    ]
    for options, words in cases:
        with pytest.raises(InputError, match=words):
            run(folder, "refused", **options)
        assert not (folder / "refused").exists() and not (folder / "refused.partial").exists()


def test_a_latency_is_met_by_prediction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, wide = tmp_path, {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 1}
    model, text = str(calibrated.model("llama", folder / "model", **wide)), str(calibrated.text(folder / "text.txt"))
    options = ["--calibration", text, "--calibration-tokens", "96", "--calibration-window", "32", "--batch", "4"]
    options += [word for level in LEVELS for word in ("--level", level)]
    with pytest.raises(SystemExit) as ended:
        main(["quantize", model, "-o", str(folder / "fast"), "--target-latency", "1us", *options])
    assert ended.value.code and not (folder / "fast").exists()
    low, high = map(float, re.findall(r"feasible are (\S+) to (\S+) ms", capsys.readouterr().err)[0])
    assert 0.003 < low < 0.95 * high < 0.02
    latency = f"{(low + high) / 2}ms"
    with pytest.raises(SystemExit) as ended:
        main(["quantize", model, "-o", str(folder / "fast"), "--target-latency", latency, "--chip", "H200", *options])
    shown, found = capsys.readouterr().out, log(folder / "fast")
    assert not ended.value.code and "ms predicted for the linears of a step of 4 rows on NVIDIA H200" in shown
    assert 1e-3 * low <= found["predicted_seconds"] <= 0.5e-3 * (low + high) and found["bits_per_weight"] > 3
    config = json.loads((folder / "fast" / "config.json").read_text())
    assert config["quantization_config"]["provenance"]["target"].endswith("a step of 4 rows on NVIDIA H200")


def test_the_limits_that_a_refusal_names_can_be_asked_for(folder: Path) -> None:
    with pytest.raises(InputError) as refused:
        run(folder, "limits", target_bits=1.0)
    found = re.search(r"feasible are (\S+) to (\S+) GB, (\S+) to (\S+) bits", str(refused.value))
    assert found is not None
    for number, (what, limit) in enumerate(zip(("size", "size", "bits", "bits"), found.groups(), strict=True)):
        value = float(limit) * (1e9 if what == "size" else 1)
        output = run(folder, f"limit{number}", **{"target_bits": None, f"target_{what}": value})
        assert len(set(log(output)["shares"]) - {0.0}) == 1


def test_mixllms_score_is_that_of_the_texts_own_labels_window_by_window(
    folder: Path, seen: dict[str, torch.Tensor]
) -> None:
    output = run(folder, "by-mixllm", score="mixllm", effort="high", algorithm="gptq")
    assert log(output)["score"] == "mixllm"
    config = json.loads((output / "config.json").read_text())["quantization_config"]
    assert config["provenance"]["target"] == "5 true bits a weight, by the score mixllm"

    name, total = "model.layers.0.self_attn.o_proj", torch.zeros(128, dtype=torch.float64)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    weight = model.get_submodule(name).weight
    delta = (encode(weight.detach(), SMALL.levels[0]).dequantize() - weight).detach()
    windows = windows_of(folder, range(calibrated.VOCABULARY))
    for window in windows:
        model.zero_grad()
        logits = model(window[None]).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").backward()
        change = (weight.grad * delta).sum(dim=1).double()
        total += (change + change.square() / 2).abs()
    torch.testing.assert_close(seen[name][0], total / len(windows), rtol=1e-3, atol=1e-7)


def test_a_count_rule_gives_each_level_its_share_of_all_features(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [word for level in LEVELS for word in ("--level", level)]
    options += ["--calibration", str(folder / "text.txt"), "--calibration-tokens", "96", "--calibration-window", "32"]
    output = folder / "counted"
    arguments = ["quantize", str(folder / "model"), "-o", str(output), "--target-shares", "50%,40%,10%", *options]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--score", "mixllm", "--algorithm", "rtn"])
    assert not ended.value.code and "lost by the score mixllm" in capsys.readouterr().out
    assert log(output)["shares"] == pytest.approx([0.5, 0.4, 0.1], abs=1e-3)
    with pytest.raises(SystemExit) as ended:
        main([*arguments[:4], "--target-shares", "50,50", *options])
    assert ended.value.code and "'50,50' are not percentages such as 90%,10%" in capsys.readouterr().err


def test_one_command_without_an_algorithm_chooses_codes_by_gptq_and_says_what_kernels_cost(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--calibration", str(folder / "text.txt"), "--calibration-tokens", "96", "--calibration-window", "32"]
    output = folder / "one-command"
    with pytest.raises(SystemExit) as ended:
        main(["quantize", str(folder / "model"), "-o", str(output), "--target-bits", "4.6", *options])
    shown = capsys.readouterr().out
    assert not ended.value.code and "because kernels take units of 64 rows; " in shown
    assert re.search(r"of that \d+\.\d % because gate and up of a channel have one level", shown)
    assert json.loads((output / "tersor-calibration.json").read_text())["algorithm"] == "gptq"


def test_groups_that_are_asked_for_are_those_of_the_usual_levels(folder: Path) -> None:
    found = log(run(folder, "grouped", levels=[], group_size=32, target_bits=4.6))
    assert found["levels"][:3] == ["uint3:g32:float16", "uint4:g32:float16", "fp5_e2m2:row:float16"]


def test_scoring_whose_memory_runs_out_is_one_line_and_keeps_what_is_finished(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(scores.Scoring, "run", fail)
        with pytest.raises(TersorError, match="the memory of cpu ran out: free some, and run again with --resume"):
            run(folder, "out-of-memory")
    assert (folder / "out-of-memory.partial").exists()
    assert run(folder, "out-of-memory", resume=True).exists()


def test_progress_of_scoring_begins_with_what_there_is_to_do(folder: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    run(folder, "told", progress=lambda *call: calls.append(call))
    first = [number for number, (_, _, name) in enumerate(calls) if name == "scores of output features"]
    assert calls[first[0] - 1][::2] == (0, "") and calls[first[0] - 1][1] == calls[first[-1]][0] == calls[first[-1]][1]


def test_the_usual_levels_have_the_largest_groups_that_fit() -> None:
    assert [level.group_size for level in usual_mix([576, 1536]).levels] == [96, 96, None, None, None]
    assert isinstance(usual_mix([4096, 14336]), Mix) and usual_mix([4096]).levels[1].group_size == 128
    with pytest.raises(InputError, match="no groups of 128, 96, 64, 32 divide all of 40, 64 input channels"):
        usual_mix([64, 40])
    with pytest.raises(FormatError, match="unknown scale dtype"):
        usual_mix([64], "half")
