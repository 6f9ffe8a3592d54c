"""Which layers do engines join into one, and what do they call it? Such layers need one scheme, or none."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from tersor.checkpoint.modules import ROUTER_NAMES, LinearLayer
from tersor.checkpoint.names import MERGED
from tersor.errors import FormatError
from tersor.formats import Scheme

_EXPERTS = re.compile(r"(.*\.experts)\.\d+\..*")

_JOINED: tuple[tuple[str, tuple[str, ...]], ...] = (
    *MERGED.items(),
    ("qkv_proj", ("wq", "wk", "wv")),
    ("qkv_proj", ("query", "key", "value")),
    ("qkv_proj", ("q_lin", "k_lin", "v_lin")),
    ("qkv", ("query", "key", "value")),
    ("qkv", ("q", "k", "v")),
    ("gate_up_proj", ("w1", "w3")),
    ("w13", ("w1", "w3")),
    ("gate_up_proj", ("c_fc_0", "c_fc_1")),
    ("wi", ("wi_0", "wi_1")),
    ("fused_qkv_a_proj", ("q_a_proj", "kv_a_proj_with_mqa")),
    ("in_proj_qkvz", ("in_proj_qkv", "in_proj_z")),
    ("in_proj_ba", ("in_proj_b", "in_proj_a")),
    ("wk_weights_proj", ("wk", "weights_proj")),
)
"""What vLLM and SGLang join: name of the one layer, and the layers it is made of, all in one module."""


def served(export: str, layers: Sequence[tuple[LinearLayer, Scheme | None]]) -> dict[str, Scheme | None]:
    """Return the schemes of the layers by the names that servers give them: q, k, v become one, gate and up, experts.

    Raises:
        FormatError: layers that are served as one have different schemes, or only some of them are left alone.
    """
    found: dict[str, Scheme | None] = {}
    first: dict[str, str] = {}
    for layer, scheme in layers:
        for name in _served_names(layer.served):
            if found.setdefault(name, scheme) != scheme:
                raise FormatError(
                    f"{export} readers serve {first[name]} and {layer.served} as one layer, so they need one "
                    "scheme: make the override or ignore pattern find both"
                )
            first.setdefault(name, layer.served)
    return found


def experts_of(name: str) -> str:
    """Return the name of the experts that a layer is one of, such as `model.layers.0.mlp.experts`, or nothing."""
    match = _EXPERTS.fullmatch(name)
    return match[1] if match else ""


def routers_and_experts(modules: Iterable[str], layers: Sequence[LinearLayer]) -> set[str]:
    """Return the modules that choose experts or hold them, also under the names of the checkpoint's own module.

    Args:
        modules: every module name of the model.
        layers: its linear layers, the experts among them.
    """
    special = [name for name in modules if name.rpartition(".")[2] in (*ROUTER_NAMES, "experts")]
    stored = {experts.rpartition(".")[0] for experts in map(experts_of, {layer.stem for layer in layers}) if experts}
    parents: dict[str, set[str]] = {}
    for parent in stored | {name.rpartition(".")[0] for name in special}:
        parents.setdefault(parent.rpartition(".")[0], set()).add(parent)
    return {
        f"{other}.{leaf}"
        for parent, _, leaf in (name.rpartition(".") for name in special)
        for other in parents[parent.rpartition(".")[0]]
    }


def _served_names(module: str) -> Iterable[str]:
    experts = experts_of(module)
    if experts:
        return [module, experts]
    parent, _, leaf = module.rpartition(".")
    return [module, *(f"{parent}.{name}" for name, parts in _JOINED if leaf in parts)]
