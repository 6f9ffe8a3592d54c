"""Measured choices: a table for each chip, which goes before the model.

A table is a JSON file in the cache directory that `tersor bench tune` writes. Its name holds a hash of the source of
the linears' kernels, so that a table measured with other kernels is never met.

A choice holds for problems that are equal in everything but the number of tokens, and for a number of tokens that was
measured, or that lies between two measured neighbours of equal choice. A choice is everything of a `LinearConfig` but
the numbers of token tiles, whole tiles and CTAs, which follow from the tokens.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tersor import settings
from tersor.errors import InputError
from tersor.formats import Activations
from tersor.hardware import Chip
from tersor.kernels.jit import source
from tersor.kernels.tune import schedules
from tersor.kernels.tune.schedules import LinearConfig, LinearProblem

VERSION = 2
KIND = "tersor measured choices"

_HEADERS = tuple(
    f"dense/{name}.cuh" for name in ("sm80_linear", "sm90_linear", "quantize_activations", "dequantize", "epilogue")
)
"""The headers that the sources of `kernels/dense.py` begin with."""

_FOLLOWS_FROM_TOKENS = ("token_tiles", "whole_tiles", "ctas")
_SCALARS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "bool": (bool,),
    "str": (str,),
    "float": (int, float),
    "Activations": (str,),
}
_KEYS = {"kind", "version", "chip", "capability", "kernels", "environment", "choices"}
_REMEDY = "measure again with 'tersor bench tune', or remove the file"
_json = functools.partial(json.dumps, allow_nan=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One measured choice: the fastest configuration of a problem, and its time in microseconds."""

    problem: LinearProblem
    config: LinearConfig
    microseconds: float


class Table:
    """The measured choices of one chip.

    Attributes:
        path: the file, which messages name.
        chip: name of the GPU.
        capability: its compute capability, such as `9.0`.
        kernels: hash of the kernels that were measured (`kernels_hash`).
        environment: driver, versions, date and the like.
        choices: problem -> choice.
    """

    def __init__(
        self,
        path: Path,
        chip: str,
        capability: str,
        kernels: str,
        environment: Mapping[str, Any],
        choices: Iterable[Choice],
    ) -> None:
        self.path = path
        self.chip = chip
        self.capability = capability
        self.kernels = kernels
        self.environment = dict(environment)
        self.choices = {choice.problem: choice for choice in choices}
        self._measured: dict[LinearProblem, list[int]] = {}
        for problem in self.choices:
            bisect.insort(self._measured.setdefault(_any_tokens(problem), []), problem.n)

    def lookup(self, problem: LinearProblem, chip: Chip) -> LinearConfig | None:
        """Return the configuration measured for a problem, or `None` where nothing was measured that decides it.

        Raises:
            InputError: it was measured with a configuration that these kernels do not have.
        """
        exact = self.choices.get(problem)
        if exact is not None:
            found = _same_choice(exact.config, schedules.candidates(problem, chip))
            if found is None:
                raise InputError(
                    f"{self.path}: no kernel runs [{problem.oc}, {problem.ic}] with {problem.n} tokens as "
                    f"{exact.config}: {_REMEDY}"
                )
            return found
        measured = self._measured.get(_any_tokens(problem), [])
        place = bisect.bisect(measured, problem.n)
        if place in (0, len(measured)):
            return None
        below, above = (self.choices[dataclasses.replace(problem, n=n)] for n in measured[place - 1 : place + 1])
        if _same_choice(below.config, [above.config]) is None:
            return None
        return _same_choice(below.config, schedules.candidates(problem, chip))

    def measured(self, problem: LinearProblem) -> tuple[int, ...]:
        """Return the numbers of tokens at which a problem was measured, whatever number it has itself."""
        return tuple(self._measured.get(_any_tokens(problem), ()))

    def updated(self, choices: Iterable[Choice], environment: Mapping[str, Any]) -> Table:
        """Return a table with further choices, which replace those of the same problems."""
        merged = {**self.choices, **{choice.problem: choice for choice in choices}}
        return Table(self.path, self.chip, self.capability, self.kernels, environment, merged.values())

    def text(self) -> str:
        """Return the table as JSON, a choice a line, in order of the problems."""
        head = {
            "kind": KIND,
            "version": VERSION,
            "chip": self.chip,
            "capability": self.capability,
            "kernels": self.kernels,
            "environment": self.environment,
        }
        lines = [_json(dataclasses.asdict(self.choices[key])) for key in sorted(self.choices, key=_order)]
        return _json(head, indent=1)[:-2] + ',\n "choices": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"


def user_path(chip: Chip) -> Path:
    """Return where the user's table for a chip lies (it need not exist)."""
    return Path(settings.get("TERSOR_CACHE_DIR")) / "tune" / f"{slug(chip)}-{kernels_hash()}.json"


def slug(chip: Chip) -> str:
    """Name a chip in a file name, such as `nvidia_h200_sm90`."""
    name = re.sub(r"[^a-z0-9]+", "_", chip.name.lower()).strip("_")
    return f"{name}_sm{capability(chip).replace('.', '')}"


def capability(chip: Chip) -> str:
    """Return a chip's compute capability as a table says it, such as `9.0`."""
    return ".".join(map(str, chip.capability))


@functools.cache
def kernels_hash() -> str:
    """Return twelve hex digits that change with the source of the linears' kernels, and with no other header."""
    files: dict[str, str] = {}
    for header in _HEADERS:
        files |= source.reached(header, "the kernels of linears", {})
    digest = hashlib.sha256()
    for name, text in sorted(files.items()):
        for part in (name.encode(), text.encode()):
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:12]


def read(path: Path, chip: Chip, kernels: str | None = None) -> Table:
    """Read a table.

    Args:
        path: the file.
        chip: the chip it must be for.
        kernels: the `kernels_hash` it must have been measured with; `None` takes any.

    Raises:
        InputError: not a table, of another version, chip or kernels; the message is one line and names the file.
    """
    try:
        table = _parse(json.loads(path.read_text(encoding="utf-8")), path)
    except (ValueError, KeyError, TypeError, OSError) as error:
        reason = f"{type(error).__name__} {error}" if isinstance(error, (KeyError, TypeError)) else str(error)
        raise InputError(f"{path} is no table of measured choices ({' '.join(reason.split())}): {_REMEDY}") from None
    if (table.chip, table.capability) != (chip.name, capability(chip)):
        raise InputError(
            f"{path} was measured on {table.chip} of compute capability {table.capability}, this is {chip.name} of "
            f"{capability(chip)}: {_REMEDY}"
        )
    if kernels is not None and table.kernels != kernels:
        raise InputError(f"{path} was measured with kernels {table.kernels}, these are {kernels}: {_REMEDY}")
    return table


def _parse(content: Any, path: Path) -> Table:
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise ValueError(f"it does not say kind {KIND!r}")
    if content.get("version") != VERSION:
        raise ValueError(f"version {content.get('version')}, this Tersor reads version {VERSION}")
    if set(content) != _KEYS:
        raise ValueError(f"keys {sorted(set(content) ^ _KEYS)} are unknown or missing")
    choices = []
    for index, entry in enumerate(content["choices"]):
        where = f"choice {index}"
        if not isinstance(entry, dict) or set(entry) != {"problem", "config", "microseconds"}:
            raise ValueError(f"{where}: expected problem, config and microseconds")
        if not isinstance(entry["microseconds"], (int, float)) or not entry["microseconds"] > 0:
            raise ValueError(f"{where}: {entry['microseconds']!r} is no time")
        problem = _dataclass(LinearProblem, entry["problem"], f"{where}, problem")
        config = _dataclass(LinearConfig, entry["config"], f"{where}, config")
        choices.append(Choice(problem=problem, config=config, microseconds=entry["microseconds"]))
    chip, measured_on, kernels = (content[key] for key in ("chip", "capability", "kernels"))
    if not all(isinstance(text, str) for text in (chip, measured_on, kernels)) or not isinstance(
        content["environment"], dict
    ):
        raise ValueError("chip, capability and kernels are texts, environment is an object")
    return Table(path, chip, measured_on, kernels, content["environment"], choices)


def _dataclass(cls: type[Any], values: Any, where: str) -> Any:
    """Make a dataclass of scalars from a JSON object that has exactly its fields."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if not isinstance(values, dict) or set(values) != set(fields):
        wrong = sorted(set(values) ^ set(fields)) if isinstance(values, dict) else values
        raise ValueError(f"{where}: fields {wrong} are unknown or missing")
    for name, value in values.items():
        expected = _SCALARS[str(fields[name].type)]
        if not isinstance(value, expected) or (isinstance(value, bool) and bool not in expected):
            raise ValueError(f"{where}: {name} is {value!r}, expected {fields[name].type}")
    if "activations" in values:
        values = {**values, "activations": Activations.of(values["activations"])}
    return cls(**values)


def _same_choice(config: LinearConfig, options: Iterable[LinearConfig]) -> LinearConfig | None:
    """Return the option that is equal to `config` in all that does not follow from the number of tokens."""
    names = [field.name for field in dataclasses.fields(config) if field.name not in _FOLLOWS_FROM_TOKENS]
    wanted = [getattr(config, name) for name in names]
    return next((option for option in options if [getattr(option, name) for name in names] == wanted), None)


def _any_tokens(problem: LinearProblem) -> LinearProblem:
    return dataclasses.replace(problem, n=1)


def _order(problem: LinearProblem) -> tuple[Any, ...]:
    return dataclasses.astuple(problem)
