"""What was chosen for a checkpoint, and what became of its layers? From its config.json, its headers and its logs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from tersor.checkpoint.inspect import Item
from tersor.compress import RECIPES
from tersor.report.runs import Checkpoint

_EXPERT = re.compile(r"(.*\bexperts)\.\d+\.(.*)")

_CHOSEN = ("format", "group_size", "scale_dtype", "levels", "overrides", "ignore", "provenance")
"""What quantization_config says of the choice."""


def checkpoint_dict(run: Checkpoint) -> dict[str, Any]:
    """Return what a page shows of a checkpoint, as JSON values.

    Of the experts of a layer that have a tensor each, those of one kind and format are one line: bits are the mean over
    all elements, the relative error is the root of the mean square over experts, objectives are sums.
    """
    found = run.found
    layers = _layers(run)
    algorithm = str(run.config.get("provenance", {}).get("algorithm", ""))
    return {
        "run": run.path,
        "label": found.model,
        "architecture": found.architecture,
        "parameters": found.parameters,
        "bytes": found.nbytes,
        "bits_per_weight": found.bits_per_weight,
        "compressed_bits_per_weight": found.compressed_bits_per_weight,
        "compressed": sum(item.compressed for item in found.items),
        "recipe": RECIPES[algorithm].summary if algorithm in RECIPES else algorithm or "unknown",
        **{key: run.config[key] for key in _CHOSEN if key in run.config},
        "schemes": _schemes(found.items),
        "calibration": None if run.log is None else _calibration(run.log),
        "mix": None if run.mix is None else {key: value for key, value in run.mix.items() if key != "layers"},
        "layers": layers,
    }


def _schemes(items: Iterable[Item]) -> list[dict[str, Any]]:
    """Return what is stored in which scheme; output features of a mixed weight count where their level is."""
    sums: dict[tuple[str, bool], list[int]] = {}

    def add(name: str, compressed: bool, *counts: int) -> None:
        own = sums.setdefault((name, compressed), [0, 0, 0, 0])
        own[:] = [one + more for one, more in zip(own, counts, strict=True)]

    for item in items:
        levels = _levels(item)
        for name, rows in levels:
            add(f"level {name}", item.compressed, 0, rows * item.shape[-1], 0, rows)
        add(item.format, item.compressed, 1, item.numel, item.nbytes, 0)
    return [
        {
            "scheme": name,
            "compressed": compressed,
            "tensors": tensors or None,
            "elements": elements,
            "bytes": nbytes or None,
            "output_features": rows or None,
        }
        for (name, compressed), (tensors, elements, nbytes, rows) in sums.items()
    ]


def _levels(item: Item) -> Sequence[tuple[str, int]]:
    """Return key and output features of every level of a mixed weight; nothing of another."""
    return asdict(item).get("levels", ())


def _calibration(log: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a log says beside its layers, without the times of blocks."""
    return {key: value for key, value in log.items() if key not in ("layers", "blocks")}


def _layers(run: Checkpoint) -> list[dict[str, Any]]:
    written = {str(line["tensor"]): line for line in run.layers}
    logged = {str(line["layer"]): line for line in run.log["layers"]} if run.log is not None else {}
    lines: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for item in run.found.items:
        if not item.compressed:
            continue
        own = written.get(item.name, {})
        module = str(own.get("layer", item.name.removesuffix(".weight")))
        log = logged.get(module, {})
        line = {
            "layer": module,
            "shape": list(item.shape),
            "format": item.format,
            "bits_per_weight": item.bits_per_weight,
            "bytes": item.nbytes,
            "relative_error": log.get("relative_error", own.get("relative_error")),
            "objective_before": log.get("objective_before"),
            "objective_after": log.get("objective_after"),
            "levels": [list(level) for level in _levels(item)],
            "warning": own.get("warning", ""),
        }
        expert = _EXPERT.fullmatch(module)
        name = module if expert is None else f"{expert[1]}.*.{expert[2]}"
        lines.setdefault((name, item.format), []).append(line)
    return [_joined(name, several) for (name, _), several in lines.items()]


def _joined(name: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Make one line of those of a layer's experts."""
    if len(lines) == 1:
        return {**lines[0], "count": 1}
    errors = [line["relative_error"] for line in lines if line["relative_error"] is not None]
    elements = sum(math.prod(line["shape"]) for line in lines)
    nbytes = sum(line["bytes"] for line in lines)
    return {
        **lines[0],
        "layer": name,
        "count": len(lines),
        "bytes": nbytes,
        "bits_per_weight": 8 * nbytes / max(1, elements),
        "relative_error": math.sqrt(sum(error**2 for error in errors) / len(errors)) if errors else None,
        "objective_before": _sum(lines, "objective_before"),
        "objective_after": _sum(lines, "objective_after"),
        "warning": next((line["warning"] for line in lines if line["warning"]), ""),
    }


def _sum(lines: Iterable[Mapping[str, Any]], key: str) -> float | None:
    values = [line[key] for line in lines if line[key] is not None]
    return sum(values) if values else None
