"""Every model type with names of its own in transformers' conversion mapping: each linear layer is found, or said."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

SCRIPT = Path(__file__).resolve().parents[2] / "bench/architectures.py"
EIGHTHS = range(8)


@pytest.fixture(scope="module")
def architectures() -> Any:
    spec = importlib.util.spec_from_file_location("architectures", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = sys.modules["architectures"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RENAMED = [name for name in CONFIG_MAPPING if get_checkpoint_conversion_mapping(name) is not None]


@pytest.mark.parametrize("part", EIGHTHS)
def test_no_linear_layer_of_a_renamed_model_is_passed_over_in_silence(architectures: Any, part: int) -> None:
    found = []
    for model_type in RENAMED[part :: len(EIGHTHS)]:
        for name in architectures.classes(model_type)[:1]:
            found.append(architectures.survey(model_type, name))
    assert not [survey.row() for survey in found if survey.silent]
    built = [survey for survey in found if "not built" not in survey.problem]
    assert len(built) > len(found) / 2
    assert sum(survey.compressed for survey in built) > 0


def test_a_layer_that_no_name_leads_to_is_told(architectures: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(model: Any) -> dict[str, Any]:
        return {name: tensor for name, tensor in model.state_dict().items() if "layers.1.mlp.up_proj" not in name}

    assert not architectures.survey("llama", "LlamaForCausalLM").silent
    monkeypatch.setattr(architectures, "released", without)
    survey = architectures.survey("llama", "LlamaForCausalLM")
    assert survey.silent and "lacks 1 tensor that LlamaForCausalLM needs" in survey.row()
