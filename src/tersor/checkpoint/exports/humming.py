"""`quant_method: humming`: signed floats and integers, read by vLLM and SGLang."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from tersor.checkpoint.config import QuantizationConfig
from tersor.checkpoint.exports import joined
from tersor.checkpoint.exports.base import ForeignExport, Layers, Stored, default_scheme, own_tensors
from tersor.checkpoint.modules import Architecture, LinearLayer
from tersor.checkpoint.names import PACKED, SCALE
from tersor.errors import FormatError
from tersor.formats import Scheme


class HummingExport(ForeignExport):
    """`quant_method: humming`, read by vLLM and SGLang."""

    name = "humming"
    can = (
        "signed floats with up to 5 exponent bits (not fp8) and int2 to int8, with scales a row or groups of 16, "
        "32, 64, ... in the model's dtype or groups of 32 in e8m0, and IC a multiple of 32"
    )

    def store(self, layer: LinearLayer, scheme: Scheme) -> Stored:
        fmt, size = scheme.format, scheme.group_size
        elements = fmt.kind == "int" or (fmt.kind == "float" and fmt.exponent_bits <= 5 and fmt.bits < 8)
        groups = size is None or (size >= 16 and size & (size - 1) == 0)
        scales = size == 32 if scheme.scale_dtype == "e8m0" else scheme.scale_dtype == self.model_dtype
        if not (elements and groups and scales and layer.shape[1] % 32 == 0):
            raise self.refuse(scheme, layer)
        own = own_tensors(layer, scheme)
        own[PACKED] = replace(own[PACKED], name=f"{layer.stem}.weight")
        if scheme.scale_dtype == "e8m0":
            own[SCALE] = replace(own[SCALE], dtype="F8_E8M0")
        return Stored(own)

    def check_model(self, architecture: Architecture, layers: Layers) -> None:
        if self.model_dtype not in ("", "float16", "bfloat16"):
            raise FormatError(
                f"humming readers run float16 and bfloat16 models, and {architecture.name} is {self.model_dtype} here: "
                "convert the source to bfloat16 first"
            )
        super().check_model(architecture, layers)
        for layer, scheme in layers:
            if scheme is not None and "lm_head" in layer.served:
                raise FormatError(f"humming readers never compress {layer.served}: leave it alone for this export")
        schemes = {scheme for _, scheme in layers if scheme is not None}
        renamed = next((layer.served for layer, _ in layers if "language_model." in layer.served), None)
        if len(schemes) > 1 and renamed is not None:
            raise FormatError(
                f"humming readers call {renamed} and its like by other names, and would take all of them for one "
                "scheme: leave the overrides out"
            )

    def quantization_config(self, config: QuantizationConfig, layers: Layers, head: str) -> dict[str, Any]:
        served = joined.served(self.name, layers)
        default = default_scheme(config, [scheme for scheme in served.values() if scheme is not None])
        # Readers leave alone what an ignored name is a part of, so a head whose name is found elsewhere is a pattern.
        ignore = [head] if head and not any(head in name for name in served if name != head) else []
        names: dict[Scheme | None, set[str]] = {}
        for name, scheme in [*served.items(), *((name, None) for name in self.left_alone)]:
            if scheme != default and name not in ignore:
                names.setdefault(scheme, set()).add(name)
        dynamic: dict[str, Any] = {}
        for scheme, members in names.items():
            pattern = f"(?:{'|'.join(re.escape(name) for name in sorted(members))})$"
            if scheme is None:
                dynamic[f"-:{pattern}"] = {}
            else:
                dynamic[f"+:{pattern}"] = _humming_scheme(scheme)
        return {
            "quant_method": "humming",
            **_humming_scheme(default),
            "ignore": ignore,
            "dynamic": dynamic,
        }


def _humming_scheme(scheme: Scheme) -> dict[str, Any]:
    fmt = scheme.format
    dtype = fmt.name if fmt.kind == "int" else f"float{fmt.bits}e{fmt.exponent_bits}m{fmt.mantissa_bits}"
    # The long names: the short ones (dtype, group_size) would be read as the activations' too.
    return {
        "b_dtype": dtype,
        "weight_scale_group_size": scheme.group_size or 0,
        "bs_dtype": "float8e8m0" if scheme.scale_dtype == "e8m0" else None,
    }
