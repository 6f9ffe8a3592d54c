"""Plain, compressed and decoded copies of a tiny checkpoint, and what tells them apart."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers import checkpoints
from tersor.checkpoint import QuantizationConfig
from tersor.checkpoint.names import PACKED, SCALE, ZERO_POINT
from tersor.convert import quantize
from tersor.formats import Scheme
from tersor.layouts import PackedWeight, StackedWeight

SUFFIX = f".{PACKED}"


def plain(name: str, directory: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Write a tiny model whose biases and norms are random as well, and whose weights have outliers."""
    checkpoints.save(name, directory, dtype, **changes)
    generator = torch.Generator().manual_seed(1)
    for file in directory.glob("*.safetensors"):
        tensors = load_file(file)
        for key, tensor in tensors.items():
            noise = torch.randn(tensor.shape, generator=generator) * 0.1
            tensors[key] = (noise if tensor.dim() > 1 else tensor.float() + noise).to(tensor.dtype)
        save_file(tensors, file, {"format": "pt"})
    return directory


@dataclass(frozen=True)
class Case:
    """A tiny model, plain and compressed.

    Attributes:
        name: of its architecture.
        options: it was compressed with.
        plain, packed: its checkpoints.
        folder: they are in, with room for more.
    """

    name: str
    options: dict
    plain: Path
    packed: Path
    folder: Path


def case(name: str, folder: Path, options: dict, **changes: Any) -> Case:
    """Write a tiny model, its config changed, and compress it."""
    source = plain(name, folder / "plain", **changes)
    return Case(name, options, source, compressed(source, folder / "packed", **options), folder)


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint."""
    return {key: tensor for file in sorted(directory.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def config(directory: Path) -> dict:
    """Return the `quantization_config` of a checkpoint."""
    return json.loads((directory / "config.json").read_text())["quantization_config"]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two checkpoints hold the same names, dtypes and bytes, on whatever device."""
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k].cpu(), b[k].cpu()) for k in a)


def decoded(source: Path, packed: Path, directory: Path) -> Path:
    """Write a plain checkpoint with the decoded weights of a compressed one."""
    shutil.copytree(source, directory)
    stored = tensors(packed)
    said = QuantizationConfig.from_dict(config(packed))
    count = 0
    for file in directory.glob("*.safetensors"):
        result = load_file(file)
        for key, tensor in result.items():
            stem = key.removesuffix(".weight")
            if stem + SUFFIX not in stored:
                continue
            scheme = said.resolve(stem)
            assert scheme is not None
            count += 1
            if tensor.dim() == 3:
                result[key] = _decoded_experts(stored, stem, scheme, tensor)
                continue
            transposed = stored[stem + SUFFIX].shape[0] != tensor.shape[0] or ".c_" in stem
            oc, ic = tensor.T.shape if transposed else tensor.shape
            weight = PackedWeight(
                scheme,
                (oc, ic),
                stored[stem + SUFFIX],
                stored[f"{stem}.{SCALE}"],
                stored.get(f"{stem}.{ZERO_POINT}"),
            ).dequantize()
            assert not torch.equal(weight.T if transposed else weight, tensor)
            result[key] = (weight.T if transposed else weight).contiguous().to(tensor.dtype)
        save_file(result, file, {"format": "pt"})
    assert count == sum(key.endswith(SUFFIX) for key in stored)
    return directory


def _decoded_experts(stored: dict[str, torch.Tensor], stem: str, scheme: Scheme, plain: torch.Tensor) -> torch.Tensor:
    """Return the decoded weights of all experts of a layer, in the order of axes that the plain ones have."""
    data = stored[stem + SUFFIX]
    transposed = data.shape[1] != plain.shape[1]
    shape = (len(plain), *(plain.shape[:0:-1] if transposed else plain.shape[1:]))
    zero_point = stored.get(f"{stem}.{ZERO_POINT}")
    weight = StackedWeight(scheme, shape, data, stored[f"{stem}.{SCALE}"], zero_point).dequantize()
    result = (weight.transpose(1, 2) if transposed else weight).contiguous().to(plain.dtype)
    assert not torch.equal(result, plain)
    return result


def compressed(source: Path, directory: Path, **options: Any) -> Path:
    """Compress a checkpoint with the `quantize` verb's function."""
    quantize(source, directory, **options)
    return directory


def token_ids(rows: int = 2, length: int = 11) -> torch.Tensor:
    """Return some token ids, int64 [rows, length]."""
    return torch.randint(2, 96, (rows, length), generator=torch.Generator().manual_seed(2))


def check_logits(case: Case, loaded: Any) -> None:
    """Assert that a loaded compressed model has the logits of its decoded weights, and not those of the plain ones."""
    reference = AutoModelForCausalLM.from_pretrained(decoded(case.plain, case.packed, case.folder / "decoded"))
    original = AutoModelForCausalLM.from_pretrained(case.plain)
    ids = token_ids()
    with torch.no_grad():
        got, expected, before = (model(ids).logits for model in (loaded, reference, original))
    assert got.dtype == torch.float32
    assert float((got - expected).abs().max()) <= 2e-5 * float(expected.abs().max())
    assert float((got - before).abs().max()) > 1e-3 * float(expected.abs().max())


def check_dequantize(case: Case, loaded: Any) -> Any:
    """Return a dequantised copy; assert that it keeps the logits, and the names and shapes of the plain tensors."""
    model = copy.deepcopy(loaded)
    ids = token_ids()
    with torch.no_grad():
        before = model(ids).logits
        model.dequantize()
        after = model(ids).logits
    assert float((after - before).abs().max()) <= 2e-5 * float(before.abs().max())
    model.save_pretrained(case.folder / "unpacked")
    unpacked, plain_ones = tensors(case.folder / "unpacked"), tensors(case.plain)
    assert {name: tensor.shape for name, tensor in unpacked.items()} == {n: t.shape for n, t in plain_ones.items()}
    return model
