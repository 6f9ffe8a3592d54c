"""Which files beside the weights belong to a model? Tokenizer, processor, templates, code; not the weights once more.

What stays behind is listed, and everything else comes along: a vocabulary may have any name. The same lists say what is
downloaded from the Hub.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from tersor.errors import CheckpointError

MODULES_NAME = "modules.json"
"""The file in which sentence-transformers names the folders of a model's parts."""

_SAFETENSORS = "*.safetensors"

_WEIGHTS = (
    *("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.ot", "*.pdparams", "*.nemo", "*.distcp"),
    *("*.gguf", "*.ggml", "*.ggmf", "*.llamafile", "*.onnx", "*.onnx_data*", "*.onnx.data", "*.tflite", "*.task"),
    *("*.litertlm", "*.pb", "*.mlmodel", "*.mlpackage", "*.engine", "*.plan", "*.pte", "*.pt2", "*.mar"),
    *("*.pkl", "*.pickle", "*.joblib", "*.npy", "weights*.npz", "model*.npz", "*.tar", "*.tgz", "*.gz", "*.zip"),
    *("*.7z", "*.zst", "*.xz", "*.whl", "*.so", "*.dll", "*.exe"),
)
"""Weights for other programs, pickles, and archives that may hold either."""

_OTHERS = (
    # Says what weights mean that are left behind, or how they were quantised.
    *("*.index.json", "adapter_config.json", "adapter_model*", "consolidated*", "params.json", "openvino_*"),
    *("*quantize_config.json", "*quant_config.json", "quant_log*", "quantization_config.json", "recipe.yaml"),
    # Of training.
    *("trainer_state.json", "training_args*", "trainer_log*", "optimizer*", "rng_state*", "all_results.json"),
    *("train_results.json", "eval_results.json", "test_results.json", "events.out.tfevents*", "zero_to_fp32.py"),
    *("*.parquet", "*.arrow", "*.log"),
    # Of the page on the Hub, and of the machine.
    *("README*", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.webp", "*.svg", "*.bmp", "*.ico", "*.mp4", "*.mov"),
    *("*.webm", "*.pdf", "*.tmp", "*.part", "*.incomplete", "*.lock", "*.swp", "*~", "*.pyc", ".*"),
    *("tersor-state.json", "tersor-calibration.json", "tersor-layers.json", "tersor-mix.json"),
)

_FOLDERS = (
    *("onnx*", "openvino*", "original", "coreml*", "tensorrt*", "trt*", "tf", "flax", "gguf*", "mlx*", "executorch*"),
    *("checkpoint-*", "checkpoints", "global_step*", "runs", "logs", "wandb", "lightning_logs", "__pycache__", ".*"),
)
"""Folders with other programs' copies of a model, or with what its training left."""

_READ = ("*.index.json", "*quantize_config.json", "*quant_config.json")
"""What is downloaded, since it says what the weights are, and yet stays behind."""

HUB_IGNORE = [
    # The folders that modules.json names begin with a number, and their weights are the model's own.
    *(f"[!0-9]*{pattern.removeprefix('*')}" if pattern.startswith("*") else pattern for pattern in _WEIGHTS),
    *("[!0-9]*/*.safetensors", "*.fp16*.safetensors", "*.bf16*.safetensors", "*.ggml*", "*.onnx*"),
    *("*.bin.index.json", "*.h5.index.json", "*.msgpack.index.json", "*.pt.index.json"),
    *(form for pattern in _OTHERS if pattern not in _READ for form in (pattern, f"*/{pattern}")),
    *(f"{pattern}/*" for pattern in _FOLDERS),
]
"""What is not downloaded of a Hub repository, as `huggingface_hub` takes it."""


def companions(directory: Path, written: tuple[str, ...]) -> list[Path]:
    """Return the files that come along with a model's weights, relative to its directory, in order.

    Args:
        directory: of the model.
        written: names of files that are not copied but written anew.

    Raises:
        CheckpointError: a file or folder that belongs to the model cannot be looked at, is a broken link, or is no
            regular file.
    """
    found: list[Path] = []
    parts = _parts(directory)
    for entry in _entries(directory):
        name = entry.name
        if not _is_folder(entry):
            if name not in written and not _matches(name, (_SAFETENSORS, *_WEIGHTS, *_OTHERS)):
                found.append(_checked(entry, directory))
        elif name in {part.parts[0] for part in parts} or not _matches(name, _FOLDERS):
            found += _folder(Path(entry.path), directory, parts, (_identity(entry),))
    return sorted(found)


def _folder(
    folder: Path, directory: Path, parts: frozenset[PurePosixPath], above: tuple[tuple[int, int], ...]
) -> Iterator[Path]:
    """Yield the files of a folder that come along; `above` identifies it and the folders that it is in."""
    relative = PurePosixPath(folder.relative_to(directory).as_posix())
    part = any(relative == named or named in relative.parents for named in parts)
    entries = _entries(folder)
    names = [entry.name for entry in entries if not _is_folder(entry)]
    holds_weights = any(_matches(name, (_SAFETENSORS, *_WEIGHTS)) for name in names)
    stays: tuple[str, ...] = (".*", "*.pyc") if part else _OTHERS
    if part and any(_matches(name, (_SAFETENSORS,)) for name in names):
        stays = (*stays, *_WEIGHTS)  # the same weights again
    for entry in entries:
        if _is_folder(entry):
            if (part or not _matches(entry.name, _FOLDERS)) and _identity(entry) not in above:
                yield from _folder(Path(entry.path), directory, parts, (*above, _identity(entry)))
        # What stands beside weights that stay behind is about them.
        elif (part or not holds_weights) and not _matches(entry.name, stays):
            yield _checked(entry, directory)


def _parts(directory: Path) -> frozenset[PurePosixPath]:
    """Return the folders that modules.json names, if there is one."""
    path = directory / MODULES_NAME
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return frozenset()
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return frozenset()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    entries = content if isinstance(content, list) else []
    named = [entry.get("path") for entry in entries if isinstance(entry, dict)]
    paths = [PurePosixPath(path) for path in named if isinstance(path, str)]
    return frozenset(path for path in paths if path.parts and not path.is_absolute() and ".." not in path.parts)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise CheckpointError(f"cannot list {folder}: {error.strerror}") from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False  # whoever wants the file says what is wrong with it


def _identity(entry: os.DirEntry[str]) -> tuple[int, int]:
    found = os.stat(entry.path)
    return found.st_dev, found.st_ino


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name.lower(), pattern.lower()) for pattern in patterns)


def _checked(entry: os.DirEntry[str], directory: Path) -> Path:
    """Return a file's path relative to the directory, once it is known that it can be copied."""
    path = Path(entry.path)
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is a link to nothing: download the file again, or remove the link") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path} is no regular file: remove it, or put the file itself there")
    return path.relative_to(directory)
