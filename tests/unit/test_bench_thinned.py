"""Pruned weights on the command lines of `tersor bench`: what is named, planned and refused, and a model of them."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.small_decoders import config_of

from tersor.bench import contenders
from tersor.bench.shapes import Shape
from tersor.bench.thinned import Thinned
from tersor.cli import bench
from tersor.cli.main import run
from tersor.formats import Plain, get_scheme
from tersor.layouts import SparseWeight
from tersor.models.random import random_decoder
from tersor.models.weights import Product

SHAPE = Shape(4096, 512)


def test_parts_and_values_are_those_of_the_text_and_so_are_the_names() -> None:
    found = bench.thinned(["fp6_e3m2", "fp16"], [SHAPE], "0.5,0.75")
    assert [contenders.label(one) for one in found] == [
        "fp6_e3m2:s50",
        "fp6_e3m2:s75",
        "float16:s50",
        "float16:s75",
    ]
    assert found[0] == Thinned(get_scheme("fp6_e3m2"), 0.5) and found[2].values == Plain("float16")
    dense = contenders.packed_bytes(found[2], 4096, 4096)
    assert 1.1 < 8 * dense / 4096**2 / 8 < 1.2 and contenders.packed_bytes(found[0], 4096, 4096) < dense * 0.62


def test_a_dry_run_says_which_tile_multiplies_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "linear", "8192x8192", "--sparsity", "0.5", "--n", "16,4096", "--dry-run", "--json"]
    assert run([*command, "--chip", "h200", "--format", "fp6_e3m2", "--format", "int4:g128"]) == 0
    few, many, *groups = json.loads(capsys.readouterr().out)["rows"]
    assert few["kernel"] == "fp6_e3m2:s50" and "at 132 places" in few["config"] and few["from"] == "predicted"
    assert many["predicted_microseconds"] > 10 * few["predicted_microseconds"] > 0
    assert 5.0 < 8 * few["weight_bytes"] / 8192**2 < 5.4
    assert {row["config"] for row in groups} == {"decoded for cuBLAS"}
    assert run([*command, "--chip", "h200", "--format", "fp6_e3m2", "--activations", "fp8"]) == 0
    bytewise = json.loads(capsys.readouterr().out)["rows"]
    assert [row["kernel"] for row in bytewise] == ["fp6_e3m2:s50:a8"] * 2
    assert bytewise[0]["predicted_microseconds"] < few["predicted_microseconds"] and "b," in bytewise[1]["config"]
    assert run([*command, "--chip", "a100", "--format", "fp6_e3m2"]) == 0
    older = json.loads(capsys.readouterr().out)["rows"]
    assert {row["config"] for row in older} == {"decoded for cuBLAS"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["linear", "--sparsity", "1.5"], "expected parts from 0 to 1"),
        (["linear", "--sparsity", "half"], "--sparsity 'half'"),
        (
            ["linear", "--sparsity", "0.5", "--activations", "int8"],
            "16-bit activations alone: int8 activations have no",
        ),
        (
            ["linear", "--sparsity", "0.5", "--activations", "fp8", "--format", "int8"],
            "16-bit activations alone: int8 has numbers that e4m3 has not",
        ),
        (["latency", "--sparsity", "0.5", "--activations", "fp8"], "8-bit activations"),
        (["latency", "--sparsity", "2"], "expected parts from 0 to 1"),
    ],
)
def test_what_cannot_be_timed_is_refused_in_a_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", *words]) != 0
    error = capsys.readouterr().err.strip()
    assert said in error and "\n" not in error


@pytest.mark.parametrize("values", [None, "fp6_e3m2"])
def test_a_model_of_pruned_weights_has_a_head_that_is_whole_and_runs(values: str | None) -> None:
    scheme = None if values is None else get_scheme(values)
    decoder = random_decoder(config_of("llama"), scheme, "cpu", torch.float32, head=scheme, sparsity=0.75)
    out = decoder.layers[0].attention.out
    assert isinstance(out.weight, SparseWeight) and 0.2 < out.weight.density < 0.3
    assert isinstance(decoder.head, Product) and not isinstance(decoder.head.weight, SparseWeight)
    dense = random_decoder(config_of("llama"), scheme, "cpu", torch.float32, head=scheme)
    sizes = [sum(one.nbytes for one in of.layers[0].tensors()) for of in (decoder, dense)]
    assert sizes[0] < 0.75 * sizes[1]
    x = torch.randn(3, out.weight.shape[1])
    torch.testing.assert_close(out(x), x @ out.weight.dequantize().T, rtol=1e-4, atol=1e-4)
