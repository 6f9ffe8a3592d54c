"""Which files come along with a model: all that is no weight, and nothing that is about weights left behind."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from helpers import checkpoints
from huggingface_hub.utils import filter_repo_objects

from tersor.checkpoint.companions import HUB_IGNORE, companions
from tersor.convert import quantize
from tersor.errors import CheckpointError

WEIGHTS = ("config.json", "model.safetensors")
COMING = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "vocab.txt", "vocab.bpe", "bpe.codes", "sentencepiece.bpe.model", "spiece.model", "source.spm"),
    *("qwen.tiktoken", "tekken.json", "emoji.json", "dict.txt", "vocab-src.json", "merges", "normalizer.json"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "chat_template.jinja"),
    *("chat_template.json", "generation_config.json", "modeling_own.py", "configuration_own.py", "sub/module.py"),
    *("custom_generate/generate.py", "custom_generate/requirements.txt", "additional_chat_templates/tool.jinja"),
    *("LICENSE", "LICENCE.txt", "NOTICE", "USE_POLICY.md", "modules.json", "config_sentence_transformers.json"),
    *("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "3_Dense/pytorch_model.bin"),
    *("3_Dense/config.json", "4_Router/deep/model.safetensors", "4_Router/deep/config.json"),
    *("sentence_bert_config.json", "mel_filters.npz", "speaker_embeddings/v2/a.npz"),
)
STAYING = (
    *("README.md", "README_zh.md", ".gitattributes", ".cache/huggingface/x.json", ".git/config", "tersor-state.json"),
    *("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "lora/adapter_config.json"),
    *("lora/adapter_model.safetensors", "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "tf_model.h5"),
    *("pytorch_model.bin.index.json", "tf_model.h5.index.json", "flax_model.msgpack", "rust_model.ot", "own.gguf"),
    *("model.fp16.safetensors", "original/consolidated.00.pth", "original/params.json", "original/tokenizer.model"),
    *("consolidated.safetensors", "consolidated.00.pth", "params.json", "quantize_config.json", "quant_config.json"),
    *("hf_quant_config.json", "onnx/model.onnx", "onnx/model.onnx_data", "onnx/config.json", "openvino/openvino.xml"),
    *("openvino_model.xml", "openvino_model.bin", "optimizer.pt", "scheduler.pt", "trainer_state.json"),
    *("training_args.bin", "rng_state.pth", "runs/a/events.out.tfevents.1", "checkpoint-500/tokenizer.json"),
    *("global_step5/x.json", "other/model.safetensors", "other/config.json", "logo.png", "weights.npz", "run.log"),
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = checkpoints.write({name: name.encode() for name in (*WEIGHTS, *COMING, *STAYING)}, tmp_path / "model")
    paths = ["", "1_Pooling", "2_Dense", "3_Dense", "4_Router", "../outside", "/etc"]
    (folder / "modules.json").write_text(json.dumps([{"idx": 0, "path": path, "type": "x"} for path in paths]))
    return folder


def test_all_that_is_no_weight_comes_along_and_nothing_else(model: Path) -> None:
    found = {path.as_posix() for path in companions(model, WEIGHTS)}
    assert found == set(COMING)


def test_the_hub_is_asked_for_the_same_files(model: Path) -> None:
    asked = set(filter_repo_objects([*WEIGHTS, *COMING, *STAYING], ignore_patterns=HUB_IGNORE))
    assert asked >= {*WEIGHTS, *COMING}
    assert not {name for name in asked & set(STAYING) if not name.endswith(".json")}


def test_folders_are_copied_with_their_bytes_and_links_as_files(tmp_path: Path) -> None:
    source = checkpoints.save("llama", tmp_path / "model")
    checkpoints.write({"blob": b"vocabulary" * 300_000, "code/generate.py": b"x = 1\n"}, tmp_path / "blobs")
    (source / "vocab.bpe").symlink_to(tmp_path / "blobs" / "blob")
    (source / "custom_generate").symlink_to(tmp_path / "blobs" / "code")
    (tmp_path / "blobs" / "code" / "loop").symlink_to(tmp_path / "blobs" / "code")
    quantize(source, tmp_path / "out")
    assert (tmp_path / "out/vocab.bpe").read_bytes() == b"vocabulary" * 300_000
    assert not (tmp_path / "out/vocab.bpe").is_symlink()
    assert (tmp_path / "out/custom_generate/generate.py").read_text() == "x = 1\n"
    assert not (tmp_path / "out/custom_generate/loop").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.symlink_to("nothing"), "vocab.bpe is a link to nothing"),
        (lambda path: path.symlink_to("vocab.bpe"), "cannot read .*vocab.bpe: Too many levels of symbolic links"),
        (os.mkfifo, "vocab.bpe is no regular file"),
    ],
)
def test_a_companion_that_cannot_be_copied_is_said_before_any_weight(
    make: object, message: str, tmp_path: Path
) -> None:
    source = checkpoints.save("llama", tmp_path / "model")
    make(source / "vocab.bpe")  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=message):
        quantize(source, tmp_path / "out", progress=lambda *_: pytest.fail("weights were read"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
