"""What does a config.json say of rotation? In `rope_parameters`, or in the older `rope_theta` and `rope_scaling`."""

from __future__ import annotations

import math

from tersor.models.fields import Fields
from tersor.models.rotary import Linear, Llama3, LongRope, Rotary, Scaling, Yarn

_KINDS = ("default", "linear", "llama3", "yarn", "longrope", "su")


def rotary(fields: Fields, head_dim: int, context: int, theta: float, kind: str = "") -> Rotary:
    """Return how queries and keys turn.

    Args:
        fields: of config.json.
        head_dim: channels of a head.
        context: tokens of a text at most.
        theta: the base where no field says it.
        kind: the kind of layer, such as `full_attention`, where each may have its own; else empty.

    Raises:
        UnsupportedError: a scaling, or a value, that is not known.
    """
    said = fields.part("rope_parameters") or fields.part("rope_scaling")
    if said is not None and kind and kind in said:
        said = said.part(kind)
    if said is None:
        said = Fields({})
    base = said.number("rope_theta", fields.number("rope_theta", theta))
    fraction = said.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0))
    dim = int(head_dim * fraction)
    if dim % 2 or not 2 <= dim <= head_dim:
        raise fields.refused("partial_rotary_factor", f"one that turns an even number of {head_dim} channels")
    return Rotary(dim, base, _scaling(said, fields, dim, context))


def local_rotary(fields: Fields, head_dim: int, context: int, theta: float) -> Rotary:
    """Return how queries and keys turn in the layers of Gemma 3 that slide: their older field is a base alone."""
    said = fields.part("rope_parameters")
    own = said.part("sliding_attention") if said is not None else None
    if own is None:
        return Rotary(head_dim, fields.number("rope_local_base_freq", theta))
    return Rotary(head_dim, own.number("rope_theta", theta), _scaling(own, fields, head_dim, context))


def _scaling(said: Fields, fields: Fields, dim: int, context: int) -> Scaling | None:
    name = "rope_type" if "rope_type" in said else "type"
    kind = said.word(name, "default")
    if kind == "default":
        return None
    if kind == "linear":
        return Linear(said.number("factor"))
    outer = fields.size("original_max_position_embeddings", context)
    original = said.size("original_max_position_embeddings", outer)
    if "original_max_position_embeddings" in fields:
        original = outer
    if kind == "llama3":
        low, high = said.number("low_freq_factor"), said.number("high_freq_factor")
        return Llama3(said.number("factor"), low, high, original)
    if kind == "yarn":
        factor = said.number("factor", context / original)
        fast, slow = said.number("beta_fast", 32.0), said.number("beta_slow", 1.0)
        truncate = said.flag("truncate", True)
        return Yarn(factor, fast, slow, original, truncate, said.number("attention_factor", _yarn_factor(said, factor)))
    if kind in ("longrope", "su"):
        short, long = (said.numbers(f"{length}_factor", dim // 2) for length in ("short", "long"))
        factor = said.number("factor", context / original)
        magnitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        return LongRope(short, long, original, said.number("attention_factor", magnitude))
    raise said.refused(name, " or ".join(_KINDS))


def _yarn_factor(said: Fields, factor: float) -> float:
    """Return what YaRN multiplies cosines and sines by (arXiv 2309.00071, section 3.4; DeepSeek's has two slopes)."""
    slopes = [said.maybe_number(name) for name in ("mscale", "mscale_all_dim")]
    above, below = (1.0 if factor <= 1 else 0.1 * (slope or 1.0) * math.log(factor) + 1 for slope in slopes)
    return above / below if all(slopes) else 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1
