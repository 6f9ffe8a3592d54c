"""What became of every layer? A small file beside a checkpoint, for who reports on it: formats, bits, errors."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tersor.checkpoint.conversion import Conversion
from tersor.checkpoint.writer import write_file
from tersor.convert.report import Row

LAYERS_NAME = "tersor-layers.json"
KIND, VERSION = "tersor layers", 1
_DIGITS = 4
"""Of errors: further ones depend on the blocks in which their sums were taken, and equal weights have equal files."""


def write_layers(conversion: Conversion, rows: Iterable[Row], directory: Path) -> None:
    """Write what was measured of every compressed layer while it was compressed.

    Args:
        conversion: what became of the tensors.
        rows: of all tensors of the source.
        directory: where the checkpoint is made.

    Raises:
        OutputError: the disk is full or does not let us write.
    """
    by_name = {row.name: row for row in rows}
    layers = [
        _line(step.layer.module, by_name[step.source.spec.name])
        for step in conversion.steps
        if step.layer is not None and step.scheme is not None
    ]
    log = {"kind": KIND, "version": VERSION, "layers": layers}
    write_file(
        directory / LAYERS_NAME, (json.dumps(log, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
    )


def _line(module: str, row: Row) -> Mapping[str, Any]:
    warning = {"warning": row.warning} if row.warning else {}
    density = {} if row.density is None else {"density": row.density}
    return {
        "layer": module,
        "tensor": row.name,
        "format": row.scheme,
        "bits_per_weight": row.bits_per_weight,
        **density,
        "relative_error": None if row.relative_error is None else float(f"{row.relative_error:.{_DIGITS}g}"),
        **warning,
    }
