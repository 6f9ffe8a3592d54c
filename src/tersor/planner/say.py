"""Why is another plan not the one? A sentence of what takes longer, from the parts of both."""

from __future__ import annotations

from tersor.planner.made import LATENCY, Made
from tersor.planner.ways import DECODE

_WORDS = {
    "products": "reads and multiplies weights for",
    "attention": "attends for",
    "small": "norms and draws for",
    "sums": "waits for sums for",
    "pipeline": "hands on between stages for",
}


def named(made: Made) -> str:
    """Return axes and micro-batches as text."""
    text = made.setting.axes.words()
    return text if made.parts == 1 else f"{text}, {made.parts} micro-batches"


def by_kind(made: Made) -> dict[str, float]:
    """Return the seconds of a step by kind of part, all phases weighted as a step has them."""
    weights = {name: (1.0 if name == DECODE else weight) for name, weight in made.replica.weights.items()}
    found = dict.fromkeys(_WORDS, 0.0)
    for part in made.times:
        found[part.kind] += part.seconds * weights[part.name.partition(".")[0]]
    return found


def why_not(made: Made, best: Made, objective: str) -> str:
    """Return a sentence: what a plan gains beside the best one, and what it pays for it."""
    own, other = by_kind(made), by_kind(best)
    worse = max(own, key=lambda kind: own[kind] - other[kind])
    better = min(own, key=lambda kind: own[kind] - other[kind])
    name = named(made)
    parts = []
    if own[better] < other[better] - 1e-9:
        parts.append(f"{_WORDS[better]} {_ms(own[better])}, not {_ms(other[better])}")
    if own[worse] > other[worse] + 1e-9:
        parts.append(f"{_WORDS[worse]} {_ms(own[worse])}, not {_ms(other[worse])}")
    text = f"{name} {', but '.join(parts)}" if parts else f"{name} takes as long in every part"
    if objective != LATENCY:
        text += f": {made.rate / made.setting.axes.mesh.devices:,.0f} tokens/s a device, not "
        text += f"{best.rate / best.setting.axes.mesh.devices:,.0f}"
    elif made.step < best.step:
        text += f"; it is {_ms(best.step - made.step)} faster a step"
    return text


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"
