"""What does another program load of a model without weights? A checkpoint of random ones, which is there for a while.

Who asks for one tensor after the other is given them, and has no file.

They are the numbers of `models.random`, since what a program multiplies is part of its time: where activations vanish,
a GPU at its power limit computes products 10 to 15 % faster than a model's.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from math import prod
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from tersor.checkpoint.source import CONFIG_NAME, INDEX_NAME, QUANTIZATION_KEYS
from tersor.errors import OutputError
from tersor.formats.dtypes import dtype_name
from tersor.hardware import resolve_device
from tersor.models.architectures import model_type
from tersor.models.config import DecoderConfig
from tersor.models.expected import Expected, plain_name, stored_shape
from tersor.models.names import NAMES
from tersor.models.random import Draws

MEMORY = Path("/dev/shm")
"""Where Linux has files in memory."""
_MEMORY_LEFT, _DISK_LEFT = 8 << 30, 1 << 30
"""Bytes of the machine's memory, and of any folder, that whoever loads the checkpoint has for itself."""


def described(config: Mapping[str, Any], context: int) -> dict[str, Any]:
    """Return a config.json that transformers and vLLM read as Tersor reads this one, for plain weights.

    Args:
        config: config.json, which need not name its type.
        context: tokens of a text that the model must have positions for.
    """
    read = DecoderConfig.from_dict(config)
    return {
        **{name: value for name, value in config.items() if name not in QUANTIZATION_KEYS},
        "architectures": [read.architecture],
        "model_type": model_type(config),
        "max_position_embeddings": max(read.context, context),
    }


def write(config: Mapping[str, Any], context: int, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
    """Write a checkpoint of random weights: a file for each layer, and one for the rest.

    Args:
        config, context: as of `described`.
        folder: that is there, and empty.
        dtype: of all tensors.
        device: that draws the numbers, a tensor at a time; the tensors of a file are in the machine's memory together.

    Raises:
        OutputError: a file cannot be written.
    """
    raw = described(config, context)
    read, expected, made = _made(raw, device)
    names = NAMES[read.architecture]
    files: dict[str, list[str]] = defaultdict(list)
    layer = names.base + names.layer.partition("{layer}")[0]
    for name in made:
        part = name.removeprefix(layer).partition(".")[0] if name.startswith(layer) else "rest"
        files[f"model-{part}.safetensors"].append(name)
    index = {
        "metadata": {"total_size": _bytes(expected, dtype)},
        "weight_map": {name: file for file, inside in files.items() for name in inside},
    }
    try:
        for file, inside in files.items():
            save_file({name: made[name]().to(dtype).cpu() for name in inside}, folder / file, {"format": "pt"})
        (folder / INDEX_NAME).write_text(json.dumps(index), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write random weights to {folder}: {error}") from None
    config_alone(config, context, folder, dtype)


def tensors(
    config: Mapping[str, Any], context: int, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and tensor of random weights, on their device, each made when it is asked for.

    Args:
        config, context: as of `described`.
        dtype: of all tensors.
        device: that draws the numbers.
    """
    _, _, made = _made(described(config, context), device)
    for name, make in made.items():
        yield name, make().to(dtype)


def config_alone(config: Mapping[str, Any], context: int, folder: Path, dtype: torch.dtype) -> None:
    """Write the config.json of a checkpoint whose weights come otherwise.

    Args:
        config, context: as of `described`.
        folder: that is there.
        dtype: of the weights.

    Raises:
        OutputError: the file cannot be written.
    """
    text = json.dumps({**described(config, context), "dtype": dtype_name(dtype)})
    try:
        (folder / CONFIG_NAME).write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write random weights to {folder}: {error}") from None


def place(config: Mapping[str, Any], context: int, dtype: torch.dtype) -> Path:
    """Return a folder that has room for a checkpoint: in memory, else the system's for temporary files.

    Args:
        config, context, dtype: as of `write`.

    Raises:
        OutputError: neither has.
    """
    read = DecoderConfig.from_dict(described(config, context))
    needed = _bytes(Expected.of(read, NAMES[read.architecture]), dtype)
    rooms = {folder: _room(folder) for folder in (MEMORY, Path(tempfile.gettempdir()))}
    for folder, room in rooms.items():
        if needed <= room:
            return folder
    found = " and ".join(f"{folder} has room for {room / 1e9:.2f} GB" for folder, room in rooms.items())
    raise OutputError(
        f"the random weights that a rival loads take {needed / 1e9:.2f} GB, and {found}: free some, or name a folder "
        "that has room in TMPDIR"
    )


@contextmanager
def temporary(config: Mapping[str, Any], context: int, dtype: torch.dtype, gpu: int | None = None) -> Iterator[Path]:
    """Have a checkpoint of random weights where there is room, and remove it at the end, however that comes about.

    Args:
        config, context, dtype: as of `write`.
        gpu: that draws the numbers, of those that torch sees; without a GPU, the CPU does.

    Raises:
        OutputError: there is no room, or a file cannot be written.
    """
    where = place(config, context, dtype)
    device = resolve_device()
    if device.type == "cuda" and gpu is not None:
        device = torch.device("cuda", gpu)
    with _ended_by_signals(), tempfile.TemporaryDirectory(prefix="tersor-random-", dir=where) as folder:
        write(config, context, Path(folder), dtype, device)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # whoever loads it has the GPU
        yield Path(folder)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Have signals that would end the process at once end it by an exception; other threads than the first cannot."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    taken = [one for one in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) == signal.SIG_DFL]
    try:
        for one in taken:
            signal.signal(one, end)
        yield
    finally:
        for one in taken:
            signal.signal(one, signal.SIG_DFL)


def _made(
    raw: Mapping[str, Any], device: torch.device
) -> tuple[DecoderConfig, Expected, dict[str, Callable[[], torch.Tensor]]]:
    """Return a model's configuration, what it expects, and name -> what makes the tensor in float32."""
    read = DecoderConfig.from_dict(raw)
    names = NAMES[read.architecture]
    expected = Expected.of(read, names)
    draws = Draws(device, 0, names.base + names.embedding)
    made: dict[str, Callable[[], torch.Tensor]] = {
        plain_name(module, shape): partial(draws.matrix, module, stored_shape(shape))
        for module, shape in expected.matrices.items()
    }
    made |= {name: partial(draws.vector, name, shape) for name, shape in expected.vectors.items()}
    return read, expected, made


def _bytes(expected: Expected, dtype: torch.dtype) -> int:
    return sum(map(prod, (*expected.matrices.values(), *expected.vectors.values()))) * dtype.itemsize


def _room(folder: Path) -> int:
    """Return how many bytes of files a folder takes, none where there is no such folder or it is not ours to write."""
    try:
        free = shutil.disk_usage(folder).free - _DISK_LEFT if os.access(folder, os.W_OK | os.X_OK) else 0
        return max(0, min(free, _memory() - _MEMORY_LEFT) if folder == MEMORY else free)
    except OSError:
        return 0


def _memory() -> int:
    """Return the bytes of the machine's memory that are to be had, as Linux says it."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return int(kilobytes) * 1024
