"""`8bit` stands for the 8-bit activations that suit a model's weights: who says which, and who is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import tiny_lm
from helpers.mixes import SMALL, levels, matrix, mixed
from torch import nn as torch_nn

import tersor
from tersor import models, nn, ops
from tersor.cli.main import run
from tersor.convert import quantize
from tersor.engine import ahead
from tersor.engine.config import EngineConfig
from tersor.errors import InputError, UnsupportedError
from tersor.evaluate import subject
from tersor.formats import Activations, Mix, Scheme, get_scheme
from tersor.hardware import CHIPS
from tersor.integrations.transformers import load, replace
from tersor.layouts import MixedWeight, PackedWeight
from tersor.models.weights import Product
from tersor.ops import dispatch

ROOT = Path(__file__).resolve().parents[2]
H200, A100 = CHIPS["NVIDIA H200"], CHIPS["NVIDIA A100"]


def schemes(*names: str) -> list[Scheme]:
    return [get_scheme(name) for name in names]


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (("int8",), Activations.INT8),
        (("uint4", "int8"), Activations.INT8),
        (("uint4", "fp6_e2m3"), Activations.E4M3),
        (("fp6_e2m3",), Activations.E4M3),
        ((), Activations.INT8),
    ],
)
def test_integers_meet_int8_and_what_is_no_integer_has_all_meet_e4m3(
    names: tuple[str, ...], chosen: Activations
) -> None:
    assert ops.activations_for("8bit", schemes(*names), H200) is chosen
    assert ops.activations_for("8bit", schemes(*names)) is chosen


def test_other_names_stand_for_themselves_and_are_refused_where_they_were() -> None:
    for one in Activations:
        assert ops.activations_for(str(one), schemes("fp6_e2m3"), A100) is one
        assert Activations.check(one) == str(one)
    assert Activations.check("8bit") == "8bit"
    near = r"activations '8bits', did you mean '8bit'\?: use 16bit, 8bit, fp8, int8 or int8:g128"
    for read in (Activations.check, lambda name: ops.activations_for(name, ())):
        with pytest.raises(InputError, match=near):
            read("8bits")


def test_a_gpu_that_has_no_kernel_with_them_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    dispatch._warn.cache_clear()
    for chip in (A100, CHIPS["NVIDIA B200"], A100, H200, None):
        for name in ("int8", "fp8", "16bit"):
            assert ops.activations_for(name, schemes("int4"), chip) is Activations.of(name)
    said = [record.message for record in caplog.records]
    gpus = ("NVIDIA A100 has 8.0", "NVIDIA B200 has 10.0")
    assert [(line.split(":")[0], line.split("and ")[1].split(":")[0]) for line in said] == [
        (f"activations {name}", gpu) for gpu in gpus for name in ("int8", "fp8")
    ]
    assert all(line.endswith("the reference multiplies, slowly; leave them 16bit") for line in said)


def test_weights_that_take_neither_and_gpus_without_kernels_are_refused_with_what_is_in_the_way() -> None:
    neither = r"^activations 8bit suit .*int8 not with fp6_e2m3.*fp8 not with int8.*: leave them 16bit$"
    with pytest.raises(UnsupportedError, match=neither):
        ops.activations_for("8bit", schemes("fp6_e2m3", "int8"))
    alone = r"^activations 8bit: .* 9\.0, and NVIDIA A100 has 8\.0: leave them 16bit$"
    with pytest.raises(UnsupportedError, match=alone):
        ops.activations_for("8bit", schemes("int8"), A100)


def test_a_layer_chooses_by_its_own_scheme_and_a_mix_by_all_its_levels() -> None:
    def layer(name: str) -> nn.PackedLinear:
        return nn.PackedLinear(64, 64, get_scheme(name), device="meta")

    for name, chosen in (("int8", Activations.INT8), ("fp6_e2m3", Activations.E4M3)):
        own = layer(name)
        own.multiply_with("8bit")
        assert own.activations is chosen
    mixture = nn.MixedLinear.from_packed(mixed(matrix(64), levels(64, mix=Mix(tuple(schemes("fp5_e2m2", "uint4"))))))
    mixture.multiply_with("8bit")
    assert {rows.activations for rows in mixture.row_sets} == {Activations.E4M3}
    refusing = nn.MixedLinear.from_packed(mixed(matrix(64), levels(64, mix=SMALL)))
    with pytest.raises(UnsupportedError, match="8bit suit no weights as these"):
        refusing.multiply_with("8bit")
    model = torch_nn.Sequential(layer("int4"), layer("fp6_e2m3"))
    replace.multiply_with(model, "8bit")
    assert {own.activations for own in model} == {Activations.E4M3}, "one kind for all"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("packed") / "int4"
    quantize(tiny_lm.TINY, output, format="int4", overrides={"embed_tokens": "fp6_e2m3"})
    return output


def layouts(decoder: models.Decoder) -> set[str]:
    out = decoder.layers[0].attention.out
    assert isinstance(out, Product) and isinstance(out.weight, PackedWeight | MixedWeight)
    return {one.layout for one in (out.weight.sets if isinstance(out.weight, MixedWeight) else (out.weight,))}


def test_models_engines_and_kernels_compiled_ahead_take_what_is_chosen(packed: Path, tmp_path: Path) -> None:
    """A tied embedding in a float is multiplied, too: then all weights meet e4m3."""
    quantize(tiny_lm.TINY, tmp_path / "integers", format="int4")
    for path, chosen, words in ((packed, Activations.E4M3, "fp8"), (tmp_path / "integers", Activations.INT8, "int8")):
        assert layouts(models.load(path, "cpu", torch.bfloat16, activations="8bit")) == {
            ops.preferred_layout(get_scheme("int4"), torch.bfloat16, torch.device("cpu"), chosen)
        }
        model = load.ready_model(path, "cpu", activations="8bit")
        assert {one.activations for one in model.modules() if isinstance(one, nn.PackedLinear)} == {chosen}
        with tersor.checkpoint.source.open_source(path) as source:
            found = ahead.kernels(source, EngineConfig(activations="8bit", dtype="bfloat16"), H200)
            assert any(f"quantize_activations_bfloat16_{words}" in one.name for one in found)
            with pytest.raises(UnsupportedError, match=r"8bit: kernels with them need compute capability 9\.0"):
                ahead.kernels(source, EngineConfig(activations="8bit"), A100)


def test_eval_says_what_was_chosen(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert subject("m@activations=8bit").activations == "8bit"
    text = tmp_path / "text.txt"
    text.write_text("def square(x):\n    return x * x\n\n" * 40, encoding="utf-8")
    options = ["--text", str(text), "--window", "64", "--max-tokens", "128", "--device", "cpu"]
    kept = tmp_path / "quality.json"
    assert run(["eval", f"{packed}@activations=8bit", *options, "-o", str(kept)]) == 0
    (one,) = json.loads(kept.read_text(encoding="utf-8"))["models"]
    assert (one["activations"], one["label"]) == ("fp8", "int4@activations=8bit")
    assert run(["generate", str(packed), "--prompt", "def", "--activations", "8bits"]) == 2
    assert "did you mean '8bit'" in capsys.readouterr().err


def test_recipes_of_the_docs_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W8A8 and W4A8: each command of the page, on the tiny model and a short text."""
    section = (ROOT / "docs" / "quality.md").read_text(encoding="utf-8").partition("## Eight-bit activations")[2]
    commands = [line.split() for line in section.splitlines() if line.startswith("    tersor ")]
    assert [command[1] for command in commands] == ["quantize", "quantize", "eval"]
    (tmp_path / "FILE").write_text("def square(x):\n    return x * x\n\n" * 40, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for _, verb, *words in commands:
        given = [str(tiny_lm.TINY) if word == "MODEL" else word for word in words]
        short = ["--window", "64", "--max-tokens", "128", "--device", "cpu"] if verb == "eval" else ["--device", "cpu"]
        assert run([verb, *given, *short]) == 0
