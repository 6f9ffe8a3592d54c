"""What do other engines call the same stream? Names, shapes and metadata of four checkpoint formats.

The bytes of codes and scales are the same in all of them; an export changes what they are called, how they are viewed
and what config.json says. Sources: humming-kernels 0.1.19 (schema/humming.py, pack_weight.cuh), compressed-tensors
0.20.0 (pack_quantized, mxfp4, mxfp6) and the Quark reader of vLLM 0.33.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tersor.checkpoint.config import QuantizationConfig
from tersor.checkpoint.header import TensorSpec
from tersor.checkpoint.modules import Architecture, LinearLayer
from tersor.checkpoint.names import MERGED, PACKED, SCALE, stored_tensors
from tersor.errors import FormatError, did_you_mean
from tersor.formats import Scheme, get_scheme

_EXPERTS = re.compile(r"(.*\.experts)\.\d+\..*")

Layers = Sequence[tuple[LinearLayer, "Scheme | None"]]
"""Every linear layer of the model, and every embedding asked for, with its scheme, `None` where it is left alone."""


@dataclass(frozen=True, slots=True)
class Stored:
    """The tensors that a compressed weight [OC, IC] becomes.

    Attributes:
        tensors: Tersor's own name of each tensor (`checkpoint.names`) -> the tensor that is written for it; a row of it
            holds the first bytes of a row of ours.
        constants: further tensors with their bytes.
    """

    tensors: Mapping[str, TensorSpec]
    constants: tuple[tuple[TensorSpec, bytes], ...] = ()

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """All tensors that are written."""
        return (*self.tensors.values(), *(spec for spec, _ in self.constants))


class Export:
    """Tersor's own checkpoint; the others override what differs.

    Attributes:
        name: what users call the format.
        model_dtype: dtype of the model's activations, such as `bfloat16`; an empty string where it is not known.
        default_scale_dtype: scale dtype used when none is asked for; `None` means the one `get_scheme` takes.
    """

    name = "tersor"
    default_scale_dtype: str | None = None

    def __init__(self, model_dtype: str = "") -> None:
        self.model_dtype = model_dtype

    def store(self, layer: LinearLayer, scheme: Scheme) -> Stored:
        """Return the tensors of a compressed layer.

        Raises:
            FormatError: the format cannot say this scheme.
        """
        return Stored(_own(layer, scheme))

    def check_model(self, architecture: Architecture, layers: Layers) -> None:
        """Check what only the whole model shows.

        Raises:
            FormatError: the format cannot say it.
        """

    def quantization_config(self, config: QuantizationConfig, layers: Layers, head: str) -> dict[str, Any]:
        """Return what config.json says; `head` is the output head's module name."""
        return config.to_dict()


class _Foreign(Export):
    """What the formats of other engines share."""

    can = ""

    def __init__(self, model_dtype: str = "") -> None:
        super().__init__(model_dtype)
        # Their readers keep scales in the model's dtype and would round any other to it.
        self.default_scale_dtype = model_dtype if model_dtype in ("float16", "bfloat16") else None

    def refuse(self, scheme: Scheme, layer: LinearLayer) -> FormatError:
        return FormatError(f"{self.name} cannot say {_words(scheme)} ({layer.served}); it can say {self.can}")

    def check_model(self, architecture: Architecture, layers: Layers) -> None:
        packed = next((layer.served for layer, scheme in layers if layer.embedding and scheme is not None), None)
        if packed is not None:
            raise FormatError(f"{self.name} readers do not decode embeddings: leave {packed} out of the overrides")
        if architecture.transposes:
            raise FormatError(
                f"{self.name} readers expect the transposed layers of {architecture.name} uncompressed: export a "
                "model without Conv1D layers"
            )


class HummingExport(_Foreign):
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
        own = _own(layer, scheme)
        own[PACKED] = replace(own[PACKED], name=f"{layer.stem}.weight")
        if scheme.scale_dtype == "e8m0":
            own[SCALE] = replace(own[SCALE], dtype="F8_E8M0")
        return Stored(own)

    def check_model(self, architecture: Architecture, layers: Layers) -> None:
        super().check_model(architecture, layers)
        for layer, scheme in layers:
            if scheme is not None and "lm_head" in layer.served:
                raise FormatError(f"humming readers never compress {layer.served}: leave it alone for this export")
        _served(self.name, layers)

    def quantization_config(self, config: QuantizationConfig, layers: Layers, head: str) -> dict[str, Any]:
        dynamic: dict[str, Any] = {}
        names: dict[Scheme | None, list[str]] = {}
        for name, scheme in _served(self.name, layers).items():
            if scheme != config.scheme and name != head:
                names.setdefault(scheme, []).append(name)
        for scheme, members in names.items():
            pattern = f"(?:{'|'.join(re.escape(name) for name in sorted(members))})$"
            if scheme is None:
                dynamic[f"-:{pattern}"] = {}
            else:
                dynamic[f"+:{pattern}"] = _humming_scheme(scheme)
        ignore = [head] if head else []
        return {
            "quant_method": "humming",
            **_humming_scheme(config.scheme),
            "ignore": ignore,
            "dynamic": dynamic,
        }


class CompressedTensorsExport(_Foreign):
    """`quant_method: compressed-tensors`, formats pack-quantized, mxfp6- and mxfp4-pack-quantized."""

    name = "compressed-tensors"
    can = "mxfp6_e2m3, mxfp4_e2m1 and int2 to int8 with float scales, a row or any group"

    def store(self, layer: LinearLayer, scheme: Scheme) -> Stored:
        oc, ic = layer.shape
        if _ct_format(scheme) is None:
            raise self.refuse(scheme, layer)
        own = _own(layer, scheme)
        if scheme.is_mx:
            own[PACKED] = replace(own[PACKED], dtype="U8", shape=(oc, ic * scheme.format.bits // 8))
            return Stored(own)
        # Its rows end with the last word that holds a bit; ours are padded to 32 elements.
        own[PACKED] = replace(own[PACKED], shape=(oc, -(-ic * scheme.format.bits // 32)))
        shape = TensorSpec(f"{layer.stem}.weight_shape", "I64", (2,))
        content = b"".join(size.to_bytes(8, "little") for size in (oc, ic))
        return Stored(own, ((shape, content),))

    def quantization_config(self, config: QuantizationConfig, layers: Layers, head: str) -> dict[str, Any]:
        members: dict[Scheme, list[str]] = {}
        for layer, scheme in layers:
            if scheme is not None:
                members.setdefault(scheme, []).append(layer.served)
        groups = {}
        for index, (scheme, names) in enumerate(members.items()):
            targets = ["Linear"] if scheme == config.scheme else sorted(names)
            groups[f"group_{index}"] = {
                "targets": targets,
                "weights": _ct_weights(scheme),
                "input_activations": None,
                "output_activations": None,
                "format": _ct_format(scheme),
            }
        formats = {group["format"] for group in groups.values()}
        return {
            "quant_method": "compressed-tensors",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": _left_alone(layers, head),
        }


class QuarkExport(_Foreign):
    """`quant_method: quark`, OCP Microscaling weights with activations as they are."""

    name = "quark"
    can = "mxfp6_e3m2, mxfp6_e2m3 and mxfp4_e2m1"

    def store(self, layer: LinearLayer, scheme: Scheme) -> Stored:
        oc, ic = layer.shape
        if not scheme.is_mx or scheme.format.name not in ("fp6_e3m2", "fp6_e2m3", "fp4_e2m1"):
            raise self.refuse(scheme, layer)
        own = _own(layer, scheme)
        own[PACKED] = TensorSpec(f"{layer.stem}.weight", "U8", (oc, ic * scheme.format.bits // 8))
        return Stored(own)

    def check_model(self, architecture: Architecture, layers: Layers) -> None:
        super().check_model(architecture, layers)
        _served(self.name, layers)

    def quantization_config(self, config: QuantizationConfig, layers: Layers, head: str) -> dict[str, Any]:
        others = [(layer.served, scheme) for layer, scheme in layers if scheme not in (None, config.scheme)]
        return {
            "quant_method": "quark",
            "quant_mode": "eager_mode",
            "global_quant_config": _quark_scheme(config.scheme),
            "layer_quant_config": {name: _quark_scheme(scheme) for name, scheme in others if scheme},
            "layer_type_quant_config": {},
            "exclude": _left_alone(layers, head),
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


_EXPORTS: dict[str, type[Export]] = {
    export.name: export for export in (Export, HummingExport, CompressedTensorsExport, QuarkExport)
}


def get_export(name: str, model_dtype: str = "") -> Export:
    """Return the checkpoint format called `name` for a model of a dtype.

    Raises:
        FormatError: there is none.
    """
    if name not in _EXPORTS:
        raise FormatError(f"unknown export {name!r}{did_you_mean(name, _EXPORTS)} (exports: {', '.join(_EXPORTS)})")
    return _EXPORTS[name](model_dtype)


def _own(layer: LinearLayer, scheme: Scheme) -> dict[str, TensorSpec]:
    """Return Tersor's own name -> the tensor of a compressed layer as Tersor's own checkpoint stores it."""
    return {
        name: TensorSpec(f"{layer.stem}.{name}", form.safetensors_dtype, form.shape)
        for name, form in stored_tensors(scheme, *layer.shape).items()
    }


def _words(scheme: Scheme) -> str:
    group = "one scale a row" if scheme.group_size is None else f"groups of {scheme.group_size}"
    return scheme.name if scheme.is_mx else f"{scheme.name} with {group} in {scheme.scale_dtype}"


def _left_alone(layers: Layers, head: str) -> list[str]:
    names = {layer.served for layer, scheme in layers if scheme is None}
    compressed = {layer.served for layer, scheme in layers if scheme is not None}
    return sorted(names | ({head} if head and head not in compressed else set()))


def _served(export: str, layers: Layers) -> dict[str, Scheme | None]:
    """Return the schemes of the layers by the names that servers give them: q, k, v become one, gate and up, experts.

    Raises:
        FormatError: layers that are served as one have different schemes.
    """
    served: dict[str, Scheme | None] = {}
    first: dict[str, str] = {}
    for layer, scheme in layers:
        for name in _served_names(layer.served):
            if served.setdefault(name, scheme) != scheme:
                raise FormatError(
                    f"{export} readers serve {first[name]} and {layer.served} as one layer, so they need one "
                    "scheme: make the override or ignore pattern find both"
                )
            first.setdefault(name, layer.served)
    return served


def _served_names(module: str) -> Iterable[str]:
    experts = _EXPERTS.fullmatch(module)
    if experts:
        return [module, experts[1]]
    parent, _, leaf = module.rpartition(".")
    return [module, *(f"{parent}.{merged}" for merged, parts in MERGED.items() if leaf in parts)]


def _humming_scheme(scheme: Scheme) -> dict[str, Any]:
    fmt = scheme.format
    dtype = fmt.name if fmt.kind == "int" else f"float{fmt.bits}e{fmt.exponent_bits}m{fmt.mantissa_bits}"
    # The long names: the short ones (dtype, group_size) would be read as the activations' too.
    return {
        "b_dtype": dtype,
        "weight_scale_group_size": scheme.group_size or 0,
        "bs_dtype": "float8e8m0" if scheme.scale_dtype == "e8m0" else None,
    }


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
