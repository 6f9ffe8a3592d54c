"""Layers of the stand-in for vLLM, built and loaded as vLLM builds and loads its own."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from helpers import vllm_stand_in

HIDDEN, INNER = 64, 128
LAYER = "model.layers.0"


def hf_config(directory: Path) -> Any:
    """Return what vLLM reads of config.json."""
    said = json.loads((directory / "config.json").read_text())
    found = SimpleNamespace(**said)
    found.get_text_config, found.to_dict = lambda: found, lambda: said
    return found


def config_of(directory: Path, asked: str | None = None) -> Any:
    """Return the method's configuration as vLLM makes it, handed to a worker."""
    kind, hf = vllm_stand_in.REGISTERED["tersor"], hf_config(directory)
    if asked is not None:
        config = kind.from_config_dict_json(asked)
    else:
        config = kind.from_config(hf.quantization_config) if hasattr(hf, "quantization_config") else kind()
    config.maybe_update_config(str(directory), hf_config=hf)
    config.hf = hf.tersor if not hasattr(hf, "get_text_config") else dict(hf.tersor)
    return pickle.loads(pickle.dumps(config))


def build(kind: str, config: Any, *, heads: int = 4, kv_heads: int = 2) -> torch.nn.Module:
    """Return a layer of the stand-in."""
    if kind == "qkv":
        attention = f"{LAYER}.self_attn.qkv_proj"
        return vllm_stand_in.QKVParallelLinear(config, attention, HIDDEN, 16, heads, kv_heads)
    if kind == "out":
        return vllm_stand_in.RowParallelLinear(config, f"{LAYER}.self_attn.o_proj", HIDDEN, [HIDDEN])
    if kind == "gate_up":
        return vllm_stand_in.MergedColumnParallelLinear(config, f"{LAYER}.mlp.gate_up_proj", HIDDEN, [INNER] * 2)
    assert kind == "down"
    return vllm_stand_in.RowParallelLinear(config, f"{LAYER}.mlp.down_proj", INNER, [HIDDEN])


PARTS = {
    "qkv": {"self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v"},
    "out": {"self_attn.o_proj": None},
    "gate_up": {"mlp.gate_proj": 0, "mlp.up_proj": 1},
    "down": {"mlp.down_proj": None},
}
"""Layer of vLLM -> the stored ones that it is made of, and what vLLM calls each."""


def fill(layer: Any, kind: str, tensors: dict[str, torch.Tensor]) -> None:
    """Load a layer from a checkpoint, a tensor at a time, and say that this was all."""
    with loading():
        for part, shard in PARTS[kind].items():
            stem = f"{LAYER}.{part}."
            for name, tensor in tensors.items():
                if name.startswith(stem) and not name.endswith(".bias"):
                    layer.load(name.removeprefix(stem), tensor, shard)
        layer.quant_method.process_weights_after_loading(layer)


@contextmanager
def loading() -> Iterator[None]:
    """Have torch's default dtype be that of the model, as vLLM has it while it loads weights."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def weight(layer: Any, channels: int) -> torch.Tensor:
    """Return what a layer multiplies with, decoded by multiplying."""
    return layer(torch.eye(channels)).T
