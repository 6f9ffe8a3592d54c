"""Python code that comes with a model is neither run nor asked about, and runs where the user says so."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import own_code
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, dynamic_module_utils
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import tersor
from tersor.cli.main import run
from tersor.errors import CheckpointError
from tersor.integrations.transformers import load
from tersor.integrations.transformers.architecture import read_architecture
from tersor.nn import PackedLinear

TEXT = "A checkpoint holds weights, and code reads them. " * 8
REFUSED = "which is not run: read it, and add --trust-remote-code"
TRUST = "--trust-remote-code"


@pytest.fixture(scope="module", autouse=True)
def copies_of_code(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep transformers' copies of code that runs in a folder of this module's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr(sys, "path", list(sys.path))
        for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
            patch.delitem(sys.modules, name)
        yield
        for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
            del sys.modules[name]


@pytest.fixture(autouse=True)
def answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> io.StringIO:
    """Standard input would answer yes to every question."""
    stdin = io.StringIO("y\n" * 8)
    monkeypatch.setattr(sys, "stdin", stdin)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "text.txt").write_text(TEXT)
    return stdin


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed model with code of its own."""
    folder = tmp_path_factory.mktemp("own")
    own_code.make(folder / "plain", config={})
    tersor.quantize(folder / "plain", folder / "packed", format="int4", group_size=64)
    own_code.edit(folder / "packed" / "config.json", {"model_type": "mine", "auto_map": own_code.AUTO_MAP})
    own_code.ran(folder / "plain").unlink(missing_ok=True)
    return folder / "packed"


def words_of(verb: str, model: Path, folder: Path) -> list[str]:
    """Return a short command line of a verb that opens a model."""
    text = str(folder / "text.txt")
    return {
        "quantize": ["quantize", str(model), "-o", str(folder / "out"), "-f", "int4", "--group-size", "64"],
        "dry run": ["quantize", str(model), "--dry-run"],
        "inspect": ["inspect", str(model)],
        "eval": ["eval", str(model), "--text", text, "--window", "32", "--max-tokens", "64", "--device", "cpu"],
        "reference": ["eval", str(model), "--reference", str(model), "--text", text, "--window", "32"],
        "generate": ["generate", str(model), "--prompt", "def", "-n", "2", "--device", "cpu"],
        "bench linear": ["bench", "linear", str(model), "--dry-run", "--chip", "h200", "--n", "1"],
        "bench tune": ["bench", "tune", str(model)],
        "demo": ["demo", "--model", str(model), "-n", "2", "--max-tokens", "64", "--window", "32", "--format", "int4"],
    }[verb]


def refused(words: list[str], answer: io.StringIO, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Run a command line that ends in the one line, having run none of the model's code and read no answer."""
    assert run(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert REFUSED in captured.err
    assert answer.read() == "y\n" * 8
    assert not own_code.ran(model).exists()


@pytest.mark.parametrize(
    "verb", ["quantize", "dry run", "eval", "reference", "generate", "bench linear", "bench tune", "demo"]
)
def test_a_verb_neither_runs_the_code_of_a_model_nor_asks(
    verb: str, answer: io.StringIO, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = own_code.make(tmp_path / "model")
    refused(words_of(verb, model, tmp_path), answer, model, capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["inspect", "eval", "generate"])
def test_a_verb_does_not_for_a_compressed_model_either(
    verb: str, packed: Path, answer: io.StringIO, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(words_of(verb, packed, tmp_path), answer, packed, capsys)


def test_serving_has_no_use_for_the_code_of_a_model(
    answer: io.StringIO, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = own_code.make(tmp_path / "model")
    assert run(["serve", str(model), "--device", "cpu", "--port", "0"]) == 1
    assert "the engine does not have MineForCausalLM" in capsys.readouterr().err
    assert answer.read() == "y\n" * 8
    assert not own_code.ran(model).exists()


def test_a_batch_has_no_use_for_the_code_of_a_model(
    answer: io.StringIO, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = own_code.make(tmp_path / "model")
    (tmp_path / "in.jsonl").write_text("{}\n")
    words = ["batch", "-m", str(model), "-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")]
    assert run([*words, "--device", "cpu"]) == 1
    assert "the engine does not have MineForCausalLM" in capsys.readouterr().err
    assert answer.read() == "y\n" * 8
    assert not own_code.ran(model).exists()


def test_kernels_are_compiled_without_the_code_of_a_model(
    packed: Path, answer: io.StringIO, capsys: pytest.CaptureFixture[str]
) -> None:
    run(["compile", str(packed), "--chip", "no such chip"])
    assert "no such chip" in capsys.readouterr().err
    assert answer.read() == "y\n" * 8
    assert not own_code.ran(packed).exists()


MODEL_ONLY = {"AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "mine", "auto_map": own_code.AUTO_MAP, "trust_remote_code": True},
        {"model_type": None, "auto_map": own_code.AUTO_MAP},
        {"model_type": "vit", "auto_map": MODEL_ONLY},
        {"model_type": "mine", "auto_map": {**own_code.AUTO_MAP, "AutoConfig": "someone/else--files.MineConfig"}},
        {
            "model_type": "fuyu",
            "text_config": {"model_type": "pix2struct_text_model", "auto_map": {"AutoModel": "modeling_mine.Mine"}},
            "architectures": ["FuyuForCausalLM"],
        },
    ],
    ids=["trust in config.json", "no model type", "a class for another task", "code elsewhere", "a part of the model"],
)
def test_no_form_of_config_runs_code_or_asks(config: dict[str, Any], answer: io.StringIO, tmp_path: Path) -> None:
    model = own_code.make(tmp_path / "model", config=config)
    for call in (
        lambda: tersor.quantize(model, None, dry_run=True),
        lambda: load.load_model(model, "cpu"),
        lambda: read_architecture(model),
    ):
        with pytest.raises(CheckpointError) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert answer.read() == "y\n" * 8
    assert not own_code.ran(model).exists()


@pytest.mark.parametrize("stated", [{}, {"trust_remote_code": True}])
def test_a_tokenizer_of_its_own_is_not_run(stated: dict[str, Any], answer: io.StringIO, tmp_path: Path) -> None:
    changes = {"auto_map": own_code.TOKENIZER_MAP, "tokenizer_class": "MineTokenizer", **stated}
    model = own_code.make(tmp_path / "model", tokenizer_config=changes)
    with pytest.raises(CheckpointError, match="the tokenizer needs Python code of its own") as caught:
        load.load_tokenizer(model)
    assert REFUSED in str(caught.value)
    assert not own_code.ran(model).exists()
    assert type(load.load_tokenizer(model, trust_remote_code=True)).__name__ == "MineTokenizer"
    assert own_code.ran(model).exists()
    assert answer.read() == "y\n" * 8


def test_a_model_that_transformers_knows_uses_the_class_it_knows(
    answer: io.StringIO, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"auto_map": own_code.AUTO_MAP | {"AutoProcessor": "processing_mine.MineProcessor"}}
    model = own_code.make(tmp_path / "model", changes, {"auto_map": own_code.TOKENIZER_MAP})
    assert run(words_of("quantize", model, tmp_path)) == 0
    assert run(words_of("generate", tmp_path / "out", tmp_path)) == 0
    assert answer.read() == "y\n" * 8
    assert not own_code.ran(model).exists()
    assert "MineForCausalLM" not in type(load.load_model(tmp_path / "out", "cpu")).__name__


def test_code_that_the_user_trusts_is_quantised_inspected_evaluated_and_generates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = own_code.make(tmp_path / "model")
    assert run([*words_of("quantize", model, tmp_path), TRUST]) == 0
    assert own_code.ran(model).exists()
    packed = tmp_path / "out"
    assert (packed / "modeling_mine.py").is_file()
    assert json.loads((packed / "config.json").read_text())["auto_map"] == own_code.AUTO_MAP
    capsys.readouterr()
    assert run([*words_of("inspect", packed, tmp_path), TRUST, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["compressed_bits_per_weight"] == pytest.approx(4.25, abs=0.01)
    assert run([*words_of("eval", packed, tmp_path), TRUST, "--reference", str(model), "--json"]) == 0
    assert 0 < json.loads(capsys.readouterr().out)["models"][0]["kl"] < 1
    assert run([*words_of("generate", packed, tmp_path), TRUST]) == 0
    assert len(capsys.readouterr().out) > 1
    assert run([*words_of("bench linear", packed, tmp_path), TRUST]) == 0
    assert "model down_proj" in capsys.readouterr().out.replace("out ", "model ")


def test_from_pretrained_follows_what_its_user_says(packed: Path, tmp_path: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(packed, trust_remote_code=True)
    assert type(loaded).__name__ == "MineForCausalLM"
    assert isinstance(loaded.model.layers[0].mlp.down_proj, PackedLinear)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoModelForCausalLM.from_pretrained(packed, trust_remote_code=False)
    own_code.make(tmp_path / "plain")
    on_the_fly = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", trust_remote_code=True, quantization_config=tersor.TersorConfig("int4", group_size=64)
    )
    assert type(on_the_fly.model.layers[0].mlp.down_proj).__name__ == "PackedLinear"
    own_code.ran(tmp_path / "plain").unlink()


def test_a_class_that_the_program_registered_goes_before_the_code(
    answer: io.StringIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OursConfig(LlamaConfig):
        model_type = "mine"

    class OursForCausalLM(LlamaForCausalLM):
        config_class = OursConfig

    for mapping in (CONFIG_MAPPING, AutoModelForCausalLM._model_mapping):
        monkeypatch.setattr(mapping, "_extra_content", dict(mapping._extra_content))
    AutoConfig.register("mine", OursConfig)
    AutoModelForCausalLM.register(OursConfig, OursForCausalLM)
    model = own_code.make(tmp_path / "model")
    for trusted in (False, True):
        assert read_architecture(model, trust_remote_code=trusted).name == "OursForCausalLM"
    assert type(load.load_model(model, "cpu")) is OursForCausalLM
    assert not own_code.ran(model).exists()
    assert answer.read() == "y\n" * 8


class Bomb:
    """An object whose pickle makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (str(self.path), "w")


def test_nothing_is_unpickled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = own_code.make(tmp_path / "model", config={})
    for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "tokenizer.pkl", "model.pt"):
        torch.save({"lm_head.weight": Bomb(tmp_path / "unpickled")}, model / name)
    for verb in ("dry run", "inspect", "eval", "generate", "quantize"):
        assert run([*words_of(verb, model, tmp_path), *([TRUST] if verb != "eval" else [])]) == 0
    own_code.edit(model / "config.json", {"transformers_weights": "pytorch_model.bin"})
    (model / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["q_proj"]}')
    for verb in ("eval", "generate"):
        assert run(words_of(verb, model, tmp_path)) == 2
    (model / "model.safetensors").unlink()
    for verb in ("dry run", "inspect", "eval", "generate"):
        assert run([*words_of(verb, model, tmp_path)]) == 2
    assert not (tmp_path / "unpickled").exists()


def test_a_question_may_be_asked_again_afterwards(tmp_path: Path) -> None:
    before = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    with pytest.raises(CheckpointError):
        read_architecture(own_code.make(tmp_path / "model"))
    assert before == dynamic_module_utils.TIME_OUT_REMOTE_CODE > 0
