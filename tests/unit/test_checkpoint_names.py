"""What a checkpoint stores of a weight is said in one place, and agrees with what is stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import checkpoints

from tersor import formats
from tersor.checkpoint.exports import get_export
from tersor.checkpoint.modules import LinearLayer
from tersor.checkpoint.names import DENSE, MERGED, STORAGES, TORCH_DTYPES, TensorForm, stored_tensors, stored_weights
from tersor.convert import quantize
from tersor.errors import FormatError, InputError

SCHEMES = [
    formats.get_scheme("fp6_e3m2"),
    formats.get_scheme("uint4", 8, "bfloat16"),
    formats.get_scheme("mxfp4_e2m1"),
]


def test_the_tensors_of_a_weight_have_these_shapes_and_dtypes() -> None:
    assert stored_tensors(formats.get_scheme("uint3", 10, "float32"), 6, 40) == {
        "weight_packed": TensorForm((6, 6), torch.int32),
        "weight_scale": TensorForm((6, 4), torch.float32),
        "weight_zero_point": TensorForm((6, 4), torch.uint8),
    }
    assert stored_tensors(formats.get_scheme("mxfp4_e2m1"), 6, 64) == {
        "weight_packed": TensorForm((6, 8), torch.int32),
        "weight_scale": TensorForm((6, 2), torch.uint8),
    }
    with pytest.raises(FormatError, match="does not divide"):
        stored_tensors(formats.get_scheme("int4", 24), 6, 64)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.key())
def test_a_checkpoint_holds_what_the_names_say(scheme: formats.Scheme, tmp_path: Path) -> None:
    source = checkpoints.save("llama", tmp_path / "model")
    options = {} if scheme.is_mx else {"group_size": scheme.group_size, "scale_dtype": scheme.scale_dtype}
    report = quantize(source, tmp_path / "out", format=scheme.name, **options)
    tensors = checkpoints.weights(tmp_path / "out")
    for row in report.compressed:
        stem = row.name.removesuffix(".weight")
        oc, ic = row.shape
        for name, form in stored_tensors(scheme, oc, ic).items():
            stored = tensors[f"{stem}.{name}"]
            assert (tuple(stored.shape), stored.dtype) == (form.shape, form.dtype)
    found = stored_weights(tensors)
    assert set(found) == {row.name.removesuffix(".weight") for row in report.compressed}
    assert set(found.values()) == {DENSE}


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.key())
def test_a_marker_tells_the_largest_weight_it_can_belong_to(scheme: formats.Scheme) -> None:
    for ic in (32, 64, 96):
        marker = DENSE.marker_form(scheme, 5, ic)
        assert DENSE.largest_weight(scheme, marker.shape) == (5, ic)
        assert DENSE.marker_form(scheme, 5, ic - 7) == marker
    assert DENSE.largest_weight(scheme, (5,)) == (0, 0)


def test_weights_are_found_by_their_markers_alone() -> None:
    names = ["a.weight_scale", "a.b.weight_packed", "c.weight", "weight_packed", "d.weight_packed.e"]
    assert stored_weights(names) == {"a.b": DENSE}
    assert len({storage.marker for storage in STORAGES}) == len(STORAGES)


def test_foreign_checkpoints_store_the_first_bytes_of_our_rows() -> None:
    layer = LinearLayer("a", "a", (6, 40), False)
    scheme = formats.get_scheme("int4", None, "bfloat16")
    own = get_export("tersor").store(layer, scheme)
    foreign = get_export("compressed-tensors", "bfloat16").store(layer, scheme)
    assert own.tensors["weight_packed"].shape == (6, 8)
    assert foreign.tensors["weight_packed"].shape == (6, 5)
    assert own.tensors["weight_scale"] == foreign.tensors["weight_scale"]
    assert [spec.name for spec in foreign.specs] == ["a.weight_packed", "a.weight_scale", "a.weight_shape"]


def test_merged_layers_are_named_once() -> None:
    parts = [part for layers in MERGED.values() for part in layers]
    assert len(set(parts)) == len(parts) == 5


def test_dtypes_have_one_name_in_config_and_one_in_safetensors() -> None:
    assert len(set(TORCH_DTYPES.values())) == len(TORCH_DTYPES)
    for name, dtype in formats.FLOAT_DTYPES.items():
        assert formats.dtype_name(dtype) == name and formats.float_dtype(name) == dtype
        assert formats.SCALE_DTYPES[name] == dtype
        assert TORCH_DTYPES[TensorForm((), dtype).safetensors_dtype] == dtype
    with pytest.raises(InputError, match=r"unknown dtype 'bfloat', did you mean 'bfloat16'\?: use one of float16, bfl"):
        formats.float_dtype("bfloat")
    with pytest.raises(InputError, match=r"use one of float16$"):
        formats.float_dtype("float32", ("float16",))
