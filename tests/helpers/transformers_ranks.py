"""A rank of transformers' own parallelism over gloo: run by torchrun with models and files of settings.

The first rank prints, for every file, the largest difference of a logit from one process's, whether greedy tokens are
the same, and the shape of its slice of the first layer's queries.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers import AutoModelForCausalLM

IDS = torch.arange(24).reshape(2, 12) * 7 % 97


def answers(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits of two texts, and eight tokens behind the first."""
    with torch.no_grad():
        return model(IDS).logits, model.generate(IDS[:1], max_new_tokens=8, do_sample=False)


def main(*pairs: str) -> None:
    """Compare models under settings with themselves in one process: a model's folder and a file of settings in turn."""
    found = []
    for path, name in zip(pairs[::2], pairs[1::2], strict=True):
        logits, tokens = answers(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval())
        said: dict[str, Any] = {}
        exec(compile(Path(name).read_text(encoding="utf-8"), name, "exec"), said)
        options = {"dtype": torch.float32, "distributed_config": said["distributed_config"]}
        model = AutoModelForCausalLM.from_pretrained(path, **options).eval()
        own, drawn = answers(model)
        query = dict(model.named_parameters())["model.layers.0.self_attn.q_proj.weight"]
        local = query.to_local() if hasattr(query, "to_local") else query
        far = float((own - logits).abs().max() / logits.abs().max())
        found.append({"far": far, "same": torch.equal(drawn, tokens), "query": list(local.shape)})
    if distributed.get_rank() == 0:
        print(json.dumps(found))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
