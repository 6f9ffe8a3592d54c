"""Bad input to `quantize`: one clear line, exit status 2, nothing left behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import checkpoints
from safetensors.torch import save_file

from tersor import hardware
from tersor.convert import quantize
from tersor.errors import TersorError

DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save("llama", tmp_path_factory.mktemp("llama") / "model", max_shard_size="60KB")


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    return shutil.copytree(llama, tmp_path / "model")


def refused(model: str | Path, output: Path, message: str, **options: Any) -> str:
    """Check that `quantize` refuses with one line, and that nothing is left beside the model."""
    before = {path.name for path in output.parent.iterdir()}
    with pytest.raises(TersorError, match=message) as caught:
        quantize(model, output, **options)
    assert caught.value.exit_status == 2
    assert "\n" not in str(caught.value)
    assert {path.name for path in output.parent.iterdir()} == before
    return str(caught.value)


def edit(model: Path, **changes: Any) -> None:
    path = model / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **changes}))


def change(model: Path, name: str, value: torch.Tensor) -> Path:
    """Put a tensor in place of another and return the file it is in."""
    for path in model.glob("*.safetensors"):
        held = checkpoints.load(path)
        if name in held:
            save_file({**held, name: value}, path, {"format": "pt"})
            return path
    raise KeyError(name)


# Where the model is


def test_missing_directories(tmp_path: Path) -> None:
    refused(tmp_path / "absent", tmp_path / "out", "no directory .*absent")
    refused("./absent/model", tmp_path / "out", "no directory ./absent/model")


def test_neither_a_directory_nor_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def gone(*_: Any, **__: Any) -> None:
        raise OSError("401 Client Error.\nRepository Not Found")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", gone)
    text = refused("some/model", tmp_path / "out", "'some/model' is not a directory here, and the Hugging Face Hub did")
    assert text.endswith("401 Client Error.")


def test_a_file_in_place_of_a_directory(model: Any, tmp_path: Path) -> None:
    refused(model / "config.json", tmp_path / "out", "is a file: give the directory")


def test_an_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    refused(tmp_path / "model", tmp_path / "out", "is empty")


def test_no_config(model: Any, tmp_path: Path) -> None:
    (model / "config.json").unlink()
    refused(model, tmp_path / "out", r"is not a model: it has no config.json \(it holds generation_config.json, model-")


@pytest.mark.parametrize(("text", "message"), [("{", "not valid JSON"), ("[]", "a JSON list, not an object")])
def test_a_broken_config(model: Any, tmp_path: Path, text: str, message: str) -> None:
    (model / "config.json").write_text(text)
    refused(model, tmp_path / "out", f"config.json is {message}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llamma"}, "transformers cannot build this model: .*llamma"),
        ({"model_type": "t5"}, "lacks [0-9]+ tensors that T5ForConditionalGeneration needs"),
        ({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}, "needs Python code of its own"),
    ],
)
def test_models_transformers_does_not_build(model: Any, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    edit(model, **changes)
    refused(model, tmp_path / "out", message)


# Weights


def test_weights_missing(model: Any, tmp_path: Path) -> None:
    for path in model.glob("*.safetensors*"):
        path.unlink()
    refused(model, tmp_path / "out", "has no weights: neither model.safetensors nor")
    (model / "model.gguf").write_bytes(b"")
    refused(model, tmp_path / "out", "it holds model.gguf")
    (model / "pytorch_model.bin").write_bytes(b"")
    refused(model, tmp_path / "out", "pytorch_model.bin, a pickle, which can run code")
    (model / "adapter_model.safetensors").write_bytes(b"")
    refused(model, tmp_path / "out", "holds an adapter")


def test_a_shard_that_is_absent(model: Any, tmp_path: Path) -> None:
    name = sorted(path.name for path in model.glob("*.safetensors"))[1]
    (model / name).unlink()
    refused(model, tmp_path / "out", f"names {name}, absent from the directory")


def test_a_tensor_that_is_not_in_its_shard(model: Any, tmp_path: Path) -> None:
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.extra.weight"] = index["weight_map"]["model.norm.weight"]
    path.write_text(json.dumps(index))
    refused(model, tmp_path / "out", "tensor 'model.extra.weight' is not in model-0000")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {"a": "../b.safetensors"}}', "not to a file beside it"),
        ('{"weight_map": {"a": 3}}', "not to a file beside it"),
    ],
)
def test_a_broken_index(model: Any, tmp_path: Path, text: str, message: str) -> None:
    (model / "model.safetensors.index.json").write_text(text)
    refused(model, tmp_path / "out", message)


def test_a_truncated_shard(model: Any, tmp_path: Path) -> None:
    path = sorted(model.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-100])
    refused(model, tmp_path / "out", f"{path.name}: truncated")


def test_a_corrupt_shard(model: Any, tmp_path: Path) -> None:
    path = sorted(model.glob("*.safetensors"))[1]
    path.write_bytes(b"\xff" * 200)
    refused(model, tmp_path / "out", f"{path.name} is not a safetensors file")


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "nan"), (float("inf"), "inf"), (float("-inf"), "-inf")])
@pytest.mark.parametrize("format", ["fp6_e3m2", "uint4", "mxfp6_e2m3"])
def test_a_weight_that_is_not_finite(model: Any, tmp_path: Path, value: float, word: str, format: str) -> None:
    weight = torch.randn(64, 96, dtype=torch.bfloat16)
    weight[37, 71] = value
    path = change(model, DOWN, weight)
    refused(
        model,
        tmp_path / "out",
        rf"{path.name}: tensor 'model.layers.0.mlp.down_proj.weight' holds {word} at \[37, 71\]",
        format=format,
    )


def test_the_index_of_a_nan_in_a_transposed_weight(tmp_path: Path) -> None:
    source = checkpoints.save("gpt2", tmp_path / "model")
    tensors = checkpoints.weights(source)
    tensors["transformer.h.1.attn.c_attn.weight"][5, 120] = float("nan")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    refused(source, tmp_path / "out", r"'transformer.h.1.attn.c_attn.weight' holds nan at \[5, 120\]")


def test_a_shape_that_is_not_the_configs(model: Any, tmp_path: Path) -> None:
    edit(model, hidden_size=128)
    refused(model, tmp_path / "out", r"has shape \[96, 64\], and LlamaForCausalLM .* wants \[96, 128\]")


def test_a_dtype_that_is_no_weights(model: Any, tmp_path: Path) -> None:
    change(model, DOWN, torch.zeros(64, 96, dtype=torch.int8))
    refused(model, tmp_path / "out", "has dtype I8: only F16, BF16, F32, F64 weights can be compressed")


def test_a_scale_beyond_its_dtype(model: Any, tmp_path: Path) -> None:
    change(model, DOWN, torch.full((64, 96), 3e38, dtype=torch.bfloat16))
    refused(model, tmp_path / "out", "'model.layers.0.mlp.down_proj.weight': a scale of .* is beyond float16's largest")


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "tersor", "version": 99}, "tersor"),
        ({"bits": 4}, "a method it does not name"),
    ],
)
def test_already_compressed(model: Any, tmp_path: Path, config: dict[str, Any], method: str) -> None:
    edit(model, quantization_config=config)
    refused(model, tmp_path / "out", f"is already compressed by {method}: start from the uncompressed model")
    edit(model, quantization_config=None, text_config={"quantization_config": config})
    refused(model, tmp_path / "out", f"is already compressed by {method}")


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "fp6_e4m2"}, r"unknown format 'fp6_e4m2', did you mean 'fp\d_e\dm2'.*\(formats: fp8_e4m3, "),
        ({"format": "int4", "scale_dtype": "half"}, "unknown scale dtype 'half'"),
        ({"group_size": 0}, "group size 0 is not .* leave it out"),
        ({"group_size": -1}, "group size -1 is not .* leave it out"),
        ({"group_size": 64.0}, "group size 64.0 is not .* leave it out"),
        (
            {"group_size": 512},
            r"group size 512 does not divide the 64 .* \(group sizes that do, for every layer: 8, 16, 32\)",
        ),
        (
            {"group_size": 24},
            r"group size 24 does not divide the 64 .* \(group sizes that do, for every layer: 8, 16, 32\)",
        ),
        ({"format": "mxfp6_e2m3", "group_size": 64}, "groups of 32"),
        ({"format": "fp66"}, "unknown format 'fp66', did you mean 'fp6'?"),
        ({"algorithm": "awq"}, r"unknown algorithm 'awq': it is a transform \(--transform awq\)"),
        ({"algorithm": "rnt"}, "unknown algorithm 'rnt', did you mean 'rtn'"),
        ({"export": "huming"}, "unknown export 'huming', did you mean 'humming'"),
        ({"device": "gpu"}, "unknown device 'gpu': use auto, cpu, cuda or cuda:N"),
        ({"device": "meta"}, "unknown device 'meta'"),
        ({"shard_size": 0}, "shard size 0 is not"),
        ({"shard_size": "5GB"}, "shard size '5GB' is not a positive number of bytes"),
        ({"shard_size": float("inf")}, "shard size inf is not"),
        ({"ignore": "lm_head"}, "ignore is 'lm_head': give a list of patterns"),
        ({"ignore": [""]}, "ignore: an empty pattern finds every module"),
        ({"ignore": ["("]}, r"ignore: '\(' is not a regular expression"),
        ({"ignore": ["norms"]}, "ignore 'norms' matches no module .*they are called like 'model.layers.0"),
        ({"ignore": ["."]}, "no linear layer is left to compress"),
        ({"overrides": ["(=int4"]}, "is not a regular expression"),
        ({"overrides": ["down_proj"]}, "is not REGEX=FORMAT"),
        ({"overrides": "down_proj=int4"}, "give a list of REGEX=FORMAT or a mapping"),
        ({"overrides": ["down_prj=int4"]}, "override 'down_prj' matches no linear layer"),
        (
            {"overrides": ["embed=int4"]},
            "finds only model.embed_tokens .*left alone unless the pattern says 'embed_tokens'",
        ),
        ({"overrides": ["head=int4"]}, "finds only lm_head .*left alone unless the pattern says 'lm_head'"),
        ({"overrides": ["down_proj=int4:g40"]}, "group size 40 does not divide the 96 input channels of .*down_proj"),
    ],
)
def test_options(model: Any, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    refused(model, tmp_path / "out", message, **options)


def test_a_head_that_shares_the_embedding(tmp_path: Path) -> None:
    source = checkpoints.save("llama", tmp_path / "model", tie_word_embeddings=True)
    refused(source, tmp_path / "out", "finds only lm_head, which has no weight of its own", overrides=["lm_head=int8"])


def test_cuda_where_there_is_none(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "cuda_available", lambda: False)
    refused(model, tmp_path / "out", r"device 'cuda:0': torch \S+ sees no CUDA GPU here: use cpu", device="cuda:0")


# Output


def test_output_that_exists(model: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    refused(model, tmp_path / "out", "output .*out exists: choose another name, or remove it")
    refused(model, model, "exists")


def test_output_inside_the_model(model: Any) -> None:
    refused(model, model / "out", "lies in the model's own directory")


def test_no_output(model: Any) -> None:
    with pytest.raises(TersorError, match="no output directory given"):
        quantize(model, None)
