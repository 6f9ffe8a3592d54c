"""Print the README's table of measured times from a results file of `tersor bench linear`, `experts` or `latency`.

    python bench/readme_table.py [RESULTS.json]

Without a name bench/results/linear_h200.json is read. README.md holds the output between two markers; a test compares
them.
"""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results" / "linear_h200.json"
FORMAT = "fp6_e3m2"
SHAPES = ((8192, 8192), (57344, 8192))
TOKENS = (1, 16, 64, 256, 1024)
OURS = (FORMAT, "pdl")
OURS_A8 = (f"{FORMAT}:a8", "pdl")
CUBLAS = ("cublas", "plain")
COLUMNS = {
    OURS: f"Tersor {FORMAT}",
    (FORMAT, "plain"): "plain launches",
    CUBLAS: "cuBLAS FP16",
    (f"humming {FORMAT}", "plain"): "humming",
    OURS_A8: "Tersor a8",
    (f"humming {FORMAT}:a8", "plain"): "humming a8",
    ("fp8", "plain"): "cuBLAS FP8",
}
"""(Kernel, chain) in the results -> heading, in the order of the table; what was not measured has no column."""


BESIDE = {"latency_h200.json": "latency_vllm_h200.json"}
"""Results file -> that of other engines, measured by the same verb in a run of its own, for the same table."""

EXPERTS_TOKENS = (1, 8, 32, 64, 512, 2048, 8192)
EXPERTS_RIVALS = {"torch": "torch bfloat16", f"humming {FORMAT}": "humming"}


def read(path: Path) -> dict[str, Any]:
    """Return what a results file holds, with the rows of the file that stands beside it and, as `beside`, its facts."""
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if path.name in BESIDE:
        other = json.loads((path.parent / BESIDE[path.name]).read_text(encoding="utf-8"))
        result["rows"] += other["rows"]
        result["beside"] = {"name": BESIDE[path.name], **other["environment"]}
    return result


def table(result: dict[str, Any], name: str) -> str:
    """Return the table of a results file in Markdown.

    Args:
        result: what the verb wrote, as `read` returns it.
        name: the results file, which the caption names.
    """
    tables = {"tersor bench experts": experts_table, "tersor bench latency": latency_table}
    return tables.get(result.get("kind", ""), linear_table)(result, name)


def latency_table(result: dict[str, Any], name: str) -> str:
    """Return the table of decode steps of whole models: milliseconds a step."""
    times = {(row["name"], row["context"], row["batch"], row["format"]): row for row in result["rows"]}
    cells = [key[:3] for key in times if key[3] == FORMAT]
    rivals = list(dict.fromkeys(key[3] for key in times if key[3] != FORMAT))
    heads = ["model", "context", "rows", f"Tersor {FORMAT}", *rivals, "tokens a second", "read time"]
    facts = result["environment"]
    caption = (
        f"A decode step of a whole model, all of its linears and the head in {FORMAT}, random weights, milliseconds on "
        f"one {facts['gpu']}, torch {facts['torch']}, commit {facts['commit']} (`bench/results/{name}`). Read time: "
        f"the bytes of weights, keys and values over the {result['read_bandwidth'] / 1e12:.2f} TB/s of a large read."
    )
    if beside := result.get("beside"):
        caption += (
            f" vLLM {beside['vllm']} in a run of its own with the same verb (`bench/results/{beside['name']}`, "
            f"commit {beside['commit']}), its output head in 16 bits."
        )
    lines = [
        *textwrap.wrap(caption, 120),
        "",
        "| " + " | ".join(heads) + " |",
        "|" + "---|" * len(heads),
    ]
    for model, context, batch in cells:
        found = [times.get((model, context, batch, kind)) for kind in (FORMAT, *rivals)]
        ours = times[model, context, batch, FORMAT]
        least = (ours["weight_bytes"] + ours["kv_bytes"]) / result["read_bandwidth"] * 1e3
        cells_of_row = [
            model,
            str(context),
            str(batch),
            *("-" if row is None else f"{row['milliseconds']:.2f}" for row in found),
            f"{batch / ours['milliseconds'] * 1e3:.0f}",
            f"{least:.2f}",
        ]
        lines.append("| " + " | ".join(cells_of_row) + " |")
    return "\n".join(lines)


def experts_table(result: dict[str, Any], name: str) -> str:
    """Return the table of layers of experts: microseconds a call, from the router's logits to the output."""
    best: dict[tuple[str, int, str], dict[str, Any]] = {}
    for row in result["rows"]:
        key = (row["name"], row["n"], row["kernel"])
        if key not in best or row["microseconds"] < best[key]["microseconds"]:
            best[key] = row
    models = dict.fromkeys(row["name"] for row in result["rows"])
    cells = [(model, n) for model in models for n in EXPERTS_TOKENS if (model, n, FORMAT) in best]
    rivals = {kernel: text for kernel, text in EXPERTS_RIVALS.items() if any((*cell, kernel) in best for cell in cells)}
    heads = ["experts", "tokens", "hit", f"Tersor {FORMAT}", *rivals.values(), "against torch", "read time"]
    facts = result["environment"]
    caption = (
        f"A layer of experts from the router's logits to the output, random routing, microseconds a call on one "
        f"{facts['gpu']}, torch {facts['torch']}, commit {facts['commit']} (`bench/results/{name}`). Hit: experts that "
        "some token goes to, whose packed bytes are read in the read time."
    )
    lines = [
        *textwrap.wrap(caption, 120),
        "",
        "| " + " | ".join(heads) + " |",
        "|" + "---|" * len(heads),
    ]
    for model, n in cells:
        ours, found = best[model, n, FORMAT], {kernel: best.get((model, n, kernel)) for kernel in rivals}
        torch = found.get("torch")
        cells_of_row = [
            model,
            str(n),
            f"{ours['experts_hit']:.0f}",
            f"{ours['microseconds']:.1f}",
            *("-" if row is None else f"{row['microseconds']:.1f}" for row in found.values()),
            "-" if torch is None else f"{torch['microseconds'] / ours['microseconds']:.2f}x",
            f"{ours['hit_bytes'] / result['read_bandwidth'] * 1e6:.1f}",
        ]
        lines.append("| " + " | ".join(cells_of_row) + " |")
    return "\n".join(lines)


def linear_table(result: dict[str, Any], name: str) -> str:
    """Return the table of linears: microseconds a call, and how many times cuBLAS FP16's speed that is.

    Args:
        result, name: as in `table`.
    """
    rows = {(row["oc"], row["ic"], row["n"], row["kernel"], row["chain"]): row for row in result["rows"]}
    grid = [(*shape, tokens) for shape in SHAPES for tokens in TOKENS]
    problems = [problem for problem in grid if {(*problem, *OURS), (*problem, *CUBLAS)} <= rows.keys()]
    columns = {key: text for key, text in COLUMNS.items() if any((*problem, *key) in rows for problem in problems)}
    heads = ["weight", "tokens", *columns.values(), "against cuBLAS", "read time"]
    facts = result["environment"]
    caption = (
        f"Microseconds a call on one {facts['gpu']}, torch {facts['torch']}, CUDA {facts['cuda']}, commit "
        f"{facts['commit']} (`bench/results/{name}`). Read time: the packed bytes over the "
        f"{result['read_bandwidth'] / 1e12:.2f} TB/s that a large read reached in the same run."
    )
    if OURS_A8 in columns:
        caption += " a8: 8-bit activations, their quantising included, where cuBLAS FP8 finds them quantised."
    lines = [
        *textwrap.wrap(caption, 120),
        "",
        "| " + " | ".join(heads) + " |",
        "|" + "---|" * len(heads),
    ]
    for problem in problems:
        found = {key: rows.get((*problem, *key)) for key in columns}
        ours, theirs = rows[(*problem, *OURS)], rows[(*problem, *CUBLAS)]
        roof = ours["weight_bytes"] / result["read_bandwidth"] * 1e6
        oc, ic, n = problem
        cells = [
            f"{oc} x {ic}",
            str(n),
            *("-" if row is None else f"{row['microseconds']:.1f}" for row in found.values()),
            f"{theirs['microseconds'] / ours['microseconds']:.2f}x",
            f"{roof:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print the table of the file named."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    if not path.is_file():
        raise SystemExit(f"no {path}: run `make bench` on a GPU")
    print(table(read(path), path.name))


if __name__ == "__main__":
    main()
