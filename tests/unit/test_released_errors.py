"""What is wrong with a compressed checkpoint, or not read of it, is one line before the first byte is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import checkpoints, released
from safetensors.torch import save_file

from tersor.checkpoint.source import without_quantization
from tersor.cli.main import run
from tersor.convert import quantize
from tersor.errors import InputError

Q = "model.layers.0.self_attn.q_proj"


def refused(model: Path, output: Path, message: str, **options: Any) -> None:
    """Compression ends in one line that holds `message` and leaves nothing behind."""
    with pytest.raises(InputError, match=message) as caught:
        quantize(model, output, **options)
    assert "\n" not in str(caught.value)
    assert not list(output.parent.glob(output.name + "*"))


def change(model: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of a checkpoint of one file."""
    path = model / "model.safetensors"
    tensors = checkpoints.load(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("case", "part"),
    [
        ("fp8 blocks", "weight_scale_inv"),
        ("gptq 4", "qzeros"),
        ("gptq 4", "scales"),
        ("awq", "scales"),
        ("nf4", "weight.absmax"),
        ("nf4", "weight.quant_map"),
        ("nf4 nested", "weight.nested_absmax"),
        ("nvfp4", "weight_scale"),
        ("llm.int8", "weight"),
    ],
)
def test_a_part_that_is_missing_is_named(case: str, part: str, tmp_path: Path) -> None:
    packed, _ = released.save(tmp_path, *released.CASES[case])
    change(packed, lambda tensors: tensors.__delitem__(f"{Q}.{part}"))
    refused(packed, tmp_path / "out", rf"model.safetensors: tensor '{Q}.{part}' is missing beside '{Q}")


@pytest.mark.parametrize(
    ("case", "part"),
    [("fp8 blocks", "weight"), ("gptq 4", "qweight"), ("awq", "qweight"), ("nf4", "weight.quant_state.*nf4")],
)
def test_a_part_without_its_weight_is_named(case: str, part: str, tmp_path: Path) -> None:
    packed, _ = released.save(tmp_path, *released.CASES[case])

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(f"{Q}.{part.partition('*')[0]}")]:
            if name.endswith(part.rpartition("*")[2]):
                del tensors[name]

    change(packed, edit)
    refused(packed, tmp_path / "out", rf"tensor '{Q}.* belongs to no compressed weight")


@pytest.mark.parametrize(
    ("case", "part", "shape"),
    [
        ("fp8 blocks", "weight_scale_inv", (3, 2)),
        ("gptq 4", "scales", (4, 63)),
        ("gptq 4", "g_idx", (63,)),
        ("gptq 4", "qzeros", (3, 8)),
        ("awq", "qzeros", (3, 8)),
        ("nf4", "weight.absmax", (63,)),
        ("nf4", "weight.quant_map", (15,)),
        ("llm.int8", "SCB", (63,)),
    ],
)
def test_a_shape_that_does_not_fit_is_named(case: str, part: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    packed, _ = released.save(tmp_path, *released.CASES[case])

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q}.{part}"] = torch.zeros(shape, dtype=tensors[f"{Q}.{part}"].dtype)

    change(packed, edit)
    refused(packed, tmp_path / "out", rf"tensor '{Q}.{part}' has shape \[{', '.join(map(str, shape))}\]")


@pytest.mark.parametrize(
    ("case", "part", "dtype"),
    [
        ("fp8 blocks", "weight_scale_inv", torch.int32),
        ("gptq 4", "qweight", torch.int64),
        ("gptq 4", "scales", torch.int16),
        ("awq", "qzeros", torch.int16),
        ("nf4", "weight.absmax", torch.uint8),
    ],
)
def test_a_dtype_that_does_not_fit_is_named(case: str, part: str, dtype: torch.dtype, tmp_path: Path) -> None:
    packed, _ = released.save(tmp_path, *released.CASES[case])

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q}.{part}"] = tensors[f"{Q}.{part}"].to(dtype)

    change(packed, edit)
    refused(packed, tmp_path / "out", rf"tensor '{Q}.{part}' has dtype [IU]\d+, not ")


METHODS = (
    "aqlm",
    "bitnet",
    "eetq",
    "fp_quant",
    "higgs",
    "hqq",
    "humming",
    "quanto",
    "sinq",
    "spqr",
    "tersor",
    "torchao",
    "vptq",
    "a_method_of_tomorrow",
)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_that_is_not_read_is_named(method: str, tmp_path: Path) -> None:
    model = checkpoints.save("llama", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    settings = {"quant_method": method, "format": "fp6_e3m2"}
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    refused(model, tmp_path / "out", f"is already compressed by {method}: start from the uncompressed model")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "awq", "bits": 4, "version": "gemv_fast"}, r"awq \(gemv_fast\)"),
        ({"quant_method": "gptq", "format": "bitblas"}, r"gptq \(bitblas\)"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, r"gptq \(marlin\)"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, r"compressed-tensors \(marlin-24\)"),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "dense",
                "sparsity_config": {"format": "sparse-24-bitmask"},
            },
            r"compressed-tensors \(dense\) \(sparse-24-bitmask\)",
        ),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, r"modelopt \(W4A8_AWQ\): start"),
        ({"quant_method": "awq", "version": "gemm"}, "awq: start .*no tensor is stored as that method stores one"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:exllamav3"}, "auto-round"),
    ],
)
def test_a_format_of_a_method_that_is_not_read_is_named(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    model = checkpoints.save("llama", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    refused(model, tmp_path / "out", f"is already compressed by {words}")


def move_settings(model: Path, name: str, settings: dict[str, Any]) -> None:
    """Write the settings to a file beside config.json, which says nothing of them any more."""
    config = json.loads((model / "config.json").read_text())
    config.pop("quantization_config")
    (model / "config.json").write_text(json.dumps(config))
    (model / name).write_text(json.dumps(settings))


def test_an_old_gptq_folder_is_known_by_its_own_file(tmp_path: Path) -> None:
    packed, plain = released.save(tmp_path, *released.CASES["gptq 4"])
    move_settings(packed, "quantize_config.json", {"bits": 4, "group_size": 16, "desc_act": True, "sym": False})
    report = quantize(packed, tmp_path / "out")
    assert report.source_method == "gptq"
    assert not (tmp_path / "out/quantize_config.json").exists()
    quantize(plain, tmp_path / "expected")
    ours, theirs = checkpoints.weights(tmp_path / "out"), checkpoints.weights(tmp_path / "expected")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    (packed / "model.safetensors").rename(packed / "gptq_model-4bit-128g.safetensors")
    refused(packed, tmp_path / "again", "holds GPTQ weights as gptq_model-4bit-128g.safetensors, an old name: rename")


def test_a_file_of_settings_that_was_left_beside_plain_weights_means_nothing(tmp_path: Path) -> None:
    model = checkpoints.save("llama", tmp_path / "model")
    (model / "quantize_config.json").write_text('{"bits": 4}')
    assert quantize(model, tmp_path / "out").source_method == ""
    assert not (tmp_path / "out/quantize_config.json").exists()


@pytest.mark.parametrize(("case", "part"), [("gptq 4", "q"), ("nf4", "weight.absmax"), ("fp8 blocks", "weight_scale")])
def test_compressed_weights_of_which_no_file_says_the_method_are_refused(case: str, part: str, tmp_path: Path) -> None:
    packed, _ = released.save(tmp_path, *released.CASES[case])
    path = packed / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config))
    refused(packed, tmp_path / "out", rf"tensor 'model.*\.{part}.* is part of a compressed weight, and no file of ")


@pytest.mark.parametrize(
    ("case", "name", "settings", "method"),
    [
        ("awq", "quant_config.json", {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}, "awq"),
        ("nvfp4", "hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4"}}, r"modelopt (NVFP4)"),
    ],
)
def test_settings_beside_config_json_are_found(
    case: str, name: str, settings: dict[str, Any], method: str, tmp_path: Path
) -> None:
    packed, _ = released.save(tmp_path, *released.CASES[case])
    move_settings(packed, name, settings)
    assert quantize(packed, tmp_path / "out").source_method == method
    assert not (tmp_path / "out" / name).exists()


def test_nothing_of_the_old_compression_is_left_in_config_json(tmp_path: Path) -> None:
    packed, _ = released.save(tmp_path, *released.CASES["fp8 blocks"])
    path = packed / "config.json"
    config = json.loads(path.read_text())
    config["compression_config"] = config.pop("quantization_config")
    path.write_text(json.dumps(config))
    assert quantize(packed, tmp_path / "out").source_method == "fp8"
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["quantization_config"]["quant_method"] == "tersor"
    assert "compression_config" not in written
    nested = {"a": 1, "text_config": {"b": 2, "quantization_config": {"quant_method": "fp8"}}}
    assert without_quantization(nested) == {"a": 1, "text_config": {"b": 2}}


def test_a_revision_of_a_folder_is_refused(tmp_path: Path) -> None:
    model = checkpoints.save("llama", tmp_path / "model")
    refused(model, tmp_path / "out", "revision 'main' is for a hub id, and .*model is a path here", revision="main")


def test_a_revision_is_the_one_that_the_hub_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    model = checkpoints.save("llama", tmp_path / "model")
    asked: list[Any] = []

    def snapshot_download(hub_id: str, revision: str | None = None, **options: Any) -> str:
        asked.append((hub_id, revision))
        if revision == "nowhere":
            raise ValueError("Revision Not Found")
        return str(model)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    quantize("org/name", tmp_path / "out", revision="v1.0")
    assert asked == [("org/name", "v1.0")]
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"]["provenance"]["source_revision"] == "v1.0"
    refused(
        Path("org/name"),
        tmp_path / "again",
        "'org/name' at revision 'nowhere' is not .*: Revision Not Found",
        revision="nowhere",
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["quantize", "MODEL", "--dry-run"],
        ["inspect", "MODEL"],
        ["generate", "MODEL", "--prompt", "x"],
        ["eval", "MODEL", "--text", "TEXT"],
        ["compile", "MODEL", "--chip", "h200"],
        ["demo", "--model", "MODEL"],
    ],
)
def test_every_verb_that_takes_a_model_takes_a_revision(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = checkpoints.save("llama", tmp_path / "model")
    text = tmp_path / "text"
    text.write_text("some words")
    places = {"MODEL": str(model), "TEXT": str(text)}
    assert run([*(places.get(item, item) for item in arguments), "--revision", "v1"]) == 2
    assert "revision 'v1' is for a hub id" in capsys.readouterr().err


def test_the_verb_says_what_a_compressed_source_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed, _ = released.save(tmp_path, *released.CASES["gptq_v2"])
    for options in (["--dry-run"], ["-o", str(tmp_path / "out")]):
        assert run(["quantize", str(packed), *options]) == 0
        assert capsys.readouterr().out.startswith("model is compressed by gptq (gptq_v2) already: decoded on the way")
    assert run(["inspect", str(packed)]) == 0
    assert "gptq" in capsys.readouterr().out
