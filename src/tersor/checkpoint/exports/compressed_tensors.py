"""`quant_method: compressed-tensors`: integers and two Microscaling formats, read by transformers, vLLM and SGLang."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from tersor.checkpoint.config import QuantizationConfig
from tersor.checkpoint.exports import joined
from tersor.checkpoint.exports.base import ForeignExport, Layers, Stored, own_tensors
from tersor.checkpoint.header import TensorSpec
from tersor.checkpoint.modules import LinearLayer
from tersor.checkpoint.names import PACKED
from tersor.formats import Scheme, get_scheme


class CompressedTensorsExport(ForeignExport):
    """`quant_method: compressed-tensors`, formats pack-quantized, mxfp6- and mxfp4-pack-quantized."""

    name = "compressed-tensors"
    compresses_head = True
    can = "mxfp6_e2m3, mxfp4_e2m1 and int2 to int8 with scales a row or any group in the model's dtype"

    def store(self, layer: LinearLayer, scheme: Scheme) -> Stored:
        oc, ic = layer.shape
        # Readers load scales into the model's dtype, which rounds any that it does not hold.
        held = scheme.is_mx or self.model_dtype in ("", "float32", scheme.scale_dtype)
        if _ct_format(scheme) is None or not held:
            raise self.refuse(scheme, layer)
        own = own_tensors(layer, scheme)
        if scheme.is_mx:
            own[PACKED] = replace(own[PACKED], dtype="U8", shape=(oc, ic * scheme.format.bits // 8))
            return Stored(own)
        # Its rows end with the last word that holds a bit; ours are padded to 32 elements.
        own[PACKED] = replace(own[PACKED], shape=(oc, -(-ic * scheme.format.bits // 32)))
        shape = TensorSpec(f"{layer.stem}.weight_shape", "I64", (2,))
        content = b"".join(size.to_bytes(8, "little") for size in (oc, ic))
        return Stored(own, ((shape, content),))

    def quantization_config(self, config: QuantizationConfig, layers: Layers, head: str) -> dict[str, Any]:
        members: dict[Scheme, set[str]] = {}
        for layer, scheme in layers:
            if scheme is not None:
                members.setdefault(scheme, set()).update(map(_target, (layer.module, layer.served, layer.stem)))
        groups = {}
        for index, (scheme, names) in enumerate(members.items()):
            groups[f"group_{index}"] = {
                # vLLM asks for the class of a layer before the parts of a joined one, so that beside "Linear" names
                # of parts would not count: a class only where all have one scheme.
                "targets": ["Linear"] if len(members) == 1 else sorted(names),
                "weights": _ct_weights(scheme),
                "input_activations": None,
                "output_activations": None,
                "format": _ct_format(scheme),
            }
        formats = {group["format"] for group in groups.values()}
        experts = [name for name in self.left_alone if name.endswith(".experts")]
        return {
            "quant_method": "compressed-tensors",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": [*self.left_alone, *(_all_experts(name) for name in experts)],
        }


def _target(name: str) -> str:
    """Return what finds a layer: its name, and for an expert a pattern, since readers ask by names of their own."""
    experts = joined.experts_of(name)
    return _all_experts(experts) if experts else name


def _all_experts(experts: str) -> str:
    return rf"re:{re.escape(experts)}\.\d+\..*"


def _ct_format(scheme: Scheme) -> str | None:
    if scheme in (get_scheme("mxfp6_e2m3"), get_scheme("mxfp4_e2m1")):
        return f"mxfp{scheme.format.bits}-pack-quantized"
    return "pack-quantized" if scheme.format.kind == "int" and scheme.scale_dtype != "e8m0" else None


def _ct_weights(scheme: Scheme) -> dict[str, Any]:
    weights: dict[str, Any] = {
        "num_bits": scheme.format.bits,
        "type": scheme.format.kind,
        "symmetric": True,
        "strategy": "channel" if scheme.group_size is None else "group",
        "group_size": scheme.group_size,
        "dynamic": False,
    }
    if scheme.is_mx:
        weights["scale_dtype"] = "torch.uint8"
    return weights
