"""peft's LoRA over packed models: training lowers the loss, and adapters are saved, loaded, merged and taken out."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora.model import LoraModel
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

import tersor
from tersor import integrations
from tersor.errors import UnsupportedError
from tersor.integrations import peft as ours
from tersor.integrations.transformers import fuse
from tersor.nn import PackedEmbedding, PackedLinear, TiedLinear

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny-lm"
PACKED_EMBEDDING = {"embed_tokens": "fp6_e3m2"}
TEXT = torch.arange(48).view(2, 24) * 7 % 500


def load(folder: Path = TINY, overrides: dict[str, str] | None = None, **options: Any) -> Any:
    config = tersor.TersorConfig(overrides=overrides or {})
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32, **options)


def with_adapter(model: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is unsupported, nobody proceeds at their own risk
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message="Model with `tie_word_embeddings=True`")
        return get_peft_model(model, LoraConfig(r=4, **options))


def train(model: Any, steps: int) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=TEXT, labels=TEXT).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(TEXT).logits


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-3, atol=1e-3)


CASES: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1},
    "all": {"target_modules": "all-linear", "use_dora": True},
    "embedding": {"target_modules": ["o_proj", "embed_tokens"]},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_an_adapter_is_trained_saved_loaded_merged_and_taken_out(options: dict[str, Any], tmp_path: Path) -> None:
    model = load(overrides=PACKED_EMBEDDING)
    before, packed = logits(model), model.model.layers[0].self_attn.o_proj
    codes = packed.weight_packed.clone()
    adapted = with_adapter(model, **options)
    losses = train(adapted, 4)
    assert losses[-1] < losses[0] - 0.5
    assert torch.equal(packed.weight_packed, codes)
    trained = logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(overrides=PACKED_EMBEDDING), tmp_path / "adapter")
    assert torch.equal(logits(again.eval()), trained)
    for safe in (False, True):
        adapted.merge_adapter(safe_merge=safe)
        assert close(logits(adapted), trained)
        adapted.unmerge_adapter()
        assert torch.equal(logits(adapted), trained)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), before)
    merged = adapted.merge_and_unload()
    assert close(logits(merged), trained)
    targeted = merged.model.layers[0].self_attn.get_submodule("q_proj" if options is CASES["attention"] else "o_proj")
    assert type(targeted) is torch.nn.Linear and targeted.weight.dtype == torch.float32
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert close(logits(loaded), trained)


def test_all_linear_takes_every_packed_linear_but_the_head() -> None:
    adapted = with_adapter(load(overrides=PACKED_EMBEDDING), target_modules="all-linear")
    wrapped = [name for name, module in adapted.named_modules() if isinstance(module, ours.PackedLoraLinear)]
    assert len(wrapped) == 7 * adapted.config.num_hidden_layers
    assert isinstance(adapted.get_output_embeddings(), TiedLinear)
    unloaded = adapted.merge_and_unload()
    assert isinstance(unloaded.model.embed_tokens, PackedEmbedding) and unloaded.config.tie_word_embeddings


def test_an_adapter_over_a_conv1d_merges_into_a_conv1d(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=64, n_head=2, vocab_size=600, **ids)).save_pretrained(
        tmp_path / "gpt2"
    )
    for stated in (False, True):
        model = load(tmp_path / "gpt2")
        options = {"target_modules": ["c_attn", "c_fc"], "init_lora_weights": False, "use_dora": stated}
        adapted = with_adapter(model, fan_in_fan_out=stated, **options).eval()
        before = logits(adapted)
        adapted.add_adapter("second", LoraConfig(r=2, target_modules=["c_fc"], init_lora_weights=False))
        adapted.merge_adapter(["default"])
        assert close(logits(adapted), before)
        adapted.merge_adapter(["second"])
        adapted.unmerge_adapter()
        assert torch.equal(logits(adapted), before)
        merged = adapted.merge_and_unload(adapter_names=["default"])
        assert type(merged.transformer.h[0].attn.c_attn) is Conv1D and close(logits(merged), before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_trainer_takes_a_packed_model_prepared_for_kbit_training(reentrant: bool, tmp_path: Path) -> None:
    how = {"use_reentrant": reentrant}
    model = prepare_model_for_kbit_training(load().bfloat16(), gradient_checkpointing_kwargs=how)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    model.enable_input_require_grads()
    adapted = with_adapter(model, target_modules=["q_proj"])
    weights = [p for p in adapted.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in weights]
    data = [{"input_ids": TEXT[0], "labels": TEXT[0]}] * 4
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, use_cpu=True, report_to=[], bf16=True, save_strategy="no", disable_tqdm=True
    )
    Trainer(adapted, arguments, train_dataset=data).train()
    assert any(not torch.equal(p, old) for p, old in zip(weights, before, strict=True))


def test_joined_layers_take_adapters() -> None:
    model = load()
    before = logits(model)
    assert fuse.fuse(model)
    adapted = with_adapter(model, target_modules=["q_proj", "gate_proj"])
    assert close(logits(adapted), before)
    losses = train(adapted, 3)
    assert losses[-1] < losses[0]
    assert close(logits(adapted.merge_and_unload()), logits(adapted))


@pytest.mark.parametrize("how", ["pissa", "olora", "orthogonal"])
def test_what_rewrites_the_base_weight_is_refused(how: Any) -> None:
    with pytest.raises(UnsupportedError, match=f"init_lora_weights='{how}'.*use True or 'gaussian'"):
        with_adapter(load(), target_modules=["q_proj"], init_lora_weights=how)


def test_a_merge_that_is_not_finite_leaves_the_layer_as_it_was() -> None:
    adapted = with_adapter(load(), target_modules=["q_proj"])
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.lora_B["default"].weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True)
    assert isinstance(layer.base_layer, PackedLinear)


def test_peft_may_be_there_before_tersor(monkeypatch: pytest.MonkeyPatch) -> None:
    create = LoraModel._create_new_module
    assert LoraModel._serves_tersor  # it was imported after tersor here
    integrations.register()
    assert LoraModel._create_new_module is create
    monkeypatch.setattr(LoraModel, "_serves_tersor", False)
    monkeypatch.setattr(LoraModel, "_create_new_module", staticmethod(create.__wrapped__))
    monkeypatch.setattr(LoraModel, "_unload_and_optionally_merge", LoraModel._unload_and_optionally_merge)
    integrations.register()
    assert LoraModel._create_new_module.__wrapped__ is create.__wrapped__
