"""A checkpoint whose output features have different schemes: what is written, what says so, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import checkpoints
from helpers.mixes import SMALL, compressed, plain_weights
from safetensors.torch import save_file

from tersor.checkpoint import QuantizationConfig
from tersor.checkpoint.inspect import inspect
from tersor.checkpoint.mixed import read_assignment
from tersor.checkpoint.names import DENSE, MIXED, stored_tensors, stored_weights
from tersor.checkpoint.source import open_source
from tersor.cli.main import main
from tersor.compress.allocation import Fused
from tersor.convert import quantize
from tersor.convert.mix import assign, fused, mixable, parse_levels
from tersor.errors import CheckpointError, FormatError, InputError
from tersor.formats import Assignment, Encoded, Mix, get_scheme
from tersor.integrations.transformers.architecture import read_architecture
from tersor.layouts import MixedWeight, PackedWeight, stream

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Assignment]]:
    """A small llama, its mix, and the levels of every module."""
    return compressed("llama", tmp_path_factory.mktemp("mixed"))


def test_every_row_is_stored_at_its_level_in_the_order_of_features(
    saved: tuple[Path, Path, dict[str, Assignment]],
) -> None:
    source, mixed, assignments = saved
    tensors, plain = checkpoints.weights(mixed), plain_weights(source, assignments)
    assert len(assignments) == 14 and stored_weights(tensors) == dict.fromkeys(stored_weights(tensors), MIXED)
    for name, assignment in assignments.items():
        weight = plain[name]
        for own, form in stored_tensors(assignment, *weight.shape).items():
            stored = tensors.pop(f"{name}.{own}")
            assert (tuple(stored.shape), stored.dtype) == (form.shape, form.dtype)
    assert not [name for name in tensors if "proj" in name]
    with open_source(mixed) as opened:
        for name, assignment in assignments.items():
            assert read_assignment(opened.tensors, name, SMALL) == assignment


def test_config_and_inspection_say_levels_and_bits(
    saved: tuple[Path, Path, dict[str, Assignment]], capsys: pytest.CaptureFixture[str]
) -> None:
    _, mixed, assignments = saved
    said = json.loads((mixed / "config.json").read_text())["quantization_config"]
    assert (said["version"], said["format"]) == (2, "mixed") and "group_size" not in said
    assert [level["format"] for level in said["levels"]] == ["uint3", "fp5_e2m2", "int8"]
    assert QuantizationConfig.from_dict(said).scheme == SMALL
    found = inspect(mixed, read_architecture)
    items = {item.name.removesuffix(".weight"): item for item in found.items if item.compressed}
    for name, assignment in assignments.items():
        levels = {scheme.key(): rows for scheme, rows in zip(SMALL.levels, assignment.rows, strict=True) if rows}
        assert (items[name].format, dict(items[name].levels)) == ("mixed", levels)
        assert items[name].bits_per_weight == pytest.approx(assignment.bits_per_weight(items[name].shape[1]))
    assert found.compressed_bits_per_weight is not None and 4.5 < found.compressed_bits_per_weight < 6.5
    with pytest.raises(SystemExit):
        main(["inspect", str(mixed)])
    assert "mixed: " in (shown := capsys.readouterr().out) and " x uint3, group 32, float16" in shown
    assert "mixed" in (mixed / "README.md").read_text()


def test_blocks_of_rows_give_the_same_bytes(
    saved: tuple[Path, Path, dict[str, Assignment]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, mixed, assignments = saved
    monkeypatch.setattr("tersor.convert.pipeline._CPU_BLOCK_ELEMENTS", 7 * 64)
    quantize(source, tmp_path / "again", assignments=assignments)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (mixed / file).read_bytes()


def test_layers_multiplied_as_one_are_chosen_as_one() -> None:
    losses = {f"l.{name}_proj": np.ones((3, 8)) for name in "kqvo"}
    losses |= {"m.up_proj": np.ones((3, 8)), "m.gate_proj": np.ones((3, 8)), "n.gate_proj": np.ones((3, 8))}
    channels = dict.fromkeys(losses, 64)
    found = [(list(one.losses), one.paired) for one in fused(losses, channels)]
    assert (["l.q_proj", "l.k_proj", "l.v_proj"], False) in found and (["m.gate_proj", "m.up_proj"], True) in found
    assert (["l.o_proj"], False) in found and (["n.gate_proj"], False) in found and len(found) == 4
    assert isinstance(fused(losses, channels)[0], Fused)


def test_the_mix_of_a_budget_or_of_shares_is_that_of_the_features(
    saved: tuple[Path, Path, dict[str, Assignment]],
) -> None:
    scores = {"a": torch.rand(3, 128).sort(0, descending=True).values}
    byted = assign(scores, {"a": 64}, SMALL, target_bytes=128 * 44)
    assert byted.allocation.nbytes <= 128 * 44 and sum(byted.shares) == pytest.approx(1)
    counted = assign(scores, {"a": 64}, SMALL, shares=[0.5, 0.25, 0.25])
    assert counted.assignments["a"].rows == (64, 32, 32)
    with pytest.raises(InputError, match="one of target bits, target bytes, and shares"):
        assign(scores, {"a": 64}, SMALL, target_bits=4, target_bytes=5)
    with pytest.raises(InputError, match=r"2.000 bits a weight, is below .*: feasible are .* to .* bits"):
        assign(scores, {"a": 64}, SMALL, target_bits=2)
    with pytest.raises(InputError, match="b has scores, and no layer of the model is called so"):
        assign({"b": scores["a"]}, {"a": 64}, SMALL, target_bits=4)


def test_a_model_of_a_size_is_scored_assigned_and_written(
    saved: tuple[Path, Path, dict[str, Assignment]], tmp_path: Path
) -> None:
    source, _, assignments = saved
    found = mixable(source, ignore=["0.self_attn.q_proj"], overrides={"0.mlp.up_proj": "int4"})
    assert set(assignments) - set(found.shapes) == {f"model.layers.0.{one}_proj" for one in ("self_attn.q", "mlp.up")}
    found, random = mixable(source), torch.Generator().manual_seed(0)
    assert found.channels == {name: 96 if "down" in name else 64 for name in assignments}
    scores = {
        name: torch.rand(1, oc, generator=random) ** 4 * torch.tensor([[16.0], [2.0], [0.1]])
        for name, (oc, _) in found.shapes.items()
    }
    mixing = assign(scores, found.channels, SMALL, target_bytes=90_000 - found.other_bytes)
    report = quantize(source, tmp_path / "sized", assignments=mixing.assignments)
    assert report.bytes_after == found.other_bytes + mixing.allocation.nbytes - mixing.allocation.padding
    assert 85_000 < report.bytes_after <= 90_000
    assert mixing.allocation.free_loss <= mixing.allocation.loss


def test_levels_are_parsed_like_overrides() -> None:
    assert parse_levels(["uint4:g128", "int8"]) == Mix((get_scheme("uint4", 128), get_scheme("int8")))
    with pytest.raises(FormatError, match=r"level 'fp9': unknown format"):
        parse_levels(["fp9", "int8"])
    with pytest.raises(InputError, match="at least two levels"):
        parse_levels(["int8"])


def test_what_has_no_levels_or_wrong_ones_is_refused(
    saved: tuple[Path, Path, dict[str, Assignment]], tmp_path: Path
) -> None:
    source, _, assignments = saved
    name = "model.layers.0.mlp.up_proj"
    without = {key: found for key, found in assignments.items() if key != name}
    short = {**assignments, name: Assignment(SMALL, bytes(5))}
    other = {**assignments, name: Assignment(Mix(SMALL.levels[:2]), bytes(96))}
    cases = [
        ({"assignments": without}, f"{name} has no levels"),
        ({"assignments": short}, f"{name}: 5 output features at levels .* expected 96"),
        ({"assignments": other}, "levels of 2 mixes"),
        ({"assignments": assignments, "group_size": 64}, "belong into every level"),
        ({"assignments": assignments, "export": "humming"}, "humming cannot say a mix of schemes in one layer"),
        (
            {
                "assignments": {
                    key: Assignment(Mix((get_scheme("int8", 48),)), bytes(len(found.level)))
                    for key, found in assignments.items()
                }
            },
            "group size 48 does not divide the 64",
        ),
    ]
    for options, words in cases:
        with pytest.raises(InputError, match=words):
            quantize(source, tmp_path / "out", **options)
    quantize(source, tmp_path / "part", assignments=without, overrides={"0.mlp.up_proj": "int4"})
    assert stored_weights(checkpoints.weights(tmp_path / "part"))[name] is DENSE


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda own: own.update({"weight_level": own["weight_level"] * 0 + 7}), "has level 7, and there are 3 levels"),
        (
            lambda own: own.update({"weight_level": own["weight_level"] * 0}),
            r"output features by level, .* have .* rows",
        ),
        (lambda own: own.update({"weight_level": own["weight_level"].int()}), "is I32"),
        (lambda own: own.pop("levels.1.weight_scale"), "levels.1.weight_scale"),
        (lambda own: own.update({"levels.1.weight_scale": own["levels.1.weight_scale"].float()}), "F32"),
    ],
    ids=["level", "rows", "dtype", "missing", "scale"],
)
def test_a_broken_mixed_weight_is_one_line(
    saved: tuple[Path, Path, dict[str, Assignment]], tmp_path: Path, change: Callable[[Tensors], object], words: str
) -> None:
    broken = shutil.copytree(saved[1], tmp_path / "broken")
    stem, tensors = "model.layers.1.mlp.down_proj.", checkpoints.weights(broken)
    own = {name.removeprefix(stem): tensors.pop(name) for name in list(tensors) if name.startswith(stem)}
    change(own)
    save_file({**tensors, **{stem + name: tensor for name, tensor in own.items()}}, broken / "model.safetensors")
    with pytest.raises(CheckpointError, match=words) as caught:
        inspect(broken, read_architecture)
    assert "\n" not in str(caught.value)


def test_the_rows_of_a_level_are_a_dense_weight(saved: tuple[Path, Path, dict[str, Assignment]]) -> None:
    source, mixed, assignments = saved
    name, tensors = "model.layers.1.self_attn.q_proj", checkpoints.weights(mixed)
    assignment = assignments[name]
    sets = []
    for level, scheme in enumerate(SMALL.levels):
        stem = f"{name}.levels.{level}"
        if f"{stem}.weight_packed" in tensors:
            codes = stream.unpack(tensors[f"{stem}.weight_packed"], scheme.format.bits, 64)
            zero_point = tensors.get(f"{stem}.weight_zero_point")
            encoded = Encoded(scheme, codes, tensors[f"{stem}.weight_scale"], zero_point, 0.0, 0.0)
            sets.append(PackedWeight.from_encoded(encoded))
    expected = plain_weights(source, {name: assignment})[name]
    assert torch.equal(MixedWeight.of(assignment, sets).dequantize(), expected)
