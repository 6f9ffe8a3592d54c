"""Placements: what JSON says of one, what each rank of it has, and that all ranks together compute the whole model."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import decoders, packed_models
from helpers.ranks import together

from tersor import models
from tersor.engine.config import EngineConfig
from tersor.errors import InputError, ShapeError
from tersor.layouts.shard import Part
from tersor.models.config import DecoderConfig
from tersor.models.mixture import Mixture
from tersor.models.names import NAMES
from tersor.models.share import Share, check
from tersor.models.weights import Shared
from tersor.ops.collective import Ranks
from tersor.planner.placement import Placement, Stage

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 160,
    "num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 3, "vocab_size": 96,
}  # fmt: skip


def test_a_placement_is_what_its_json_says(tmp_path: Path) -> None:
    cuts = {"channels": (0, 64, 96, 160), "vocabulary": (0, 10, 20, 96)}
    first = Stage(layers=(0, 2), ranks=3, cuts=cuts, whole=("heads",))
    placement = Placement((first, Stage(layers=(2, 3), ranks=4, expert_groups=2)), data=2)
    path = tmp_path / "placement.json"
    path.write_text(json.dumps(placement.to_dict()))
    assert Placement.read(path) == placement == Placement.from_dict(placement.to_dict())
    path.write_text(json.dumps({"version": 7, "placement": placement.to_dict(), "predicted": {}}))
    assert Placement.read(path) == placement
    assert (placement.layers, placement.ranks) == (3, 7)
    assert [placement.members(index) for index in range(2)] == [range(3), range(3, 7)]
    places = [placement.place(rank) for rank in range(7)]
    assert [(place.index, place.rank) for place in places] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (1, 3)]
    assert [(place.expert_group, place.expert_rank) for place in places[3:]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert places[0].first and not places[0].last and places[6].last


def test_even_stages_have_more_layers_in_front_and_every_axis_multiplies_the_ranks() -> None:
    found = Placement.even(7, pipeline=3, tensor=2, expert=4)
    assert [stage.layers for stage in found.stages] == [(0, 3), (3, 5), (5, 7)]
    assert all((stage.ranks, stage.expert_groups) == (8, 4) for stage in found.stages)
    with pytest.raises(InputError, match=r"^pipeline_parallel is 4, and the model has 3 layers$"):
        Placement.even(3, pipeline=4)


STAGES: list[tuple[list[dict[str, Any]], str]] = [
    ([], "at least one copy of a model and one stage"),
    ([{"layers": [0, 0]}], "a stage has at least one layer"),
    ([{"layers": [0, 2]}, {"layers": [3, 4]}], r"layers \[\[0, 2\], \[3, 4\]\]: each begins where the one ahead ends"),
    ([{"layers": [1, 2]}], "each begins where the one ahead ends, from 0"),
    ([{"ranks": 2}], "a stage of a placement says no layers"),
    ([{"layers": [0, 2], "rank": 2}], "'rank', did you mean 'ranks'"),
    ([{"layers": [0, 2], "ranks": 1.5}], "1.5 where a whole number is meant"),
    ([{"layers": [0, 1, 2]}], "stage 0 of a placement is none: too many values"),
    ([{"layers": [0, 2], "ranks": 6, "expert_groups": 4}], "6 ranks are not 4 groups of as many each"),
    ([{"layers": [0, 2], "ranks": 2, "cuts": {"chanels": [0, 1, 2]}}], "'chanels', did you mean 'channels'"),
    ([{"layers": [0, 2], "ranks": 2, "cuts": {"heads": [0, 4, 4]}}], r"heads are \[0, 4, 4\]: from 0 up, 2 shares"),
    ([{"layers": [0, 2], "ranks": 2, "cuts": {"heads": [0, 4]}}], "2 shares of something"),
    ([{"layers": [0, 2], "ranks": 2, "cuts": {"heads": [0, 4, 8]}, "whole": ["heads"]}], "heads are cut and whole"),
    ([{"layers": [0, 2], "whole": ["experts", "channel"]}], "'channel', did you mean 'channels'"),
]


@pytest.mark.parametrize(("stages", "line"), STAGES)
def test_what_is_no_placement_is_refused_in_a_line(stages: list[dict[str, Any]], line: str) -> None:
    with pytest.raises(InputError, match=line):
        Placement.from_dict({"stages": stages})


def test_a_file_that_holds_none_is_refused_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    for text, line in (("{", "cannot be read as JSON"), ("[1]", "no JSON object"), ('{"a": 1}', "no list of stages")):
        path.write_text(text)
        with pytest.raises(InputError, match=line):
            Placement.read(path)
    with pytest.raises(InputError, match=r"none\.json: cannot be read as JSON"):
        Placement.read(tmp_path / "none.json")
    with pytest.raises(InputError, match="a placement of version 2, and this Tersor reads version 1"):
        Placement.from_dict({"version": 2, "stages": []})


def test_an_engine_has_its_placement_from_axes_or_from_one_that_is_given(tmp_path: Path) -> None:
    config = EngineConfig(tensor_parallel=2, pipeline_parallel=2)
    assert config.ranks == 4 and config.ranks_said == "tensor_parallel is 2 and pipeline_parallel is 2, 4 ranks"
    assert config.placed(5) == Placement.even(5, pipeline=2, tensor=2)
    given = Placement.even(3, expert=2)
    path = tmp_path / "placement.json"
    path.write_text(json.dumps(given.to_dict()))
    for form in (given, given.to_dict(), str(path), path, asdict(given)):
        found = EngineConfig(placement=form)
        assert found.placement == given and found.ranks == 2 and found.placed(9) == given
    with pytest.raises(InputError, match="expert_parallel is 2, and a placement says it all"):
        EngineConfig(placement=given, expert_parallel=2)
    with pytest.raises(InputError, match="the placement is of 3 copies of a model: an engine is one"):
        EngineConfig(placement=replace(given, data=3))
    with pytest.raises(InputError, match="pipeline_parallel is 0: it must be at least 1"):
        EngineConfig(pipeline_parallel=0)


def of_llama(stage: Stage) -> list[Share]:
    """Return what the ranks of a stage have of a small model."""
    config = DecoderConfig.from_dict(LLAMA)
    placement = Placement((replace(stage, layers=(0, 3)),))
    return [Share.of(config, NAMES[config.architecture], {}, placement.place(rank)) for rank in range(stage.ranks)]


def test_stages_cut_as_they_are_told_and_heads_of_keys_follow_those_of_queries() -> None:
    stage = Stage(layers=(0, 1), ranks=3, cuts={"heads": (0, 2, 4, 8), "vocabulary": (0, 1, 2, 96)})
    shares = of_llama(stage)
    assert [(share.forms[0].heads, share.forms[0].kv_heads) for share in shares] == [(2, 1), (2, 1), (4, 1)]
    keys = [share.parts["model.layers.0.self_attn.k_proj"] for share in shares]
    assert keys == [Part(((0, 8),)), Part(((0, 8),)), Part(((8, 16),))]  # the first head of keys is on two ranks
    assert shares[2].parts["lm_head"] == Part(((2, 96),))
    whole = of_llama(Stage(layers=(0, 1), ranks=2, whole=("heads", "vocabulary")))
    assert all(share.forms[0].heads == 8 and "lm_head" not in share.parts for share in whole)
    assert whole[0].whole("heads") and not whole[0].whole("channels")


@pytest.mark.parametrize(
    ("cuts", "line"),
    [
        ({"heads": (0, 3, 8)}, "o_proj: the placement gives a rank heads 3 to 8, and 4 of them read one kv head"),
        ({"heads": (0, 4, 9)}, "o_proj: the placement cuts heads up to 9, and there are 8"),
        ({"channels": (0, 63, 160)}, "down_proj: the placement cuts channels at 63, and they are cut in units of 8"),
        ({"channels": (0, 64, 128)}, "down_proj: the placement cuts channels up to 128, and there are 160"),
        ({"vocabulary": (0, 50, 97)}, "the vocabulary: the placement cuts vocabulary up to 97, and there are 96"),
    ],
)
def test_cuts_that_weights_do_not_allow_are_refused_by_the_name_of_the_weight(cuts: Any, line: str) -> None:
    with pytest.raises(ShapeError, match=line):
        of_llama(Stage(layers=(0, 1), ranks=2, cuts=cuts))


def test_a_placement_of_another_number_of_layers_is_refused() -> None:
    config = DecoderConfig.from_dict(LLAMA)
    with pytest.raises(ShapeError, match=r"^the placement is of 5 layers, and the model has 3$"):
        check(config, NAMES[config.architecture], {}, Placement.even(5))


LONG = {"max_position_embeddings": 256}
CASES: dict[str, tuple[str, Stage, dict[str, Any], dict[str, Any]]] = {
    "mixtral, a group a rank": ("mixtral", Stage(layers=(0, 1), ranks=2, expert_groups=2), {}, {}),
    "mixtral, packed, uneven": (
        "mixtral", Stage(layers=(0, 1), ranks=2, expert_groups=2, cuts={"experts": (0, 3, 4)}),
        {"format": "fp6_e3m2"}, {"head_dim": 32},
    ),
    "qwen3_moe, groups of two": (
        "qwen3_moe", Stage(layers=(0, 1), ranks=4, expert_groups=2), {"format": "fp6_e3m2"},
        {"moe_intermediate_size": 96, "head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2},
    ),
    "gpt_oss, biases": ("gpt_oss", Stage(layers=(0, 1), ranks=2, expert_groups=2), {}, {}),
    "gpt_oss, packed": (
        "gpt_oss", Stage(layers=(0, 1), ranks=3, expert_groups=3, cuts={"vocabulary": (0, 5, 64, 96)}),
        {"format": "mxfp4_e2m1"}, {"intermediate_size": 96, "head_dim": 32},
    ),
    "deepseek_v3, shared experts": ("deepseek_v3", Stage(layers=(0, 1), ranks=2, expert_groups=2), {}, {}),
    "deepseek_v2, experts everywhere": (
        "deepseek_v2", Stage(layers=(0, 1), ranks=2, whole=("experts", "channels")), {}, {}
    ),
    "llama, attention everywhere": (
        "llama", Stage(layers=(0, 1), ranks=3, cuts={"channels": (0, 32, 64, 160)}, whole=("heads",)),
        {"format": "int4", "group_size": 32}, {"intermediate_size": 160},
    ),
    "qwen2, feed-forward networks and head everywhere": (
        "qwen2", Stage(layers=(0, 1), ranks=2, whole=("channels", "vocabulary")), {"format": "fp6_e3m2"}, {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_ranks_of_a_stage_have_the_logits_of_one_device(case: str, tmp_path: Path) -> None:
    name, stage, options, changes = CASES[case]
    if options:
        path = packed_models.case(name, tmp_path, options, **LONG, **changes).packed
    else:
        path = packed_models.plain(name, tmp_path / "plain", **LONG, **changes)
    whole = models.load(path, "cpu")
    placement = Placement((replace(stage, layers=(0, len(whole.layers))),))
    given = decoders.texts(whole.config.vocabulary)
    wanted = decoders.logits(whole, given)
    largest = max(float(one.abs().max()) for one in wanted)

    def run(ranks: Ranks) -> tuple[models.Decoder, list[torch.Tensor]]:
        decoder = models.load(path, "cpu", ranks=ranks, place=placement.place(ranks.rank))
        return decoder, decoders.logits(decoder, given)

    found = together(stage.ranks, run)
    for _, parts in found:
        for one, other, first in zip(parts, wanted, found[0][1], strict=True):
            assert float((one - other).abs().max()) < 1e-5 * largest
            assert torch.equal(one, first)  # bit for bit on every rank
    for decoder, _ in found:
        mixtures = [layer.ffn for layer in decoder.layers if isinstance(layer.ffn, Mixture)]
        assert all((one.held < one.form.count) == (stage.expert_groups > 1) for one in mixtures)
        assert isinstance(decoder.head, Shared) == ("vocabulary" not in stage.whole)


def test_a_stage_has_its_own_layers_and_one_of_a_tied_head_the_embedding_too(tmp_path: Path) -> None:
    changes = {"num_hidden_layers": 3, "tie_word_embeddings": True}
    path = packed_models.case("llama", tmp_path, {"format": "fp6_e3m2"}, **changes).packed
    placement = Placement.even(3, pipeline=3)
    first, middle, last = (models.load(path, "cpu", place=placement.place(rank)) for rank in range(3))
    assert all(len(one.layers) == 1 and len(one.caches(2)) == 1 for one in (first, middle, last))
    assert first.embedding is not None and middle.embedding is last.embedding is None
    assert first.head is first.norm is middle.head is middle.norm is None
    assert last.head is not None and last.norm is not None
    whole = models.load(path, "cpu")
    assert whole.head is not None
    tied = sum(one.nbytes for one in whole.head.tensors())
    assert first.nbytes + middle.nbytes + last.nbytes == whole.nbytes + tied
