"""What is kept of a calibration while it runs? A file for every finished block, from which an interrupted one goes on.

A block's file holds the packed tensors of its layers and, as metadata, its part of the log. It is written whole or not
at all. Hidden states are not kept: the blocks that are finished are run again, with the same bits.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tersor import files
from tersor.checkpoint.header import TensorSpec, build, lay_out
from tersor.checkpoint.names import SAFETENSORS_DTYPES
from tersor.checkpoint.reader import SafetensorsFile
from tersor.checkpoint.writer import output_error, write_file
from tersor.convert.pipeline import Ready
from tersor.errors import InputError

LOG_NAME = "tersor-calibration.json"
_FOLDER = "calibration"
_RECORD = "record"
VALUE = "value"
"""Among the tensors of a step: all of a norm's weight, or of a bias, that a transform changed."""


class Store:
    """The folder `calibration` in the directory that an output is made in.

    Attributes:
        directory: the folder.
    """

    def __init__(self, workplace: Path) -> None:
        """Make the folder, or take up what an interrupted run left in it.

        Raises:
            OutputError: the disk does not let us write.
        """
        self.directory = self.folder(workplace)
        self._log = workplace / LOG_NAME
        self._open: dict[int, SafetensorsFile] = {}
        try:
            self.directory.mkdir(exist_ok=True)
        except OSError as error:
            raise output_error(error, self.directory) from None

    @staticmethod
    def folder(workplace: Path) -> Path:
        """Return where the folder is, or will be."""
        return workplace / _FOLDER

    @staticmethod
    def held_bytes(workplace: Path) -> int:
        """Return the bytes of what stands in the folder, if there is one."""
        return sum(path.stat().st_size for path in Store.folder(workplace).glob("*"))

    def path(self, kind: str, block: int) -> Path:
        """Return the file of a kind, such as `block`, that belongs to a block."""
        return self.directory / f"{kind}-{block:05d}.safetensors"

    def has(self, block: int) -> bool:
        """Whether a block is finished."""
        return self.path("block", block).exists()

    def finish(self, block: int, tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any]) -> None:
        """Keep a block's packed tensors and its part of the log.

        Raises:
            OutputError: the disk is full or does not let us write.
        """
        text = json.dumps(record, allow_nan=False)
        write_tensors(self.path("block", block), tensors, {_RECORD: text})

    def record(self, block: int) -> dict[str, Any]:
        """Return a finished block's part of the log.

        Raises:
            InputError: the file is not as it was written.
        """
        file = self._file(block)
        try:
            found: dict[str, Any] = json.loads(file.metadata[_RECORD])
        except (KeyError, ValueError) as error:
            raise InputError(
                f"{file.path} cannot be read ({error}): remove {self.directory.parent} and start again"
            ) from None
        return found

    def ready(self, record: Mapping[str, Any]) -> dict[int, Ready]:
        """Return the packed weights of a block by their steps; they are read when they are written."""
        block = int(record["block"])
        return {
            int(index): Ready(partial(self.tensors, block, int(index)), error, norm, tuple(underflowed))
            for index, (error, norm, underflowed) in record["steps"].items()
        }

    def tensors(self, block: int, index: int) -> dict[str, torch.Tensor]:
        """Return the packed tensors of a step of a finished block, by their own names."""
        file, start = self._file(block), f"{index}."
        return {name.removeprefix(start): file.read(name) for name in file.tensors if name.startswith(start)}

    def _file(self, block: int) -> SafetensorsFile:
        if block not in self._open:
            self._open[block] = SafetensorsFile(self.path("block", block))
        return self._open[block]

    def write_log(self, log: Mapping[str, Any]) -> None:
        """Write the log beside the checkpoint.

        Raises:
            OutputError: the disk is full or does not let us write.
        """
        write_file(self._log, (json.dumps(log, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())

    @staticmethod
    def discard(workplace: Path) -> None:
        """Remove the folder, when all of it is in the checkpoint."""
        shutil.rmtree(Store.folder(workplace), ignore_errors=True)


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str], *, durable: bool = True
) -> None:
    """Write tensors to a file whole or not at all, from the memory that they have on the host.

    Args:
        path, durable: as for `files.write_whole`.
        tensors, metadata: what the file holds.

    Raises:
        OutputError: the disk is full or does not let us write.
    """
    on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    placed = lay_out(
        TensorSpec(name, SAFETENSORS_DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in on_host.items()
    )
    parts = (on_host[spec.name].reshape(-1).view(torch.uint8).numpy().data for spec in placed if spec.numel)
    try:
        files.write_whole(path, itertools.chain([build(placed, metadata)], parts), durable=durable)
    except OSError as error:
        raise output_error(error, path) from None


def read_tensor(path: Path, name: str, out: torch.Tensor | None = None) -> torch.Tensor:
    """Read one tensor of a file that `write_tensors` wrote.

    Args:
        path: the file.
        name: of the tensor.
        out: where it goes, in one piece, of its shape and dtype; memory of its own by default.
    """
    with SafetensorsFile(path) as file:
        if out is None:
            return file.read(name)
        file.read_into(file.tensors[name], 0, out.view(-1).view(torch.uint8).numpy().data)
        return out


def remove(path: Path) -> None:
    """Remove a file that is needed no more, if it is there."""
    if path.exists():
        os.unlink(path)
