"""What is measured: recipes, each one call of `tersor.quantize` and the ways in which its checkpoint then runs.

To measure something else, add it to `recipes`: its options are handed on as they are, so that whatever `tersor.quantize`
takes can be a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ROWS = ("fp4_e2m1", "fp5_e2m2", "fp6_e3m2", "fp6_e2m3")
"""Formats with one scale a row."""
GROUPED = ("uint4", "uint3", "int4")
"""Formats with a scale a group; how large it is depends on the model's channels."""
TARGETS = (4.5, 5.0)
"""True bits a weight of the mixes."""
ORIGINAL = "original"
"""Name of the model as it is: of what it loses when only keys and values are rounded."""

GPTQ: dict[str, Any] = {"algorithm": "gptq"}
HIGH: dict[str, Any] = {"algorithm": "gptq", "effort": "high"}
STEPS = ("rotation", "scaling", "norms")
"""Steps of a calibration that are off by default, by the names that `--step` takes."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A way to compress a model.

    Attributes:
        name: of the recipe, of its checkpoint's directory and, in results, of its rows.
        options: of `tersor.quantize`; empty for the model as it is.
        calibrated: whether it is given the calibration text.
        mixllm: true bits a weight of a mix by MixLLM's score and count rule, in place of our levels.
        ways: how the checkpoint runs, as behind the @ of `tersor eval`; empty is with 16-bit activations.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    calibrated: bool = False
    mixllm: float | None = None
    ways: tuple[str, ...] = ("",)

    @property
    def labels(self) -> tuple[str, ...]:
        """What its rows are called, one a way."""
        return tuple(f"{self.name}@{way}" if way else self.name for way in self.ways)

    @property
    def engine(self) -> bool:
        """Whether a way asks for keys and values in another dtype, which the engine alone has."""
        return any("kv-dtype" in way for way in self.ways)


def recipes(group: int) -> list[Recipe]:
    """Return all recipes for a model, those that the claims need most first.

    Args:
        group: input channels that share a scale, where formats have groups; it divides all of the model's.
    """
    found = [_plain(scheme, group) for scheme in (*GROUPED, *ROWS)]
    found += [_plain(scheme, group, GPTQ) for scheme in (*GROUPED, *ROWS)]
    found += [_plain(scheme, group, HIGH) for scheme in (*GROUPED, *ROWS)]
    found += mixes(group)
    found += [_named("int4-row-rtn", "int4"), _named("int4-row-gptq", "int4", **GPTQ)]
    found += [_named(f"{name}-g-rtn", name, group) for name in ("fp6_e3m2", "fp6_e2m3")]
    found += [_named(f"mx{name}-rtn", f"mx{name}") for name in ("fp6_e3m2", "fp6_e2m3")]
    found += eight_bit(group)
    found += with_steps(group)
    return found


def mixes(group: int) -> list[Recipe]:
    """Return mixes by true bits, and the uniform formats that stand beside them."""
    found = [_named("uint5-g-gptq", "uint5", group, **GPTQ)]
    found += [_named(f"uint4-g{size}-gptq", "uint4", size, **GPTQ) for size in (64, 32) if size < group]
    old = [f"uint4:g{group}", "int8:row"]
    for bits in TARGETS:
        found += [
            _mix(f"mix-{bits}-rtn", bits),
            _mix(f"mix-{bits}-gptq", bits, **GPTQ),
            _mix(f"mix-{bits}-gptq-high", bits, **HIGH),
            _mix(f"mix48-{bits}-gptq", bits, levels=old, **GPTQ),
            Recipe(f"mixllm-{bits}-gptq", GPTQ, calibrated=True, mixllm=bits),
        ]
    return found


def eight_bit(group: int) -> list[Recipe]:
    """Return what 8-bit activations and keys and values in e4m3 are measured with."""
    everything = ("", "activations=fp8", "kv-dtype=fp8", "activations=fp8,kv-dtype=fp8")
    rows = {"format": "fp6_e2m3"}
    return [
        Recipe(ORIGINAL, ways=("kv-dtype=fp8",)),
        Recipe("fp6_e2m3-8bit-rtn", rows, ways=everything),
        Recipe("fp6_e2m3-8bit-gptq", {**rows, **GPTQ}, calibrated=True, ways=everything),
        Recipe("int8-row-rtn", {"format": "int8"}, ways=("", "activations=int8")),
        Recipe("fp4_e2m1-8bit-gptq", {"format": "fp4_e2m1", **GPTQ}, calibrated=True, ways=("", "activations=fp8")),
        Recipe(
            "uint4-8bit-gptq",
            {"format": "uint4", "group_size": group, **GPTQ},
            calibrated=True,
            ways=("", "activations=int8"),
        ),
    ]


def with_steps(group: int) -> list[Recipe]:
    """Return what a step more in a calibration is measured with: each beside the recipe that lacks it."""
    return [
        Recipe(
            f"{name}-{step}",
            {"format": scheme, "group_size": size, "steps": [step], **GPTQ},
            calibrated=True,
        )
        for name, scheme, size in (
            ("uint4-g-gptq", "uint4", group),
            ("uint3-g-gptq", "uint3", group),
            ("fp6_e2m3-row-gptq", "fp6_e2m3", None),
        )
        for step in STEPS
    ]


def _plain(scheme: str, group: int, how: Mapping[str, Any] | None = None) -> Recipe:
    """Return a uniform format, in groups where it has them, by a recipe of `compress` or, without one, to nearest."""
    effort = "rtn" if how is None else "gptq-high" if "effort" in how else "gptq"
    grouped = scheme in GROUPED
    return _named(f"{scheme}-{'g' if grouped else 'row'}-{effort}", scheme, group if grouped else None, **(how or {}))


def _named(name: str, scheme: str, group: int | None = None, **how: Any) -> Recipe:
    return Recipe(name, {"format": scheme, "group_size": group, **how}, calibrated=bool(how))


def _mix(name: str, bits: float, **more: Any) -> Recipe:
    return Recipe(name, {"target_bits": bits, **more}, calibrated=True)
