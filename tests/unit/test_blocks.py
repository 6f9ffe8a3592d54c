"""A model that runs block by block computes what the whole one does, with one block in memory; others are refused."""

from __future__ import annotations

from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import calibrated
from transformers import AutoModelForCausalLM, T5Config

from tersor.checkpoint.source import open_source
from tersor.convert import quantize
from tersor.errors import InputError
from tersor.integrations.transformers.architecture import read_architecture
from tersor.integrations.transformers.blocks import BlockModel, Call


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "gemma3_text", "mixtral", "gpt_oss", "deepseek_v3"])
@torch.no_grad()
def test_logits_are_those_of_the_whole_model_and_one_block_is_in_memory(name: str, tmp_path: Path) -> None:
    directory = calibrated.model(name, tmp_path / "model")
    ids = torch.randint(2, calibrated.VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(1))
    whole = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(input_ids=ids).logits
    with open_source(directory) as source:
        targets = read_architecture(directory).find(source.tensors)
        parameters = {key: target.parameter for key, target in targets.items() if target.known}
        sizes = [(parameter, source.tensors[key].spec.numel) for key, parameter in parameters.items()]
        model = BlockModel(directory, torch.device("cpu"), torch.float32, sizes)

        def load(block: int | None) -> None:
            own = [key for key, parameter in parameters.items() if model.block_of(parameter) == block]
            model.load({key: source.tensors[key].file.read(key) for key in own})

        load(None)
        model.tie()
        hidden, calls = model.enter(ids)
        for block, call in enumerate(calls):
            load(block)
            there = [key for key, value in model.model.named_parameters() if value.device.type != "meta"]
            assert {model.block_of(key) for key in there} - {None} == {block}
            twin = model.twin(block)
            assert all(a is b for a, b in zip(twin.parameters(), model.blocks[block].parameters(), strict=True))
            hidden = model.run(twin, hidden, call)
            model.drop(block)
        assert torch.equal(model.leave(hidden, ids), whole)


def test_a_model_whose_blocks_read_the_tokens_is_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": calibrated.VOCABULARY}
    directory, text = calibrated.model("gemma4_text", tmp_path / "model", **sizes), calibrated.text(tmp_path / "text")
    with pytest.raises(InputError, match=r"its blocks read the tokens.*: use --algorithm rtn") as caught:
        quantize(directory, tmp_path / "out", calibration=text, **{**calibrated.OPTIONS, "group_size": 8})
    assert "\n" not in str(caught.value)


def test_a_block_that_leaves_something_for_others_is_refused(tmp_path: Path) -> None:
    directory = calibrated.model("llama", tmp_path / "model")
    sizes = [("model.layers.0.mlp.up_proj.weight", 1)]
    model = BlockModel(directory, torch.device("cpu"), torch.float32, sizes)
    shared: UserDict[str, torch.Tensor] = UserDict()
    hidden, call = torch.zeros(1, 2, 64), Call((), {"shared_kv_states": shared})

    def leave(x: torch.Tensor, shared_kv_states: Any) -> torch.Tensor:
        shared_kv_states["full_attention"] = x
        return x

    with pytest.raises(InputError, match="its blocks depend on each other by more than their hidden state"):
        model.run(leave, hidden, call)  # type: ignore[arg-type]


def test_a_model_that_does_not_continue_a_text_is_refused(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    T5Config(architectures=["T5ForConditionalGeneration"], **sizes).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="does not continue a text, which calibration needs: use --algorithm rtn"):
        BlockModel(tmp_path, torch.device("cpu"), torch.float32, [])
