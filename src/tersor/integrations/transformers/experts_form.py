"""What do the experts of a layer compute, and how does transformers keep their weights? Asked of the module itself.

transformers 5 keeps the experts of a layer as two tensors of three axes: `gate_up_proj` [E, 2*I, H], or `up_proj`
[E, I, H] where there is no gate, and `down_proj` [E, H, I]. Some models turn the last two axes, take gate and up in
turn, or add biases. Llama 4 runs every expert on every token, with the router's scores multiplied into the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tersor import ops
from tersor.errors import UnsupportedError
from tersor.nn.experts import Rows

_EVERY_TOKEN = ("Llama4TextExperts",)
"""Classes whose forward takes the tokens of every expert, one expert after the other, and multiplies all of them."""
_PROBE = 12.0
"""Gate and up are tried from minus this to this: beyond where known ones are clamped."""


@dataclass(frozen=True, slots=True)
class ExpertsForm:
    """How a module of experts keeps its weights, and what it does with them.

    Attributes:
        fused: name of the weight that reads the hidden state: `gate_up_proj`, or `up_proj` without a gate.
        count, hidden, inner: E, H and I.
        transposed: whether weights are kept as [E, IC, OC].
        gated: whether there is a gate.
        biased: whether there are `<weight>_bias` [E, OC].
        every_token: whether each expert takes all tokens, scaled before.
        rows: what the rows of the fused weight are, where `gate` is known.
        gate: how gate and up become one, `None` where that is none of `ops.Gate`.
    """

    fused: str
    count: int
    hidden: int
    inner: int
    transposed: bool
    gated: bool
    biased: bool
    every_token: bool
    rows: Rows
    gate: ops.Gate | None

    def shape(self, name: str) -> tuple[int, int, int]:
        """Return (E, OC, IC) of `fused` or `down_proj`."""
        width = self.inner * (2 if self.gated else 1)
        return (self.count, width, self.hidden) if name == self.fused else (self.count, self.hidden, self.inner)

    @property
    def names(self) -> tuple[str, str]:
        """Names of the two weights."""
        return self.fused, "down_proj"


def is_experts(module: Any) -> bool:
    """Whether a module holds the experts of a layer in fused weights."""
    return hasattr(module, "num_experts") and hasattr(module, "down_proj")


def experts_form(experts: Any) -> ExpertsForm:
    """Say how a module of experts of transformers keeps its weights.

    Raises:
        UnsupportedError: it is none that is known, or does more than gate, up and down.
    """
    name = type(experts).__name__
    every_token = name in _EVERY_TOKEN
    known = every_token or (hasattr(experts, "_apply_gate") and hasattr(experts, "has_gate"))
    if not known or getattr(experts, "has_post_expert_norm", False):
        what = "has_post_expert_norm=True" if known else "not in transformers' form"
        raise UnsupportedError(f"experts of {name} cannot run packed ({what}): ignore them")
    gated, transposed = getattr(experts, "has_gate", True), getattr(experts, "is_transposed", every_token)
    biased = getattr(experts, "has_bias", False)
    fused = "gate_up_proj" if gated else "up_proj"
    shapes = [list(getattr(getattr(experts, key, None), "shape", ())) for key in (fused, "down_proj")]
    if len(shapes[0]) == len(shapes[1]) == 3:
        count, inputs, outputs = shapes[0]
        hidden, width = (inputs, outputs) if transposed else (outputs, inputs)
        inner = width // 2 if gated else width
        down = [count, inner, hidden] if transposed else [count, hidden, inner]
        if count and inner and shapes[1] == down and not (gated and width % 2):
            gate, rows = _gate_of(experts, every_token) if gated else (None, Rows.PLAIN)
            return ExpertsForm(fused, count, hidden, inner, transposed, gated, biased, every_token, rows, gate)
    raise UnsupportedError(
        f"{name} with {fused} {shapes[0]} and down_proj {shapes[1]} is not a layer of gated experts: ignore its experts"
    )


def apply_gate(experts: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what a gated module of experts makes of the output [..., 2*I] of its fused weight: [..., I]."""
    if hasattr(experts, "_apply_gate"):
        found: Callable[[torch.Tensor], torch.Tensor] = experts._apply_gate
        return found

    def apply(both: torch.Tensor) -> torch.Tensor:
        gate, up = both.chunk(2, dim=-1)
        gated: torch.Tensor = up * experts.act_fn(gate)
        return gated

    return apply


def _gate_of(experts: Any, every_token: bool) -> tuple[ops.Gate | None, Rows]:
    """Find the gate that gives what the module gives, and the order of rows, by trying a grid of numbers."""
    line = torch.linspace(-_PROBE, _PROBE, 49, dtype=torch.float32, device="cpu")
    gate, up = line[:, None].expand(49, 48).clone(), line[:48].expand(49, 48).clone()
    apply = apply_gate(experts)
    for rows in (Rows.HALVES, Rows.PAIRS):
        both = rows.whole(gate[..., None], up[..., None])[..., 0]
        try:
            found = apply(both)
        except Exception:  # it needs more than numbers of its own: another module, or weights that are not there yet
            return None, Rows.PLAIN
        if found.shape != gate.shape or found.device.type == "meta":
            continue
        for known in ops.Gate:
            if torch.allclose(found, known.combine(gate, up), rtol=1e-5, atol=1e-5):
                return known, rows
    return None, Rows.PLAIN
