"""What stands in the tables of a report? Headings and cells, made of its document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tersor.compress.salience import KL
from tersor.formats import LUTS
from tersor.report.svg import Markup, bar, element, text
from tersor.report.words import measured, plus_minus, size, times

_SHOWN = ("commit", "tersor", "torch", "cuda", "driver", "gpu", "date")
"""Of an environment, in this order; what else is there comes behind."""


_OF_CALIBRATION = {
    "computed_on": "calibrated by",
    "seconds": "seconds of calibration",
    "rarely_hit_experts": "rarely hit experts",
    "rounded_to_nearest": "rounded to nearest",
}
"""Field of a calibration's log -> what it is called; config.json says the rest."""


_OF_LOSSES = {
    "loss": "expected loss",
    "loss_without_units": "if kernels took single rows",
    "loss_without_pairs_and_units": "if gate and up might differ, too",
}
"""Loss that a mix expects -> what it is called."""


def table(headings: Sequence[object], rows: Sequence[Sequence[object]], words: int = 1) -> Markup:
    """Return a table; the first `words` columns are to the left, the others to the right."""
    if not rows:
        return Markup("")

    def cells(name: str, row: Sequence[object]) -> str:
        return "".join(
            element(name, text("" if cell is None else cell), **({} if index < words else {"class_": "right"}))
            for index, cell in enumerate(row)
        )

    head = element("thead", element("tr", cells("th", headings)))
    body = element("tbody", "".join(element("tr", cells("td", row)) for row in rows))
    return element("div", element("table", head + body), class_="wide")


def quality_table(group: dict[str, Any]) -> Markup:
    """Return what was measured of every model, its reference and the noise floors of a group."""
    compared = group["reference"] is not None
    headings = ["", "model", "bits a weight", "size", "perplexity"]
    more = ["loss, %", "KL x 1000", "median", "p99", "flips, %"] if compared else []
    rows = [_model(model["number"], model, compared) for model in group["models"]]
    if group["reference_model"] is not None and all(model.get("kl") != 0 for model in group["models"]):
        rows.insert(0, _model("", group["reference_model"], compared))
    rows += [
        ["", f"noise floor: the reference with {floor['rounding']} ({floor['run']})", "", "", *_values(floor, compared)]
        for floor in group["noise_floors"]
    ]
    return table([*headings, *more], rows, 2)


def _model(number: object, model: dict[str, Any], compared: bool) -> list[object]:
    stored = [f"{model['bits_per_weight']:.3f}", size(model["weight_bytes"])]
    return [number, _way(model), *stored, *_values(model, compared)]


def _way(model: dict[str, Any]) -> str:
    """Return a model's label, with its way of running where the label does not say it."""
    label = str(model["label"])
    said = [
        f"{name}={model[key]}"
        for key, name, plain in (("activations", "activations", "16bit"), ("kv_dtype", "kv-dtype", None))
        if model.get(key, plain) not in (plain, None) and f"{name}={model[key]}" not in label
    ]
    return f"{label} ({', '.join(said)})" if said else label


def _values(model: dict[str, Any], compared: bool) -> list[object]:
    perplexity = plus_minus(model.get("perplexity"), model.get("perplexity_error"), 3)
    if not compared:
        return [perplexity]
    return [perplexity, *([""] * 5 if model.get("kl") is None else beside_reference(model))]


def beside_reference(model: dict[str, Any]) -> list[str]:
    """Return loss, KL, its median and 99th percentile, and flips of a model that was compared with a reference."""
    lost = None if model.get("perplexity_ratio") is None else loss(model)
    return [
        measured(lost, times(100, model.get("perplexity_ratio_error")), sign=True),
        measured(times(1000, model.get("kl")), times(1000, model.get("kl_error"))),
        measured(times(1000, model.get("kl_median"))),
        measured(times(1000, model.get("kl_p99"))),
        measured(times(100, model.get("flips")), times(100, model.get("flips_error"))),
    ]


def loss(model: dict[str, Any]) -> float:
    """Return how far the perplexity is above the reference's, in per cent."""
    return 100 * (float(model["perplexity_ratio"]) - 1)


def comparison_table(group: dict[str, Any]) -> Markup:
    """Return the paired differences of every two models of a group."""
    labels = {model["number"]: f"{model['number']} {model['label']}" for model in group["models"]}
    compared = any("kl_difference" in found for found in group["comparisons"])
    headings = ["model", "against", "log perplexity", "worse in windows"]
    rows: list[list[object]] = []
    for found in group["comparisons"]:
        gap, error = found["log_perplexity_difference"], found.get("log_perplexity_difference_error")
        row: list[object] = [labels[found["other"]], labels[found["first"]], measured(gap, error, sign=True)]
        row.append(f"{found['log_perplexity_better']} of {found['windows']}")
        if "kl_difference" in found:
            gap, error = 1000 * found["kl_difference"], times(1000, found.get("kl_difference_error"))
            row += [measured(gap, error, sign=True), f"{found['kl_better']} of {found['windows']}"]
        rows.append(row)
    return table([*headings, *(["KL x 1000", "farther in windows"] if compared else [])], rows, 2)


def task_table(tasks: Sequence[dict[str, Any]]) -> Markup:
    """Return what models reached at tasks."""
    rows = [
        [
            score["label"],
            score["task"],
            score["metric"],
            score["run"],
            score.get("documents"),
            measured(score.get("value"), score.get("error")),
        ]
        for score in tasks
    ]
    return table(["model", "task", "metric", "run", "documents", "value"], rows, 4)


def choice_table(one: dict[str, Any]) -> Markup:
    """Return what was chosen for a checkpoint, and why it is what it is."""
    rows: list[list[object]] = [["codes", one["recipe"]]]
    said = dict(one.get("provenance", {}))
    rows += [[str(key).replace("_", " "), value] for key, value in said.items() if key != "algorithm"]
    calibration = one["calibration"] or {}
    rows += [[words, _words(calibration[key])] for key, words in _OF_CALIBRATION.items() if calibration.get(key)]
    rows += [["format", _scheme(one)]]
    rows += [["level", _scheme(level)] for level in one.get("levels", ())]
    rows += [[words, value] for words, value in _mix(one["mix"] or {})]
    rows += [["override", f"{pattern} = {_scheme(scheme)}"] for pattern, scheme in one.get("overrides", {}).items()]
    rows += [["ignored", pattern] for pattern in one.get("ignore", ())]
    stored = (
        f"{one['parameters'] / 1e6:,.1f} M elements in {size(one['bytes'])}, {one['bits_per_weight']:.3f} bits each"
    )
    bits = one["compressed_bits_per_weight"]
    if bits is not None:
        stored += f"; {bits:.3f} in the {one['compressed']} compressed weights"
    return table(["", one["architecture"]], [*rows, ["stored", stored]], 2)


def _mix(said: dict[str, Any]) -> list[tuple[str, str]]:
    """Return how a budget of bytes was spent."""
    pairs = zip(said.get("levels", ()), said.get("shares", ()), strict=True)
    rows = [("of all output features", ", ".join(f"{share:.1%} at {level}" for level, share in pairs))] if said else []
    if "padding_bytes" in said:
        rows.append(("to fill units of kernels", size(said["padding_bytes"])))
    if "predicted_seconds" in said:
        of = said.get("predicted_for", "a step")
        rows.append((f"predicted for the linears of {of}", f"{1e3 * said['predicted_seconds']:.4g} ms"))
    by = said.get("score", KL)
    if by != KL:
        rows.append(("compared by the score", str(by)))
    unit = "nats a token" if by == KL else "by that score"
    return rows + [(words, f"{said[key]:.4g} {unit}") for key, words in _OF_LOSSES.items() if key in said]


def _scheme(said: dict[str, Any]) -> str:
    if "scale_dtype" not in said and "group_size" not in said:
        return str(said.get("format"))
    group = said.get("group_size")
    shared = "table" if said.get("format") in LUTS else "scale"
    return f"{said.get('format')}, one {said.get('scale_dtype')} {shared} a {f'group of {group}' if group else 'row'}"


def _words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def scheme_table(one: dict[str, Any]) -> Markup:
    """Return how much of a checkpoint is stored how; levels of mixed weights stand below them."""
    total = sum(row["elements"] for row in one["schemes"] if row["tensors"])
    rows = [
        [
            row["scheme"],
            bar(row["elements"] / max(1, total), f"{row['elements'] / max(1, total):.1%} of all elements"),
            f"{row['elements'] / 1e6:,.2f} M",
            row["tensors"],
            row["output_features"],
            None if row["bytes"] is None else size(row["bytes"]),
        ]
        for row in sorted(one["schemes"], key=lambda row: (not row["compressed"], row["output_features"] is not None))
    ]
    return table(["stored as", "share", "elements", "tensors", "output features", "size"], rows, 2)


def layer_table(one: dict[str, Any]) -> Markup:
    """Return bits, errors and objectives of every compressed layer, with bars."""
    layers = one["layers"]
    most_bits = max((layer["bits_per_weight"] for layer in layers), default=0.0)
    most_error = max((layer["relative_error"] or 0.0 for layer in layers), default=0.0)
    calibrated = any(layer["objective_after"] is not None for layer in layers)
    headings = ["layer", "format", "bits a weight", "", "size", "relative error", ""]
    more = ["objective before", "after", "left", ""] if calibrated else []
    rows = [_layer(layer, most_bits, most_error, calibrated) for layer in layers]
    return table([*headings, *more], rows, 2)


def _layer(layer: dict[str, Any], most_bits: float, most_error: float, calibrated: bool) -> list[object]:
    name = layer["layer"] if layer["count"] == 1 else f"{layer['layer']} ({layer['count']})"
    levels = ", ".join(f"{features} of {scheme}" for scheme, features in layer["levels"])
    bits, error = layer["bits_per_weight"], layer["relative_error"]
    cells: list[object] = [name + (f": {layer['warning']}" if layer["warning"] else "")]
    cells += [f"{layer['format']} ({levels})" if levels else layer["format"], f"{bits:.3f}"]
    cells += [bar(bits / most_bits if most_bits else 0.0, f"{bits:.3f} bits a weight"), size(layer["bytes"])]
    if error is None:
        cells += ["-", ""]
    else:
        share = error / most_error if most_error else 0.0
        cells += [f"{100 * error:.3g} %", bar(share, f"relative error {error:.4g}", "bar worse")]
    if not calibrated:
        return cells
    before, after = layer["objective_before"], layer["objective_after"]
    if before is None or after is None:
        return [*cells, "-", "-", "-", ""]
    left = after / before if before else 1.0
    words = f"{left:.1%} of the objective of rounding to nearest"
    return [*cells, f"{before:.4g}", f"{after:.4g}", f"{left:.1%}", bar(left, words, "bar kept")]


def run_table(runs: Sequence[dict[str, Any]]) -> Markup:
    """Return where and when every run was measured."""
    keys = [key for key in _SHOWN if any(run["environment"].get(key) is not None for run in runs)]
    rows = []
    for run in runs:
        own = run["environment"]
        rest = ", ".join(f"{key} {value}" for key, value in own.items() if key not in _SHOWN and value is not None)
        rows.append([run["run"], run["kind"], *(own.get(key) for key in keys), rest])
    return table(["run", "kind", *keys, "more"], rows, len(keys) + 3)
