"""By which method is a checkpoint compressed, and is it one that is read? The table of methods."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tersor.checkpoint.released import compressed_tensors as ct
from tersor.checkpoint.released.bitsandbytes import bitsandbytes
from tersor.checkpoint.released.integers import awq, gptq, gptq_format
from tersor.checkpoint.released.mxfp4 import mxfp4
from tersor.checkpoint.released.parts import Assembly, DecodedTensor
from tersor.checkpoint.released.scaled import MODELOPT_ALGORITHMS, fp8, modelopt, quark
from tersor.checkpoint.source import Source, StoredTensor, quantization_of, stated_dtype
from tersor.errors import CheckpointError, InputError

_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
_UNNAMED = "a method it does not name"
_COMPANIONS = (
    r".*[._](weight_scale|weight_scale_inv|weight_scale_2|weight_packed|weight_shape|weight_global_scale|"
    r"weight_zero_point|weight_g_idx|qweight|qzeros|g_idx|SCB|absmax|quant_map|nested_absmax|nested_quant_map|"
    r"pre_quant_scale)"
    r"|.*\.scales|.*\.quant_state\..*"
)
"""Names of tensors that mean nothing without the weight that they belong to."""

_UNMISTAKABLE = r".*\.(qweight|qzeros|weight_packed|weight_scale_inv|absmax|quant_state\..*)"
"""Names of tensors that no plain model has."""


@dataclass(frozen=True, slots=True)
class Released:
    """A checkpoint that was compressed by another method, seen as the plain one that it stands for.

    Attributes:
        method: what config.json calls the method, with its format where that says more.
        settings: what config.json, or a file beside it, says of the compression.
        tensors: the plain tensors by name; those that are stored compressed are `DecodedTensor`.
    """

    method: str
    settings: Mapping[str, Any]
    tensors: dict[str, StoredTensor]


def _gptq_unreadable(settings: Mapping[str, Any]) -> str:
    form = gptq_format(settings)
    if settings.get("is_marlin_format"):
        return "marlin"
    return "" if form in ("gptq", "gptq_v2") else form


def _modelopt_unreadable(settings: Mapping[str, Any]) -> str:
    algorithm = settings.get("quant_algo")
    return "" if algorithm in (None, *MODELOPT_ALGORITHMS) else str(algorithm)


def _awq_unreadable(settings: Mapping[str, Any]) -> str:
    bits = settings.get("bits", settings.get("w_bit", 4))
    version = str(settings.get("version") or settings.get("checkpoint_format") or "gemm").lower()
    return f"{bits} bits" if bits != 4 else "" if version == "gemm" else version


def _auto_round_unreadable(settings: Mapping[str, Any]) -> str:
    packing = str(settings.get("packing_format", "auto_round:auto_gptq"))
    return "" if packing.endswith(("gptq", "awq")) else packing


def _auto_round(assembly: Assembly) -> None:
    packing = str(assembly.settings.get("packing_format", ""))
    (awq if packing.endswith("awq") else gptq)(assembly)


def _all_read(settings: Mapping[str, Any]) -> str:
    return ""


_METHODS: dict[str, tuple[Callable[[Assembly], None], Callable[[Mapping[str, Any]], str]]] = {
    "fp8": (fp8, _all_read),
    "fbgemm_fp8": (fp8, _all_read),
    "mxfp8": (fp8, _all_read),
    "mxfp4": (mxfp4, _all_read),
    "compressed-tensors": (ct.compressed_tensors, ct.unreadable),
    "gptq": (gptq, _gptq_unreadable),
    "awq": (awq, _awq_unreadable),
    "auto-round": (_auto_round, _auto_round_unreadable),
    "bitsandbytes": (bitsandbytes, _all_read),
    "modelopt": (modelopt, _modelopt_unreadable),
    "quark": (quark, _all_read),
}
"""Method -> what reads it, and what says in words why a configuration of it is not read."""


def compression_of(source: Source) -> dict[str, Any] | None:
    """Return how the weights of a checkpoint are compressed, or `None`: by config.json, or by a file beside it.

    AutoGPTQ and AutoAWQ once wrote their settings to files of their own, ModelOpt still does.
    """
    stated = quantization_of(source.config)
    if stated is None and any(name.endswith((".qweight", ".weight_scale")) for name in source.tensors):
        return settings_beside(source.directory)
    return stated


def settings_beside(directory: Path) -> dict[str, Any] | None:
    """Return the settings of a compression that a file beside config.json holds, or `None`."""
    for name, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq"), ("hf_quant_config.json", "")):
        try:
            found = json.loads((directory / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(found, dict):
            inner = found.get("quantization")
            if method:
                return {"quant_method": method, **found}
            if isinstance(inner, dict) and inner.get("quant_algo"):
                return {"quant_method": "modelopt", **inner}
    return None


def method_name(settings: Mapping[str, Any]) -> str:
    """Return what to call a method: its name, and the format in brackets where there are several."""
    name = str(settings.get("quant_method") or _UNNAMED)
    if name == "bitsandbytes":
        detail: Any = settings.get("bnb_4bit_quant_type") if settings.get("load_in_4bit") else ""
        detail = "int8" if settings.get("load_in_8bit") else detail
    else:
        keys = ("format", "quant_algo", "checkpoint_format", *(["version"] if name == "awq" else []))
        detail = next((settings[key] for key in keys if settings.get(key)), "")
    return f"{name} ({detail})" if detail and detail not in (name, "gemm", "GEMM") else name


def read_released(source: Source) -> Released | None:
    """See a compressed checkpoint as a plain one; no weight is read yet.

    Returns:
        The plain tensors, or `None` where nothing says that the checkpoint is compressed.

    Raises:
        InputError: a method that is not read, or a configuration of it; the message names it.
        CheckpointError: a tensor that a weight needs is missing or has the wrong dtype or shape.
    """
    settings = compression_of(source)
    if settings is None:
        _check_plain(source)
        return None
    method = str(settings.get("quant_method") or "")
    if not method and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        method = "bitsandbytes"
        settings = {"quant_method": method, **settings}
    reader, unreadable = _METHODS.get(method, (None, _all_read))
    words = method_name(settings) if reader is not None else method or _UNNAMED
    why = unreadable(settings)
    if reader is None or why:
        raise InputError(
            f"{source.directory} is already compressed by {words}{f' ({why})' if why and why not in words else ''}: "
            "start from the uncompressed model"
        )
    assembly = Assembly(source.tensors, settings, _dtype_of(source))
    reader(assembly)
    tensors = assembly.finish(_COMPANIONS)
    plain = not any(isinstance(tensor, DecodedTensor) for tensor in tensors.values())
    if plain and settings.get("format") != "dense":
        raise InputError(
            f"{source.directory} is already compressed by {words}: start from the uncompressed model (config.json says "
            "so, and no tensor is stored as that method stores one)"
        )
    return Released(words, settings, tensors)


def _check_plain(source: Source) -> None:
    matches = re.compile(_UNMISTAKABLE).fullmatch
    for name, tensor in source.tensors.items():
        if matches(name):
            raise CheckpointError(
                f"{tensor.file.path}: tensor {name!r} is part of a compressed weight, and no file of "
                f"{source.directory} says by which method: put the quantization_config back into config.json"
            )


def _dtype_of(source: Source) -> str:
    """Return the safetensors dtype of a model: the stated one, else that of its plain weights."""
    stated = _DTYPES.get(stated_dtype(source.config) or "")
    if stated:
        return stated
    plain = {item.spec.dtype for name, item in source.tensors.items() if name.endswith((".weight", ".bias"))}
    return next((dtype for dtype in ("BF16", "F16", "F32") if dtype in plain), "BF16")
