"""Embeddings named by an override: compressed, loaded, compressed while loading, saved, decoded, and refused."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import packed_models as models
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM

import tersor
from tersor.checkpoint.inspect import inspect
from tersor.convert import quantize
from tersor.errors import InputError, TersorError
from tersor.integrations.transformers.architecture import read_architecture
from tersor.nn import PackedEmbedding, PackedLinear, TiedLinear, bits_per_weight

# Name -> architecture, whether tied, changes to its config, the override.
CASES = {
    "llama": ("llama", False, {}, {"embed_tokens": "fp6_e2m3"}),
    "llama-tied": ("llama", True, {"tie_word_embeddings": True}, {"embed_tokens": "fp6_e3m2:g32"}),
    "llama-both": ("llama", False, {}, {"embed_tokens": "int8", "lm_head": "fp6_e3m2"}),
    "gpt2": ("gpt2", True, {}, {r"\.wte$": "int8:g16", "wpe": "fp8_e4m3"}),
    "gpt2-uint": ("gpt2", True, {}, {"wte": "uint6:g32:bfloat16"}),
    "gemma": ("gemma", True, {}, {"embed_tokens": "mxfp6_e3m2"}),
    "gemma3": ("gemma3_text", True, {}, {"embed_tokens": "int6"}),
}


@dataclass(frozen=True)
class Case:
    tied: bool
    options: dict
    plain: Path
    packed: Path
    folder: Path


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    name, is_tied, changes, overrides = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    options = {"format": "fp5_e2m2", "overrides": overrides}
    plain = models.plain(name, folder / "plain", **changes)
    return Case(is_tied, options, plain, models.compressed(plain, folder / "packed", **options), folder)


@pytest.fixture(scope="module")
def loaded(case: Case) -> Any:
    return AutoModelForCausalLM.from_pretrained(case.packed)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(models.token_ids()).logits


def same_storage(head: Any, embedding: Any) -> bool:
    return head.weight_packed.data_ptr() == embedding.weight_packed.data_ptr()


def test_the_embedding_is_packed_and_a_tied_head_shares_it(case: Case, loaded: Any) -> None:
    embedding, head = loaded.get_input_embeddings(), loaded.get_output_embeddings()
    assert isinstance(embedding, PackedEmbedding)
    assert isinstance(head, TiedLinear) == case.tied
    stored = models.tensors(case.packed)
    assert not any(name.startswith("lm_head.weight") for name in stored if case.tied)
    assert models.same(loaded.state_dict(), stored)
    if case.tied:
        assert head.source is embedding
        assert same_storage(head, embedding)
        assert loaded.config.tie_word_embeddings
        loaded.tie_weights()
        assert loaded.get_output_embeddings() is head
    assert not any(tensor.device.type == "meta" for tensor in (*loaded.parameters(), *loaded.buffers()))


def test_logits_are_those_of_the_decoded_weights(case: Case, loaded: Any) -> None:
    reference = AutoModelForCausalLM.from_pretrained(models.decoded(case.plain, case.packed, case.folder / "decoded"))
    got, expected, before = (logits(m) for m in (loaded, reference, AutoModelForCausalLM.from_pretrained(case.plain)))
    assert float((got - expected).abs().max()) <= 2e-5 * float(expected.abs().max())
    assert float((got - before).abs().max()) > 1e-3 * float(expected.abs().max())


def test_compressing_while_loading_gives_the_same_model(case: Case, loaded: Any) -> None:
    config = tersor.TersorConfig(**case.options)
    model = AutoModelForCausalLM.from_pretrained(case.plain, quantization_config=config, dtype=torch.float32)
    assert models.same(model.state_dict(), loaded.state_dict())
    assert [type(module) for module in model.modules()] == [type(module) for module in loaded.modules()]
    assert torch.equal(logits(model), logits(loaded))
    model.save_pretrained(case.folder / "while_loading")
    assert models.same(models.tensors(case.folder / "while_loading"), models.tensors(case.packed))


def test_save_pretrained_writes_the_same_checkpoint(case: Case, loaded: Any) -> None:
    loaded.save_pretrained(case.folder / "again")
    assert models.same(models.tensors(case.folder / "again"), models.tensors(case.packed))
    assert models.config(case.folder / "again") == models.config(case.packed)
    again, info = AutoModelForCausalLM.from_pretrained(case.folder / "again", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(logits(again), logits(loaded))


def test_dequantize_gives_the_plain_architecture_back(case: Case, loaded: Any) -> None:
    model = copy.deepcopy(loaded)
    expected = logits(model)
    if case.tied:
        assert same_storage(model.get_output_embeddings(), model.get_input_embeddings())
    model.dequantize()
    assert float((logits(model) - expected).abs().max()) <= 2e-5 * float(expected.abs().max())
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, torch.nn.Embedding)
    assert (embedding.weight is head.weight) == case.tied
    model.tie_weights()
    assert (embedding.weight is head.weight) == case.tied
    model.save_pretrained(case.folder / "unpacked")
    unpacked, plain = models.tensors(case.folder / "unpacked"), models.tensors(case.plain)
    assert {name: tensor.shape for name, tensor in unpacked.items()} == {n: t.shape for n, t in plain.items()}


def test_generates_and_casts(case: Case, loaded: Any) -> None:
    tokens = loaded.generate(models.token_ids(1, 5), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert tokens.shape == (1, 8)
    model = copy.deepcopy(loaded).to(torch.bfloat16)
    assert logits(model).dtype == torch.bfloat16
    assert models.same(
        {n: t for n, t in model.state_dict().items() if ".weight_" in n},
        {n: t for n, t in loaded.state_dict().items() if ".weight_" in n},
    )


def test_inspect_the_table_and_the_mean_show_it(case: Case, loaded: Any) -> None:
    rows = {row.name: row for row in quantize(case.plain, None, dry_run=True, **case.options).compressed}
    items = {item.name: item for item in inspect(case.packed, read_architecture).items if item.compressed}
    assert {name: (row.shape, row.scheme, row.bytes_after) for name, row in rows.items() if "embed" in name} == {
        name: (item.shape, item.format, item.nbytes) for name, item in items.items() if "embed" in name
    }
    assert rows.keys() == items.keys()
    assert any("embed" in name or "wte" in name for name in rows)
    bits = sum(8 * item.nbytes for item in items.values()) / sum(item.numel for item in items.values())
    assert bits_per_weight(loaded) == pytest.approx(bits)


def test_without_an_override_embeddings_stay(case: Case, tmp_path: Path) -> None:
    rows = quantize(case.plain, None, dry_run=True, overrides={".": "int8"}).rows
    notes = {row.note for row in rows if row.scheme is None and len(row.shape) == 2}
    assert notes <= {"embedding", "output head"} and "embedding" in notes


def test_a_head_stored_though_the_config_ties_it_stays_its_own(tmp_path: Path) -> None:
    plain = models.plain("llama", tmp_path / "plain", tie_word_embeddings=True)
    tensors = models.tensors(plain)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    options = {"overrides": {"embed_tokens": "int8"}}
    packed = models.compressed(plain, tmp_path / "packed", **options)
    config = tersor.TersorConfig(**options)
    for model in (
        AutoModelForCausalLM.from_pretrained(packed),
        AutoModelForCausalLM.from_pretrained(plain, quantization_config=config),
    ):
        assert isinstance(model.get_input_embeddings(), PackedEmbedding)
        assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])


def test_the_base_model_alone_and_a_head_in_kernel_layout(tmp_path: Path) -> None:
    plain = models.plain("llama", tmp_path / "plain", tie_word_embeddings=True)
    packed = models.compressed(plain, tmp_path / "packed", overrides={"embed_tokens": "fp6_e3m2"})
    whole, base = AutoModelForCausalLM.from_pretrained(packed), AutoModel.from_pretrained(packed)
    with torch.no_grad():
        ids = models.token_ids()
        assert torch.equal(base(ids).last_hidden_state, whole.model(ids).last_hidden_state)
    # As on a GPU: the head has its own layout, and what is saved is the embedding's stream.
    whole.lm_head._set_weight(whole.lm_head.packed_weight().to_layout("tiles_bfloat16"))
    whole.save_pretrained(tmp_path / "again")
    assert models.same(models.tensors(tmp_path / "again"), models.tensors(packed))


def test_a_model_compiles_in_one_graph(tmp_path: Path) -> None:
    plain = models.plain("llama", tmp_path / "plain", num_hidden_layers=1, tie_word_embeddings=True)
    packed = models.compressed(plain, tmp_path / "packed", overrides={"embed_tokens": "fp6_e3m2"})
    model = AutoModelForCausalLM.from_pretrained(packed)
    ids = models.token_ids()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


def test_only_the_embedding(tmp_path: Path) -> None:
    plain = models.plain("gpt2", tmp_path / "plain")
    packed = models.compressed(plain, tmp_path / "packed", ignore=["h\\."], overrides={"wte": "fp6"})
    model = AutoModelForCausalLM.from_pretrained(packed)
    layers = {name for name, module in model.named_modules() if isinstance(module, PackedLinear | PackedEmbedding)}
    assert layers == {"transformer.wte", "lm_head"}


@pytest.mark.parametrize(
    ("name", "changes", "options", "message"),
    [
        (
            "llama",
            {},
            {"overrides": ["embed=int4"]},
            r"model.embed_tokens \(embedding\), left alone unless the pattern",
        ),
        ("llama", {}, {"overrides": ["embed_tokens=int4:g48"]}, "group size 48 does not divide the 64 input channels"),
        (
            "opt",
            {},
            {"overrides": ["embed_positions=int4"]},
            "embed_positions \\(OPTLearnedPositionalEmbedding\\) computes",
        ),
        ("llama", {"tie_word_embeddings": True}, {"overrides": ["lm_head=int4"]}, "no weight of its own here"),
        *(
            ("llama", {}, {"format": "mxfp6_e2m3", "overrides": ["embed_tokens=mxfp6_e2m3"], "export": export}, message)
            for export, message in {
                "humming": "humming readers do not decode embeddings: leave model.embed_tokens out of the overrides",
                "compressed-tensors": "compressed-tensors readers do not decode embeddings",
                "quark": "quark readers do not decode embeddings",
            }.items()
        ),
    ],
)
def test_what_cannot_be_is_one_line(
    tmp_path: Path, name: str, changes: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    plain = models.plain(name, tmp_path / "plain", torch.bfloat16, **changes)
    with pytest.raises(InputError, match=message) as caught:
        quantize(plain, tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain"]


def test_an_embedding_of_another_shape(tmp_path: Path) -> None:
    plain = models.plain("llama", tmp_path / "plain")
    tensors = models.tensors(plain)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:90].clone()
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    quantize(plain, None, dry_run=True)
    with pytest.raises(TersorError, match=r"embed_tokens.weight' has shape \[90, 64\], .* wants \[96, 64\]"):
        quantize(plain, None, dry_run=True, overrides={"embed_tokens": "int8"})
