"""Print the README's table of measured times from a results file of bench/linear.py.

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
TOKENS = (1, 16, 64)
COLUMNS = {FORMAT: f"Tersor {FORMAT}", "cublas": "cuBLAS FP16", "fp8": "FP8", f"humming {FORMAT}": f"humming {FORMAT}"}
"""Contender in the results -> heading, in the order of the table; one that was not measured has no column."""


def table(result: dict[str, Any], name: str) -> str:
    """Return the table in Markdown: microseconds a call, and how many times cuBLAS FP16's speed that is.

    Args:
        result: what bench/linear.py wrote.
        name: the results file, which the caption names.
    """
    rows = [
        row
        for shape in SHAPES
        for tokens in TOKENS
        for row in result["rows"]
        if (row["oc"], row["ic"]) == shape and row["n"] == tokens
    ]
    columns = {key: heading for key, heading in COLUMNS.items() if any(key in row for row in rows)}
    roof = f"roof {FORMAT}"
    heads = ["weight", "tokens", *columns.values(), "against cuBLAS", "read time"]
    facts = result["environment"]
    caption = (
        f"Microseconds a call on one {facts['gpu']}, torch {facts['torch']}, CUDA {facts['cuda']}, commit "
        f"{facts['commit']} (`bench/results/{name}`). Read time: the packed bytes over the "
        f"{result['read_bandwidth'] / 1e12:.2f} TB/s that a large read reached in the same run."
    )
    lines = [
        *textwrap.wrap(caption, 120),
        "",
        "| " + " | ".join(heads) + " |",
        "|" + "---|" * len(heads),
    ]
    for row in rows:
        times = [f"{row[key]:.1f}" if key in row else "-" for key in columns]
        ratio = f"{row['cublas'] / row[FORMAT]:.2f}x"
        cells = [f"{row['oc']} x {row['ic']}", str(row["n"]), *times, ratio, f"{row[roof]:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print the table of the file named."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    if not path.is_file():
        raise SystemExit(f"no {path}: run `make bench` on a GPU")
    print(table(json.loads(path.read_text()), path.name))


if __name__ == "__main__":
    main()
