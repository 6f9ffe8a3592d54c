"""What came of a compression: a row a tensor, and the totals."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor of the source.

    Attributes:
        name: the tensor's name in the source.
        shape: the tensor's shape in the source.
        dtype: the tensor's safetensors dtype in the source; that of a compressed source's weight is the model's.
        scheme: key of the scheme that it was compressed to, such as `fp6_e3m2:row:float16`, or `None`.
        bits_per_weight: bits stored for each element, scales counted.
        bytes_before, bytes_after: sizes on disk.
        relative_error: Frobenius norm of the error over that of the weight; `None` where nothing was compressed (yet).
        note: why the tensor was left alone, where that is worth a word.
        linear: whether the tensor is the weight of a linear layer, or of the experts of a layer.
        warning: what came out badly though it was compressed, and what helps.
        density: which part of the weights is left, where the weight is stored sparse.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    scheme: str | None
    bits_per_weight: float
    bytes_before: int
    bytes_after: int
    relative_error: float | None = None
    note: str = ""
    linear: bool = False
    warning: str = ""
    density: float | None = None

    @staticmethod
    def from_dict(raw: dict[str, Any]) -> Row:
        """Return the row that `raw` is: `dataclasses.asdict` of one, through JSON."""
        return Row(**{**raw, "shape": tuple(raw["shape"])})


@dataclass(frozen=True, slots=True)
class Left:
    """Tensors that were left as they are for one reason.

    Attributes:
        reason: in words.
        tensors: how many.
        nbytes: their bytes.
        example: name of one of them.
    """

    reason: str
    tensors: int
    nbytes: int
    example: str


@dataclass(frozen=True, slots=True)
class Report:
    """What a compression did, or would do.

    Attributes:
        source, output: the model and the directory written; output is `None` for a dry run.
        scheme: key of the scheme asked for.
        export: the checkpoint format.
        rows: one row for each tensor.
        files: names of the safetensors files written.
        seconds: time taken by this run.
        stream_seconds: the part of `seconds` in which weights were read, encoded and written.
        bytes_read: bytes of weights read in this run (less than all of them after a resume).
        source_method: what the source was compressed by, such as `fp8`, and decoded from; empty for a plain one.
        mix: of a target, what was chosen and what it takes and loses (`convert.mix.Mixing.to_dict`).
        dead_units: layer -> how many of its input units never fire on the calibration text; `None` where nobody asked.
    """

    source: str
    output: str | None
    scheme: str
    export: str
    rows: tuple[Row, ...]
    files: tuple[str, ...] = ()
    seconds: float = 0.0
    stream_seconds: float = 0.0
    bytes_read: int = 0
    source_method: str = ""
    mix: dict[str, Any] | None = None
    dead_units: Mapping[str, int] | None = None

    @property
    def compressed(self) -> tuple[Row, ...]:
        """The rows of compressed tensors."""
        return tuple(row for row in self.rows if row.scheme is not None)

    @property
    def linear_share(self) -> float:
        """The share of the elements of linear weights that was compressed; 1 where there are none."""
        sizes = [(math.prod(row.shape), row.scheme is not None) for row in self.rows if row.linear]
        total = sum(size for size, _ in sizes)
        return sum(size for size, done in sizes if done) / total if total else 1.0

    @property
    def mostly_left(self) -> bool:
        """Whether less than half of the linear weights was compressed: a user has to hear of it."""
        return self.linear_share < 0.5

    @property
    def left(self) -> tuple[Left, ...]:
        """What was left as it is, by reason, the most bytes first."""
        rows: dict[str, list[Row]] = {}
        for row in self.rows:
            if row.scheme is None:
                rows.setdefault(row.note or "norms, biases and the like", []).append(row)
        found = [
            Left(reason, len(members), sum(row.bytes_after for row in members), members[0].name)
            for reason, members in rows.items()
        ]
        return tuple(sorted(found, key=lambda left: -left.nbytes))

    @property
    def bits_per_weight(self) -> float:
        """Mean bits stored for an element of the compressed tensors, scales counted."""
        return mean_bits(self.compressed)

    @property
    def bytes_before(self) -> int:
        """Bytes of all tensors of the source."""
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        """Bytes of all tensors of the output."""
        return sum(row.bytes_after for row in self.rows)

    @property
    def worst(self) -> Row | None:
        """The row with the largest relative error; `None` for a dry run."""
        measured = [row for row in self.rows if row.relative_error is not None]
        return max(measured, key=lambda row: row.relative_error or 0.0, default=None)

    @property
    def warnings(self) -> tuple[str, ...]:
        """One line for every tensor that came out badly, with its name."""
        return tuple(f"{row.name}: {row.warning}" for row in self.rows if row.warning)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        worst = self.worst
        return {
            "source": self.source,
            "source_method": self.source_method or None,
            "output": self.output,
            "scheme": self.scheme,
            "export": self.export,
            "tensors": len(self.rows),
            "compressed": len(self.compressed),
            "linear_share": self.linear_share,
            "left": [dataclasses.asdict(left) for left in self.left],
            "bits_per_weight": self.bits_per_weight,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "worst_relative_error": worst.relative_error if worst else None,
            "worst_tensor": worst.name if worst else None,
            "warnings": list(self.warnings),
            **({"dead_units": dict(self.dead_units)} if self.dead_units is not None else {}),
            "files": list(self.files),
            "seconds": self.seconds,
            "stream_seconds": self.stream_seconds,
            "bytes_read": self.bytes_read,
            **({"mix": {key: own for key, own in self.mix.items() if key != "layers"}} if self.mix else {}),
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }


def mean_bits(rows: Sequence[Row]) -> float:
    """Return the mean bits stored for an element over all rows, 0 where there is none."""
    elements = sum(math.prod(row.shape) for row in rows)
    return sum(row.bits_per_weight * math.prod(row.shape) for row in rows) / elements if elements else 0.0
