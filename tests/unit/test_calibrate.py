"""Calibrated compression: what a recipe is told of each layer, experts, gradients, the log, and texts that go wrong."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import calibrated, checkpoints
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import tersor
from tersor.compress import quantize_rtn
from tersor.compress.encode import RECIPES
from tersor.convert import quantize
from tersor.convert.calibrate.text import read_windows
from tersor.errors import InputError, TersorError

OPTIONS = calibrated.OPTIONS
Seen = list[dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrated.model("llama", tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrated.text(tmp_path_factory.mktemp("text") / "calibration.txt")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """What a recipe is told, call by call, the weight under `weight`; it rounds to nearest."""
    calls: Seen = []
    recipe = RECIPES["gptq"]

    def quantize_and_note(weight: torch.Tensor, scheme: Any, statistics: Any) -> Any:
        calls.append({"weight": weight.clone(), **{name: value.clone() for name, value in statistics.items()}})
        return quantize_rtn(weight, scheme)

    monkeypatch.setitem(RECIPES, "gptq", dataclasses.replace(recipe, quantize=quantize_and_note))
    return calls


def compress(model: Path, text: Path, output: Path, **options: Any) -> dict[str, Any]:
    """Compress, and return the log."""
    quantize(model, output, calibration=text, **{**OPTIONS, **options})
    log: dict[str, Any] = json.loads((output / "tersor-calibration.json").read_text())
    return log


def windows(text: Path) -> torch.Tensor:
    return read_windows(str(text), calibrated.tokenizer(), 3, 32, calibrated.VOCABULARY)


def inputs(model: Any, module: str, ids: torch.Tensor) -> torch.Tensor:
    """Return what a layer of a whole model reads, [tokens, IC]."""
    found: list[torch.Tensor] = []
    handle = model.get_submodule(module).register_forward_pre_hook(lambda _, args: found.append(args[0]))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    handle.remove()
    return found[0].flatten(0, -2)


def near(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> bool:
    return float((found - expected).norm()) <= tolerance * float(expected.norm()) and bool(expected.norm() > 0)


def test_statistics_are_those_of_the_compressed_model_and_its_distance_to_the_original(
    llama: Path, text: Path, tmp_path: Path, seen: Seen
) -> None:
    log = compress(llama, text, tmp_path / "out")
    original = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = windows(text)
    # The last layer of the last block has all others ahead of it, so it reads what it reads in the finished model.
    last = "model.layers.1.mlp.down_proj"
    x, own = inputs(packed, last, ids), inputs(original, last, ids)
    assert near(seen[-1]["hessian"], x.T @ x / len(x))
    assert near(seen[-1]["shift"], (own - x).T @ x / len(x), 1e-3)
    assert log["layers"][-1]["layer"] == last and log["layers"][-1]["tokens"] == len(x) == 96
    # What the first layers read is the original's.
    first = inputs(original, "model.layers.0.self_attn.q_proj", ids)
    assert all(near(call["hessian"], first.T @ first / len(first)) for call in seen[:3])
    assert all(not call["shift"].any() for call in seen[:3])


def test_layers_come_in_the_order_in_which_they_run(llama: Path, text: Path, tmp_path: Path) -> None:
    layers = [line["layer"].split(".", 3)[3] for line in compress(llama, text, tmp_path / "out")["layers"]]
    order = [["k_proj", "q_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert [sorted(name.split(".")[1] for name in layers[first:last]) for first, last in ((0, 3), (3, 4))] == order[:2]
    assert [sorted(name.split(".")[1] for name in layers[first:last]) for first, last in ((4, 6), (6, 7))] == order[2:]


def test_the_log_and_the_configuration_say_what_was_done(llama: Path, text: Path, tmp_path: Path) -> None:
    log = compress(llama, text, tmp_path / "out", overrides=["embed_tokens=int8:row"])
    assert (log["algorithm"], log["source"], log["windows"], log["window"]) == ("gptq", "calibration.txt", 3, 32)
    assert len(log["layers"]) == 14 and len(log["blocks"]) == 2
    for line in log["layers"]:
        assert line["objective_after"] < line["objective_before"] and line["seconds"] >= 0
        assert 0 < line["relative_error"] < 0.3 and line["format"] == "int4:g16:float16"
    assert log["rounded_to_nearest"] == ["model.embed_tokens"] and log["rarely_hit_experts"] == []
    provenance = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["provenance"]
    assert (
        provenance["algorithm"] == "gptq" and provenance["calibration"] == "3 windows of 32 tokens of calibration.txt"
    )
    assert "3 windows of 32 tokens of calibration.txt" in (tmp_path / "out" / "README.md").read_text()
    assert not (tmp_path / "out" / "calibration").exists()


def test_calibrated_weights_give_outputs_nearer_to_the_originals(llama: Path, text: Path, tmp_path: Path) -> None:
    compress(llama, text, tmp_path / "gptq", format="int3")
    quantize(llama, tmp_path / "rtn", format="int3", group_size=16)
    ids = windows(text)
    with torch.no_grad():
        own = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)(input_ids=ids).logits
        distances = [
            (
                AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)(input_ids=ids).logits - own
            ).norm()
            for name in ("gptq", "rtn")
        ]
    assert distances[0] < 0.6 * distances[1]


def test_high_effort_weighs_tokens_and_outputs_by_the_gradients_of_the_whole_model(
    llama: Path, text: Path, tmp_path: Path, seen: Seen
) -> None:
    compress(llama, text, tmp_path / "out", effort="high", seed=5)
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    ids, found = windows(text), list[torch.Tensor]()

    def note(_: Any, args: Any, output: torch.Tensor) -> None:
        output.register_hook(lambda gradient: found.append(gradient[0]))

    handle = model.get_submodule("model.layers.0.self_attn.q_proj").register_forward_hook(note)
    for number, window in enumerate(ids):
        log_p = model(input_ids=window[None], use_cache=False).logits[0].log_softmax(dim=-1)
        labels = torch.multinomial(log_p.detach().exp(), 1, generator=torch.Generator().manual_seed(5 + number))
        (-log_p.gather(1, labels).sum()).backward()
    handle.remove()
    gradients = torch.cat(found)
    call = next(call for call in seen if call["weight"].shape == (64, 64))
    assert near(call["output_hessian"], gradients.T @ gradients / 96, 1e-3)
    squares = gradients.square().mean(dim=1)
    weights = squares.clamp(0.1 * squares.mean(), 20 * squares.mean())
    x = inputs(model, "model.layers.0.self_attn.q_proj", ids)
    assert near(call["hessian"], (x * (weights / weights.mean())[:, None]).T @ x / 96, 1e-3)
    assert not near(call["hessian"], x.T @ x / 96, 1e-2)


def test_every_expert_has_statistics_of_its_own_and_rarely_hit_ones_share(
    tmp_path: Path, text: Path, seen: Seen
) -> None:
    model = calibrated.model("mixtral", tmp_path / "model")
    log = compress(model, text, tmp_path / "out")
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    taken: list[Any] = []
    handle = whole.get_submodule("model.layers.0.mlp.experts").register_forward_pre_hook(
        lambda _, args: taken.append(args)
    )
    with torch.no_grad():
        whole(input_ids=windows(text), use_cache=False)
    handle.remove()
    # q, k, v and o are compressed ahead of the experts, so that these read nearly what the original's read.
    chosen = taken[0][1]
    counts = [int((chosen == expert).any(dim=-1).sum()) for expert in range(4)]
    lines = {line["layer"]: line for line in log["layers"] if "experts" in line["layer"]}
    assert len(lines) == 2 * 4 * 3
    found = [lines[f"model.layers.0.mlp.experts.{expert}.w1"]["tokens"] for expert in range(4)]
    assert sum(found) == 2 * 96 and all(abs(a - b) <= 8 for a, b in zip(found, counts, strict=True))
    rare = [name for name, line in lines.items() if line["tokens"] < (96 if name.endswith("w2") else 64)]
    assert rare and set(log["rarely_hit_experts"]) == set(rare)
    experts = [call for call in seen if call["weight"].shape == (96, 64)][:8]
    assert len({float(call["hessian"].norm()) for call in experts}) == 4, "w1 and w3 of an expert read the same"


@pytest.mark.parametrize("name", ["gpt_oss", "llama4_text", "qwen2_moe"])
def test_models_with_experts_in_one_tensor_or_beside_a_shared_one_are_calibrated(
    name: str, tmp_path: Path, text: Path
) -> None:
    model = calibrated.model(name, tmp_path / "model")
    log = compress(model, text, tmp_path / "out", group_size=4, format="int4")
    assert log["rounded_to_nearest"] == []
    assert all(line["objective_after"] <= line["objective_before"] for line in log["layers"])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        pair = [each(input_ids=windows(text), use_cache=False).logits for each in (loaded, original)]
    assert float((pair[0] - pair[1]).norm()) < 0.2 * float(pair[1].norm())


def change(model: Path, output: Path, **tensors: torch.Tensor) -> Path:
    """Return a copy of a checkpoint with other tensors, their dots written as two underscores."""
    shutil.copytree(model, output)
    held = checkpoints.load(output / "model.safetensors")
    save_file(
        {**held, **{name.replace("__", "."): value for name, value in tensors.items()}},
        output / "model.safetensors",
        {"format": "pt"},
    )
    return output


@pytest.mark.parametrize(
    ("ignore", "message"),
    [
        ([], r"what model\.layers\.1\.mlp\.gate_proj reads of this text holds a NaN or an infinity"),
        (
            ["mlp"],
            r"activations of the model, windows 0 on hold .* first in model\.layers\.1\.post_attention_layernorm",
        ),
    ],
)
def test_activations_that_are_not_finite_name_their_layer(
    llama: Path, text: Path, tmp_path: Path, ignore: list[str], message: str
) -> None:
    huge = {"model__layers__1__post_attention_layernorm__weight": torch.full((64,), 1e38)}
    model = change(llama, tmp_path / "model", **huge)
    with pytest.raises(InputError, match=message) as caught:
        compress(model, text, tmp_path / "out", ignore=ignore)
    assert "\n" not in str(caught.value) and not (tmp_path / "out.partial").exists()


def test_a_dead_channel_and_a_text_of_one_word_stop_nothing(llama: Path, tmp_path: Path) -> None:
    scale = torch.ones(64)
    scale[3] = 0
    model = change(llama, tmp_path / "model", model__layers__0__input_layernorm__weight=scale)
    (tmp_path / "text.txt").write_text(calibrated.words(*([7] * 100)))
    log = compress(model, tmp_path / "text.txt", tmp_path / "out")
    assert all(0 <= line["objective_after"] <= line["objective_before"] for line in log["layers"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algorithm": "gptq"}, "algorithm 'gptq' needs a text to calibrate on: add --calibration FILE"),
        ({"calibration": "a.txt", "algorithm": "rtn"}, "algorithm 'rtn' takes no calibration text"),
        ({"calibration": "a.txt"}, "a.txt: no such text file"),
        ({"effort": "high"}, "say nothing without a calibration text"),
        ({"calibration": "a.txt", "algorithm": "gptq"}, "a.txt: no such text file"),
        ({"calibration": "a.txt", "algorithm": "gptq", "calibration_window": 128}, "exceeds the model's 64 positions"),
    ],
)
def test_options_that_do_not_fit_are_one_line_and_leave_nothing(
    llama: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(TersorError, match=message) as caught:
        quantize(llama, tmp_path / "out", format="int4", **options)
    assert caught.value.exit_status == 2 and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_asks_for_no_text(llama: Path) -> None:
    assert len(quantize(llama, format="int4", algorithm="gptq", dry_run=True).compressed) == 14


def test_a_model_in_memory_is_not_calibrated(llama: Path, text: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    with pytest.raises(InputError, match="a module in memory is rounded to nearest: for 'gptq' save it"):
        tersor.quantize(model, format="int4", algorithm="gptq")
    with pytest.raises(InputError, match="a module in memory is rounded to nearest"):
        tersor.quantize(model, format="int4", calibration=str(text))
