"""`quantize` of a module in memory: packed in place, as the same checkpoint would be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import packed_models as models
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM

import tersor
from tersor.errors import InputError
from tersor.nn import PackedEmbedding, PackedLinear, TiedLinear


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32, bias=False))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"format": "int4", "group_size": 32, "overrides": {"down_proj": "int8"}, "ignore": ["k_proj"]}),
        ("gpt2", {}),
        ("gemma", {"overrides": ["embed_tokens=int8"]}),
        ("mixtral", {"ignore": [r"layers\.0.*experts", r"experts\.2\.w1"], "overrides": {"w2": "int8"}}),
        ("qwen3_moe", {"format": "int4"}),
        ("gpt_oss", {"overrides": {"experts.down_proj": "int8"}, "ignore": [r"layers\.0.*experts.down"]}),
        ("granitemoe", {}),
    ],
)
def test_a_model_packed_in_memory_saves_what_the_path_form_writes(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    plain = models.plain(name, tmp_path / "plain", torch.bfloat16)
    wanted = tersor.quantize(plain, tmp_path / "packed", **options)
    model = AutoModelForCausalLM.from_pretrained(plain)
    report = tersor.quantize(model, **options)
    model.save_pretrained(tmp_path / "saved")
    assert models.same(models.tensors(tmp_path / "saved"), models.tensors(tmp_path / "packed"))
    assert models.config(tmp_path / "saved") == models.config(tmp_path / "packed")
    # By names in memory and on disk, which may differ.
    errors, expected = (sorted(row.relative_error or 0 for row in rows.compressed) for rows in (report, wanted))
    assert errors == pytest.approx(expected, rel=1e-4)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(model.eval()(models.token_ids()).logits, again(models.token_ids()).logits)
    if name == "gemma":
        assert isinstance(model.lm_head, TiedLinear) and isinstance(model.model.embed_tokens, PackedEmbedding)
    with pytest.raises(InputError, match="already compressed by tersor"):
        tersor.quantize(model)


def test_any_module_is_packed_in_place_and_computes_nearly_the_same() -> None:
    model = mlp()
    x = torch.randn(3, 64)
    before = model(x).detach()
    bias = model[0].bias
    report = tersor.quantize(model, format="int8")
    assert [type(layer) for layer in model] == [PackedLinear, nn.ReLU, PackedLinear]
    assert model[0].bias is bias and model.training
    assert [row.name for row in report.compressed] == ["0.weight", "2.weight"]
    assert report.worst is not None and 0 < report.worst.relative_error < 0.01
    assert float((model(x).detach() - before).norm() / before.norm()) < 0.02


def test_a_dry_run_changes_nothing() -> None:
    model = mlp()
    report = tersor.quantize(model, dry_run=True)
    assert len(report.compressed) == 2 and type(model[0]) is nn.Linear


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda m: m[2].weight.data[3].fill_(float("nan")), {}, r"'2.weight' holds nan at \[3, 0\]"),
        (lambda m: m[2].weight.data.fill_(3e38), {}, "'2.weight': a scale of .* is beyond float16's largest"),
        (lambda m: None, {"group_size": 64}, "group size 64 does not divide the 96 input channels of '2.weight'"),
        (lambda m: None, {"ignore": ["lm_head"]}, "ignore 'lm_head' matches no module"),
        (lambda m: None, {"output": "out"}, "compressed in place, and output 'out' is given: .* save_pretrained"),
        (lambda m: None, {"export": "quark"}, "a module is compressed in place"),
        (lambda m: m.to("meta"), {}, "0.weight is on the meta device"),
    ],
)
def test_what_cannot_be_packed_leaves_the_whole_model_as_it_was(
    change: Any, options: dict[str, Any], message: str
) -> None:
    model = mlp()
    change(model)
    with pytest.raises(InputError, match=message):
        tersor.quantize(model, **options)
    assert [type(layer) for layer in model] == [nn.Linear, nn.ReLU, nn.Linear]


def test_a_layer_as_the_whole_module_is_one_line() -> None:
    with pytest.raises(InputError, match="Linear is a layer itself, which cannot be replaced in place"):
        tersor.quantize(nn.Linear(64, 64))


class Doubling(nn.Linear):
    """Computes something else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Halved(nn.Module):
    """A parametrization."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 2


def test_layers_that_compute_more_are_left_alone_and_said() -> None:
    model = nn.Sequential(nn.Linear(64, 64), Doubling(64, 64), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    parametrize.register_parametrization(model[2], "weight", Halved())
    model[4].weight = model[3].weight
    report = tersor.quantize(model)
    notes = {row.name: row.note for row in report.rows if row.note}
    assert "Doubling" in notes["1.weight"]
    assert notes["2.parametrizations.weight.original"] == "parametrized"
    assert notes["3.weight"] == "shares its weight"
    assert [isinstance(layer, PackedLinear) for layer in model] == [True, False, False, False, False]


def test_a_layer_that_stands_in_two_places_stays_one() -> None:
    shared = nn.Linear(64, 64)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    tersor.quantize(model)
    assert isinstance(model[0], PackedLinear) and model[0] is model[2]


def test_what_is_packed_already_is_said_and_heads_and_adapters_are_left_alone() -> None:
    adapter = nn.Module()
    adapter.base_layer = nn.Linear(64, 64)
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64), "lm_head": nn.Linear(64, 64), "c": adapter})
    tersor.quantize(model, ignore=["b"])
    report = tersor.quantize(model, format="int8")
    said = {row.name: row.scheme or row.note for row in report.rows if row.scheme or row.note}
    assert said == {
        "a.weight_packed": "packed already",
        "a.weight_scale": "packed already",
        "b.weight": "int8:row:float16",
        "lm_head.weight": "output head",
        "c.base_layer.weight": "part of an adapter",
    }


def test_hooks_of_a_layer_move_to_the_packed_one() -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model, seen = mlp(), []
    model[0].register_forward_hook(lambda *_: seen.append(0))
    add_hook_to_module(model[2], AlignDevicesHook("cpu"))
    tersor.quantize(model)
    assert model(torch.randn(2, 64)).shape == (2, 32)
    assert seen == [0] and isinstance(model[2]._hf_hook, AlignDevicesHook)


def test_where_most_of_a_model_is_left_alone_it_is_warned_about() -> None:
    layers = nn.Linear(64, 128), nn.Linear(128, 64), nn.Linear(64, 8)
    with pytest.warns(
        UserWarning, match=r"only 3 % of the linear weights were compressed.*ignored by .* \(0\.weight\)"
    ):
        tersor.quantize(nn.Sequential(*layers), ignore=["^[01]$"])


@pytest.mark.filterwarnings("error")
def test_where_most_of_it_is_compressed_nothing_is_warned_about() -> None:
    assert tersor.quantize(mlp()).linear_share == 1
