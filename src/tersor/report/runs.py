"""Which run is this? A JSON of `tersor eval` or `tersor bench`, or a compressed checkpoint with its logs."""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from tersor import evaluate, files
from tersor.bench import latency, linear, throughput
from tersor.bench.experts import measure as experts
from tersor.checkpoint.config import QUANT_METHOD
from tersor.checkpoint.inspect import Inspection, inspect
from tersor.checkpoint.source import read_config
from tersor.convert.calibrate.store import LOG_NAME
from tersor.convert.layers import KIND as LAYERS_KIND
from tersor.convert.layers import LAYERS_NAME
from tersor.convert.layers import VERSION as LAYERS_VERSION
from tersor.convert.target import LOG_NAME as MIX_NAME
from tersor.errors import InputError
from tersor.integrations.transformers.architecture import read_architecture

Columns: TypeAlias = Callable[[dict[str, Any]], tuple[list[str], list[list[str]]]]

SPEEDS: dict[str, Columns] = {
    latency.KIND: latency.columns,
    throughput.KIND: throughput.columns,
    linear.KIND: linear.columns,
    experts.KIND: experts.columns,
}
"""Kind of a measurement of time -> what makes headings and cells of it."""

VERSIONS = {
    evaluate.KIND: evaluate.VERSION,
    latency.KIND: latency.VERSION,
    throughput.KIND: throughput.VERSION,
    linear.KIND: linear.VERSION,
    experts.KIND: experts.VERSION,
}
"""Kind of a results file -> the version that is read."""

_OF_MIX = ("bits_per_weight", "bytes", "padding_bytes", "loss", "predicted_seconds")
"""How names of its numbers begin."""

Kinds: TypeAlias = type | tuple[type, ...]

_NUMBER = (int, float)
_MODEL: dict[str, Kinds] = {
    "label": str,
    "weight_bytes": int,
    "bits_per_weight": _NUMBER,
    "windows": int,
    "window": int,
    "perplexity": _NUMBER,
    "windows_sha256": str,
    "per_window": dict,
}
"""Field of a model of `tersor eval` -> what it is."""
_FLOOR: dict[str, Kinds] = {"rounding": str, "kl": _NUMBER}
_QUANTITIES = ("kl", "perplexity", "reference_perplexity", "flips")
"""How names of what is measured begin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a verb wrote as JSON.

    Attributes:
        path: as the user wrote it.
        kind: a key of `VERSIONS`.
        result: all of the file.
    """

    path: str
    kind: str
    result: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A compressed checkpoint.

    Attributes:
        path: as the user wrote it.
        directory: where it is.
        found: what it holds.
        config: its quantization_config, as it stands in config.json.
        layers: what was written of every layer when it was compressed, or nothing.
        log: of its calibration, where there was one.
    mix: how a budget of bytes was spent on levels of output features, where it was.
    """

    path: str
    directory: Path
    found: Inspection
    config: Mapping[str, Any]
    layers: Sequence[Mapping[str, Any]]
    log: Mapping[str, Any] | None
    mix: Mapping[str, Any] | None = None


Run: TypeAlias = Measured | Checkpoint


def read_runs(paths: Sequence[str], *, trust_remote_code: bool = False) -> list[Run]:
    """Read runs, in order.

    Args:
        paths: of results files and checkpoint directories.
        trust_remote_code: whether Python code that comes with a checkpoint is run, to know its layers.

    Raises:
        InputError: one that is neither, is of another version, is damaged, or stands there twice.
    """
    runs: list[Run] = []
    seen: dict[Path, str] = {}
    for path in paths:
        place = _place(path)
        where = place.resolve()
        if where in seen:
            raise InputError(f"{path} is given twice")
        seen[where] = path
        if place.is_dir():
            runs.append(_checkpoint(path, place, trust_remote_code))
        else:
            runs.append(_measured(path, place))
    return runs


def need(raw: Any, key: str, kind: Kinds, where: str) -> Any:
    """Return a field of a JSON object.

    Raises:
        InputError: it is not there, or not of this kind.
    """
    if not isinstance(raw, dict) or key not in raw:
        raise InputError(f"{where}: damaged: {key!r} is missing")
    value = raw[key]
    if (
        not isinstance(value, kind)
        or isinstance(value, bool)
        or (isinstance(value, float) and not math.isfinite(value))
    ):
        raise InputError(f"{where}: damaged: {key!r} is {str(value)[:40]!r}")
    return raw[key]


def _place(path: str) -> Path:
    try:
        place = files.user_path(path)
        mode = files.mode_of(place)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if not mode:
        raise InputError(f"{path}: no such file or directory: a run is a JSON of {_kinds()} or a compressed checkpoint")
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        raise InputError(f"{path} is neither a file nor a directory")
    return place


def _kinds() -> str:
    *most, last = (kind if kind == evaluate.KIND else kind.removeprefix("tersor ") for kind in VERSIONS)
    return f"{', '.join(most)} or {last}"


def _read(path: str, place: Path) -> Any:
    try:
        return json.loads(place.read_text(encoding="utf-8"), parse_constant=_refused)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON: {error}") from None


def _refused(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _measured(path: str, place: Path) -> Measured:
    found = _read(path, place)
    kind = found.get("kind") if isinstance(found, dict) else None
    if not isinstance(kind, str) or kind not in VERSIONS:
        raise InputError(f"{path} is no run: neither a JSON of {_kinds()} nor a compressed checkpoint")
    if found.get("version") != VERSIONS[kind]:
        raise InputError(
            f"{path}: results of {kind}, version {found.get('version')!r}, and this Tersor reads version "
            f"{VERSIONS[kind]}: measure again"
        )
    need(found, "environment", dict, path)
    if kind == evaluate.KIND:
        _check_evaluation(found, path)
    else:
        need(found, "rows", list, path)
        try:
            SPEEDS[kind](found)
        except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
            raise InputError(f"{path}: damaged: a row lacks {error}, or it is no number") from None
    return Measured(path=path, kind=kind, result=found)


def _check_evaluation(found: dict[str, Any], path: str) -> None:
    if "models" not in found and "tasks" not in found:
        raise InputError(f"{path}: damaged: there are neither models nor tasks")
    models = need(found, "models", list, path) if "models" in found else []
    more = [found["reference_model"]] if "reference_model" in found else []
    for index, model in enumerate([*models, *more]):
        for key, kind in _MODEL.items():
            need(model, key, kind, f"{path}: model {index}")
        _check_numbers(model, f"{path}: model {index}")
        for key, values in model["per_window"].items():
            if not isinstance(values, list) or len(values) != model["windows"] or not all(map(_number, values)):
                raise InputError(f"{path}: damaged: model {index}: {key!r} has no number for every window")
        if model["perplexity"] <= 0 or model["weight_bytes"] <= 0 or model["bits_per_weight"] <= 0:
            raise InputError(f"{path}: damaged: model {index}: a size or a perplexity is not positive")
    if "noise_floor" in found:
        for key, kind in _FLOOR.items():
            need(found["noise_floor"], key, kind, f"{path}: noise_floor")
        _check_numbers(found["noise_floor"], f"{path}: noise_floor")
    for index, task in enumerate(need(found, "tasks", list, path) if "tasks" in found else []):
        for key in ("label", "task", "metric"):
            need(task, key, str, f"{path}: task {index}")
        for key in ("value", "error"):
            need({key: None, **task}, key, (*_NUMBER, type(None)), f"{path}: task {index}")


def _check_numbers(measured: dict[str, Any], where: str) -> None:
    for key in measured:
        if key.startswith(_QUANTITIES):
            need(measured, key, _NUMBER, where)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _checkpoint(path: str, place: Path, trust_remote_code: bool) -> Checkpoint:
    config = read_config(place)
    raw = config.get("quantization_config")
    method = raw.get("quant_method") if isinstance(raw, dict) else None
    if not isinstance(raw, dict) or method != QUANT_METHOD:
        how = "not compressed" if method is None else f"compressed by {method!r}"
        raise InputError(f"{path} is {how}: a report shows checkpoints that tersor quantize wrote")
    try:
        found = inspect(place, partial(read_architecture, trust_remote_code=trust_remote_code))
    except InputError as error:
        said = str(error)
        raise InputError(said if path in said else f"{path}: {said}") from None
    layers: Sequence[Mapping[str, Any]] = ()
    if files.mode_of(place / LAYERS_NAME):
        where = f"{path}: {LAYERS_NAME}"
        listed = _read(where, place / LAYERS_NAME)
        if not isinstance(listed, dict) or (listed.get("kind"), listed.get("version")) != (LAYERS_KIND, LAYERS_VERSION):
            raise InputError(f"{where} holds no {LAYERS_KIND}, version {LAYERS_VERSION}")
        layers = need(listed, "layers", list, where)
        for line in layers:
            need(line, "tensor", str, where)
            need(line, "layer", str, where)
            need(line, "relative_error", (*_NUMBER, type(None)), where)
    log = None
    if files.mode_of(place / LOG_NAME):
        where = f"{path}: {LOG_NAME}"
        log = _read(where, place / LOG_NAME)
        for line in need(log, "layers", list, where):
            need(line, "layer", str, where)
            for key in ("objective_before", "objective_after", "relative_error"):
                if key in line:
                    need(line, key, _NUMBER, where)
    return Checkpoint(
        path=path, directory=place.resolve(), found=found, config=raw, layers=layers, log=log, mix=_mix(path, place)
    )


def _mix(path: str, place: Path) -> Mapping[str, Any] | None:
    """Read what stands beside a checkpoint of mixed weights, `None` where nothing does."""
    if not files.mode_of(place / MIX_NAME):
        return None
    where = f"{path}: {MIX_NAME}"
    found: dict[str, Any] = _read(where, place / MIX_NAME)
    levels, shares = need(found, "levels", list, where), need(found, "shares", list, where)
    if len(levels) != len(shares) or not all(map(_number, shares)):
        raise InputError(f"{where}: damaged: there is no share for every level")
    for key in found:
        if key.startswith(_OF_MIX):
            need(found, key, _NUMBER, where)
    return found
