"""A package that has of vLLM what is asked of it: a file for `vllm/__init__.py`, which imports nothing of the tests.

A token takes 2 ms and 0.1 ms a row, by a clock of its own. What is asked is kept in `asked.jsonl` beside it, and of the
weights what they are: name -> dtype, shape, mean and standard deviation. A quantization may be the name of a fault.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from safetensors import safe_open

TokensPrompt = dict
ROOM = 1000
"""Tokens that there are keys and values for."""
_BLOCK = 16
_now = 0.0
time.perf_counter = lambda: _now
LOADERS: dict[str, type] = {}


class DefaultModelLoader:
    """What loads weights, of files unless it is another."""


def register_model_loader(name: str) -> Any:
    """Enter a loader."""
    return lambda kind: LOADERS.setdefault(name, kind)


for _name, _attributes in {
    "vllm.model_executor": {},
    "vllm.model_executor.model_loader": {"register_model_loader": register_model_loader},
    "vllm.model_executor.model_loader.default_loader": {"DefaultModelLoader": DefaultModelLoader},
}.items():
    sys.modules[_name] = ModuleType(_name)
    sys.modules[_name].__dict__.update(_attributes, __path__=[])


def _keep(**what: Any) -> None:
    with (Path(__file__).parent / "asked.jsonl").open("a") as file:
        file.write(json.dumps(what) + "\n")


def _tensors(options: dict[str, Any], folder: Path) -> Iterator[tuple[str, Any]]:
    """Yield name and array of the weights that options say."""
    if "load_format" in options:
        import torch

        asked = SimpleNamespace(model=str(folder), dtype=getattr(torch, options["dtype"]))
        for name, tensor in LOADERS[options["load_format"]]().get_all_weights(asked, None):
            yield name, tensor.cpu().numpy()
        return
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for name, file in index.items():
        with safe_open(folder / file, "np") as tensors:
            yield name, tensors.get_tensor(name)


def _weights(options: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for name, tensor in _tensors(options, Path(options["model"])):
        values = tensor.astype("float32")
        found[name] = [str(tensor.dtype), list(tensor.shape), float(values.mean()), float(values.std())]
    return found


class SamplingParams(SimpleNamespace):
    """As it is called."""

    def __init__(self, *, n: int = 1, **own: Any) -> None:
        super().__init__(n=n, **own)


class LLM:
    """As it is called."""

    def __init__(self, **options: Any) -> None:
        print("INFO: vLLM says much")
        os.write(1, b"and its libraries do\n")
        config = json.loads((Path(options["model"]) / "config.json").read_text())
        weights = _weights(options)
        prefixes = ("VLLM_", "CUDA_VISIBLE", "TERSOR_VLLM_")
        variables = {name: value for name, value in os.environ.items() if name.startswith(prefixes)}
        _keep(llm=options, config=config, weights=weights, environment=variables, pid=os.getpid())
        self._fault = options.get("quantization")
        if self._fault == "refused":
            raise ValueError("no such format\nsays vLLM")
        if self._fault == "crashed":
            os._exit(3)
        self._known: set[tuple[int, ...]] = set()
        cache = SimpleNamespace(kv_cache_size_tokens=ROOM)
        self.llm_engine = SimpleNamespace(vllm_config=SimpleNamespace(cache_config=cache))

    def generate(self, prompts: list[Any], params: list[Any], *, use_tqdm: bool) -> list[Any]:
        """Answer."""
        global _now
        assert not use_tqdm
        if self._fault == "slow" and len(prompts) > 1:
            time.sleep(60)
        tokens = [prompt["prompt_token_ids"] for prompt in prompts]
        _keep(prompts=tokens, params=[vars(one) for one in params])
        found = []
        for prompt, one in zip(tokens, params, strict=True):
            blocks = [tuple(prompt[:end]) for end in range(_BLOCK, len(prompt), _BLOCK)]
            cached = _BLOCK * sum(block in self._known for block in blocks)
            self._known.update(blocks)
            drawn = one.max_tokens - (self._fault == "short")
            outputs = [SimpleNamespace(token_ids=[7] * drawn)] * one.n
            found.append(SimpleNamespace(outputs=outputs, num_cached_tokens=cached))
        _now += max(one.max_tokens for one in params) * (2 + 0.1 * len(prompts)) / 1e3
        return found

    def reset_prefix_cache(self) -> bool:
        """Forget."""
        self._known.clear()
        return True
