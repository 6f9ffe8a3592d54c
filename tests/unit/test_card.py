"""The model card of a compressed checkpoint says what loads it, and what happens without Tersor."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import checkpoints, tiny_lm

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


def test_the_card_of_another_engines_checkpoint_says_that_such_an_engine_reads_it() -> None:
    text = card({}, "quark")
    assert "load it with an engine that reads it" in text
    assert "Without Tersor" not in text
