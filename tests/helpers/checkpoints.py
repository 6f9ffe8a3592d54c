"""Tiny random checkpoints of the architectures Tersor compresses, as transformers writes them."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tersor.formats import Scheme

SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LATENT = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_group": 2,
    "topk_group": 1,
    "num_key_value_heads": 4,
    "head_dim": 16,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16, "tie_word_embeddings": True},
    "gemma2": {"head_dim": 16, "tie_word_embeddings": True},
    "gemma3_text": {"head_dim": 16, "tie_word_embeddings": True},
    "phi": {},
    "phi3": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "gpt_neox": {},
    "falcon": {},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 96, "n_positions": 64},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 32, "decoder_sparse_step": 1},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32},
    "qwen3_moe": {**_EXPERTS, "head_dim": 16, "decoder_sparse_step": 1},
    "deepseek_v2": {**_LATENT, "topk_method": "group_limited_greedy"},
    "deepseek_v3": _LATENT,
}

FUSED: dict[str, dict[str, Any]] = {
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "intermediate_size": 52},
    "llama4_text": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "intermediate_size": 40,
        "intermediate_size_mlp": 96,
        "interleave_moe_layer_step": 2,
    },
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 48},
    "gemma4_text": {
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 24,
        "enable_moe_block": True,
        "head_dim": 16,
        "global_head_dim": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
    },
}
"""Architectures whose releases store one tensor for all experts of a layer."""


def save(name: str, directory: Path, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    """Write a random model of an architecture, as `save_pretrained` does, and return its directory.

    It is made once a process; every call writes files of its own, so a test may change them.

    Args:
        name: a key of `CONFIGS` or `FUSED`.
        directory: where to write it.
        dtype: of every weight.
        changes: to the config; `max_shard_size` goes to `save_pretrained`.
    """
    return write(_saved(name, dtype, json.dumps(changes, sort_keys=True)), directory)


@functools.cache
def _saved(name: str, dtype: torch.dtype, changes: str) -> dict[str, bytes]:
    """Return the files of a checkpoint, name to content; `changes` is JSON."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = json.loads(changes)
    sharding = {"max_shard_size": settings.pop("max_shard_size")} if "max_shard_size" in settings else {}
    config = AutoConfig.for_model(name, **{**SMALL, **{**CONFIGS, **FUSED}[name], **settings})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, **sharding)
        return bytes_of(Path(folder))


def write(files: dict[str, bytes], directory: Path) -> Path:
    """Write files below a directory, which is made, and return it: the way back from `bytes_of`."""
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return directory


def load(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of one file."""
    from safetensors.torch import load_file

    return load_file(path)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint, read by the safetensors library."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors.update(load(path))
    return tensors


def bytes_of(directory: Path) -> dict[str, bytes]:
    """Return the content of every file below a directory, by relative name."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def unpack_bits(stream: torch.Tensor, bits: int, ic: int) -> np.ndarray:
    """Return the codes [OC, ic] of a stored stream, bit by bit: element k is bits k*bits .. of the row."""
    rows = np.unpackbits(stream.numpy().view(np.uint8), axis=1, bitorder="little")
    digits = rows[:, : ic * bits].reshape(len(rows), ic, bits)
    return (digits * (1 << np.arange(bits))).sum(axis=2)


def decode(tensors: dict[str, torch.Tensor], stem: str, scheme: Scheme, ic: int) -> torch.Tensor:
    """Return the float32 weight [OC, ic] of a compressed layer, with none of the code that wrote it."""
    codes = unpack_bits(tensors[f"{stem}.weight_packed"], scheme.format.bits, ic)
    values = scheme.format.values()[torch.from_numpy(codes)]
    stored = tensors[f"{stem}.weight_scale"]
    scale = torch.exp2(stored.float() - 127) if scheme.scale_dtype == "e8m0" else stored.float()
    size = scheme.group_size or ic
    if scheme.has_zero_point:
        values = values - tensors[f"{stem}.weight_zero_point"].float().repeat_interleave(size, dim=1)
    return values * scale.repeat_interleave(size, dim=1)
