"""Models that are no plain causal ones: encoders, rerankers, encoder-decoders, models of images and sound.

Each is written by transformers under the names that released checkpoints have, compressed, and loaded in its own class.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import checkpoints
from safetensors.torch import save_file
from torch import nn

import tersor
from tersor.engine.sampling import Sampling
from tersor.errors import CheckpointError, InputError
from tersor.formats import Scheme
from tersor.integrations.transformers.decode import Decoder
from tersor.integrations.transformers.load import load_model
from tersor.nn import PackedLinear

TEXT = checkpoints.SMALL | {"head_dim": 16}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 64}
ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
IDS = torch.randint(2, 90, (2, 7), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Case:
    """A class of models, and what of it is compressed.

    Attributes:
        config: makes the config.
        compressed: a word of every layer that is packed.
        left: reason -> a word of the layers left alone for it.
        inputs: of the forward pass; token ids where empty.
    """

    name: str
    config: Callable[[], Any]
    compressed: tuple[str, ...]
    left: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)


def gemma3() -> Any:
    return transformers.Gemma3Config(
        text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4, image_token_index=95
    )


def qwen() -> Any:
    text = {**TEXT, "rope_parameters": ROPE}
    return transformers.Qwen2_5_VLConfig(text_config=text, vision_config=QWEN_VISION, image_token_id=95)


def nomic() -> Any:
    return transformers.NomicBertConfig(**{**TEXT, "num_key_value_heads": 4, "type_vocab_size": 2})


TOWER = "outside the language model"
CASES = [
    Case("Gemma3ForConditionalGeneration", gemma3, ("self_attn", "mlp"), {TOWER: "vision_tower"}),
    Case("Qwen2_5_VLForConditionalGeneration", qwen, ("self_attn", "mlp"), {TOWER: "visual", "output head": "lm_head"}),
    Case(
        "T5ForConditionalGeneration",
        lambda: transformers.T5Config(vocab_size=96, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4),
        ("encoder.block.0.layer.0.SelfAttention", "decoder.block.1.layer.1.EncDecAttention", "DenseReluDense"),
        inputs={"input_ids": IDS, "decoder_input_ids": IDS},
    ),
    Case(
        "WhisperForConditionalGeneration",
        lambda: transformers.WhisperConfig(
            vocab_size=96,
            d_model=64,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=96,
            decoder_ffn_dim=96,
            num_mel_bins=8,
            max_source_positions=8,
            max_target_positions=16,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        ),
        ("encoder.layers.0.self_attn", "decoder.layers.0.encoder_attn", "fc1"),
        inputs={"input_features": torch.ones(2, 8, 16), "decoder_input_ids": IDS},
    ),
    Case(
        "BertForSequenceClassification",
        lambda: transformers.BertConfig(**TEXT),
        ("attention.self.query", "intermediate.dense", "pooler.dense"),
        {"output head": "classifier"},
    ),
    Case(
        "LlamaForSequenceClassification", lambda: transformers.LlamaConfig(**TEXT), ("mlp",), {"output head": "score"}
    ),
    Case("LlamaModel", lambda: transformers.LlamaConfig(**TEXT), ("self_attn", "mlp")),
    *(
        [Case("NomicBertModel", nomic, ("self_attn.q_proj", "self_attn.v_proj", "mlp"))]
        if hasattr(transformers, "NomicBertModel")
        else []
    ),
]


@dataclass(frozen=True)
class Made:
    case: Case
    source: Path
    output: Path
    report: tersor.convert.Report


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    case, folder = request.param, tmp_path_factory.mktemp(request.param.name)
    torch.manual_seed(0)
    getattr(transformers, case.name)(case.config()).save_pretrained(folder / "plain")
    report = tersor.quantize(folder / "plain", folder / "packed", format="fp6_e3m2")
    return Made(case, folder / "plain", folder / "packed", report)


def load(name: str, folder: Path) -> Any:
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["unexpected_keys"]
    return model.eval()


def test_the_layers_of_text_are_packed_and_the_others_are_said(made: Made) -> None:
    model = load(made.case.name, made.output)
    packed = {name for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    plain = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for word in made.case.compressed:
        assert any(word in name for name in packed), word
        assert not any(word in name for name in plain if not any(part in name for part in made.case.left.values()))
    reasons = {left.reason: left for left in made.report.left}
    for reason, word in made.case.left.items():
        assert reason in reasons
        assert any(word in name for name in plain) and not any(word in name for name in packed)
    assert made.report.linear_share > 0.5


def test_it_computes_what_the_decoded_weights_compute(made: Made, tmp_path: Path) -> None:
    model = load(made.case.name, made.output)
    reference = load(made.case.name, made.source)
    weights = {name: module.weight for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    before = run(made, reference)
    for name, weight in weights.items():
        reference.get_submodule(name).weight = nn.Parameter(weight)
    wanted, found = run(made, reference), run(made, model)
    assert float((found - wanted).abs().max()) <= 3e-5 * float(wanted.abs().max())
    assert float((found - before).abs().max()) > 1e-3 * float(wanted.abs().max())


def run(made: Made, model: Any) -> torch.Tensor:
    with torch.no_grad():
        output = model(**(made.case.inputs or {"input_ids": IDS}))
    found: torch.Tensor = output[0]
    return found


def test_it_is_the_same_compressed_while_loading_and_saved(made: Made, tmp_path: Path) -> None:
    options = tersor.TersorConfig("fp6_e3m2")
    model = getattr(transformers, made.case.name).from_pretrained(made.source, quantization_config=options).eval()
    loaded = load(made.case.name, made.output)
    for (name, ours), (_, theirs) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert torch.equal(ours, theirs), name
    loaded.save_pretrained(tmp_path / "again")
    again = load(made.case.name, tmp_path / "again")
    assert torch.equal(run(made, again), run(made, loaded))


def test_a_tower_is_packed_where_a_pattern_spells_it(tmp_path: Path) -> None:
    transformers.Gemma3ForConditionalGeneration(gemma3()).save_pretrained(tmp_path / "plain")
    source = tmp_path / "plain"
    with pytest.raises(InputError, match=r"finds only .*vision.* left alone unless the pattern says 'vision_tower'"):
        tersor.quantize(source, None, dry_run=True, overrides=["vision.*fc1=int8"])
    report = tersor.quantize(source, tmp_path / "packed", overrides=[r"vision_tower\.encoder.*mlp=int8"])
    stored = {row.name: row.scheme for row in report.rows if "vision_tower" in row.name and row.scheme}
    assert set(stored.values()) == {Scheme.from_key("int8:row:float16").key()}
    assert all("encoder" in name and "mlp" in name for name in stored)
    model = load("Gemma3ForConditionalGeneration", tmp_path / "packed")
    assert sum(isinstance(module, PackedLinear) for module in model.model.vision_tower.modules()) == len(stored) == 4


def test_an_old_name_on_disk_finds_its_layer(tmp_path: Path) -> None:
    """The hub's Gemma 3 calls its layers `language_model.model.layers.0`, as transformers writes them still."""
    transformers.Gemma3ForConditionalGeneration(gemma3()).save_pretrained(tmp_path / "plain")
    names = checkpoints.weights(tmp_path / "plain")
    assert "language_model.model.layers.0.mlp.up_proj.weight" in names
    report = tersor.quantize(tmp_path / "plain", None, dry_run=True, ignore=[r"^model\.language_model\.layers\.0\."])
    assert {row.name for row in report.compressed} == {
        name for name in names if name.startswith("language_model.model.layers.1.") and "_proj." in name
    }


def test_a_checkpoint_that_lacks_weights_is_refused_before_a_byte_is_written(tmp_path: Path) -> None:
    source = checkpoints.save("llama", tmp_path / "model")
    tensors = checkpoints.weights(source)
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]
    for path in source.glob("*.safetensors*"):
        path.unlink()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    message = (
        r"lacks 2 tensors that LlamaForCausalLM needs \('model.layers.1.mlp.up_proj.weight', 'model.norm.weight'\)"
    )
    with pytest.raises(CheckpointError, match=message):
        tersor.quantize(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_where_most_stays_as_it_is_the_summary_begins_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tersor.cli.main import run as tersor_run

    source = checkpoints.save("llama", tmp_path / "model")
    ignore = ["--ignore", "mlp", "--ignore", "q_proj|k_proj"]
    assert tersor_run(["quantize", str(source), "-o", str(tmp_path / "out"), *ignore]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("warning: only ") and "% of the linear weights were compressed" in first
    reasons = [line for line in lines if line.startswith("  ") and " tensor" in line]
    assert any("ignored by 'mlp'" in line and "in 6 tensors" in line for line in reasons)
    assert any("output head" in line and "in 1 tensor:" in line for line in reasons)
    assert tersor_run(["quantize", str(source), "--dry-run", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert 0.5 < report["linear_share"] < 1
    assert {left["reason"] for left in report["left"]} == {"output head", "embedding", "norms, biases and the like"}


def test_the_verbs_run_the_language_model_of_a_model_of_images_and_refuse_what_continues_no_text(
    tmp_path: Path,
) -> None:
    transformers.Gemma3ForConditionalGeneration(gemma3()).save_pretrained(tmp_path / "plain")
    tersor.quantize(tmp_path / "plain", tmp_path / "packed")
    model = load_model(tmp_path / "packed", "cpu")
    decoder = Decoder(model, Sampling(), 12)
    decoder.prefill([2, 3, 4], None)
    tokens = []
    for _ in range(4):
        tokens.append(int(decoder.token))
        decoder.step()
    wanted = model.generate(torch.tensor([[2, 3, 4]]), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert tokens == wanted[0, 3:].tolist()
    transformers.BertModel(transformers.BertConfig(**TEXT)).save_pretrained(tmp_path / "encoder")
    with pytest.raises(CheckpointError, match="a BertModel does not continue a text"):
        load_model(tmp_path / "encoder", "cpu")
