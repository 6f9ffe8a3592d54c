"""How does the residual stream of a model pass through its weights? What a rotation has to know of each of them.

The stream may be rotated where nothing but linear layers behind RMS norms reads it and nothing but linear layers writes
it, beside embedding and output head. A model is taken for such a one where every parameter it has is known by name and
place, as those of Llama are; anything else is refused, and named.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from tersor.errors import InputError
from tersor.integrations.transformers.architecture import meta_model
from tersor.integrations.transformers.norm_form import norm_form

_HEADS = "heads"
_HIDDEN = "hidden"


@dataclass(frozen=True, slots=True)
class Place:
    """What becomes of a parameter in a model whose residual stream is rotated.

    Attributes:
        norm: name of the norm's weight that its columns are multiplied with first, else empty.
        offset: what is added to that weight.
        columns: what its columns are rotated as, `hidden` or `heads`, else empty.
        rows: what its rows are rotated as, else empty.
        emptied: of a norm's weight, its value when its gains are in the layers behind it; else `None`.
    """

    norm: str = ""
    offset: float = 0.0
    columns: str = ""
    rows: str = ""
    emptied: float | None = None


@dataclass(frozen=True, slots=True)
class Residual:
    """A model whose residual stream can be rotated.

    Attributes:
        hidden: channels of the stream.
        head: channels of an attention head's values.
        places: parameter -> what becomes of it; those that are not in it stay as they are.
        embedding, output: the weights of embedding and output head.
        tied: whether the latter is the former's, as config.json says.
    """

    hidden: int
    head: int
    places: Mapping[str, Place]
    embedding: str
    output: str
    tied: bool


_READS_ATTENTION = r"self_attn\.(?:q|k|qkv)_proj\.weight"
_READS_MLP = r"mlp\.(?:gate|up|gate_up)_proj\.weight"
_WRITES = r"(?:self_attn\.o_proj|mlp\.down_proj)\.(?:weight|bias)"
_UNTOUCHED = r"self_attn\.(?:(?:q|k|qkv)_proj\.bias|[qk]_norm\.weight)|mlp\.(?:gate|up|gate_up)_proj\.bias"
_NORMS = {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"}


def read_residual(directory: Path, *, trust_remote_code: bool = False) -> Residual:
    """Say how the residual stream of the model of a config.json passes through its weights.

    Args:
        directory: where config.json is.
        trust_remote_code: whether Python code that comes with the model is run.

    Raises:
        CheckpointError: transformers cannot build the model.
        InputError: the stream cannot be rotated; the module in the way is named.
    """
    model, tied = meta_model(directory, trust_remote_code=trust_remote_code, untied=True)
    modules = dict(model.named_modules())
    names = {id(module): name for name, module in modules.items()}
    embedding, head = names.get(id(model.get_input_embeddings()), ""), names.get(id(model.get_output_embeddings()), "")
    if not embedding or not head:
        raise InputError(f"transform 'rotate': {type(model).__name__} has no output head beside its embedding")
    base = embedding.rpartition(".")[0]
    inside = f"{base}." if base else ""
    ends = (f"{embedding}.weight", f"{head}.weight", f"{head}.bias", f"{inside}norm.weight")
    places: dict[str, Place] = {}
    for name, _ in model.named_parameters():
        if name in ends:
            continue
        match = re.fullmatch(rf"({re.escape(inside)}layers\.\d+\.)(.+)", name)
        place = _place(modules, match[1], match[2]) if match else None
        if place is None:
            owner = name.rpartition(".")[0]
            raise InputError(
                f"transform 'rotate': {owner}, a {type(modules[owner]).__name__}, is none of the modules that Llama "
                "has, so the residual stream cannot be rotated through it: leave the transform out"
            )
        places[name] = place
    if any(name.endswith("qkv_proj.weight") for name in places):  # values are in one piece with queries
        places = {name: _without_heads(place) for name, place in places.items()}
    places = {name: place for name, place in places.items() if place != Place()}
    places[f"{embedding}.weight"] = Place(columns=_HIDDEN)
    places[f"{head}.weight"] = _behind(modules, f"{inside}norm")
    places[f"{inside}norm.weight"] = _emptied(modules, f"{inside}norm")
    hidden = int(modules[embedding].weight.shape[1])
    return Residual(hidden, head_size(model), places, f"{embedding}.weight", f"{head}.weight", tied)


def _place(modules: Mapping[str, Any], layer: str, own: str) -> Place | None:
    """Return what becomes of a parameter of a block, `None` where it is not known."""
    part = own.partition(".")[0]
    if part in _NORMS.values() and own == f"{part}.weight":
        return _emptied(modules, layer + part)
    if re.fullmatch(_UNTOUCHED, own):
        return Place()
    if re.fullmatch(rf"{_READS_ATTENTION}|{_READS_MLP}", own):
        return _behind(modules, layer + _NORMS[part])
    if own == "self_attn.v_proj.weight":
        return replace(_behind(modules, layer + _NORMS[part]), rows=_HEADS)
    if own == "self_attn.v_proj.bias":
        return Place(rows=_HEADS)
    if re.fullmatch(_WRITES, own):
        heads = own == "self_attn.o_proj.weight"
        return Place(columns=_HEADS if heads else "", rows=_HIDDEN)
    return None


def _behind(modules: Mapping[str, Any], norm: str) -> Place:
    """Return what becomes of the weight of a layer that reads what a norm makes."""
    return Place(f"{norm}.weight", _offset(modules, norm), _HIDDEN)


def _emptied(modules: Mapping[str, Any], norm: str) -> Place:
    return Place(emptied=1.0 - _offset(modules, norm))


def _offset(modules: Mapping[str, Any], norm: str) -> float:
    """Return what a norm adds to its weight.

    Raises:
        InputError: a rotation does not pass through it.
    """
    found = modules.get(norm)
    form = norm_form(found) if isinstance(found, nn.Module) else None
    if form is None or not form.turns:
        what = f"is a {type(found).__name__}" if found is not None else "is not there"
        raise InputError(
            f"transform 'rotate': {norm} {what}, and a rotation passes through RMS norms alone: leave the transform out"
        )
    return form.offset


def _without_heads(place: Place) -> Place:
    return replace(place, columns=place.columns.replace(_HEADS, ""), rows=place.rows.replace(_HEADS, ""))


def head_size(model: Any) -> int:
    """Return the channels of an attention head of a model of transformers, as its config says them."""
    config = model.config.get_text_config()
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
