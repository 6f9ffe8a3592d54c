"""Weights that models and other programs hold in kernel layouts are the stored ones, wherever they were moved."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import pruned
from helpers.every_layout import (
    IC,
    MIXES,
    OF_EXPERTS,
    PLACED,
    SCHEMES,
    check,
    check_gated,
    check_mixed,
    check_stack,
    mixed,
    named,
    plain,
    same,
    stored,
    to,
)
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from tersor import ops
from tersor.formats import Activations, Plain, Scheme, get_scheme
from tersor.integrations.transformers.experts import PackedExperts
from tersor.layouts import (
    STREAM,
    MixedWeight,
    PackedWeight,
    SparseWeight,
    StackedMixedWeight,
    StackedWeight,
    TiledSparseWeight,
    tiled_sparse,
)
from tersor.layouts.shard import Part
from tersor.models.config import DecoderConfig
from tersor.models.random import random_decoder
from tersor.models.streamed import Offload, weights_of, with_weights
from tersor.models.weights import Product
from tersor.nn import MixedLinear, PackedEmbedding, PackedLinear, TiedLinear
from tersor.offload.image import Image
from tersor.ops import reference


@pytest.mark.parametrize(("scheme", "layout"), named(PLACED[::2]))
def test_products_and_gradients_of_blocks_of_rows_are_those_of_the_whole(
    scheme: Scheme, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = stored(scheme, 136).to_layout(layout)
    generator = torch.Generator().manual_seed(3)
    x, grad = torch.randn(2, IC, generator=generator), torch.randn(2, 136, generator=generator)
    whole = ops.linear(x, weight)
    back = grad @ weight.dequantize()
    monkeypatch.setitem(reference.BLOCK_ELEMENTS, "cpu", 64 * IC)
    torch.testing.assert_close(ops.linear(x, weight), whole, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(reference.input_grad(grad, weight), back, rtol=1e-4, atol=1e-3)
    if weight.outliers is None:
        parts = [ops.linear(x, weight.rows(first, min(first + 64, 136))) for first in (0, 64, 128)]
        torch.testing.assert_close(torch.cat(parts, dim=-1), whole, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("scheme", "layout"), named(OF_EXPERTS))
def test_a_tied_head_has_the_weight_of_its_embedding(
    scheme: Scheme, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "preferred_layout", lambda *_: layout)
    embedding = PackedEmbedding(72, IC, scheme, dtype=torch.float32)
    embedding._set_weight(stored(scheme, 72))
    model = torch.nn.ModuleDict({"embedding": embedding, "head": TiedLinear(IC, 72, scheme, dtype=torch.float32)})
    model["head"].tie(embedding)  # type: ignore[operator]
    for one in (model, copy.deepcopy(model), model.half()):
        check(one["head"].packed_weight(), stored(scheme, 72).dequantize(), layout)
        check(one["embedding"].packed_weight(), stored(scheme, 72).dequantize(), STREAM)


def brought(product: Product) -> Any:
    """Return the weight of a product with tensors that are views of one piece of bytes, as where a layer streams."""
    tensors = weights_of(product)  # type: ignore[arg-type]
    image = Image.of(tensors)
    memory = torch.full((image.nbytes,), 255, dtype=torch.uint8)
    image.write(memory, tensors)
    views = iter(image.views(memory))
    return with_weights(product, lambda _: next(views)).weight  # type: ignore[arg-type, attr-defined]


@pytest.mark.parametrize(("scheme", "layout"), named(PLACED))
def test_weights_that_stream_have_the_bytes_of_those_that_stay(scheme: Scheme, layout: str) -> None:
    weight = stored(scheme, 136).to_layout(layout)
    assert same(brought(Product(weight)), weight)


@pytest.mark.parametrize("layout", MIXES)
def test_mixed_weights_that_stream_have_the_bytes_of_those_that_stay(layout: str) -> None:
    weight = mixed(MIXES[layout], 200).to_layout(to(layout))
    found = brought(Product(weight))
    assert same(found, weight) and torch.equal(found.dequantize(), weight.dequantize())


@pytest.mark.parametrize("kind", ["qwen3_moe", "llama"])
@pytest.mark.parametrize(
    ("form", "layout"),
    [(get_scheme("uint4", 32), "tiles_int8"), (get_scheme("fp6_e3m2"), "tiles_bfloat16"), (SCHEMES[2], STREAM)],
)
def test_layers_that_stream_have_the_bytes_of_those_that_stay(
    kind: str, form: Scheme, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "preferred_layout", lambda *_: layout)
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "head_dim": 16}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    experts = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "norm_topk_prob": True}
    architecture = {"llama": "LlamaForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}[kind]
    config = DecoderConfig.from_dict({"architectures": [architecture], **sizes, **(experts if kind != "llama" else {})})

    def made(offload: Offload | None) -> Any:
        return random_decoder(config, form, "cpu", torch.bfloat16, offload=offload)

    stays, streams = made(None), made(Offload(lambda layers, outside: 1))
    streams.streamed.begin()
    for index, (one, other) in enumerate(zip(stays.layers, streams.layers, strict=True)):
        with streams.streamed.there(index):
            tensors = weights_of(one)
            assert {tensor.dtype for tensor in tensors} >= {torch.int32}
            for own, moved in zip(tensors, weights_of(other), strict=True):
                assert own.dtype == moved.dtype and torch.equal(own, moved)


VALUES = (Plain("bfloat16"), Plain("float16"), get_scheme("fp6_e3m2"), get_scheme("int8"), get_scheme("fp5_e2m2"))


@pytest.mark.parametrize("places", [0, 2])
@pytest.mark.parametrize("values", VALUES, ids=lambda one: one.key() if isinstance(one, Scheme) else one.dtype)
def test_a_pruned_weight_keeps_its_numbers(
    values: Scheme | Plain, places: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiled_sparse, "_CHUNK_WEIGHTS", 64 * IC)
    target = values.dtype if isinstance(values, Plain) else "float16"
    first, decoded = pruned.sparse(plain(264), pruned.kept(264, IC, 0.3), values)
    second, also = pruned.sparse(plain(264, 1), pruned.kept(264, IC, 0.6, 1), values)

    def check_sparse(found: SparseWeight, wanted: torch.Tensor) -> None:
        tiles = TiledSparseWeight.of(found, target, places)
        for one in (found, tiles, tiles.stored(), brought(Product(tiles)), brought(Product(found))):
            assert torch.equal(one.dequantize(), wanted)
        for own, other in zip(tiles.stored().tensors(), found.tensors(), strict=True):
            assert torch.equal(own, other)
        for rows in ((0, 1), (63, 65), (64, len(wanted))):
            if rows[1] <= len(wanted) and rows[0] < rows[1]:
                assert torch.equal(tiles.dequantize(rows=rows), wanted[slice(*rows)])

    check_sparse(first, decoded)
    stack, every = SparseWeight.stack([first, second]), torch.cat([decoded, also])
    check_sparse(stack, every)
    for part, wanted in zip(stack.split([100, 428]), every.split([100, 428]), strict=True):
        check_sparse(part, wanted)
    both = SparseWeight.gate_up(first.cut(Part(((0, 261),))), second.cut(Part(((0, 261),))))
    check_sparse(both, both.dequantize())
    for half, wanted in zip(both.split_gate_up(), (decoded, also), strict=True):
        check_sparse(half, wanted[:261])
    check_sparse(first.cut(Part(((0, 65), (70, 264)), (96, 192))), torch.cat([decoded[:65], decoded[70:]])[:, 96:])
    check_sparse(first.take(torch.arange(263, -1, -1)), decoded.flip(0))


@pytest.mark.parametrize(("scheme", "layout"), named(PLACED))
def test_layers_of_vllm_hold_what_is_stored(
    scheme: Scheme, layout: str, vllm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tersor.integrations.vllm import arriving, experts, parts

    monkeypatch.setattr(ops, "preferred_layout", lambda *_: layout)
    each = [stored(scheme, 72, seed) for seed in range(3)]
    (one,) = arriving.together(each)
    assert isinstance(one, PackedWeight)
    on = arriving._on(one, torch.device("cpu"))
    assert same(on, one)
    (part,) = parts.parts_of([on], torch.float32, Activations.NATIVE)
    ready = one.to_layout(layout)
    held = [ready.data, ready.scale, ready.zero_point]
    held += [] if scheme.outliers is None else [ready.outliers, ready.arranged]
    for own, other in zip(part.held, held, strict=True):
        assert own is other is None or torch.equal(own, other)
    check(ready, torch.cat([weight.dequantize() for weight in each]), layout)
    if scheme.outliers is None:
        assert same(parts.stored_of(part), ready)
        gates = [experts._gate_up({"w1": each[0], "w3": two}) for two in each]
        stack = experts._ready(experts._stacked(gates), torch.float32, Activations.NATIVE)
        assert isinstance(stack, StackedWeight)
        for index, two in enumerate(each):
            check_gated(stack.expert(index), each[0].dequantize(), two.dequantize(), layout)


@pytest.mark.parametrize("layout", MIXES)
def test_mixed_layers_of_vllm_hold_what_is_stored(layout: str, vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from tersor.integrations.vllm import arriving, experts, parts

    monkeypatch.setattr(ops, "preferred_layout", lambda *_: layout)
    each = [mixed(MIXES[layout], 200, seed) for seed in range(2)]
    (one,) = arriving.together(each)
    assert isinstance(one, MixedWeight)
    (part,) = parts.parts_of([one], torch.float32, Activations.NATIVE)
    decoded = [weight.dequantize() for weight in each]
    check_mixed(ops.row_sets.weight_of(part.held, part.form), torch.cat(decoded), layout)
    gates = [experts._gate_up({"w1": each[0], "w3": two}) for two in each]
    stack = experts._ready(experts._stacked(gates), torch.float32, Activations.NATIVE)
    assert isinstance(stack, StackedMixedWeight)
    check_mixed(stack, torch.stack([torch.cat([decoded[0], two]) for two in decoded]), layout)


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def experts_of(layers: list[list[Any]]) -> PackedExperts:
    """Return experts of transformers with these layers, gate, up and down of each."""
    config = Qwen3MoeConfig(
        hidden_size=IC, moe_intermediate_size=IC, num_experts=len(layers), experts_implementation="eager"
    )
    experts = PackedExperts(Qwen3MoeExperts(config), PROJECTIONS[:2], PROJECTIONS[2])
    for expert, three in enumerate(layers):
        for name, layer in zip(PROJECTIONS, three, strict=True):
            experts._layers(expert)[name] = layer
    experts.join()
    return experts


@pytest.mark.parametrize(("scheme", "layout"), named(OF_EXPERTS[::2]))
def test_joined_experts_show_what_each_has_stored(scheme: Scheme, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "preferred_layout", lambda *_: layout)
    each = [[stored(scheme, IC, 3 * expert + part) for part in range(3)] for expert in range(2)]
    experts: Any = experts_of([[PackedLinear.from_packed(one, dtype=torch.float32) for one in three] for three in each])
    for module in (experts, copy.deepcopy(experts), experts.half().float()):
        gate_up, down = module.gate_up.packed_weight(), module.down.packed_weight()
        check_stack(down, torch.stack([three[2].dequantize() for three in each]), layout)
        state = module.state_dict()
        for expert, three in enumerate(each):
            check_gated(gate_up.expert(expert), three[0].dequantize(), three[1].dequantize(), layout)
            for name, one in zip(PROJECTIONS, three, strict=True):
                assert same(module._layers(expert)[name].packed_weight(), one)
                assert torch.equal(state[f"{expert}.{name}.weight_scale"], one.scale)
    experts.keep_apart()
    check(experts._layers(1)["up_proj"].packed_weight().to_layout(layout), each[1][1].dequantize(), layout)


@pytest.mark.parametrize("layout", MIXES)
def test_joined_mixed_experts_show_what_each_has_stored(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "preferred_layout", lambda *_: layout)
    each = [[mixed(MIXES[layout], IC, 3 * expert + part) for part in range(3)] for expert in range(2)]
    experts: Any = experts_of([[MixedLinear.from_packed(one, dtype=torch.float32) for one in three] for three in each])
    decoded = [[one.dequantize() for one in three] for three in each]
    for module in (experts, copy.deepcopy(experts), experts.half().float()):
        gate_up, down = module.gate_up.packed_weight(), module.down.packed_weight()
        check_mixed(down, torch.stack([three[2] for three in decoded]), layout)
        check_mixed(gate_up, torch.stack([torch.cat(three[:2]) for three in decoded]), layout)
        for expert, three in enumerate(each):
            for name, one in zip(PROJECTIONS, three, strict=True):
                assert same(module._layers(expert)[name].packed_weight(), one)
