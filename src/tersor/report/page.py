"""What does a report look like? What was measured, as one page (`frame`), with pictures."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from tersor.report.frame import framed, note
from tersor.report.svg import Markup, Point, element, scatter, text
from tersor.report.tables import (
    choice_table,
    comparison_table,
    layer_table,
    loss,
    quality_table,
    run_table,
    scheme_table,
    table,
    task_table,
)
from tersor.report.words import times

_SPREAD = 30.0
"""Ratio of the largest loss to the smallest from which on losses are drawn on a logarithmic axis."""


_MOST_PAIRS = 60
"""Pairs of models whose differences all stand in a table: those of eleven models."""

_BELOW = 20.0
"""A noise floor is drawn unless the least KL is so many times as large: the axis would leave models no room."""


def page(document: dict[str, Any], title: str = "Tersor report") -> str:
    """Return a document of `report.document` as HTML.

    Args:
        document: what is shown; text in it is escaped.
        title: the heading.
    """
    made = document["environment"]
    parts = [element("h1", text(title))]
    parts.append(note(f"Tersor {made['tersor']}, commit {made['commit']}, {made['date']}; {_count(document)}."))
    for number, group in enumerate(document["quality"]):
        parts += _quality(group, number)
    if document["tasks"]:
        limited = sorted({score["limit"] for score in document["tasks"] if score["limit"]})
        parts += [element("h2", "Tasks"), note("+- is the standard error that lm-eval gives.")]
        parts += [note(f"Of the first {limit} documents of each task.") for limit in limited]
        parts.append(task_table(document["tasks"]))
    for one in document["checkpoints"]:
        parts += _checkpoint(one)
    for one in document["speed"]:
        parts += _speed(one)
    parts += [element("h2", "Runs"), run_table(document["runs"])]
    return framed(title, parts)


def _count(document: dict[str, Any]) -> str:
    runs = len(document["runs"])
    return "one run" if runs == 1 else f"{runs} runs"


def _quality(group: dict[str, Any], number: int) -> list[Markup]:
    against = f" against {group['reference']}" if group["reference"] is not None else ""
    parts = [element("h2", text(f"Quality{against}"))]
    if group["apart"]:
        parts.append(note(f"Shown apart from the models above, and not compared with them: {group['apart']}."))
    texts = f" of {', '.join(group['texts'])}" if group["texts"] else ""
    parts.append(
        note(
            f"{group['windows']} windows of {group['window']} tokens{texts}, computed on {group['computed']}; bars and "
            "+- are one standard error over windows."
        )
    )
    parts += [_pictures(group), quality_table(group)]
    if group["reference"] is not None:
        parts.append(
            note(
                "KL: KL(reference || model) in nats a token; its median is over windows, p99 over tokens. Flips: "
                "another most probable token. Loss: perplexity above the reference's, its error that of the paired "
                "difference. A KL below the noise floor says nothing."
            )
        )
    if group["comparisons"]:
        parts.append(element("h3", "Paired differences"))
        parts.append(
            note("The model's value less the other's, on the same windows, so that what makes a window hard cancels.")
        )
        shown = group["comparisons"]
        if len(shown) > _MOST_PAIRS:
            shown = _neighbours(group)
            parts.append(
                note(
                    f"Of {len(group['comparisons'])} pairs those that stand beside each other by bits a weight; --json "
                    "has all of them."
                )
            )
        parts.append(comparison_table({**group, "comparisons": shown}))
    return parts


def _neighbours(group: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the comparisons of models that follow each other when all are sorted by bits a weight."""
    ordered = sorted(group["models"], key=lambda model: model["bits_per_weight"])
    numbers = [model["number"] for model in ordered]
    pairs = [tuple(sorted(pair)) for pair in pairwise(numbers)]
    found = {(one["first"], one["other"]): one for one in group["comparisons"]}
    return [found[pair] for pair in pairs if pair in found]


def _pictures(group: dict[str, Any]) -> Markup:
    """Return pictures of bits and of size against KL and loss, or against perplexity without a reference."""
    models = group["models"]
    widths = (
        ("bits a weight", lambda model: float(model["bits_per_weight"])),
        ("size of the weights, MB", lambda model: model["weight_bytes"] / 1e6),
    )
    pictures = []
    if group["reference"] is None:
        for label, x in widths:
            points = _points(models, x, lambda model: model["perplexity"], "perplexity_error", 1)
            pictures.append(scatter(points, x_label=label, y_label="perplexity", log=False))
        return element("div", "".join(pictures), class_="plots")
    far = [model for model in models if model.get("kl", 0) > 0]
    least = min((model["kl"] for model in far), default=0.0)
    floors = [floor["kl"] for floor in group["noise_floors"] if floor["kl"] > 0]
    levels = [(1000 * floor, "noise floor") for floor in floors if floor > least / _BELOW]
    lost = [model for model in models if model.get("perplexity_ratio") is not None]
    losses = [loss(model) for model in lost]
    wide = bool(losses) and min(losses) > 0 and max(losses) > _SPREAD * min(losses)
    for label, x in widths:
        if far:
            points = _points(far, x, lambda model: 1000 * model["kl"], "kl_error", 1000)
            pictures.append(scatter(points, x_label=label, y_label="KL x 1000", log=True, levels=levels))
        if lost:
            points = _points(lost, x, loss, "perplexity_ratio_error", 100)
            zero = () if wide else ((0.0, "reference"),)
            pictures.append(scatter(points, x_label=label, y_label="loss of perplexity, %", log=wide, levels=zero))
    said = []
    if len(far) < len(models):
        said.append(note("Models with a KL of 0 are not in the pictures of KL."))
    if len(levels) < len(floors):
        said.append(note(f"A noise floor of KL x 1000 = {1000 * min(floors):.3g} is far below the pictures."))
    return Markup(element("div", "".join(pictures), class_="plots") + "".join(said))


def _points(
    models: list[dict[str, Any]],
    x: Callable[[dict[str, Any]], float],
    y: Callable[[dict[str, Any]], float],
    error: str,
    factor: float,
) -> list[Point]:
    return [
        Point(
            number=model["number"],
            label=model["label"],
            x=x(model),
            y=y(model),
            error=times(factor, model.get(error)) or 0.0,
        )
        for model in models
    ]


def _checkpoint(one: dict[str, Any]) -> list[Markup]:
    parts = [element("h2", text(f"Checkpoint {one['label']}")), choice_table(one)]
    parts += [element("h3", "Levels" if one.get("levels") else "Stored"), scheme_table(one)]
    parts.append(element("h3", "Layers"))
    known = any(layer["relative_error"] is not None for layer in one["layers"])
    if known:
        parts.append(note("Relative error: Frobenius norm of the weight's error over that of the weight."))
    else:
        parts.append(note("Errors of the weights are not known: an older Tersor compressed this checkpoint."))
    if one["calibration"] is not None:
        parts.append(
            note("Objective: the recipe's loss of the layer's outputs, rounded to nearest and, after, as written.")
        )
    if any(layer["count"] > 1 for layer in one["layers"]):
        parts.append(
            note(
                "Experts of a layer are one line, with how many there are: the mean of bits, the root of the mean "
                "square of errors, the sum of objectives."
            )
        )
    parts.append(layer_table(one))
    return parts


def _speed(one: dict[str, Any]) -> list[Markup]:
    own = one["environment"]
    said = {key: value for key, value in one["facts"].items() if isinstance(value, (str, int, float))}
    facts = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in said.items())
    parts = [element("h2", text(f"Speed: {one['kind'].removeprefix('tersor ')}, {own.get('gpu') or 'no GPU'}"))]
    parts.append(note(f"{one['run']}: {facts}" if facts else one["run"]))
    if one["method"]:
        parts.append(note(f"{one['method']}."))
    parts.append(table(one["columns"], one["rows"]))
    parts += [
        note(f"Not measured: {', '.join(str(value) for value in row.values() if value not in ('', None))}.")
        for row in one["skipped"]
        if isinstance(row, dict)
    ]
    return parts
