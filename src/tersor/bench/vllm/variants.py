"""In which formats does vLLM run? By the names that `--against` knows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from tersor.bench import contenders
from tersor.errors import InputError
from tersor.formats import Activations, Scheme

VLLM, FP8, HUMMING, TERSOR = "vllm", "vllm:fp8", "vllm:humming", "vllm:tersor"
RIVALS = (VLLM, FP8, HUMMING, TERSOR)
"""With 16-bit weights, with weights and activations in e4m3, and with humming's or Tersor's kernels in the formats of
Tersor."""

_HUMMING_WEIGHTS, _HUMMING_ACTIVATIONS = "VLLM_HUMMING_ONLINE_QUANT_CONFIG", "VLLM_HUMMING_INPUT_QUANT_CONFIG"


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """vLLM with weights in one format, made of a 16-bit checkpoint as it loads it; the output head stays in 16 bits.

    Attributes:
        format: what rows call it.
        options: of `vllm.LLM`.
        environment: variables of its process.
    """

    format: str
    options: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


def named(text: str | None) -> tuple[str, ...]:
    """Read names such as `vllm,vllm:fp8`, or `none`, whether vLLM is installed or not; `None` is none of them.

    Raises:
        InputError: an unknown name.
    """
    return () if text is None else contenders.named_rivals(text, RIVALS)


def variants(
    names: Sequence[str],
    schemes: Sequence[Scheme | None],
    activations: Activations | str = Activations.NATIVE,
) -> list[Variant]:
    """Return what is measured by each name.

    Args:
        names: of `RIVALS`.
        schemes: of Tersor's weights, which both of these have as well; `None` is 16-bit ones.
        activations: that they multiply them with.

    Raises:
        InputError: humming or Tersor's plug-in is named, and all of Tersor's weights have 16 bits.
        UnsupportedError: vLLM or humming is named and not installed.
    """
    if names:
        contenders.need_installed("vllm", "vllm")
    found: list[Variant] = []
    for name in names:
        if name == VLLM:
            found.append(Variant(format="vllm 16bit"))
        elif name == FP8:
            found.append(Variant(format="vllm fp8", options={"quantization": "fp8"}))
        else:
            if name == HUMMING:
                contenders.need_installed("humming", "humming-kernels")
            packed = [scheme for scheme in schemes if scheme is not None]
            if not packed:
                raise InputError(f"--against {name} has the formats of Tersor, and --format names none but 16bit")
            make = _humming if name == HUMMING else _tersor
            found += [make(scheme, activations) for scheme in packed]
    return found


def versions(names: Sequence[str]) -> dict[str, str]:
    """Return the versions of the packages that rows of these names depend on."""
    packages = [*(["vllm"] if names else []), *(["humming-kernels"] if HUMMING in names else [])]
    return {package: _version(package) for package in packages}


def _humming(scheme: Scheme, activations: Activations | str) -> Variant:
    environment = {_HUMMING_WEIGHTS: json.dumps(contenders.humming_weight(scheme))}
    if activations != Activations.NATIVE:
        environment[_HUMMING_ACTIVATIONS] = json.dumps(contenders.HUMMING_INPUTS[Activations.of(activations)])
    return Variant(
        format=f"vllm humming {contenders.label(scheme, activations)}",
        options={"quantization": "humming"},
        environment=environment,
    )


def _tersor(scheme: Scheme, activations: Activations | str) -> Variant:
    return Variant(
        format=f"vllm tersor {contenders.label(scheme, activations)}",
        options={"quantization": "tersor"},
        environment={"TERSOR_VLLM_FORMAT": scheme.key(), "TERSOR_VLLM_ACTIVATIONS": str(Activations.of(activations))},
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # a source tree on the path
        return "unknown"
