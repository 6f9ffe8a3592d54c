"""What the planner knows of a model: true bytes, and the cuts that loading makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tersor
from tersor.checkpoint.config import parse_scheme
from tersor.checkpoint.names import Form, stored_forms
from tersor.checkpoint.source import open_source
from tersor.errors import CheckpointError, UnsupportedError
from tersor.formats import Assignment, Mix, Pruned, Scheme, Sparse
from tersor.layouts.shard import Part
from tersor.models.config import DecoderConfig
from tersor.models.expected import Expected
from tersor.models.geometries import GEOMETRIES
from tersor.models.names import NAMES
from tersor.models.parts import model_of, of_config
from tersor.models.share import Share
from tersor.planner import cuts
from tersor.planner.cuts import Piece
from tersor.planner.parts import PLAIN_BYTES, Weight
from tersor.planner.placement import Placement

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny-lm"


def scheme(text: str) -> Scheme:
    """A scheme by its name."""
    return parse_scheme(text, None, None, "format")


@pytest.mark.parametrize("name", sorted(GEOMETRIES))
def test_bytes_of_every_geometry_are_those_of_its_tensors(name: str) -> None:
    config = DecoderConfig.from_dict(GEOMETRIES[name])
    expected = Expected.of(config, NAMES[config.architecture])
    elements = 0
    for shape in (*expected.matrices.values(), *expected.vectors.values()):
        total = 1
        for axis in shape:
            total *= axis
        elements += total
    assert model_of(name).nbytes == PLAIN_BYTES * elements


def test_bytes_of_a_checkpoint_are_those_of_its_files(tmp_path: Path) -> None:
    tersor.quantize(TINY, tmp_path / "mixed", format="fp6_e3m2", overrides={"down_proj": "uint4:g64"})
    found = model_of(str(tmp_path / "mixed"))
    with open_source(tmp_path / "mixed") as source:
        assert found.nbytes == sum(tensor.nbytes for tensor in source.tensors.values())
    assert found.label == "mixed"
    forms = {weight.module: weight.form for kind in found.kinds for weight in kind.weights()}
    assert isinstance(forms["mlp.down_proj"], Scheme) and forms["mlp.down_proj"].group_size == 64
    assert model_of(str(TINY)).digest != found.digest


def test_a_folder_with_a_config_alone_is_planned_plain_or_in_a_format(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GEOMETRIES["llama-3-8b"]), encoding="utf-8")
    plain, packed = model_of(str(tmp_path)), model_of(str(tmp_path), scheme("int4:g128"))
    assert plain.nbytes == model_of("llama-3-8b").nbytes > 3 * packed.nbytes
    assert plain.digest != packed.digest


def test_models_that_cannot_be_planned_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        model_of(str(tmp_path / "none"))
    with pytest.raises(UnsupportedError, match="whose weights have their own formats: leave --format out"):
        model_of(str(TINY), scheme("int4"))
    raw = {**GEOMETRIES["llama-3-8b"], "architectures": ["OtherForCausalLM"]}
    with pytest.raises(UnsupportedError, match="OtherForCausalLM"):
        of_config(raw, "other")


def test_layers_that_differ_are_kinds_of_their_own() -> None:
    deep = model_of("deepseek-v3")
    assert [kind.name for kind in deep.kinds] == ["layers.0-2", "layers.3-60"]
    assert deep.kinds[0].experts is None and deep.kinds[1].experts is not None
    sliding = model_of("gpt-oss-20b")
    assert [kind.window for kind in sliding.kinds] == [128, 0]
    assert sliding.kinds[0].name == "layers.0,2,4+9"
    assert sliding.layers[:4] == (0, 1, 0, 1)


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize(
    "name, format",
    [
        ("llama-3-70b", None),
        ("qwen2.5-72b", "int4:g128"),
        ("opt-13b", "fp6_e3m2"),
        ("qwen2.5-7b", None),
        ("gpt-oss-20b", None),
        ("mixtral-8x7b", "int4:g64"),
        ("qwen3-30b-a3b", "fp6_e3m2"),
        ("deepseek-v3", "fp8_e4m3"),
    ],
)
def test_cuts_are_those_that_loading_makes(name: str, format: str | None, ranks: int) -> None:
    """`models.share` cuts what a rank loads: heads, inner channels, vocabularies."""
    model = model_of(name, None if format is None else scheme(format))
    config = DecoderConfig.from_dict(GEOMETRIES[name])
    names = NAMES[config.architecture]
    forms: dict[str, Form] = {}
    for kind in model.kinds:
        for weight in kind.weights():
            for layer in kind.layers:
                for expert in range(weight.copies):
                    if weight.form is not None:
                        forms[kind.start.format(layer=layer) + weight.module.format(expert=expert)] = weight.form
    for rank in {0, ranks - 1}:
        place = Placement.even(len(config.layers), tensor=ranks).place(rank)
        share = Share.of(config, names, forms, place)
        for kind in model.kinds:
            start = kind.start.format(layer=kind.layers[0])
            heads = cuts.heads_of(kind, ranks)
            pieces: list[Piece] = [*cuts.qkv_by_heads(kind, heads)[rank], *cuts.out_by_heads(kind, heads)[rank]]
            if kind.experts is not None:
                own = kind.experts
                spans = cuts.inner(own.ffn, (own.down,), ranks, "experts")
                pieces += cuts.up_by_inner(own.gate_up, own.ffn, spans, own.interleaved)[rank]
                pieces += cuts.down_by_inner(own.down, spans)[rank]
            elif kind.down is not None:
                spans = cuts.inner(kind.ffn, (kind.down,), ranks, "ffn")
                pieces += cuts.up_by_inner(kind.gate_up, kind.ffn, spans)[rank]
                pieces += cuts.down_by_inner(kind.down, spans)[rank]
            for piece in pieces:
                module = start + piece.weight.module.format(expert=0)
                assert piece.part == share.parts.get(module, Part()), module
        (row,) = cuts.by_rows(model.out, ranks, "vocabulary")[rank]
        assert row.part.rows == (share.vocabulary[rank],)


def test_bytes_of_a_part_are_those_of_a_weight_of_its_shape() -> None:
    form = scheme("uint4:g64")
    weight = Weight("down", 96, 512, form)
    tensors = stored_forms(form, (96, 192))
    size = sum(one.shape[0] * one.shape[1] * one.dtype.itemsize for one in tensors.values())
    assert weight.nbytes(Part(columns=(64, 256))) == size
    assert weight.nbytes(Part(((0, 32), (64, 96)))) == sum(
        one.shape[0] * one.shape[1] * one.dtype.itemsize for one in stored_forms(form, (64, 512)).values()
    )
    assert Weight("down", 96, 512, form, biased=True).nbytes() == weight.nbytes() + PLAIN_BYTES * 96
    assert Weight("experts", 96, 512, form, copies=5).nbytes() == 5 * weight.nbytes()


def test_levels_of_a_mixed_weight_follow_its_rows() -> None:
    mix = Mix((scheme("uint4:g64"), scheme("int8")))
    weight = Weight("up", 8, 512, Assignment(mix, bytes([0, 0, 1, 1, 0, 0, 0, 1])))
    assert [rows for _, rows in weight.levels()] == [5, 3]
    assert [rows for _, rows in weight.levels(Part(((0, 4),)))] == [2, 2]
    halves = [weight.nbytes(Part((span,))) for span in ((0, 4), (4, 8))]
    assert sum(halves) == weight.nbytes() and halves[0] > halves[1]


def test_a_part_of_a_pruned_weight_has_its_share() -> None:
    weight = Weight("up", 8, 512, Pruned.of(Sparse(scheme("int8")), [128] * 8))
    assert weight.nbytes() < PLAIN_BYTES * 8 * 512
    assert 2 * weight.nbytes(Part(((0, 4),))) == pytest.approx(weight.nbytes(), rel=1e-3)


def test_the_digest_tells_models_apart() -> None:
    raw: dict[str, Any] = GEOMETRIES["llama-3-8b"]
    same, other = of_config(raw, "a"), of_config({**raw, "rope_theta": 1.0}, "a")
    assert of_config(raw, "b").digest == same.digest != other.digest
