"""What is wrong with a checkpoint or an option, said in one line, before or instead of a model with random weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import packed_models as models
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

import tersor
from tersor.errors import CheckpointError, FormatError, InputError, NonFiniteError, UnsupportedError

LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("llama")
    plain = models.plain("llama", folder / "plain")
    return plain, models.compressed(plain, folder / "packed", format="uint4", group_size=32)


@pytest.fixture
def broken(llama: tuple[Path, Path], tmp_path: Path) -> Callable[..., Path]:
    """Return a function that copies the compressed model with its tensors and its quantization_config changed."""

    def make(
        change: Callable[[dict[str, Any]], object] = lambda tensors: None,
        configure: Callable[[dict[str, Any]], object] = lambda config: None,
    ) -> Path:
        directory = tmp_path / "broken"
        shutil.copytree(llama[1], directory)
        tensors = models.tensors(directory)
        change(tensors)
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        config = json.loads((directory / "config.json").read_text())
        configure(config["quantization_config"])
        (directory / "config.json").write_text(json.dumps(config))
        return directory

    return make


def refused(directory: Path, kind: type[Exception], *words: str, **options: Any) -> None:
    with pytest.raises(kind) as caught:
        AutoModelForCausalLM.from_pretrained(directory, **options)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text
    assert isinstance(caught.value, tersor.errors.TersorError)


@pytest.mark.parametrize("name", ["weight_scale", "weight_zero_point"])
def test_a_missing_companion(broken: Callable[..., Path], name: str) -> None:
    directory = broken(lambda tensors: tensors.pop(f"{LAYER}.{name}"))
    refused(directory, CheckpointError, f"{LAYER}.{name} is missing")


def test_a_missing_weight(broken: Callable[..., Path]) -> None:
    def remove(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(LAYER)]:
            del tensors[name]

    refused(broken(remove), CheckpointError, f"holds neither {LAYER}.weight nor its packed form")


def test_missing_weights_of_experts_and_conv1d(tmp_path: Path) -> None:
    for name, layer in {
        "mixtral": "model.layers.1.block_sparse_moe.experts.2.w2",
        "gpt2": "transformer.h.1.attn.c_proj",
    }.items():
        packed = models.compressed(models.plain(name, tmp_path / name), tmp_path / f"{name}-packed")
        tensors = {
            key: tensor for key, tensor in models.tensors(packed).items() if not key.startswith(f"{layer}.weight")
        }
        save_file(tensors, packed / "model.safetensors", {"format": "pt"})
        refused(packed, CheckpointError, layer.replace("block_sparse_moe", "mlp") + ".weight")


def test_missing_plain_weights_are_an_error_while_loading_too(llama: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(llama[0], tmp_path / "plain")
    tensors = models.tensors(tmp_path / "plain")
    del tensors[f"{LAYER}.weight"]
    save_file(tensors, tmp_path / "plain" / "model.safetensors", {"format": "pt"})
    refused(tmp_path / "plain", CheckpointError, f"{LAYER}.weight", quantization_config=tersor.TersorConfig())


def test_packed_weights_that_all_belong_to_no_layer(broken: Callable[..., Path]) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".weight_" in name]:
            tensors[name.replace("layers.", "layers.7")] = tensors.pop(name)

    refused(
        broken(add), CheckpointError, "model.layers.7", "belongs to no layer of LlamaForCausalLM, nor does any other"
    )


@pytest.mark.parametrize("name", ["weight_packed", "weight_scale", "weight_zero_point"])
def test_a_wrong_shape(broken: Callable[..., Path], name: str) -> None:
    def shorten(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{LAYER}.{name}"] = tensors[f"{LAYER}.{name}"][1:].clone()

    refused(broken(shorten), CheckpointError, f"{LAYER}.{name}", "[63, ", "[64, ", "uint4:g32:float16")


def test_a_wrong_dtype(broken: Callable[..., Path]) -> None:
    def widen(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{LAYER}.weight_scale"] = tensors[f"{LAYER}.weight_scale"].float()

    refused(broken(widen), CheckpointError, f"{LAYER}.weight_scale is F32", "torch.float16")


def test_zero_points_that_the_scheme_does_not_have(broken: Callable[..., Path]) -> None:
    directory = broken(configure=lambda config: config.update(format="int4"))
    refused(directory, CheckpointError, "has a weight_zero_point, which int4:g32:float16 has not")


def test_a_packed_weight_that_the_config_ignores(broken: Callable[..., Path]) -> None:
    directory = broken(configure=lambda config: config["ignore"].append("down_proj"))
    refused(directory, CheckpointError, "down_proj is packed, and quantization_config says to ignore it")


def test_a_config_without_packed_tensors(llama: tuple[Path, Path], broken: Callable[..., Path]) -> None:
    directory = broken()
    shutil.copy(llama[0] / "model.safetensors", directory / "model.safetensors")
    refused(directory, CheckpointError, "config.json says tersor, and no tensor is called *.weight_packed")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 6}, ["version 6", "version 5"]),
        ({"group_sise": 3}, ["unknown key 'group_sise'", "did you mean 'group_size'"]),
        ({"overrides": {"x": {"format": "int4", "bits": 3}}}, ["unknown key 'bits'"]),
        ({"format": "fp6_e4m2"}, ["fp6_e4m2"]),
        ({"ignore": ["("]}, ["'('", "not a regular expression"]),
        ({"group_size": "32"}, ["group_size is '32'"]),
    ],
)
def test_a_config_that_is_none(broken: Callable[..., Path], change: dict[str, Any], words: list[str]) -> None:
    refused(broken(configure=lambda config: config.update(change)), InputError, *words)


def test_options_are_checked_where_they_are_given() -> None:
    with pytest.raises(FormatError, match="fp6_e4m2"):
        tersor.TersorConfig("fp6_e4m2")
    with pytest.raises(FormatError, match=r"override 'x'.*int9"):
        tersor.TersorConfig(overrides={"x": "int9"})
    with pytest.raises(InputError, match="ignore is 'lm_head', not a list"):
        tersor.TersorConfig(ignore="lm_head")
    with pytest.raises(InputError, match="not a regular expression"):
        tersor.TersorConfig(ignore=["["])
    with pytest.raises(TypeError, match="formt"):
        tersor.TersorConfig(formt="int4")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"group_size": 24}, ["group size 24 does not divide"]),
        ({"ignore": ["nothing_like_it"]}, ["'nothing_like_it' matches no module"]),
        ({"overrides": {"nothing_like_it": "int8"}}, ["'nothing_like_it' matches no linear layer"]),
        ({"ignore": ["."]}, ["no linear layer is left to compress"]),
    ],
)
def test_options_that_do_not_fit_the_model(llama: tuple[Path, Path], options: dict[str, Any], words: list[str]) -> None:
    refused(llama[0], InputError, *words, quantization_config=tersor.TersorConfig(**options))


def test_a_tied_output_head_cannot_be_packed(tmp_path: Path) -> None:
    plain = models.plain("qwen2", tmp_path / "plain", tie_word_embeddings=True)
    config = tersor.TersorConfig(overrides={"lm_head": "int8"})
    refused(plain, InputError, "lm_head", "no weight of its own", quantization_config=config)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("name", "key"), [("llama", f"{LAYER}.weight"), ("gpt2", "transformer.h.1.mlp.c_fc.weight")])
def test_a_weight_that_is_not_finite(tmp_path: Path, name: str, key: str, value: float) -> None:
    plain = models.plain(name, tmp_path / "plain")
    tensors = models.tensors(plain)
    tensors[key][40, 7] = value
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    refused(plain, NonFiniteError, key, "[40, 7]", str(value), quantization_config=tersor.TersorConfig())


def test_weights_that_are_no_safetensors(llama: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(llama[0], tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save(models.tensors(llama[0]), tmp_path / "pickled" / "pytorch_model.bin")
    refused(tmp_path / "pickled", CheckpointError, "pickle", quantization_config=tersor.TersorConfig())


def test_a_state_dict_in_place_of_files(llama: tuple[Path, Path]) -> None:
    config = AutoConfig.from_pretrained(llama[1])
    with pytest.raises(UnsupportedError, match="reads names and dtypes from the checkpoint's files"):
        LlamaForCausalLM.from_pretrained(None, config=config, state_dict=models.tensors(llama[1]))


def test_sharding_by_transformers() -> None:
    quantizer = AUTO_QUANTIZER_MAPPING["tersor"](tersor.TersorConfig(), pre_quantized=True)
    model = SimpleNamespace(config=SimpleNamespace(distributed_config=object()))
    with pytest.raises(UnsupportedError, match="cannot be sharded by transformers yet: use device_map"):
        quantizer._process_model_before_weight_loading(model, checkpoint_files=["model.safetensors"])


def test_a_truncated_file(llama: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(llama[1], tmp_path / "short")
    file = tmp_path / "short" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(Exception, match=r"(?i)truncated|incomplete|invalid"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "short")


def test_a_compressed_model_is_not_compressed_again(llama: tuple[Path, Path]) -> None:
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        model = AutoModelForCausalLM.from_pretrained(llama[1], quantization_config=tersor.TersorConfig("int4"))
    assert model.config.quantization_config.to_dict()["format"] == "uint4"
