"""The model card of a compressed checkpoint says what loads it, and what happens without Tersor."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import calibrated, checkpoints, tiny_lm

from tersor.checkpoint import QuantizationConfig
from tersor.checkpoint.exports import get_export
from tersor.checkpoint.source import open_source
from tersor.convert.card import model_card
from tersor.convert.job import quantize
from tersor.formats import get_scheme


def card(changes: dict[str, Any], export: str = "tersor") -> str:
    """Return the card of the bundled model, its config changed, in int4."""
    conversion: Any = SimpleNamespace(config=QuantizationConfig(get_scheme("int4")), steps=())
    with open_source(tiny_lm.TINY) as source:
        source.config.update(changes)
        return model_card(source, conversion, get_export(export, "bfloat16"), "rtn")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, 'AutoModelForCausalLM.from_pretrained("path/to/this/directory")'),
        ({"architectures": None}, 'AutoModelForCausalLM.from_pretrained("path/to/this/directory")'),
        ({"architectures": ["T5Model"]}, 'T5Model.from_pretrained("path/to/this/directory")'),
        (
            {"auto_map": {"AutoConfig": "files.MineConfig", "AutoModel": "files.Mine"}, "architectures": ["Mine"]},
            'AutoModel.from_pretrained("path/to/this/directory", trust_remote_code=True)',
        ),
    ],
)
def test_the_card_says_which_class_loads_a_checkpoint(changes: dict[str, Any], line: str) -> None:
    text = card(changes)
    assert f"\nmodel = {line}\n" in text
    name = line.split(".", maxsplit=1)[0]
    assert f"\nfrom transformers import {name}\n" in text


def test_the_card_says_that_tersor_must_be_installed_and_what_happens_without(tmp_path: Path) -> None:
    model = checkpoints.save("llama", tmp_path / "model")
    quantize(model, tmp_path / "out", format="int4")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "must be installed where the model is loaded: `pip install .`" in text
    assert "**Without Tersor the model is noise.**" in text
    assert "random numbers in their place" in text


def test_the_card_says_what_weights_take_and_of_a_mix_what_was_chosen_for_what(tmp_path: Path) -> None:
    model = calibrated.model("llama", tmp_path / "model", num_hidden_layers=1)
    text = str(calibrated.text(tmp_path / "text.txt"))
    quantize(model, tmp_path / "int4", format="int4")
    sizes = [sum(one.nbytes for one in checkpoints.weights(tmp_path / name).values()) for name in ("int4", "model")]
    said = (tmp_path / "int4" / "README.md").read_text()
    assert "\nThey take 4.2" in said and " bits a weight, scales counted; all tensors take " in said
    assert f"all tensors take {sizes[0]:,} bytes, where those of the source take {sizes[1]:,}.\n" in said
    options: dict[str, Any] = {"levels": ["uint4:g16", "int8"], "target_bits": 6.8, "algorithm": "rtn"}
    quantize(model, tmp_path / "mix", calibration=text, calibration_tokens=64, calibration_window=32, seed=3, **options)
    said = (tmp_path / "mix" / "README.md").read_text()
    line = next(line for line in said.splitlines() if line.startswith("Of all output features "))
    shares = [float(share) for share in re.findall(r"(\S+) % are ", line)]
    assert len(shares) == 2 and sum(shares) == pytest.approx(100, abs=0.2)
    assert "\nIts output features were scored on 2 windows of 32 tokens of text.txt.\n" in said
    assert not (tmp_path / "mix" / "tersor-calibration.json").exists() and "tersor-calibration.json" not in said
    assert line.endswith("chosen for 6.8 true bits a weight; tersor-mix.json says what that is expected to lose.")


def test_the_card_of_another_engines_checkpoint_says_that_such_an_engine_reads_it() -> None:
    text = card({}, "quark")
    assert "load it with an engine that reads it" in text
    assert "Without Tersor" not in text
