"""A checkpoint is made of another: what every conversion begins and ends with, whatever it does in between."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tersor.checkpoint.conversion import Conversion
from tersor.checkpoint.exports import Export
from tersor.checkpoint.released import Released, read_released
from tersor.checkpoint.source import Source, open_source
from tersor.convert.beside import write_beside
from tersor.convert.calibrate import discard
from tersor.convert.checks import check_apart
from tersor.convert.layers import write_layers
from tersor.convert.pipeline import Pipeline, Progress, Ready, row_of
from tersor.convert.report import Report
from tersor.convert.resume import Workplace
from tersor.version import __version__


@dataclass(frozen=True, slots=True)
class Making:
    """What a checkpoint is made of, by what, and where.

    Attributes:
        source: the checkpoint; of one that another method compressed it has the tensors that these stand for.
        released: which method that is; `None` of a plain one.
        revision: of a Hub id that was asked for.
        destination: the directory to make; `None` of a dry run.
        algorithm: what config.json and the model card call what is done.
        companions: files of the source that belong to the output, too, relative to its directory.
        device: where weights are encoded.
        progress: called with bytes done, bytes in all, and a name.
        started: when the work began, by the monotonic clock.
    """

    source: Source
    released: Released | None
    revision: str | None
    destination: Path | None
    algorithm: str
    companions: tuple[Path, ...]
    device: torch.device
    progress: Progress | None
    started: float

    @staticmethod
    @contextmanager
    def of(
        model: str | os.PathLike[str],
        revision: str | None,
        destination: Path | None,
        algorithm: str,
        device: torch.device,
        progress: Progress | None,
    ) -> Iterator[Making]:
        """Open a checkpoint as long as it is needed.

        Args:
            model: its directory, or a Hub id that is downloaded.
            revision, destination, algorithm, device, progress: as the attributes.

        Raises:
            InputError: bad options or a bad checkpoint, or one inside of which the output would lie.
        """
        started = time.monotonic()
        with open_source(model, revision) as source:
            if destination is not None:
                check_apart(source, destination)
            released = read_released(source)
            if released is not None:
                source.tensors = released.tensors
            companions = tuple(source.companions())
            yield Making(source, released, revision, destination, algorithm, companions, device, progress, started)

    @property
    def provenance(self) -> dict[str, str]:
        """What config.json says of how the output was made."""
        return {
            "tersor": __version__,
            "algorithm": self.algorithm,
            "source": self.source.label,
            **({"source_revision": self.revision} if self.revision is not None else {}),
            **({"source_method": self.released.method} if self.released is not None else {}),
        }

    def identity(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the output depends on, as JSON values, beside what only this kind of conversion knows."""
        return {
            "tersor": __version__,
            "model": self.source.label,
            "algorithm": self.algorithm,
            **own,
            "source's compression": dict(self.released.settings) if self.released is not None else None,
            "weights": self.source.fingerprint(),
        }

    def planned(self, conversion: Conversion, export: Export) -> Report:
        """Return what would be written."""
        return Report(
            source=self.source.label,
            output=None,
            scheme=conversion.config.scheme.key(),
            export=export.name,
            rows=tuple(row_of(step) for step in conversion.steps),
            files=tuple(name for name, _ in conversion.shards),
            seconds=time.monotonic() - self.started,
            source_method=self.released.method if self.released is not None else "",
        )

    def write(
        self,
        conversion: Conversion,
        export: Export,
        work: Workplace,
        rounding: str,
        ready: Mapping[int, Ready] | None = None,
    ) -> Report:
        """Write what is not there yet, and what belongs beside it, give the directory its name, and say what was done.

        Args:
            conversion: what becomes of every tensor.
            export: whose names and metadata the output has.
            work: where it is made.
            rounding: how codes are chosen of what is not ready, a key of `compress.RECIPES`.
            ready: number of a step -> its weight, where that is compressed already.

        Raises:
            InputError: a weight holds a NaN or an infinity, or the source cannot be read.
            OutputError: the output cannot be written.
        """
        names, first = [name for name, _ in conversion.shards], len(work.rows)
        pipeline = Pipeline(conversion, rounding, work.directory, self.device, self.progress, ready)
        streaming = time.monotonic()
        pipeline.run(first, lambda number, rows: work.finished(rows, names[: number + 1]))
        stream_seconds = time.monotonic() - streaming
        write_beside(self.source, conversion, export, self.algorithm, self.companions, work.directory)
        write_layers(conversion, (row for rows in work.rows for row in rows), work.directory)
        work.publish()
        discard(work.output)  # takes a while: whoever is killed meanwhile has all of the output
        done = {row.name: row for rows in work.rows for row in rows}
        skipped = {index for _, indices in conversion.shards[:first] for index in indices}
        read = [step.source.nbytes for index, step in enumerate(conversion.steps) if index not in skipped]
        return replace(
            self.planned(conversion, export),
            output=str(self.destination),
            rows=tuple(done[step.source.spec.name] for step in conversion.steps),
            stream_seconds=stream_seconds,
            bytes_read=sum(read),
        )
