"""Transforms: what is done to a model beside choosing codes keeps what it computes, is logged, and refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import calibrated, checkpoints, released
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import tersor
from tersor.checkpoint.source import open_source
from tersor.cli import main
from tersor.compress import awq, norms
from tersor.compress.encode import RECIPES
from tersor.convert import quantize
from tersor.convert.calibrate.run import Run
from tersor.convert.calibrate.store import Store
from tersor.convert.rotate import rotate
from tersor.convert.transforms import parse_transforms
from tersor.errors import InputError, TersorError

OPTIONS = {**calibrated.OPTIONS, "calibration_tokens": 64}
ODD = {"hidden_size": 72, "head_dim": 18, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}
"""A Llama whose sizes are no powers of two, with biases, whose head is the embedding."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrated.text(tmp_path_factory.mktemp("text") / "calibration.txt")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECIPES, "gptq", calibrated.quick(RECIPES["gptq"]))


def uneven(name: str, directory: Path, **changes: Any) -> Path:
    """Write a random model whose norms and biases are random, too; return its directory."""
    calibrated.model(name, directory, **changes)
    tensors, drawing = checkpoints.weights(directory), torch.Generator().manual_seed(1)
    moved = {
        key: value + 0.3 * torch.randn(value.shape, generator=drawing) if value.dim() == 1 else value
        for key, value in tensors.items()
    }
    save_file(moved, directory / "model.safetensors", {"format": "pt"})
    return directory


def rotated(directory: Path, output: Path, seed: int = 0) -> Path:
    """Write what a checkpoint becomes by a rotation, not compressed; return its directory."""
    shutil.copytree(directory, output)
    with open_source(directory) as source:
        rotate(source, seed)
        read: Any = source.tensors
        plain = {
            name: tensor.read_rows(0, tensor.spec.shape[0]) if hasattr(tensor, "read_rows") else tensor.file.read(name)
            for name, tensor in read.items()
        }
        config = source.config
    save_file(
        {name: value.contiguous() for name, value in plain.items()}, output / "model.safetensors", {"format": "pt"}
    )
    (output / "config.json").write_text(json.dumps(config))
    return output


def logits(directory: Path) -> torch.Tensor:
    ids = torch.arange(2, 42).view(2, 20)
    with torch.no_grad():
        found: torch.Tensor = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(input_ids=ids).logits
    return found


def distance(one: Path, other: Path) -> float:
    mine, theirs = logits(one), logits(other)
    return float((mine - theirs).norm() / theirs.norm())


def log_of(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "tersor-calibration.json").read_text())
    return found


# Rotation


@pytest.mark.parametrize(
    ("name", "changes"), [("llama", ODD), ("gemma", {}), ("qwen3", {}), ("qwen2", {}), ("phi3", {})]
)
def test_a_rotated_model_computes_the_same(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = uneven(name, tmp_path / "model", **changes)
    turned = rotated(model, tmp_path / "turned", seed=3)
    assert distance(turned, model) < 3e-6
    before, after = checkpoints.weights(model), checkpoints.weights(turned)
    down = "model.layers.1.mlp.down_proj.weight"
    assert float((before[down] - after[down]).norm()) > float(before[down].norm())
    assert not json.loads((turned / "config.json").read_text())["tie_word_embeddings"]
    assert not torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])


@pytest.mark.parametrize("options", [{"algorithm": "rtn"}, {"effort": "high"}])
def test_compressing_with_a_rotation_is_compressing_the_rotated_model(
    options: dict[str, Any], text: Path, tmp_path: Path, quick: None
) -> None:
    model = uneven("llama", tmp_path / "model", tie_word_embeddings=True)
    chosen = {**OPTIONS, "calibration": text, **options} if "effort" in options else {"format": "int4", **options}
    quantize(model, tmp_path / "out", transforms=["rotate"], seed=5, **chosen)
    quantize(
        rotated(model, tmp_path / "turned", 5),
        tmp_path / "plain",
        **{**chosen, **({"seed": 5} if "effort" in options else {})},
    )
    mine, theirs = checkpoints.weights(tmp_path / "out"), checkpoints.weights(tmp_path / "plain")
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    provenance = config["quantization_config"]["provenance"]
    assert (provenance["transforms"], provenance["seed"], config["tie_word_embeddings"]) == ("rotate", "5", False)
    assert distance(tmp_path / "out", model) < 0.3


def test_a_compressed_source_is_rotated_like_the_plain_one_that_it_stands_for(tmp_path: Path) -> None:
    packed, plain = released.save(tmp_path, *released.CASES["fp8 blocks"])
    for model, output in ((packed, "out"), (plain, "expected")):
        quantize(model, tmp_path / output, format="int4", transforms=["rotate"])
    released.same(tmp_path / "out", tmp_path / "expected")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "opt",
            "model.decoder.embed_positions, a OPTLearnedPositionalEmbedding, is none of the modules that Llama has",
        ),
        ("phi", "model.layers.0.input_layernorm is a LayerNorm, and a rotation passes through RMS norms alone"),
        ("gemma2", "model.layers.0.pre_feedforward_layernorm, a Gemma2RMSNorm, is none of the modules"),
        ("mixtral", "model.layers.0.mlp.gate, a MixtralTopKRouter, is none of the modules"),
    ],
)
def test_a_model_that_cannot_be_rotated_is_refused_by_the_module_in_the_way(
    name: str, message: str, tmp_path: Path
) -> None:
    model = calibrated.model(name, tmp_path / "model")
    with pytest.raises(InputError, match=f"^transform 'rotate': {message}") as caught:
        quantize(model, tmp_path / "out", format="int4", transforms=["rotate"])
    assert "\n" not in str(caught.value) and [path.name for path in tmp_path.iterdir()] == ["model"]


# Scales of channels


@pytest.fixture
def strong(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Let the search return strong random scales; gives the distances of every scaled block from its original."""
    found: list[float] = []

    def search(self: Any) -> awq.Scales:
        drawing = torch.Generator().manual_seed(2)
        channels = int(self._source.max()) + 1
        return awq.Scales(torch.rand(channels, generator=drawing) * 4 + 0.25, 0.5, 1.0, 0.5)

    scale = Run._scale

    def compared(self: Any, block: int, twin: Any, scaling: Any) -> None:
        x = torch.randn(1, 8, self._model.model.config.hidden_size, generator=torch.Generator().manual_seed(3))
        call = self._model.enter(torch.arange(2, 10)[None])[1][block]
        before = self._model.run(twin, x, call)
        scale(self, block, twin, scaling)
        after = self._model.run(twin, x, call)
        found.append(float((after - before).norm() / (before - x).norm()))

    monkeypatch.setattr(awq.Readers, "search", search)
    monkeypatch.setattr(awq.Readers, "loss", lambda self, scales: 0.5)
    monkeypatch.setattr(Run, "_scale", compared)
    return found


@pytest.mark.parametrize(
    ("name", "folded"),
    [
        (
            "llama",
            {
                "q_proj": "input_layernorm",
                "o_proj": "v_proj",
                "up_proj": "post_attention_layernorm",
                "down_proj": "up_proj",
            },
        ),
        ("gemma2", {"q_proj": "input_layernorm", "gate_proj": "pre_feedforward_layernorm", "down_proj": "up_proj"}),
        ("opt", {"q_proj": "self_attn_layer_norm", "out_proj": "v_proj", "fc1": "final_layer_norm", "fc2": "fc1"}),
        ("gpt2", {"c_attn": "ln_1", "c_fc": "ln_2", "c_proj": None}),
        ("phi", {"q_proj": None, "dense": "v_proj", "fc1": None, "fc2": None}),
        ("mixtral", {"k_proj": "input_layernorm", "o_proj": "v_proj", "experts": None}),
    ],
)
def test_scaled_blocks_compute_the_same_and_so_does_the_checkpoint(
    name: str, folded: dict[str, str | None], text: Path, tmp_path: Path, strong: list[float]
) -> None:
    model = uneven(name, tmp_path / "model")
    quantize(
        model,
        tmp_path / "out",
        calibration=text,
        transforms=["awq"],
        **{**OPTIONS, "format": "int8", "algorithm": "rtn"},
    )
    assert len(strong) == 2 and max(strong) < 1e-5
    assert distance(tmp_path / "out", model) < 0.05
    lines = {layer.rpartition(".")[2]: line for line in log_of(tmp_path / "out")["scales"] for layer in line["layers"]}
    for layer, producer in folded.items():
        into = lines[layer]["folded_into"]
        assert (into and into.rpartition(".")[2]) == producer
        assert into or lines[layer]["left"]


def test_what_calibration_computes_with_is_what_is_written(
    text: Path, tmp_path: Path, strong: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = uneven("llama", tmp_path / "model")
    save_file(
        {name: value.bfloat16() for name, value in checkpoints.weights(model).items()}, model / "model.safetensors"
    )
    kept: list[torch.Tensor] = []
    finish = Store.finish

    def keep(self: Store, block: int, tensors: Any, record: Any) -> None:
        kept.extend(tensors[f"{number}.value"] for number in record["changed"])
        finish(self, block, tensors, record)

    monkeypatch.setattr(Store, "finish", keep)
    options = {**OPTIONS, "format": "int8", "algorithm": "rtn", "calibration": text}
    quantize(model, tmp_path / "out", transforms=["rotate", "awq", "tweak-norms"], **options)
    written = checkpoints.weights(tmp_path / "out").values()
    assert len(kept) == 4 and all(any(torch.equal(value, other) for other in written) for value in kept)
    assert max(strong) < 1e-5 and distance(tmp_path / "out", model) < 0.1


def test_scales_lower_what_rounding_costs_and_the_norm_makes_up_for_them(text: Path, tmp_path: Path) -> None:
    model = uneven("llama", tmp_path / "model")
    tensors, norm = checkpoints.weights(model), "model.layers.0.input_layernorm.weight"
    tensors[norm][5] = 40.0
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    options = {**OPTIONS, "algorithm": "rtn", "format": "int3", "group_size": None, "calibration": text}
    quantize(model, tmp_path / "awq", transforms=["awq"], **options)
    line = log_of(tmp_path / "awq")["scales"][0]
    assert line["exponent"] > 0 and line["objective_after"] < 0.7 * line["objective_before"]
    quantize(model, tmp_path / "rtn", format="int3")
    assert distance(tmp_path / "awq", model) < 0.9 * distance(tmp_path / "rtn", model)
    after = checkpoints.weights(tmp_path / "awq")[norm]
    assert float(after[5]) < 0.5 * float(tensors[norm][5]) and not torch.equal(after, tensors[norm])


def test_a_layer_that_gains_nothing_stays_as_it_is(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    model = uneven("llama", tmp_path / "model")
    monkeypatch.setattr(awq.Readers, "loss", lambda self, scales: 1.0)
    quantize(model, tmp_path / "awq", calibration=text, transforms=["awq"], **OPTIONS)
    quantize(model, tmp_path / "plain", calibration=text, **OPTIONS)
    mine, theirs = checkpoints.weights(tmp_path / "awq"), checkpoints.weights(tmp_path / "plain")
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert all(line["exponent"] == 0 for line in log_of(tmp_path / "awq")["scales"])


# Norms


@pytest.mark.parametrize("name", ["llama", "opt", "gemma"])
def test_tweaked_norms_bring_blocks_nearer_to_the_originals(name: str, text: Path, tmp_path: Path) -> None:
    model = uneven(name, tmp_path / "model")
    options = {**OPTIONS, "algorithm": "rtn", "format": "int3", "calibration": text}
    quantize(model, tmp_path / "out", transforms=["tweak-norms"], **options)
    lines = log_of(tmp_path / "out")["norms"]
    assert len(lines) == 2 and all(line["error_after"] < line["error_before"] for line in lines)
    assert all(line["distance_after"] < line["distance_before"] for line in lines)
    before, after = checkpoints.weights(model), checkpoints.weights(tmp_path / "out")
    changed = {key for key in before if key in after and not torch.equal(before[key], after[key])}
    assert changed and all("norm" in key for key in changed)


def test_norms_that_bring_a_block_no_nearer_are_left(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    model = uneven("llama", tmp_path / "model")
    monkeypatch.setattr(norms.Steps, "step", lambda self, gradients: [value.add_(1) for value in self.values])
    quantize(model, tmp_path / "out", calibration=text, transforms=["tweak-norms"], **OPTIONS)
    before, after = checkpoints.weights(model), checkpoints.weights(tmp_path / "out")
    assert all(torch.equal(before[key], after[key]) for key in before if key in after)
    assert {line["left"] for line in log_of(tmp_path / "out")["norms"]} == {"its error is not lower"}


# Options


def test_transforms_go_with_a_mix_and_with_each_other(text: Path, tmp_path: Path, quick: None) -> None:
    model = uneven("llama", tmp_path / "model")
    options = {key: value for key, value in OPTIONS.items() if key not in ("format", "group_size")}
    wanted = ["tweak-norms", "awq", "rotate"]
    levels = ["uint4:g16", "int8"]
    quantize(model, tmp_path / "out", calibration=text, transforms=wanted, target_bits=6.5, levels=levels, **options)
    assert log_of(tmp_path / "out")["transforms"] == ["rotate", "awq", "tweak-norms"]
    assert distance(tmp_path / "out", model) < 0.3


def test_the_command_takes_transforms(tmp_path: Path, text: Path, quick: None) -> None:
    model = uneven("llama", tmp_path / "model")
    words = ["quantize", str(model), "-o", str(tmp_path / "out"), "--format", "int4", "--algorithm", "gptq"]
    words += ["--calibration", str(text), "--calibration-tokens", "32", "--transform", "awq", "--transform", "rotate"]
    assert main.run(words) == 0
    assert log_of(tmp_path / "out")["transforms"] == ["rotate", "awq"]
    assert "changed by transforms: rotate, awq" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transforms": ["rotat"]}, "unknown transform 'rotat', did you mean 'rotate'"),
        ({"transforms": "awq"}, "transforms are a list of names, not the text 'awq'"),
        ({"transforms": ["awq"]}, "transform 'awq' needs a text to calibrate on: add --calibration FILE"),
        ({"transforms": ["tweak-norms"]}, "transform 'tweak-norms' needs a text to calibrate on"),
        (
            {"transforms": ["rotate"], "calibration": "a.txt", "algorithm": "rtn"},
            "algorithm 'rtn' takes no calibration text",
        ),
    ],
)
def test_options_that_do_not_fit_are_one_line_and_leave_nothing(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = calibrated.model("llama", tmp_path / "model")
    with pytest.raises(TersorError, match=message) as caught:
        quantize(model, tmp_path / "out", format="int4", **options)
    assert caught.value.exit_status == 2 and [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_model_in_memory_is_not_transformed(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(calibrated.model("llama", tmp_path / "model"))
    with pytest.raises(InputError, match="transforms change a checkpoint on disk: save the module"):
        tersor.quantize(model, format="int4", transforms=["rotate"])


def test_transforms_are_done_once_and_in_one_order() -> None:
    assert parse_transforms(["awq", "rotate", "awq"]) == ("rotate", "awq")
