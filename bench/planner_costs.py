"""How well are decode steps predicted that were measured on one H200? The planner's costs against `latency_h200*.json`.

`python bench/planner_costs.py` prints a line for every measured step and the mean error of every model; with `--write`
it makes the table of docs/planning.md of them instead. Constants of
`tersor.planner.cost` are fitted to the rows of Llama-3-8B with keys and values in 16 bits and of OPT-30B in FP6; those
of Llama-2-70B, of e4m3 keys and values, of 16-bit weights and of experts are predicted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import results_file
import torch

from tersor.checkpoint.config import parse_scheme
from tersor.hardware import chip_named
from tersor.models.parts import model_of
from tersor.planner import links
from tersor.planner.asked import Asked
from tersor.planner.choose import plan
from tersor.planner.cost import Kernels
from tersor.planner.mesh import Mesh
from tersor.planner.parts import Workload

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "planning.md"


def steps() -> Iterator[tuple[str, dict[str, Any], float]]:
    """Yield every measured step with 16-bit activations: its file, its row, and the milliseconds predicted.

    Results of pruned weights and of layers that stream are left out, of which there are no plans, and those of several
    GPUs (`planner_measured.py`).
    """
    chip = chip_named("h200")
    for path in sorted(RESULTS.glob("latency_h200*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        alone = "placement" not in found and found["activations"] == "16bit"
        if alone and not any(_unplanned(row) for row in found["rows"]):
            for row in found["rows"]:
                yield path.stem, row | {"kv_dtype": found["kv_dtype"]}, predicted(row, found, chip) * 1e3


def _unplanned(row: dict[str, Any]) -> bool:
    return ":s" in row["format"] or row.get("streamed_bytes", 0) > 0


def predicted(row: dict[str, Any], found: dict[str, Any], chip: Any) -> float:
    """Return the seconds that the planner predicts of a measured step."""
    scheme = None if row["format"] == "16bit" else parse_scheme(row["format"], None, None, "format")
    workload = Workload(
        batch=row["batch"],
        context=row["context"],
        prompt=1,
        kv_bytes=1 if found["kv_dtype"] == "fp8" else 2,
        phases=("decode",),
    )
    kernels = Kernels(chip, torch.float16)
    asked = Asked(model_of(row["name"], scheme), Mesh((1,)), workload, kernels, links.of_chip(chip))
    return plan(asked).passes["decode"]


def table(found: Sequence[tuple[str, dict[str, Any], float]]) -> str:
    """Return the table of measured steps: how far off the predictions of each model and length of text are, by rows."""
    lines = [
        "| model, weights | keys, values | tokens | rows: measured ms, error of the predicted | mean error |",
        "|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, ...], list[tuple[dict[str, Any], float]]] = {}
    for name, row, milliseconds in found:
        kv = "fp8" if row["kv_dtype"] == "fp8" else "16 bits"
        key = name, f"{row['name']} {row['format']}", kv, str(row["context"])
        groups.setdefault(key, []).append((row, milliseconds / row["milliseconds"] - 1))
    for (_, *words), own in groups.items():
        cells = [f"{row['batch']}: {row['milliseconds']:.2f} {100 * error:+.1f} %" for row, error in own]
        mean = 100 * sum(abs(error) for _, error in own) / len(own)
        lines.append(f"| {' | '.join(words)} | {', '.join(cells)} | {mean:.1f} % |")
    every = [abs(error) for own in groups.values() for _, error in own]
    lines.append(f"| all | | | {len(every)} steps | {100 * sum(every) / len(every):.1f} % |")
    return "\n".join(lines)


def page(text: str, found: Sequence[tuple[str, dict[str, Any], float]]) -> str:
    """Return a page with that table between its marks."""
    return results_file.marked(text, "measured", table(found))


def main() -> None:
    """Print all rows, and the mean error of every model; or write the page."""
    if results_file.rewrote(__doc__, PAGE, lambda text: page(text, list(steps()))):
        return
    errors: dict[str, list[float]] = {}
    print("file | model | format | kv | rows | context | measured ms | predicted ms | error")
    for name, row, milliseconds in steps():
        error = milliseconds / row["milliseconds"] - 1
        errors.setdefault(f"{row['name']} {row['format']}", []).append(abs(error))
        print(
            f"{name} | {row['name']} | {row['format']} | {row['kv_dtype']} | {row['batch']} | {row['context']} | "
            f"{row['milliseconds']:.3f} | {milliseconds:.3f} | {100 * error:+.1f} %"
        )
    for name, own in errors.items():
        print(f"{name}: {len(own)} steps, mean error {100 * sum(own) / len(own):.1f} %, largest {100 * max(own):.1f} %")


if __name__ == "__main__":
    main()
