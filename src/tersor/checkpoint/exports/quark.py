"""`quant_method: quark`: three Microscaling formats, read by vLLM."""

from __future__ import annotations

from typing import Any

from tersor.checkpoint.config import QuantizationConfig
from tersor.checkpoint.exports.base import ForeignExport, Layers, Stored, default_scheme, own_tensors
from tersor.checkpoint.header import TensorSpec
from tersor.checkpoint.modules import Architecture, LinearLayer
from tersor.checkpoint.names import PACKED
from tersor.errors import FormatError
from tersor.formats import Scheme


class QuarkExport(ForeignExport):
    """`quant_method: quark`, OCP Microscaling weights with activations as they are."""

    name = "quark"
    can = "mxfp6_e3m2, mxfp6_e2m3 and mxfp4_e2m1"

    def store(self, layer: LinearLayer, scheme: Scheme) -> Stored:
        oc, ic = layer.shape
        if not scheme.is_mx or scheme.format.name not in ("fp6_e3m2", "fp6_e2m3", "fp4_e2m1"):
            raise self.refuse(scheme, layer)
        own = own_tensors(layer, scheme)
        own[PACKED] = TensorSpec(f"{layer.stem}.weight", "U8", (oc, ic * scheme.format.bits // 8))
        return Stored(own)

    def check_model(self, architecture: Architecture, layers: Layers) -> None:
        super().check_model(architecture, layers)
        # Readers take a layer for one that is named apart where its name is a part of that name, too.
        schemes = {layer.served: scheme for layer, scheme in layers if scheme is not None}
        names = sorted(schemes)
        for index, name in enumerate(names):
            following = index + 1
            while following < len(names) and names[following].startswith(name):
                other = names[following]
                if schemes[other] != schemes[name]:
                    raise FormatError(
                        f"quark readers take {name} for {other}, whose name begins with it, so they need one scheme: "
                        "make the override find both"
                    )
                following += 1

    def quantization_config(self, config: QuantizationConfig, layers: Layers, head: str) -> dict[str, Any]:
        schemes = {layer.served: scheme for layer, scheme in layers if scheme is not None}
        default = default_scheme(config, schemes.values())
        return {
            "quant_method": "quark",
            "quant_mode": "eager_mode",
            "global_quant_config": _quark_scheme(default),
            "layer_quant_config": {
                name: _quark_scheme(scheme) for name, scheme in schemes.items() if scheme != default
            },
            "layer_type_quant_config": {},
            "exclude": self.left_alone,
            "algo_config": None,
            "kv_cache_quant_config": {},
            "softmax_quant_spec": None,
            "export": {
                "kv_cache_group": [],
                "pack_method": "reorder",
                "weight_format": "real_quantized",
                "weight_merge_groups": None,
            },
        }


def _quark_scheme(scheme: Scheme) -> dict[str, Any]:
    fmt = scheme.format
    weight = {
        "dtype": "fp4" if fmt.bits == 4 else fmt.name,
        "qscheme": "per_group",
        "group_size": scheme.group_size,
        "ch_axis": -1,
        "scale_format": "e8m0",
        "scale_calculation_mode": "even",
        "is_dynamic": False,
        "symmetric": None,
        "round_method": "half_even",
        "scale_type": "float",
        "observer_cls": "PerBlockMXObserver",
    }
    return {
        "weight": weight,
        "input_tensors": None,
        "output_tensors": None,
        "bias": None,
        "target_device": None,
    }
