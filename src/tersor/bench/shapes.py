"""Which linears does a model have? Shapes [OC, IC] by model name, by folder, or as OCxIC.

Projections that read the same input are one weight, as decoders run them: `qkv_proj`, `gate_up_proj`. Geometries of
named models are those of the config.json that their makers publish.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tersor import files
from tersor.checkpoint.names import MERGED
from tersor.errors import InputError, did_you_mean
from tersor.models.config import DecoderConfig
from tersor.models.geometries import GEOMETRIES, geometry


@dataclass(frozen=True, slots=True)
class Shape:
    """A weight [oc, ic] and what it is called; the name is empty where only sizes were given."""

    oc: int
    ic: int
    name: str = ""

    def __str__(self) -> str:
        return f"{self.oc}x{self.ic}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """The sizes of a decoder layer.

    Attributes:
        hidden, ffn: width of the residual stream and of the feed-forward network.
        heads, kv_heads: attention heads, and those of keys and values.
        head_dim: width of a head.
        gated: whether the feed-forward network has a gate (LLaMA) or not (OPT).
    """

    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int = 128
    gated: bool = True

    @staticmethod
    def of(config: DecoderConfig) -> Geometry:
        """Return the sizes of a decoder's layers."""
        form = config.layers[0].attention
        sizes = {"heads": form.heads, "kv_heads": form.kv_heads, "head_dim": form.head_dim}
        return Geometry(hidden=config.hidden, ffn=config.ffn, gated=config.gate is not None, **sizes)

    def linears(self) -> dict[str, tuple[int, int]]:
        """Return name -> (OC, IC) of the linears of a layer."""
        attention = self.heads * self.head_dim
        qkv = (attention + 2 * self.kv_heads * self.head_dim, self.hidden)
        if self.gated:
            up, down, out = "gate_up_proj", "down_proj", "o_proj"
        else:
            up, down, out = "fc1", "fc2", "out_proj"
        return {
            "qkv_proj": qkv,
            out: (self.hidden, attention),
            up: ((2 if self.gated else 1) * self.ffn, self.hidden),
            down: (self.hidden, self.ffn),
        }


MODELS: dict[str, Geometry] = {
    name: Geometry.of(config)
    for name, config in ((name, geometry(name)) for name in GEOMETRIES)
    if not any(layer.experts for layer in config.layers)
}

DEFAULT = ("llama-2-70b", "llama-3-8b")
"""What is measured where nothing is named."""

_SIZES = re.compile(r"([0-9]+)x([0-9]+)")


def resolve(words: Iterable[str], *, trust_remote_code: bool = False) -> list[Shape]:
    """Return the shapes that words name, in order, each size once; equal ones share a line of names.

    Args:
        words: model names (`MODELS`), folders with a config.json, or sizes such as `8192x28672`.
        trust_remote_code: whether Python code that comes with the model of a folder is run.

    Raises:
        InputError: a word is none of these.
        CheckpointError: a folder's config.json is none that transformers builds a language model from.
    """
    names: dict[tuple[int, int], list[str]] = {}
    for word in words:
        for shape in _shapes(word, trust_remote_code):
            known = names.setdefault((shape.oc, shape.ic), [])
            if shape.name and shape.name not in known:
                known.append(shape.name)
    return [Shape(oc, ic, ", ".join(known)) for (oc, ic), known in names.items()]


def _shapes(word: str, trust_remote_code: bool) -> list[Shape]:
    sizes = _SIZES.fullmatch(word)
    if sizes:
        oc, ic = int(sizes[1]), int(sizes[2])
        if not oc or not ic:
            raise InputError(f"{word}: output and input channels are at least 1")
        return [Shape(oc, ic)]
    if word.lower() in MODELS:
        linears = MODELS[word.lower()].linears()
        return [Shape(oc, ic, f"{word.lower()} {name}") for name, (oc, ic) in linears.items()]
    try:
        folder = files.user_path(word)
        mode = files.mode_of(folder)
    except OSError as error:
        raise InputError(f"cannot read {word}: {error.strerror}") from None
    if not stat.S_ISDIR(mode):
        near = did_you_mean(word.lower(), MODELS)
        raise InputError(
            f"no shapes for {word!r}{near}: give OCxIC such as 8192x28672, a folder with a config.json, or one of "
            f"{', '.join(MODELS)}"
        )
    from tersor.checkpoint.source import read_config
    from tersor.integrations.transformers.architecture import read_architecture

    read_config(folder)
    architecture = read_architecture(folder, trust_remote_code=trust_remote_code)
    linears = {
        name: (oc, ic)
        for name, linear in architecture.linears.items()
        if name != architecture.head
        for oc, ic in [linear.shape]
    }
    return [Shape(oc, ic, f"{folder.resolve().name} {name}") for name, (oc, ic) in joined(linears)]


def joined(linears: Mapping[str, tuple[int, int]]) -> list[tuple[str, tuple[int, int]]]:
    """Join the projections of one parent that read the same input, and drop the path before a layer's own name.

    Args:
        linears: module name -> (OC, IC).

    Returns:
        (name, (OC, IC)), each pair once, in order.
    """
    found: dict[tuple[str, tuple[int, int]], None] = {}
    parents: dict[str, dict[str, tuple[int, int]]] = {}
    for module, shape in linears.items():
        parent, _, leaf = module.rpartition(".")
        parents.setdefault(parent, {})[leaf] = shape
    for leaves in parents.values():
        for name, parts in MERGED.items():
            if all(part in leaves for part in parts) and len({leaves[part][1] for part in parts}) == 1:
                shapes = [leaves.pop(part) for part in parts]
                found[name, (sum(oc for oc, _ in shapes), shapes[0][1])] = None
        found |= dict.fromkeys(leaves.items())
    return list(found)
