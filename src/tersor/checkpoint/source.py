"""Where are the weights? A local directory or a Hub id, its shards checked against its index."""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from tersor import files
from tersor.checkpoint.companions import HUB_IGNORE, companions
from tersor.checkpoint.header import TensorSpec
from tersor.checkpoint.reader import SafetensorsFile
from tersor.errors import CheckpointError, InputError

CONFIG_NAME = "config.json"
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
"""Keys of a config.json that say how its weights are compressed; the second is an older compressed-tensors'."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor and the open file it is in."""

    file: SafetensorsFile
    spec: TensorSpec

    def part(self, name: str, first: int, rows: int) -> StoredTensor:
        """Return rows `first` to `first + rows` of the tensor as one of its own, called `name`."""
        spec = self.spec
        offset = spec.offset + first * (spec.nbytes // spec.shape[0])
        return StoredTensor(self.file, replace(spec, name=name, shape=(rows, *spec.shape[1:]), offset=offset))

    @property
    def nbytes(self) -> int:
        """Bytes that the tensor takes on disk."""
        return self.spec.nbytes


class Source:
    """An open checkpoint directory.

    Attributes:
        directory: where the checkpoint is.
        label: what the checkpoint is called: the Hub id, or the directory's name.
        from_hub: whether `label` is a Hub id.
        config: content of config.json.
        files: the safetensors files, in order of name.
        tensors: every tensor by name, in the order of the bytes on disk.
    """

    def __init__(self, directory: Path, label: str, from_hub: bool = False) -> None:
        """Open a directory and check that it is a whole checkpoint.

        Raises:
            CheckpointError: it is not; the message says which file lacks what.
        """
        self.directory = directory
        self.label = label
        self.from_hub = from_hub
        self.config = read_config(directory)
        with _reading(directory):
            weight_map = _weight_map(directory)
        names = [SINGLE_NAME] if weight_map is None else sorted(set(weight_map.values()))
        self.files: list[SafetensorsFile] = []
        try:
            for name in names:
                self.files.append(SafetensorsFile(directory / name))
            self.tensors = _collect(self.files, weight_map)
        except BaseException:
            self.close()
            raise
        if not self.tensors:
            raise CheckpointError(f"{directory} holds no tensors")

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close every file; idempotent."""
        for file in self.files:
            file.close()

    def fingerprint(self) -> list[list[Any]]:
        """Return what identifies the weights: name, size, time of change and header digest of every file."""
        stats = [(file, os.stat(file.path)) for file in self.files]
        return [[file.path.name, stat.st_size, stat.st_mtime_ns, file.header_digest] for file, stat in stats]

    def companions(self) -> list[Path]:
        """Return the files that come along, relative to the directory: tokenizer, templates, code.

        Raises:
            CheckpointError: one of them cannot be read.
        """
        return companions(self.directory, (CONFIG_NAME, *(file.path.name for file in self.files)))


def open_source(model: str | os.PathLike[str], revision: str | None = None) -> Source:
    """Open a checkpoint: a directory, or a Hub id of which everything is downloaded that belongs to it.

    Args:
        model: the directory or Hub id.
        revision: branch, tag or commit of a Hub id; `None` is its main branch.

    Raises:
        CheckpointError: neither a directory nor a Hub id, or not a whole checkpoint.
        InputError: a revision of a directory.
    """
    if not isinstance(model, str | os.PathLike):
        raise CheckpointError(f"{type(model).__name__} is no model: give a directory or a Hub id")
    text = os.fspath(model)
    with _reading(text):
        directory = files.user_path(text)
        mode = files.mode_of(directory)
        if mode and revision is not None:
            raise InputError(
                f"revision {revision!r} is for a hub id, and {text} is a path here: leave the revision out, or check "
                "it out there"
            )
        if stat.S_ISDIR(mode):
            return Source(directory, _printable(Path(os.path.realpath(directory)).name))
    if mode:
        raise CheckpointError(f"{text} is a file: give the directory that holds {CONFIG_NAME} and the weights")
    if not _HUB_ID.fullmatch(text):
        raise CheckpointError(f"no directory {text}")
    return Source(_download(text, revision), text, from_hub=True)


def read_config(directory: Path) -> dict[str, Any]:
    """Read config.json.

    Raises:
        CheckpointError: missing or empty directory, no config.json, not JSON.
    """
    path = directory / CONFIG_NAME
    with _reading(directory):
        if not stat.S_ISDIR(files.mode_of(directory)):
            raise CheckpointError(f"no directory {directory}")
        if files.mode_of(path):
            config = _read_json(path)
            if not isinstance(config, dict):
                raise CheckpointError(f"{path} is a JSON {type(config).__name__}, not an object")
            return config
        present = sorted(item.name for item in directory.iterdir())
    if not present:
        raise CheckpointError(f"{directory} is empty: give a directory with {CONFIG_NAME} and safetensors files")
    shown = ", ".join(present[:4]) + (", ..." if len(present) > 4 else "")
    if CONFIG_NAME in present:
        raise CheckpointError(f"{path} is a link to nothing: download the file again")
    raise CheckpointError(f"{directory} is not a model: it has no {CONFIG_NAME} (it holds {shown})")


def quantization_of(config: dict[str, Any]) -> dict[str, Any] | None:
    """Return the `quantization_config` of a config.json, also that of a text sub-config, or `None`."""
    for holder in (config, config.get("text_config")):
        if not isinstance(holder, dict):
            continue
        found = next((holder[key] for key in QUANTIZATION_KEYS if holder.get(key)), None)
        if found is not None:
            return found if isinstance(found, dict) else {"quant_method": found}
    return None


def stated_dtype(config: Mapping[str, Any]) -> str | None:
    """Return the dtype that a config.json, or its text sub-config, says the model has, such as `bfloat16`."""
    for holder in (config, config.get("text_config")):
        if isinstance(holder, dict):
            found = holder.get("dtype") or holder.get("torch_dtype")
            if isinstance(found, str):
                return found
    return None


def without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config.json that says nothing of compression any more, nor does any of its sub-configs."""
    return {
        key: without_quantization(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in QUANTIZATION_KEYS
    }


@contextlib.contextmanager
def _reading(path: str | Path) -> Iterator[None]:
    """Say in one line which path of a checkpoint the operating system does not give, and why."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot read {error.filename or path}: {error.strerror or error}") from None


def _printable(name: str) -> str:
    """Return a file's name with the bytes that are no text spelled out."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _read_json(path: Path) -> Any:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path} is no regular file: put the file itself there")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None


def _weight_map(directory: Path) -> dict[str, str] | None:
    """Return tensor -> file of a sharded checkpoint, `None` for a single file."""
    if files.mode_of(directory / SINGLE_NAME):
        return None
    path = directory / INDEX_NAME
    if not files.mode_of(path):
        raise CheckpointError(_no_weights(directory))
    index = _read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{path}: tensor {tensor!r} is mapped to {name!r}, not to a file beside it")
    absent = sorted({name for name in weight_map.values() if not (directory / name).is_file()})
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise CheckpointError(f"{path} names {absent[0]}{more}, absent from the directory: download the rest")
    return weight_map


def _no_weights(directory: Path) -> str:
    names = sorted(item.name for item in directory.iterdir() if item.is_file())
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    adapters = [name for name in names if name.startswith("adapter_model")]
    if adapters:
        return f"{directory} holds an adapter ({adapters[0]}), not a model: merge it into its base model first"
    if pickled:
        return (
            f"{directory} holds its weights as {pickled[0]}, a pickle, which can run code when it is read: load it "
            "with transformers and save_pretrained it to get safetensors"
        )
    others = [name for name in names if name.endswith((".safetensors", ".gguf"))]
    if "quantize_config.json" in names and len(others) == 1 and others[0].endswith(".safetensors"):
        return f"{directory} holds GPTQ weights as {others[0]}, an old name: rename that file to {SINGLE_NAME}"
    found = f" (it holds {', '.join(others[:3])})" if others else ""
    return f"{directory} has no weights: neither {SINGLE_NAME} nor {INDEX_NAME} is there{found}"


def _collect(shards: list[SafetensorsFile], weight_map: dict[str, str] | None) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for file in shards:
        for name, spec in file.tensors.items():
            home = weight_map.get(name, file.path.name) if weight_map else file.path.name
            if home == file.path.name and name not in tensors:
                tensors[name] = StoredTensor(file, spec)
    if weight_map:
        missing = [name for name in weight_map if name not in tensors]
        if missing:
            name = missing[0]
            raise CheckpointError(
                f"tensor {name!r} is not in {weight_map[name]}, where {INDEX_NAME} says it is ({len(missing)} "
                f"such): download {weight_map[name]} again"
            )
    return tensors


def _download(hub_id: str, revision: str | None = None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, revision=revision, ignore_patterns=HUB_IGNORE))
    except Exception as error:
        at = f" at revision {revision!r}" if revision is not None else ""
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise CheckpointError(
            f"{hub_id!r}{at} is not a directory here, and the Hugging Face Hub did not give it: {reason.strip()}"
        ) from None
