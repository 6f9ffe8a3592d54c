"""How good are the models of all runs, together? Only what read the same windows against the same reference."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import combinations
from pathlib import Path
from typing import Any

from tersor.evaluate import PerWindow, Quality, compare
from tersor.report.runs import Measured

_SAME = 1e-3
"""Relative difference of the perplexities of one reference in two runs: kernels and threads may differ, models not."""


@dataclass(slots=True, kw_only=True)
class Group:
    """Models that can be compared.

    Attributes:
        windows_sha256, windows, window: the tokens that they read: a hash, windows, and tokens in each.
        reference: label of the reference, `None` without one.
        computed: the type of device and the dtype of activations, in words.
        texts: files that the runs name.
        reference_model: the reference's own numbers, where a run has them.
        floors: noise floors, one a run that has one.
        models: what was measured, in order.
        runs: the path of the run of each.
    """

    windows_sha256: str
    windows: int
    window: int
    reference: str | None
    computed: str
    texts: list[str] = field(default_factory=list)
    reference_model: dict[str, Any] | None = None
    floors: list[dict[str, Any]] = field(default_factory=list)
    models: list[dict[str, Any]] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)

    def takes(self, other: Group) -> bool:
        """Whether the models of another group belong to this one."""
        mine, its = (
            (one.windows_sha256, one.windows, one.window, one.reference, one.computed) for one in (self, other)
        )
        return mine == its and not self.other_reference(other)

    def other_reference(self, other: Group) -> bool:
        """Whether the references have one name, and yet do not predict alike."""
        one, two = (group.models[0].get("reference_perplexity") if group.models else None for group in (self, other))
        return bool(one and two and abs(math.log(one / two)) > _SAME)

    def apart_from(self, other: Group) -> str:
        """Return why this group is not one with another."""
        mine, its = (f"{one.windows} windows of {one.window} tokens" for one in (self, other))
        reasons = []
        if self.texts and other.texts and not set(self.texts) & set(other.texts):
            reasons.append(f"another text ({', '.join(self.texts)}, not {', '.join(other.texts)})")
        elif mine != its:
            reasons.append(f"other windows ({mine}, not {its})")
        elif self.windows_sha256 != other.windows_sha256:
            reasons.append(f"other tokens (though {mine}, too)")
        if self.reference != other.reference:
            reasons.append(f"another reference ({self.reference or 'none'}, not {other.reference or 'none'})")
        elif self.other_reference(other) and not reasons:
            reasons.append(f"another model as reference, which is called {self.reference}, too")
        if self.computed != other.computed:
            reasons.append(f"computed otherwise ({self.computed}, not {other.computed})")
        return " and ".join(reasons)

    def labels(self) -> list[str]:
        """Return a label for every model, each once: with its run behind it where runs call models alike."""
        own = [str(model["label"]) for model in self.models]
        often = Counter(own)
        named = [
            f"{label} ({Path(run).name})" if often[label] > 1 else label
            for label, run in zip(own, self.runs, strict=True)
        ]
        again = Counter(named)
        return [f"{label}, number {number}" if again[label] > 1 else label for number, label in enumerate(named, 1)]

    def to_dict(self) -> dict[str, Any]:
        """Return everything that a page shows, as JSON values; models are numbered from 1."""
        labels = self.labels()
        return {
            "windows_sha256": self.windows_sha256,
            "windows": self.windows,
            "window": self.window,
            "reference": self.reference,
            "computed": self.computed,
            "texts": self.texts,
            "reference_model": self.reference_model,
            "noise_floors": self.floors,
            "models": [
                {"number": number, **(_without_windows(model) or {}), "label": label, "run": run}
                for number, (model, label, run) in enumerate(zip(self.models, labels, self.runs, strict=True), 1)
            ],
            "comparisons": self._comparisons(),
        }

    def _comparisons(self) -> list[dict[str, Any]]:
        found = [_quality(model) for model in self.models]
        return [
            {"first": i + 1, "other": j + 1, **compare(found[i], found[j]).to_dict()}
            for i, j in combinations(range(len(found)), 2)
            if "nll" in self.models[i]["per_window"] and "nll" in self.models[j]["per_window"]
        ]


def find_groups(runs: Sequence[Measured]) -> list[Group]:
    """Return the models of all runs, those together that can be compared.

    Args:
        runs: of `tersor eval`.
    """
    groups: list[Group] = []
    for run in runs:
        result = run.result
        origin, device = result.get("reference_model"), str(result.get("device", "")).partition(":")[0]
        for model in result.get("models", ()):
            alone = Group(
                windows_sha256=model["windows_sha256"],
                windows=model["windows"],
                window=model["window"],
                reference=None if origin is None else origin["label"],
                computed=_computed(device, str(result.get("dtype"))),
                models=[model],
            )
            group = next((one for one in groups if one.takes(alone)), None)
            if group is None:
                alone.models = []
                groups.append(group := alone)
            group.models.append(model)
            group.runs.append(run.path)
            text = result.get("text")
            if isinstance(text, str) and text not in group.texts:
                group.texts.append(text)
            group.reference_model = group.reference_model or _without_windows(origin)
            floor = _without_windows(result.get("noise_floor"))
            if floor is not None and all(one["run"] != run.path for one in group.floors):
                group.floors.append({"run": run.path, **floor})
    return groups


def _computed(device: str, dtype: str) -> str:
    """Return a type of device and the dtype of activations there, such as `cpu in float32`."""
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "the checkpoint's dtype"
    return f"{device} in {dtype}"


def _without_windows(measured: dict[str, Any] | None) -> dict[str, Any] | None:
    """Leave out means of windows, which a page does not show."""
    return None if measured is None else {key: value for key, value in measured.items() if key != "per_window"}


def _quality(model: dict[str, Any]) -> Quality:
    names = [one.name for one in fields(Quality) if one.name != "per_window"]
    kept = {
        one.name: tuple(model["per_window"][one.name]) for one in fields(PerWindow) if one.name in model["per_window"]
    }
    values = {name: model[name] for name in names if name in model}
    return Quality(**{"perplexity_error": None, **values}, per_window=PerWindow(**kept) if "nll" in kept else None)
