"""Which layers of experts are there? Sizes and routing by model name, as the config.json of their makers has them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from tersor.bench.shapes import Shape
from tersor.errors import InputError, did_you_mean
from tersor.formats import Scheme
from tersor.models import geometries
from tersor.ops import Gate


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """The experts of a decoder layer, and how its router chooses; experts that all tokens share are no part of it.

    Attributes:
        name: of the model.
        experts: E.
        top_k: K, the experts of a token.
        hidden, ffn: H, width of the residual stream, and F, that of an expert.
        gate: how gate and up become one.
        biased: whether gate, up and down have biases.
        scoring: `softmax` over all experts, or `sigmoid` of each (DeepSeek-V3, arXiv 2412.19437); where it is
            `sigmoid`, a bias of each expert takes part in the choice.
        normalize: whether the weights of a token are divided by their sum.
        groups, top_groups: groups of experts, and how many of them a token chooses from.
        scale: what weights are multiplied by at last.
    """

    name: str
    experts: int
    top_k: int
    hidden: int
    ffn: int
    gate: Gate = Gate.SILU
    biased: bool = False
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True
    groups: int = 1
    top_groups: int = 1
    scale: float = 1.0

    @staticmethod
    def of(name: str) -> Geometry:
        """Return the experts of a model that `models.geometries` knows by a name."""
        config = geometries.geometry(name)
        experts, gate = config.layers[-1].experts, config.gate
        assert experts is not None and gate is not None
        return Geometry(
            name=name,
            experts=experts.count,
            top_k=experts.top_k,
            hidden=config.hidden,
            ffn=experts.ffn,
            gate=gate,
            biased=experts.biased,
            scoring=experts.scoring,
            normalize=experts.normalize,
            groups=experts.groups,
            top_groups=experts.top_groups,
            scale=experts.scale,
        )

    def linears(self) -> tuple[Shape, Shape]:
        """Return the weights of an expert: gate and up in one, and down."""
        return Shape(2 * self.ffn, self.hidden, "gate_up_proj"), Shape(self.hidden, self.ffn, "down_proj")

    def packed_bytes(self, scheme: Scheme) -> int:
        """Return the bytes of an expert's packed weights with their scales."""
        return round(sum(shape.oc * shape.ic * scheme.bits_per_weight(shape.ic) / 8 for shape in self.linears()))

    @property
    def parameters(self) -> int:
        """Weights of an expert."""
        return 3 * self.hidden * self.ffn


MODELS = {
    geometry.name: geometry
    for geometry in (
        Geometry.of("qwen3-30b-a3b"),
        Geometry.of("mixtral-8x7b"),
        Geometry.of("gpt-oss-20b"),
        Geometry.of("gpt-oss-120b"),
        Geometry.of("deepseek-v3"),
        Geometry(name="olmoe", experts=64, top_k=8, hidden=2048, ffn=1024, normalize=False),
    )
}

DEFAULT = ("qwen3-30b-a3b",)
"""What is measured where nothing is named."""


def resolve(words: Iterable[str]) -> list[Geometry]:
    """Return the layers that words name, in order, each once.

    Raises:
        InputError: a word is no name of `MODELS`.
    """
    found = {}
    for word in words:
        name = word.lower()
        if name not in MODELS:
            raise InputError(f"no experts for {word!r}{did_you_mean(name, MODELS)}: use {', '.join(MODELS)}")
        found[name] = MODELS[name]
    return list(found.values())
