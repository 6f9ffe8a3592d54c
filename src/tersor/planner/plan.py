"""The plan: how a model is spread over devices, what that takes by part, and why not otherwise; and its file."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tersor import files
from tersor.errors import InputError, OutputError

KIND, VERSION = "tersor plan", 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """What a rank has of a weight; `None` is all.

    Attributes:
        rows: spans of output channels.
        columns: a span of input channels.
        experts: a span of its copies.
    """

    rows: tuple[tuple[int, int], ...] | None = None
    columns: tuple[int, int] | None = None
    experts: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """How one weight of some layers is cut.

    Attributes:
        module: its name, with `{layer}` and `{expert}` for numbers.
        layers: that have it so; none for a weight outside layers.
        way: such as `row`.
        quantum: input channels that stay together.
        slices: of every rank of a stage.
        nbytes: of every rank, of one layer.
        block: that it belongs to, such as `layers.0-79.qkv` or `head`: group and name of a `Chosen`.
    """

    module: str
    layers: tuple[int, ...]
    way: str
    quantum: int
    slices: tuple[Slice, ...]
    nbytes: tuple[int, ...]
    block: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """What was chosen for a block in a phase.

    Attributes:
        phase, group, block: such as `decode`, `layers.0-79` and `out`.
        way: its name.
        reads, gives: layouts of what it reads and gives (docs/planning.md).
        options: how many ways there were.
        heads: query heads of every rank, where attention is cut by them.
    """

    phase: str
    group: str
    block: str
    way: str
    reads: str
    gives: str
    options: int
    heads: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of the predicted time of a pass, and where the number comes from.

    Attributes:
        name: such as `decode.layers.0-79.out`, or `decode.sum.layers.0-79.out` of an exchange behind a block.
        kind: `products`, `attention`, `small`, `sums` or `pipeline`.
        seconds: of all layers.
        count: how often it comes in a pass.
        source: of one of them.
    """

    name: str
    kind: str
    seconds: float
    count: int
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of a rank.

    Attributes:
        weights, kv: of its layers.
        activations: the most at a time, of the phase that has most.
        logits: of the rows of a step.
        buffers: of collectives, the CUDA context and what else a process has.
        room: of its device.
    """

    weights: int
    kv: int
    activations: int
    logits: int
    buffers: int
    room: int

    @property
    def total(self) -> int:
        """All but the room."""
        return self.weights + self.kv + self.activations + self.logits + self.buffers


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A stage of a replica.

    Attributes:
        first, last: its layers, the latter not included.
        embedding, head: whether it has them.
        devices: of the first replica.
        seconds: phase -> of a pass.
        memory: of every rank.
    """

    first: int
    last: int
    embedding: bool
    head: bool
    devices: tuple[int, ...]
    seconds: dict[str, float]
    memory: tuple[Memory, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rival:
    """Another plan, and why it was not taken.

    Attributes:
        name: its axes, or the rule that made it.
        axes: likewise in words.
        seconds: of a step; `None` where it does not fit.
        rate: tokens a second of all devices, likewise.
        why: a sentence.
    """

    name: str
    axes: str
    seconds: float | None
    rate: float | None
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A plan.

    Attributes:
        model, digest: what is planned: its label, and what identifies it.
        chip, links: what prices are of.
        mesh: devices of every node, as text.
        data, pipeline, tensor, expert: ranks along the axes; `expert` replicas have the experts of a layer together.
        idle: devices without a part.
        workload: batch, context, prompt, kv_bytes, phases.
        objective: `latency` or `throughput`.
        parts: micro-batches of a decode step.
        stages: of a replica.
        cuts: of every weight.
        chosen: of every block.
        times: of the passes, by part.
        step: seconds of a step, in which its share of prefill is: what was searched for.
        passes: phase -> seconds of a pass through all stages.
        apart: phase -> seconds of a pass on the same axes if that phase alone counted.
        rate: tokens a second that all devices draw together.
        bound: no plan of the searched space has a step (or a token of a device) of fewer seconds.
        gap: by how much of it this one may be worse.
        searched: seconds of the search.
        method: its name.
        rivals: other axes, the best first.
        rules: plans by rule at the same costs.
        notes: what could not be cut, and why.
        architecture: of the model: its class in config.json.
    """

    model: str
    digest: str
    chip: str
    links: str
    mesh: str
    data: int
    pipeline: int
    tensor: int
    expert: int
    idle: int
    workload: dict[str, Any]
    objective: str
    parts: int
    stages: tuple[Stage, ...]
    cuts: tuple[Cut, ...]
    chosen: tuple[Chosen, ...]
    times: tuple[Part, ...]
    step: float
    passes: dict[str, float]
    apart: dict[str, float]
    rate: float
    bound: float
    gap: float
    searched: float
    method: str
    rivals: tuple[Rival, ...] = field(default=())
    rules: tuple[Rival, ...] = field(default=())
    notes: tuple[str, ...] = field(default=())
    architecture: str = ""

    @property
    def devices(self) -> int:
        """All devices of the mesh."""
        return self.data * self.pipeline * self.tensor + self.idle

    def axes(self) -> str:
        """Return the axes as text."""
        text = f"DP{self.data} PP{self.pipeline} TP{self.tensor}"
        return text if self.expert == 1 else f"{text} EP{self.expert * self.tensor}"

    def to_dict(self) -> dict[str, Any]:
        """Return what its file holds."""
        return {"kind": KIND, "version": VERSION, **dataclasses.asdict(self)}

    @staticmethod
    def from_dict(raw: Mapping[str, Any], where: str = "the plan") -> Plan:
        """Return the plan that a file holds.

        Raises:
            InputError: it holds none, or one of another version; the line says which.
        """
        if not isinstance(raw, Mapping) or raw.get("kind") != KIND:
            raise InputError(f"{where} is no plan: tersor plan MODEL -o FILE writes one")
        if raw.get("version") != VERSION:
            raise InputError(f"{where} is version {raw.get('version')} of plans, and this Tersor reads {VERSION}")
        body = {name: value for name, value in raw.items() if name not in ("kind", "version")}
        try:
            return typing.cast(Plan, _made(Plan, body, where))
        except (TypeError, ValueError) as error:
            raise InputError(f"{where} is no whole plan: {error}") from None

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all.

        Raises:
            OutputError: it cannot be written.
        """
        try:
            files.write_whole(path, (json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n").encode())
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror or error}") from None


def read(path: Path) -> Plan:
    """Read a plan's file.

    Raises:
        InputError: it is none, or of another version.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise InputError(f"{path} is no JSON: {error}") from None
    return Plan.from_dict(raw, str(path))


def _made(kind: Any, value: Any, where: str) -> Any:
    """Return a value of a dataclass's field as its type says; JSON has lists for tuples."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _made(next(one for one in inner if one is not type(None)), value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError(f"{value!r} is no list")
        each = [inner[0]] * len(value) if inner[-1] is ... else list(inner)
        if len(each) != len(value):
            raise TypeError(f"{value!r} has {len(value)} numbers, not {len(each)}")
        return tuple(_made(one, item, where) for one, item in zip(each, value, strict=True))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise TypeError(f"{value!r} is no object")
        return {str(name): item for name, item in value.items()}
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise TypeError(f"{value!r} is no object")
        hints = typing.get_type_hints(kind)
        unknown = [name for name in value if name not in hints]
        missing = [
            one.name for one in dataclasses.fields(kind) if one.name not in value and one.default is dataclasses.MISSING
        ]
        if unknown or missing:
            raise TypeError(f"{'has' if unknown else 'lacks'} {(unknown or missing)[0]!r}")
        return kind(**{name: _made(hints[name], item, where) for name, item in value.items()})  # type: ignore[operator]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is not Any and not isinstance(value, kind):
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value
