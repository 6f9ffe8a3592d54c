"""Every kind of weight in the engine on a GPU: what a CPU computes, where weights stream and beside bytes, too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import calibrated, mixes, packed_models, pruned
from transformers import AutoModelForCausalLM

import tersor
from tersor.convert import quantize
from tersor.errors import TersorError

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

PROMPTS = [[3 + (7 * row + place) % 90 for place in range(length)] for row, length in enumerate((1, 5, 40, 64, 97))]
GREEDY = tersor.SamplingParams(max_tokens=12, temperature=0, logprobs=0, ignore_eos=True)
SAMPLED = tersor.SamplingParams(max_tokens=8, temperature=0.9, top_p=0.9, seed=3, logprobs=0, ignore_eos=True)
OPTIONS: dict[str, Any] = {"kv_bytes": 16 << 20, "max_rows": 8, "max_step_tokens": 64, "max_length": 128}


SIZES: dict[str, Any] = {"max_position_embeddings": 256, "num_hidden_layers": 3}
WIDE: dict[str, Any] = {**SIZES, "hidden_size": 128, "intermediate_size": 256}
EXPERTS: dict[str, Any] = {**WIDE, "moe_intermediate_size": 128}


def packed(kind: str, sizes: dict[str, Any] = WIDE, **options: Any) -> Callable[[Path], Path]:
    return lambda folder: packed_models.case(kind, folder, options, **sizes).packed


def sparse(values: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        quantize(pruned.saved("llama", folder / "plain", 0.4, **WIDE), folder / "packed", format=values)
        return folder / "packed"

    return make


TABLES = {"format": "lut3", "scale_dtype": "float16"}
KINDS: dict[str, Callable[[Path], Path]] = {
    "plain": lambda folder: packed_models.plain("llama", folder / "plain", **WIDE),
    "fp6": packed("llama", format="fp6_e3m2"),
    "uint4": packed("qwen2", format="uint4", group_size=32),
    "int4": packed("llama", format="int4", group_size=128),
    "fp8": packed("llama", format="fp8_e4m3"),
    "microscaled": packed("llama", format="mxfp6_e2m3"),
    "mixed": lambda folder: mixes.compressed("llama", folder, **WIDE)[1],
    "sparse": sparse("fp6_e3m2"),
    "sparse, plain values": sparse("bf16"),
    "outliers": packed("llama", format="fp4_e2m1", outliers="2%"),
    "tables": packed("llama", **TABLES),
    "tables, outliers": packed("llama", **TABLES, outliers="2%"),
    "experts": packed("qwen3_moe", EXPERTS, format="fp6_e3m2"),
    "int4 experts": packed("qwen3_moe", EXPERTS, format="int4", group_size=32),
    "plain experts": lambda folder: packed_models.plain("mixtral", folder / "plain", **WIDE),
    "mixed experts": lambda folder: mixes.compressed("mixtral", folder, **WIDE)[1],
    "experts of tables": packed("mixtral", **TABLES),
    "latent": packed("deepseek_v3", SIZES, format="fp6_e3m2"),
    "learned positions": packed("opt", SIZES, format="int8"),
}
"""Name -> what makes the checkpoint in a folder."""


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes the checkpoint of a kind, once."""
    made: dict[str, Path] = {}

    def path(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind.replace(" ", "-").replace(",", ""))
            made[kind] = KINDS[kind](folder)
        return made[kind]

    return path


def said(path: Path, device: str = "cpu", dtype: str = "float32", **options: Any) -> tuple[np.ndarray, list[Any]]:
    """Return last states of the prompts [P, H], and tokens with log probabilities of greedy and sampled answers."""
    model = tersor.LLM(path, tokenizer=calibrated.tokenizer(), device=device, dtype=dtype, **OPTIONS, **options)
    answers: list[Any] = []
    try:
        found = np.stack([one.outputs.embedding for one in model.embed(PROMPTS)])
        if device == DEVICE:
            outputs = [*model.generate(PROMPTS, GREEDY), *model.generate(PROMPTS, SAMPLED)]
            answers = [(one.token_ids, one.logprobs) for output in outputs for one in output.outputs]
    finally:
        model.close()
    return found, answers


def there(path: Path, **options: Any) -> tuple[np.ndarray, list[Any]]:
    """Return the same of the GPU, in the dtype of its kernels."""
    return said(path, DEVICE, "float16", **options)


def apart(kind: str, found: np.ndarray, wanted: np.ndarray) -> float:
    """Return the largest distance of two states of length 1; the median where a rounding may send a token elsewhere."""
    distances = np.linalg.norm(found - wanted, axis=-1)
    assert np.isfinite(distances).all()
    return float(np.median(distances) if "experts" in kind or kind == "latent" else distances.max())


@pytest.mark.parametrize("kind", KINDS)
def test_states_are_those_of_a_cpu_and_streamed_weights_change_no_bit(
    kind: str, paths: Callable[[str], Path], tmp_path: Path
) -> None:
    path = paths(kind)
    assert apart(kind, there(path)[0], said(path)[0]) < 0.03
    stays = there(path, cuda_graph=False)
    for way in ({"offload": "host"}, {"offload": "disk", "offload_directory": str(tmp_path)}):
        states, answers = there(path, cuda_graph=False, resident_layers=1, **way)
        assert np.array_equal(states, stays[0]) and answers == stays[1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("activations", ["8bit", "fp8", "int8", "int8:g128"])
@pytest.mark.parametrize(
    "kind",
    ["fp6", "uint4", "int4", "mixed", "sparse", "outliers", "tables", "experts", "int4 experts", "mixed experts"],
)
def test_activations_in_bytes_are_those_of_a_cpu_or_refused_alike(
    kind: str, activations: str, paths: Callable[[str], Path]
) -> None:
    path = paths(kind)
    try:
        wanted = said(path, activations=activations)[0]
    except TersorError as error:
        with pytest.raises(type(error)) as caught:
            there(path, activations=activations)
        assert str(caught.value) == str(error)
        return
    assert apart(kind, there(path, activations=activations)[0], wanted) < 0.15


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float32", "fp8"])
@pytest.mark.parametrize("kind", ["fp6", "latent"])
def test_keys_and_values_of_every_dtype_are_those_of_a_cpu(
    kind: str, kv_dtype: str, paths: Callable[[str], Path]
) -> None:
    wanted = said(paths(kind), kv_dtype=kv_dtype)[0]
    assert apart(kind, there(paths(kind), kv_dtype=kv_dtype)[0], wanted) < 0.06


@pytest.mark.parametrize("place", [DEVICE, "auto"], ids=str)
@pytest.mark.parametrize("kind", ["fp6", "mixed", "sparse", "outliers", "tables", "mixed experts"])
def test_transformers_places_a_model_on_the_gpu_and_saves_it_from_there(
    kind: str, place: Any, paths: Callable[[str], Path], tmp_path: Path
) -> None:
    path, ids = paths(kind), packed_models.token_ids()
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float16, device_map=place)
        assert {tensor.device.type for tensor in model.state_dict().values()} == {DEVICE}
        found = model(ids.to(DEVICE)).logits.float().cpu()
    assert float((found - wanted).norm()) <= 2e-2 * float(wanted.norm())
    if place == DEVICE:
        AutoModelForCausalLM.from_pretrained(path, device_map=place).save_pretrained(tmp_path / "saved")
        assert packed_models.same(packed_models.tensors(tmp_path / "saved"), packed_models.tensors(path))
