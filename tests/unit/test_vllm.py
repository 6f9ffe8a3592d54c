"""Tersor checkpoints in vLLM's layers: what a rank holds is its part of what is stored, and multiplies as that does."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import checkpoints, mixes, packed_models, pruned, vllm_stand_in
from helpers.vllm_layers import HIDDEN, INNER, LAYER, PARTS, build, config_of, fill, weight

from tersor.convert import quantize
from tersor.errors import CheckpointError, TersorError, UnsupportedError
from tersor.formats import get_scheme
from tersor.integrations.transformers.load import load_model

pytestmark = pytest.mark.usefixtures("one_vllm_rank")


KEPT = {"format": "int4", "outliers": "3%"}


def spans(kind: str, rank: int, ranks: int, kv_heads: int = 2) -> list[slice]:
    """Return the rows of every stored weight that a rank has, by hand."""
    if kind in ("out", "down"):
        return [slice(None)]
    found = []
    for place, size in enumerate([64, 32, 32] if kind == "qkv" else [INNER] * 2):
        of = min(ranks, kv_heads) if kind == "qkv" and place else ranks
        own, number = size // of, rank * of // ranks
        found.append(slice(number * own, (number + 1) * own))
    return found


@pytest.fixture(scope="module", params=["fp6", "groups", "outliers", "several", "mixed", "pruned", "pruned int8"])
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a compressed checkpoint."""
    folder, kind = tmp_path_factory.mktemp("vllm"), request.param
    changes = {"intermediate_size": INNER}
    if kind == "mixed":
        return mixes.compressed("llama", folder, **changes)[1]
    if kind.startswith("pruned"):
        source = pruned.saved("llama", folder / "plain", 0.4, **changes)
        quantize(source, folder / "out", format="bf16" if kind == "pruned" else "int8")
        return folder / "out"
    options: dict[str, Any] = {
        "fp6": {},
        "groups": {"format": "uint4", "group_size": 32},
        "outliers": KEPT,
        "several": {"ignore": ["k_proj"], "overrides": {"up_proj": "int8"}},
    }[kind]
    return packed_models.case("llama", folder, options, **changes).packed


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_rank_holds_its_part_of_every_kind_of_weight(stored: Path, vllm: SimpleNamespace, ranks: int) -> None:
    decoded = dict(load_model(stored, "cpu", "float32").named_modules())
    tensors = checkpoints.weights(stored)
    for kind, parts in PARTS.items():
        if kind == "out" and ranks == 4:  # 16 channels a rank are no quantum
            continue
        for rank in range(ranks):
            vllm.ranks, vllm.rank = ranks, rank
            layer: Any = build(kind, config_of(stored))
            fill(layer, kind, tensors)
            wholes = [decoded[f"{LAYER}.{part}"].weight for part in parts]
            wanted = torch.cat([one[rows] for one, rows in zip(wholes, spans(kind, rank, ranks), strict=True)])
            if kind in ("out", "down"):
                own = wanted.shape[1] // ranks
                wanted = wanted[:, rank * own : (rank + 1) * own]
            torch.testing.assert_close(weight(layer, wanted.shape[1]), wanted, rtol=0, atol=0)
            bias = torch.randn(len(wanted))
            x = torch.randn(3, wanted.shape[1])
            torch.testing.assert_close(layer(x, bias), torch.nn.functional.linear(x, wanted, bias))
            assert not [name for name, one in layer.named_parameters() if not one.numel()]


def test_what_is_alike_is_one_weight_and_what_is_not_stays_side_by_side(tmp_path: Path) -> None:
    options = {"ignore": ["k_proj"], "overrides": {"up_proj": "int8"}}
    packed = packed_models.case("llama", tmp_path, options, intermediate_size=INNER).packed
    config, tensors = config_of(packed), checkpoints.weights(packed)
    found = {}
    for kind in ("qkv", "gate_up"):
        layer: Any = build(kind, config)
        fill(layer, kind, tensors)
        found[kind] = [(type(part).__name__, part.rows) for part in layer.tersor]
    assert found["qkv"] == [("DensePart", 64), ("PlainPart", 32), ("DensePart", 32)]
    assert found["gate_up"] == [("DensePart", INNER), ("DensePart", INNER)]
    plain = packed_models.case("llama", tmp_path / "alike", {}, intermediate_size=INNER).packed
    layer = build("qkv", config_of(plain))
    fill(layer, "qkv", checkpoints.weights(plain))
    assert [part.rows for part in layer.tersor] == [128]


def test_a_weight_that_is_stored_in_one_is_cut_in_every_part(tmp_path: Path, vllm: SimpleNamespace) -> None:
    packed = packed_models.case("phi3", tmp_path, {}, intermediate_size=INNER).packed
    whole = dict(load_model(packed, "cpu", "float32").named_modules())[f"{LAYER}.mlp.gate_up_proj"].weight
    for rank in range(2):
        vllm.ranks, vllm.rank = 2, rank
        layer: Any = build("gate_up", config_of(packed))
        for name, tensor in checkpoints.weights(packed).items():
            if name.startswith(f"{LAYER}.mlp.gate_up_proj."):
                layer.load(name.rpartition(".")[2], tensor)
        layer.quant_method.process_weights_after_loading(layer)
        half = slice(rank * INNER // 2, (rank + 1) * INNER // 2)
        assert torch.equal(weight(layer, HIDDEN), torch.cat([whole[:INNER][half], whole[INNER:][half]]))


def test_a_plain_checkpoint_is_packed_as_the_verb_would(tmp_path: Path, vllm: SimpleNamespace) -> None:
    asked = {"format": "int4:g32", "ignore": ["o_proj"], "overrides": {"down_proj": "fp6"}}
    source = packed_models.plain("llama", tmp_path / "plain", intermediate_size=INNER)
    quantize(
        source, tmp_path / "out", format="int4", group_size=32, ignore=["o_proj"], overrides={"down_proj": "fp6:row"}
    )
    decoded = dict(load_model(tmp_path / "out", "cpu", "float32").named_modules())
    vllm.ranks, vllm.rank = 2, 1
    for kind in ("gate_up", "down"):
        layer: Any = build(kind, config_of(source, json.dumps(asked)))
        fill(layer, kind, checkpoints.weights(source))
        wholes = [decoded[f"{LAYER}.{part}"].weight for part in PARTS[kind]]
        wanted = torch.cat([one[rows] for one, rows in zip(wholes, spans(kind, 1, 2), strict=True)])
        wanted = wanted[:, INNER // 2 :] if kind == "down" else wanted
        assert torch.equal(weight(layer, wanted.shape[1]), wanted)
    left = config_of(source, json.dumps(asked)).get_quant_method(
        vllm_stand_in.LinearBase.__new__(vllm_stand_in.LinearBase), f"{LAYER}.self_attn.o_proj"
    )
    assert type(left) is vllm_stand_in.UnquantizedLinearMethod


def test_the_environment_says_what_a_plain_checkpoint_is_packed_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = packed_models.plain("llama", tmp_path, intermediate_size=INNER)
    monkeypatch.setenv("TERSOR_VLLM_FORMAT", "uint4:g64")
    config = config_of(source)
    assert config.plan.stored[f"{LAYER}.mlp.down_proj"].represented == get_scheme("uint4", 64)
    monkeypatch.setenv("TERSOR_VLLM_ACTIVATIONS", "int8")
    other = config_of(source)
    assert config.hf["plan"] == other.hf["plan"] and other.hf["activations"] == "int8"
    monkeypatch.setenv("TERSOR_VLLM_FORMAT", "int8")
    assert config_of(source).hf["plan"] != config.hf["plan"]
    monkeypatch.setenv("TERSOR_VLLM_FORMAT", "fp9")
    with pytest.raises(TersorError, match=r"environment variable TERSOR_VLLM_FORMAT: .*fp9"):
        config_of(source)


def test_random_weights_have_the_shapes_of_a_rank(tmp_path: Path, vllm: SimpleNamespace) -> None:
    source = packed_models.plain("llama", tmp_path, intermediate_size=INNER)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    vllm.ranks, vllm.rank, vllm.load_config.load_format = 2, 1, "dummy"
    config = config_of(source)
    for kind, rows, channels in (("qkv", 64, HIDDEN), ("gate_up", INNER, HIDDEN), ("down", HIDDEN, INNER // 2)):
        layer: Any = build(kind, config)
        layer.quant_method.process_weights_after_loading(layer)
        found = weight(layer, channels)
        assert found.shape == (rows, channels) and bool(found.isfinite().all()) and found.std() > 0.05
    router = vllm_stand_in.ReplicatedLinear.__new__(vllm_stand_in.ReplicatedLinear)
    assert type(config.get_quant_method(router, f"{LAYER}.mlp.gate")) is vllm_stand_in.UnquantizedLinearMethod


def test_names_of_the_checkpoint_become_those_of_vllm(tmp_path: Path) -> None:
    packed = packed_models.case("llama", tmp_path, {}, intermediate_size=INNER).packed
    config = config_of(packed)
    config.apply_vllm_mapper(vllm_stand_in.Mapper({"model.": "language_model.model."}))
    method = config.get_quant_method(
        vllm_stand_in.LinearBase.__new__(vllm_stand_in.LinearBase), f"language_{'model.'}{LAYER}.mlp.gate_up_proj"
    )
    assert type(method).__name__ == "TersorLinearMethod"


def test_a_trace_of_a_layer_holds_an_operator_for_every_weight(tmp_path: Path) -> None:
    operators: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        operators.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    folders = {
        "linear": packed_models.case("llama", tmp_path / "fp6", {}, intermediate_size=INNER).packed,
        "outlier_linear": packed_models.case("llama", tmp_path / "kept", KEPT, intermediate_size=INNER).packed,
        "mixed_linear": mixes.compressed("llama", tmp_path / "mixed", intermediate_size=INNER)[1],
    }
    for name, packed in folders.items():
        layer: Any = build("qkv", config_of(packed))
        fill(layer, "qkv", checkpoints.weights(packed))
        operators.clear()
        with torch.inference_mode():
            traced = torch.compile(
                lambda x, layer=layer: layer.quant_method.apply(layer, x), backend=backend, fullgraph=True
            )
            for tokens in (3, 5):
                x = torch.randn(tokens, HIDDEN)
                torch._dynamo.mark_dynamic(x, 0)
                assert torch.equal(traced(x), layer(x))
        assert [operator.removesuffix(".default") for operator in operators] == [f"tersor.{name}"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_embedding_and_head_are_padded_as_vllm_pads_them(tmp_path: Path, vllm: SimpleNamespace, ranks: int) -> None:
    options = {"overrides": {"lm_head": "uint4:g32", "embed_tokens": "int8"}}
    packed = packed_models.case("llama", tmp_path, options, intermediate_size=INNER).packed
    tensors, model = checkpoints.weights(packed), load_model(packed, "cpu", "float32")
    rows, logits = [], []
    ids, x = torch.arange(96), torch.randn(5, HIDDEN)
    for rank in range(ranks):
        vllm.ranks, vllm.rank = ranks, rank
        config = config_of(packed)
        embedding: Any = vllm_stand_in.VocabParallelEmbedding(config, "", 96, HIDDEN)
        head: Any = vllm_stand_in.ParallelLMHead(config, "lm_head", 96, HIDDEN)
        for layer, stem in ((embedding, "model.embed_tokens."), (head, "lm_head.")):
            for name, tensor in tensors.items():
                if name.startswith(stem):
                    layer.load(name.removeprefix(stem), tensor)
            layer.quant_method.process_weights_after_loading(layer)
        own = embedding.shard_indices
        span = range(own.org_vocab_end_index - own.org_vocab_start_index)
        rows.append(embedding.quant_method.embedding(embedding, torch.tensor(list(span))))
        logits.append(head.quant_method.apply(head, x))
    assert torch.equal(torch.cat(rows), model.model.embed_tokens(ids))
    found = torch.cat(logits, dim=-1)
    torch.testing.assert_close(found[:, :96], model.lm_head(x))
    assert found.shape == (5, 128) and not found[:, 96:].any()


def test_a_tied_head_multiplies_with_the_packed_embedding(tmp_path: Path) -> None:
    options = {"overrides": {"embed_tokens": "fp6"}}
    changes = {"intermediate_size": INNER, "tie_word_embeddings": True}
    packed = packed_models.case("qwen2", tmp_path, options, **changes).packed
    config, model = config_of(packed), load_model(packed, "cpu", "float32")
    embedding: Any = vllm_stand_in.VocabParallelEmbedding(config, "model.embed_tokens", 96, HIDDEN)
    head: Any = vllm_stand_in.ParallelLMHead(config, "lm_head", 96, HIDDEN)
    assert head.quant_method.tie_weights(head, embedding) is head
    for name, tensor in checkpoints.weights(packed).items():
        if name.startswith("model.embed_tokens."):
            embedding.load(name.rpartition(".")[2], tensor)
    for layer in (embedding, head):
        layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(5, HIDDEN)
    for layer in (head, embedding):  # some models have no head and ask the embedding
        torch.testing.assert_close(layer.quant_method.apply(layer, x)[:, :96], model.lm_head(x))


PAGE = (Path(__file__).resolve().parents[2] / "docs" / "vllm.md").read_text().replace("\\\n", "")


def test_what_the_page_asks_of_a_plain_checkpoint_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = vllm_stand_in.REGISTERED["tersor"]
    asked = [shlex.split(line) for line in re.findall(r"^ {4}(.*--hf-overrides.*)$", PAGE, re.MULTILINE)]
    assert len(asked) == 1
    overrides = json.loads(asked[0][asked[0].index("--hf-overrides") + 1])
    config = kind.from_config_dict_json(overrides.pop("quantization_config_dict_json"))
    assert not overrides and config.parsed.scheme == get_scheme("int4", 64) and not config.stored
    assert config.parsed.resolve(f"{LAYER}.mlp.down_proj") == get_scheme("int8")
    settings = dict(re.findall(r"(TERSOR_VLLM_\w+)=([\w:]+)", PAGE))
    assert set(settings) == {"TERSOR_VLLM_FORMAT", "TERSOR_VLLM_ACTIVATIONS"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert kind().parsed.scheme == get_scheme(settings["TERSOR_VLLM_FORMAT"])


def test_what_is_not_supported_is_said_in_a_line(
    tmp_path: Path, vllm: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = packed_models.case("llama", tmp_path / "row", {}).packed  # 96 inner channels
    vllm.ranks, vllm.rank = 2, 1
    config = config_of(packed)
    down = f"{LAYER}.mlp.down_proj"
    with pytest.raises(UnsupportedError, match=r"gives a rank input channels 48 to 96, .* multiples of 32: use fewer"):
        vllm_stand_in.RowParallelLinear(config, down, 96, [HIDDEN])
    vllm.ranks, vllm.rank = 1, 0
    layer: Any = vllm_stand_in.RowParallelLinear(config, down, 96, [HIDDEN])
    with pytest.raises(
        CheckpointError, match=r"read no tensor 'model.layers.0.mlp.down_proj.weight_packed' and 1 more"
    ):
        layer.quant_method.process_weights_after_loading(layer)
    layer = vllm_stand_in.RowParallelLinear(config, down, 96, [HIDDEN - 1])
    tensors = checkpoints.weights(packed)
    layer.load("weight_packed", tensors[f"{down}.weight_packed"])
    with pytest.raises(CheckpointError, match="has 64 rows, and vLLM's layer 63"):
        layer.load("weight_scale", tensors[f"{down}.weight_scale"])
    with pytest.raises(TersorError, match="an object with format, ignore, overrides"):
        vllm_stand_in.REGISTERED["tersor"].from_config_dict_json('{"bits": 6}')
    monkeypatch.setenv("TERSOR_VLLM_ACTIVATIONS", "fp8")
    sparse = pruned.saved("llama", tmp_path / "plain", 0.3)
    quantize(sparse, tmp_path / "sparse", format="bf16")
    with pytest.raises(UnsupportedError, match="is pruned, and pruned weights are multiplied with 16-bit activations"):
        config_of(tmp_path / "sparse")
    monkeypatch.setenv("TERSOR_VLLM_ACTIVATIONS", "int8")
    with pytest.raises(UnsupportedError, match="activations int8 with weights in fp6"):
        config_of(packed)
