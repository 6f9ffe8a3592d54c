"""Every way to cut an operator gives the whole operator's outputs and gradients, on 2, 3, 4 and 8 ranks."""

from __future__ import annotations

import pytest
import torch
from helpers.graph_calls import CALLS, Maker
from helpers.graph_ranks import gradients_of_ranks, operator, outputs_of_ranks

from tersor.planner.graph.cuts import ways
from tersor.planner.graph.local import run
from tersor.planner.graph.rules import RULES, base_name
from tersor.planner.graph.shares import largest, span

aten = torch.ops.aten
ALIKE = {
    *("aten.alias", "aten.clone", "aten.detach", "aten.lift_fresh_copy", "aten.dropout", "aten._unsafe_view"),
    *("aten.reshape", "aten.t", "aten.arange", "aten.full", "aten.zeros", "aten.ones", "aten.empty"),
    *("aten.full_like", "aten.zeros_like", "aten.ones_like", "aten.empty_like", "aten.scalar_tensor"),
    *("aten.empty_permuted", "transformers.grouped_mm_fallback"),
}
"""Rules that are another's under a second name, or those of tensors that are made of nothing."""


WITHOUT_GRADIENT = ("any", "all", "argmax", "argmin", "copy", "grouped product")
OFFERED = {
    "linear": "in out row0 row1",
    "linear without bias": "in out row0",
    "mm": "in out row",
    "addmm": "in out row",
    "addmm of a matrix": "in out row",
    "bmm": "batch in out row",
    "baddbmm": "batch in out row",
    "mv": "in row",
    "dot": "in",
    "convolution": "batch in out",
    "convolution of groups": "batch groups in out",
    "transposed convolution": "batch in out",
    "embedding": "row0 vocabulary width",
    "attention": "batch0 heads rows width",
    "causal attention": "batch0 heads width",
    "grouped queries": "group heads width",
    "add": "dim0 dim2",
    "add of a number": "dim0 dim1",
    "sub": "dim0 dim1",
    "mul": "dim0 dim1",
    "div": "dim0 dim1",
    "where": "dim0 dim1",
    "tanh": "dim0",
    "gelu": "dim0 dim1",
    "cast": "dim0 dim1",
    "dropout of nothing": "dim0 dim1",
    "view that splits": "dim0 dim1_0 dim1_1",
    "view that merges": "dim0_0 dim0_1",
    "view that regroups": "dim0_0 dim0_1 dim1_1",
    "view across": "",
    "unsqueeze": "dim0 dim1",
    "squeeze": "dim0 dim2",
    "permute": "dim0 dim1 dim2",
    "transpose": "dim0 dim1 dim2",
    "expand": "dim1 dim2",
    "repeat": "dim1 dim2 times0 times1 times2",
    "split": "dim0 part",
    "split by size": "dim0 part",
    "unbind": "dim0 dim2",
    "uneven split": "dim0",
    "slice": "dim0 part",
    "slice from the end": "dim0 part",
    "slice of a few": "dim0",
    "select": "dim0 dim2",
    "cat": "dim0 part",
    "uneven cat": "dim0",
    "stack": "dim0 dim1",
    "pad": "dim0",
    "slice_scatter": "dim0",
    "select_scatter": "dim0 dim2",
    "copy": "dim0 dim1",
    "sum": "dim0 dim1",
    "sum of all": "dim0 dim1",
    "mean": "dim0 dim1",
    "amax": "dim0",
    "max": "dim0",
    "min": "dim1",
    "argmax": "dim0",
    "amin": "dim1",
    "argmin": "dim1",
    "var": "dim0",
    "std": "dim0",
    "prod": "dim0",
    "logsumexp": "dim0",
    "any": "dim0",
    "all": "dim0",
    "softmax": "dim0",
    "log_softmax": "dim1",
    "cumsum": "dim0",
    "cumprod": "dim0",
    "older softmax": "dim0",
    "older log_softmax": "dim0",
    "roll": "dim0",
    "sort": "dim0",
    "topk": "dim0",
    "flip": "dim1",
    "layer_norm": "dim0 dim1",
    "rms_norm": "dim0",
    "layer_norm with statistics": "dim0 dim1",
    "fused rms_norm": "dim0",
    "group_norm": "batch groups",
    "batch_norm": "batch channels",
    "batch_norm of a batch": "channels",
    "norm of instances": "channels",
    "max_pool2d": "batch channels",
    "avg_pool2d": "batch channels",
    "adaptive pool": "batch channels",
    "upsample": "batch channels",
    "bilinear": "batch channels",
    "gather": "dim0 picked places",
    "index_select": "dim0 dim2 picked",
    "scatter_add": "dim0",
    "scatter": "dim0",
    "index": "dim1 picked0 picked1",
    "index of two": "dim0 picked0",
    "index apart": "dim1 picked0",
    "index_put": "dim1",
    "grouped product": "in out",
}
"""The names along which each call may be cut by two ranks in halves."""


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("name", CALLS)
def test_slices_of_every_way_make_the_whole(name: str, ranks: int) -> None:
    target, args, kwargs = CALLS[name](Maker(ranks, seed=ranks))
    made, inputs, parts = operator(target, args, kwargs)
    expected = target(*args, **kwargs)
    expected = list(expected) if isinstance(expected, (tuple, list)) else [expected]
    tolerance = 0.05 if inputs[0].dtype == torch.bfloat16 else 1e-9
    for way in ways(made, ranks):
        found = outputs_of_ranks(made, inputs, parts, way, ranks)
        for one, other in zip(found, expected, strict=True):
            assert torch.allclose(one.double(), other.double(), rtol=tolerance, atol=tolerance * 10), way


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("name", [name for name in CALLS if name not in WITHOUT_GRADIENT])
def test_gradients_of_every_way_make_the_whole(name: str, ranks: int) -> None:
    target, args, kwargs = CALLS[name](Maker(ranks, seed=ranks))
    made, inputs, parts = operator(target, args, kwargs)
    for way in ways(made, ranks):
        expected, found = gradients_of_ranks(made, inputs, parts, way, ranks)
        for one, other in zip(found, expected, strict=True):
            assert torch.allclose(one, other, rtol=1e-9, atol=1e-9), way


def test_every_rule_is_tested() -> None:
    tested = {base_name(operator(*make(Maker(2, seed=0)))[0].call) for make in CALLS.values()}
    assert set(RULES) - tested == ALIKE


SPLIT = {
    "linear": ("in", "out", "row1"),
    "embedding": ("width",),
    "layer_norm": ("dim0",),
    "mul": ("dim1",),
    "split": ("part",),
    "cat": ("part",),
    "slice": ("part",),
    "group_norm": ("groups",),
    "convolution of groups": ("groups",),
    "sum": ("dim1",),
    "mean": ("dim1",),
    "softmax": ("dim0",),
    "causal attention": ("heads",),
    "grouped queries": ("heads",),
}
"""Names that views elsewhere split, by call; a rank then has several runs of the dimension (block-cyclic)."""


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", SPLIT)
def test_strided_cuts_make_the_whole(name: str, ranks: int) -> None:
    target, args, kwargs = CALLS[name](Maker(12, seed=1))
    sizes = operator(target, args, kwargs)[0].sizes
    split = {key: (3, sizes[key] // 3) if sizes[key] == 12 else (2, sizes[key] // 2) for key in SPLIT[name]}
    made, inputs, parts = operator(target, args, kwargs, split)
    expected = run(made, inputs)
    strided = 0
    for way in ways(made, ranks):
        strided += any(place.kind == "cut" and place.part > 0 for place in way.places)
        found = outputs_of_ranks(made, inputs, parts, way, ranks)
        for one, other in zip(found, expected, strict=True):
            assert torch.allclose(one, other, rtol=1e-9, atol=1e-9), way
        whole, joined = gradients_of_ranks(made, inputs, parts, way, ranks)
        for one, other in zip(joined, whole, strict=True):
            assert torch.allclose(one, other, rtol=1e-9, atol=1e-9), way
    assert strided


@pytest.mark.parametrize("name", CALLS)
def test_an_operator_may_be_cut_along_the_names_of_its_rule(name: str) -> None:
    made, _, _ = operator(*CALLS[name](Maker(2, seed=0)))
    even = [way.name for way in ways(made, 2) if way.cuts and made.sizes[way.name] % 2 == 0]
    assert " ".join(sorted(even)) == OFFERED[name]


UNEVEN = ((5, 2), (7, 3), (11, 4), (11, 8))
"""What sizes of calls are multiples of, and ranks, which do not divide it."""


@pytest.mark.parametrize("multiple, ranks", UNEVEN)
@pytest.mark.parametrize("name", CALLS)
def test_uneven_slices_of_every_way_make_the_whole_and_its_gradients(name: str, multiple: int, ranks: int) -> None:
    target, args, kwargs = CALLS[name](Maker(multiple, seed=ranks))
    made, inputs, parts = operator(target, args, kwargs)
    found = [way for way in ways(made, ranks) if way.cuts]
    uneven = [way for way in found if made.sizes[way.name] % ranks]
    assert {way.name for way in uneven} >= {one for one in OFFERED[name].split() if made.sizes[one] == multiple}
    tolerance = 0.05 if inputs[0].dtype == torch.bfloat16 else 1e-9
    expected = target(*args, **kwargs)
    expected = list(expected) if isinstance(expected, (tuple, list)) else [expected]
    for way in uneven:
        for one, other in zip(outputs_of_ranks(made, inputs, parts, way, ranks), expected, strict=True):
            assert torch.allclose(one.double(), other.double(), rtol=tolerance, atol=tolerance * 10), way
        if name not in WITHOUT_GRADIENT:
            for one, other in zip(*gradients_of_ranks(made, inputs, parts, way, ranks), strict=True):
                assert torch.allclose(one, other, rtol=1e-9, atol=1e-9), way


def test_a_size_is_not_cut_where_one_rank_would_have_much_more_than_others_or_one_nothing() -> None:
    made, _, _ = operator(aten.linear.default, [torch.zeros(6, 4), torch.zeros(9, 4)])
    assert [way.name for way in ways(made, 3) if way.cuts] == ["row0", "in", "out"]
    assert [way.name for way in ways(made, 5) if way.cuts] == ["out"]
    assert [way.name for way in ways(made, 8) if way.cuts] == []
    assert [span(50257, 4, rank) for rank in (0, 1, 3)] == [(0, 12565), (12565, 12564), (37693, 12564)]
    assert largest(50257, 8) == span(50257, 8, 0)[1] == 6283


def test_an_operator_without_a_rule_is_named_and_not_cut() -> None:
    made, _, _ = operator(aten.histc.default, [torch.zeros(8), 4, 0, 8])
    assert made.note == "no rule for aten.histc.default, so that every rank computes all of it"
    assert [way.name for way in ways(made, 2)] == ["whole"]
