"""Loading for an evaluation: everything that can be wrong is one line that names it; and the picture."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_lm
from safetensors.torch import load_file, save_file

from tersor import evaluate, hardware, nn, plots
from tersor.cli import console
from tersor.errors import CheckpointError, InputError, TersorError, UnsupportedError
from tersor.evaluate import plot
from tersor.integrations.transformers import load


def one_line(caught: pytest.ExceptionInfo[TersorError]) -> str:
    message = str(caught.value)
    assert "\n" not in message and caught.value.exit_status == 2
    return message


def test_a_model_on_a_cpu_is_float32_unless_asked() -> None:
    assert tiny_lm.model().dtype == torch.float32 and not tiny_lm.model().training
    assert load.load_model(tiny_lm.TINY, "cpu", "bfloat16").dtype == torch.bfloat16


def test_size_and_bits_of_the_checkpoint() -> None:
    place = load.locate(tiny_lm.TINY)
    assert place.weight_bytes == (tiny_lm.TINY / "model.safetensors").stat().st_size
    assert place.plain_bits == 16.0
    assert nn.bits_per_weight(tiny_lm.model()) is None


def test_bits_of_a_compressed_model_count_its_scales() -> None:
    from tersor.formats import get_scheme
    from tersor.nn import PackedLinear

    layers = torch.nn.Sequential(PackedLinear(64, 32, get_scheme("fp6")), PackedLinear(128, 32, get_scheme("int4")))
    expected = ((6 + 16 / 64) * 64 + (4 + 16 / 128) * 128) / 192
    assert nn.bits_per_weight(layers) == pytest.approx(expected)


@pytest.mark.parametrize("load", [load.load_model, load.load_tokenizer])
def test_directories_that_are_no_model(load: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for path, words in (
        (tmp_path / "absent", "absent"),
        (tmp_path / "empty", "empty"),
        (tmp_path / "file", "is a file"),
    ):
        with pytest.raises(CheckpointError) as caught:
            load(path)
        assert words in one_line(caught) and str(path) in one_line(caught)


def test_a_directory_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        load.load_model(tiny_lm.copy(tmp_path / "bare", "config.json", "tokenizer.json"), "cpu")
    assert "no weights" in one_line(caught)


def test_truncated_weights(tmp_path: Path) -> None:
    broken = tiny_lm.copy(tmp_path / "broken")
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[:-1000])
    with pytest.raises(CheckpointError) as caught:
        load.load_model(broken, "cpu")
    assert "model.safetensors" in one_line(caught)


def test_a_tensor_that_is_not_there_is_not_made_up(tmp_path: Path) -> None:
    short = tiny_lm.copy(tmp_path / "short")
    tensors = load_file(short / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, short / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks 1 tensors") as caught:
        load.load_model(short, "cpu")
    assert "model.layers.1.mlp.up_proj.weight" in one_line(caught)


def test_an_architecture_that_does_not_exist(tmp_path: Path) -> None:
    strange = tiny_lm.copy(tmp_path / "strange")
    config = json.loads((strange / "config.json").read_text())
    (strange / "config.json").write_text(json.dumps({**config, "model_type": "no-such-thing"}))
    with pytest.raises(CheckpointError) as caught:
        load.load_model(strange, "cpu")
    assert "cannot be loaded as a language model" in one_line(caught)


def test_a_checkpoint_without_a_tokenizer(tmp_path: Path) -> None:
    bare = tiny_lm.copy(tmp_path / "bare", "config.json", "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load.load_tokenizer(bare)
    assert "no tokenizer" in one_line(caught)


def test_a_tokenizer_that_names_its_class_needs_no_configuration_of_the_model(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    named = {**json.loads((tiny_lm.TINY / "tokenizer_config.json").read_text())}
    for kind in ("PreTrainedTokenizerFast", "GPT2Tokenizer", "LlamaTokenizerFast", None):
        model = tiny_lm.copy(tmp_path / str(kind))
        (model / "tokenizer_config.json").write_text(json.dumps({**named, "tokenizer_class": kind}))
        found, expected = load.load_tokenizer(model), AutoTokenizer.from_pretrained(model)
        text = "One day, a cat\u2019s 3 friends"
        assert type(found) is type(expected) and found.eos_token_id == expected.eos_token_id
        assert found(text)["input_ids"] == expected(text)["input_ids"]
    program = f"""
import sys
from tersor.integrations.transformers.load import load_tokenizer
load_tokenizer({str(tiny_lm.TINY)!r})
print([name for name in sys.modules if name.startswith(("torch.distributed.fsdp", "torch._dynamo", "sklearn"))])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_tokenizer_that_is_not_json(tmp_path: Path) -> None:
    broken = tiny_lm.copy(tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError) as caught:
        load.load_tokenizer(broken)
    assert "tokenizer cannot be loaded" in one_line(caught)


@pytest.mark.parametrize(
    ("device", "message"),
    [("gpu", "unknown device 'gpu'"), ("meta", "unknown device"), ("cuda", "sees no CUDA GPU"), ("cuda:1", "CUDA")],
)
def test_devices_that_are_not_there(device: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tersor.hardware.cuda_available", lambda: False)
    with pytest.raises(InputError) as caught:
        load.load_model(tiny_lm.TINY, device)
    assert message in one_line(caught)
    assert hardware.resolve_device() == torch.device("cpu")


def test_an_unknown_dtype_names_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'bfloat16'"):
        load.load_model(tiny_lm.TINY, "cpu", "bfloat")


def test_texts_that_cannot_be_measured_on(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.txt").write_text(" \n\n")
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    cases = {"absent.txt": "no such text file", "empty.txt": "is empty", "blank.txt": "is empty"}
    cases |= {"latin.txt": "not UTF-8 text: byte 0xe9 at 3", ".": "cannot be read"}
    for name, words in cases.items():
        with pytest.raises(InputError) as caught:
            evaluate.read_text(tmp_path / name)
        assert words in one_line(caught)
    (tmp_path / "good.txt").write_text("caf\u00e9", encoding="utf-8")
    assert evaluate.read_text(tmp_path / "good.txt") == "caf\u00e9"


def quality(perplexity: float, kl: float | None) -> evaluate.Quality:
    compared = {} if kl is None else {"kl": kl, "kl_error": kl / 10, "reference_perplexity": 10.0}
    if kl is not None:
        compared["perplexity_ratio_error"] = 0.01
    return evaluate.Quality(windows=4, window=8, tokens=28, perplexity=perplexity, perplexity_error=0.5, **compared)


@pytest.mark.parametrize("compared", [False, True])
def test_the_picture_is_written(compared: bool, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    points = [
        plot.Point(label=name, size=size, quality=quality(perplexity, kl if compared else None))
        for name, size, perplexity, kl in (("whole", 100, 10.0, 0.0), ("six", 60, 10.2, 0.01), ("four", 40, 12.0, 0.2))
    ]
    plot.plot(points, tmp_path / "out.png")
    data = (tmp_path / "out.png").read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 5000
    plot.plot(points, tmp_path / "out.svg")
    assert "perplexity" in (tmp_path / "out.svg").read_text() or "<svg" in (tmp_path / "out.svg").read_text()


def test_a_picture_without_matplotlib_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"pip install tersor\[plot\]"):
        plots.check_plot(tmp_path / "out.png")


@pytest.mark.parametrize(
    ("name", "message"), [("out.jpeg", "written as one of .png"), ("no/out.png", "does not exist")]
)
def test_pictures_that_cannot_be_written(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        plots.check_plot(tmp_path / name)


def test_a_small_model_runs_on_one_thread_by_decision_of_a_verb(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    cpu = torch.device("cpu")
    console.choose_threads(1 << 30, cpu)
    console.choose_threads(1 << 20, torch.device("cuda"))
    assert chosen == []
    console.choose_threads(1 << 20, cpu)
    assert chosen == [1]


def test_a_ready_model_is_joined_and_multiplies_with_what_was_asked_for(tmp_path: Path) -> None:
    from tersor.convert import quantize
    from tersor.formats import Activations

    quantize(tiny_lm.TINY, tmp_path / "packed", format="fp6_e3m2")
    model = load.ready_model(tmp_path / "packed", "cpu", activations="fp8", fuse=True)
    layers = [module for module in model.modules() if isinstance(module, nn.PackedLinear)]
    assert layers and {layer.activations for layer in layers} == {Activations.E4M3}
    assert any(type(module).__name__ == "GatedMLP" for module in model.modules())
    assert not any(type(module).__name__ == "GatedMLP" for module in load.ready_model(tmp_path / "packed").modules())


def test_a_model_that_cannot_be_made_ready_says_why() -> None:
    with pytest.raises(InputError, match="has no packed layers that can be joined") as caught:
        load.ready_model(tiny_lm.TINY, "cpu", fuse=True)
    assert str(tiny_lm.TINY) in one_line(caught)
    with pytest.raises(InputError, match="did you mean 'fp8'"):
        load.ready_model("not looked for", "cpu", activations="fp9")


def test_library_code_leaves_the_threads_of_the_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading, evaluating and generating are called from other programs, too."""
    from tersor.integrations.transformers.generate import stream

    monkeypatch.setattr(torch, "set_num_threads", lambda count: pytest.fail("torch's threads were set"))
    model = load.ready_model(tiny_lm.TINY, "cpu")
    tokenizer = load.load_tokenizer(tiny_lm.TINY)
    windows = evaluate.cut_windows("def square(x):\n    return x * x\n" * 20, tokenizer, window=16, max_tokens=32)
    assert evaluate.evaluate(model, windows).windows == 2
    assert "".join(stream(model, tokenizer, "def f", max_new_tokens=2))
