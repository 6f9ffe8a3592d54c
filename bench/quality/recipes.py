"""What is measured: recipes, each one call of `tersor.quantize` or `tersor.prune`, and how its checkpoint then runs.

To measure something else, add it to `recipes`: its options are handed on as they are, so that a row can be whatever
these calls do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tersor.compress.prune import get_algorithm

ROWS = ("fp4_e2m1", "fp5_e2m2", "fp6_e3m2", "fp6_e2m3")
"""Formats with one scale a row."""
GROUPED = ("uint4", "uint3", "int4")
"""Formats with a scale a group; how large it is depends on the model's channels."""
TARGETS = (4.5, 5.0)
"""True bits a weight of the mixes."""
ORIGINAL = "original"
"""Name of the model as it is: of what it loses when only keys and values are rounded."""

RTN: dict[str, Any] = {"algorithm": "rtn"}
GPTQ: dict[str, Any] = {"algorithm": "gptq"}
HIGH: dict[str, Any] = {"algorithm": "gptq", "effort": "high"}
FP8, INT8, KV = "activations=fp8", "activations=int8", "kv-dtype=fp8"
WAYS = {
    "fp6_e2m3-row-rtn": ("", FP8, KV, f"{FP8},{KV}"),
    "fp6_e2m3-row-gptq": ("", FP8),
    "fp4_e2m1-row-gptq": ("", FP8),
    "int8-row-rtn": ("", INT8),
    "uint4-g-gptq": ("", INT8),
}
"""Recipe -> the ways in which its checkpoint runs, where there are more than one."""
ROTATE, AWQ, TWEAK_NORMS = "rotate", "awq", "tweak-norms"
TRANSFORMED = (
    *((base, name) for base in ("uint4-g-rtn", "uint4-g-gptq", "uint3-g-gptq") for name in (ROTATE, AWQ, TWEAK_NORMS)),
    ("fp6_e2m3-row-gptq", ROTATE),
)
"""(Recipe, transform that `tersor quantize` does beside choosing codes)."""
OUTLIERS = "0.5%"
BESIDE = (
    *("int4-g-rtn", "int4-g-gptq", "uint4-g-gptq", "uint3-g-gptq"),
    *("fp4_e2m1-row-rtn", "fp4_e2m1-row-gptq", "lut3-row-gptq"),
)
"""Recipes that are measured with so many outliers, too."""
SPARSITY = 0.5
"""The share of zeros of pruned models."""
VALUES = ("fp8_e4m3", "fp6_e2m3", "int4")
"""What weights that stay are stored as, beside the model's dtype."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A way to compress a model.

    Attributes:
        name: of the recipe, of its checkpoint's directory and, in results, of its rows.
        options: of the call; empty for the model as it is.
        calibrated: whether it is given the calibration text.
        verb: the call, `quantize` or `prune`.
        mixllm: true bits a weight of a mix by MixLLM's score and count rule, in place of our levels.
        ways: how the checkpoint runs, as behind the @ of `tersor eval`; empty is with 16-bit activations.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    calibrated: bool = False
    verb: str = "quantize"
    mixllm: float | None = None
    ways: tuple[str, ...] = ("",)

    @property
    def labels(self) -> tuple[str, ...]:
        """What its rows are called, one a way."""
        return tuple(f"{self.name}@{way}" if way else self.name for way in self.ways)


def recipes(group: int) -> list[Recipe]:
    """Return all recipes for a model, those that the claims need most first.

    Ahead of them are those whose keys and values the engine keeps: without kernels, which take 16 bits, it is slow.

    Args:
        group: input channels that share a scale, where formats have groups; it divides all of the model's.
    """
    found = [_plain(scheme, group) for scheme in (*GROUPED, *ROWS)]
    found += [_plain(scheme, group, GPTQ) for scheme in (*GROUPED, *ROWS)]
    found += [_plain(scheme, group, HIGH) for scheme in (*GROUPED, *ROWS)]
    found += mixes(group)
    found += [_named("int4-row-rtn", "int4"), _named("int4-row-gptq", "int4", **GPTQ)]
    found += [_named("int8-row-rtn", "int8")]
    found += [_named("lut3-row-rtn", "lut3"), _named("lut3-row-gptq", "lut3", **GPTQ)]
    found += [_named(f"{name}-g-rtn", name, group) for name in ("fp6_e3m2", "fp6_e2m3")]
    found += [_named(f"mx{name}-rtn", f"mx{name}") for name in ("fp6_e3m2", "fp6_e2m3")]
    known = {one.name: one for one in found}
    found += [transformed(known[base], name) for base, name in TRANSFORMED]
    found += [beside(known[base]) for base in BESIDE]
    found += pruned()
    every = [Recipe(ORIGINAL, ways=(KV,)), *(replace(one, ways=WAYS.get(one.name, one.ways)) for one in found)]
    return sorted(every, key=lambda one: not any(KV in way for way in one.ways))


def mixes(group: int) -> list[Recipe]:
    """Return mixes by true bits, and the uniform formats that stand beside them."""
    found = [_named("uint5-g-gptq", "uint5", group, **GPTQ)]
    found += [_named(f"uint4-g{size}-gptq", "uint4", size, **GPTQ) for size in (64, 32) if size < group]
    old = [f"uint4:g{group}", "int8:row"]
    for bits in TARGETS:
        found += [
            _mix(f"mix-{bits}-rtn", bits, **RTN),
            _mix(f"mix-{bits}-gptq", bits, **GPTQ),
            _mix(f"mix-{bits}-gptq-high", bits, **HIGH),
            _mix(f"mix48-{bits}-gptq", bits, levels=old, **GPTQ),
            Recipe(f"mixllm-{bits}-gptq", GPTQ, calibrated=True, mixllm=bits),
        ]
    return found


def transformed(base: Recipe, name: str) -> Recipe:
    """Return a recipe with a transform, beside the one that lacks it; rotation alone needs no text."""
    calibrated = base.calibrated or name != ROTATE
    return Recipe(f"{base.name}-{name}", {**RTN, **base.options, "transforms": [name]}, calibrated=calibrated)


def beside(base: Recipe) -> Recipe:
    """Return a recipe that keeps outliers, beside the one that lacks them."""
    return Recipe(f"{base.name}-outliers", {**base.options, "outliers": OUTLIERS}, calibrated=base.calibrated)


def pruned() -> list[Recipe]:
    """Return recipes that make weights zero: as papers leave the others, and by `admm`, which fits them, and codes."""
    share = f"{100 * SPARSITY:g}"
    found = [_pruned(f"{name}-{share}", algorithm=name, update=False) for name in ("magnitude", "wanda", "sparsegpt")]
    found += [_pruned(f"admm-{share}"), _pruned(f"admm-{share}-allocate", allocate=True)]
    return found + [_pruned(f"admm-{share}-{values}", values=values) for values in VALUES]


def _pruned(name: str, **how: Any) -> Recipe:
    calibrated = get_algorithm(how.get("algorithm", "admm")).needs_text
    return Recipe(name, {"sparsity": SPARSITY, **how}, calibrated=calibrated, verb="prune")


def _plain(scheme: str, group: int, how: Mapping[str, Any] | None = None) -> Recipe:
    """Return a uniform format, in groups where it has them, by a recipe of `compress` or, without one, to nearest."""
    effort = "rtn" if how is None else "gptq-high" if "effort" in how else "gptq"
    grouped = scheme in GROUPED
    return _named(f"{scheme}-{'g' if grouped else 'row'}-{effort}", scheme, group if grouped else None, **(how or {}))


def _named(name: str, scheme: str, group: int | None = None, **how: Any) -> Recipe:
    return Recipe(name, {"format": scheme, "group_size": group, **how}, calibrated=bool(how))


def _mix(name: str, bits: float, **more: Any) -> Recipe:
    return Recipe(name, {"target_bits": bits, **more}, calibrated=True)
