"""Which model is judged, and how does it run? `MODEL`, or `MODEL@OPTION=VALUE[,OPTION=VALUE]`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tersor.engine.config import EngineConfig
from tersor.errors import InputError, did_you_mean
from tersor.formats import Activations

EXAMPLE = "@kv-dtype=fp8 or @activations=fp8,kv-dtype=fp8"


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model and its way of running.

    Attributes:
        name: a checkpoint directory or a hub id.
        activations: what packed linears multiply with; `8bit` becomes one kind where the checkpoint is known.
        kv_dtype: of keys and values in the engine, one of `engine.config.KV_DTYPES`; `None` asks for no engine.
        way: what stands behind @, as it was given; empty where nothing does.
    """

    name: str
    activations: str = Activations.NATIVE
    kv_dtype: str | None = None
    way: str = ""

    @property
    def label(self) -> str:
        """What the subject is called in a table: its directory's name, or a hub id as it is, with its way."""
        directory = Path(self.name)
        name = directory.resolve().name if directory.is_dir() else self.name
        return f"{name}@{self.way}" if self.way else name

    @property
    def pages(self) -> EngineConfig:
        """How the engine keeps keys and values."""
        return EngineConfig(kv_dtype=self.kv_dtype or "auto")


def subject(text: str, *, activations: Activations | str = Activations.NATIVE, kv_dtype: str | None = None) -> Subject:
    """Return the model that a text names, with its way of running.

    A directory that is called as the whole text is that directory, whatever @ its name holds.

    Args:
        text: `MODEL`, or with options of its own behind @: `activations` and `kv-dtype`.
        activations, kv_dtype: of a model that says nothing else.

    Raises:
        InputError: an option that there is not or that is given twice, or a value that it cannot have.
    """
    name, at, way = text.rpartition("@")
    if not at or Path(text).exists() or ("=" not in way and "/" in way):
        name, way = text, ""
    given: dict[str, str] = {}
    for part in way.split(",") if at and name != text else ():
        option, equals, value = part.partition("=")
        option = option.strip().replace("_", "-")
        if not name or not equals:
            raise InputError(
                f"{text!r}: behind @ stands how the model runs, such as {EXAMPLE} (a branch or tag is --revision)"
            )
        if option not in _CHECKS:
            near = did_you_mean(option, _CHECKS)
            raise InputError(f"{text!r}: option {option!r}{near}: there are {' and '.join(_CHECKS)}")
        if option in given:
            raise InputError(f"{text!r}: {option} is given twice")
        given[option] = value.strip()
        try:
            _CHECKS[option](given[option])
        except InputError as error:
            raise InputError(f"{text!r}: {error}") from None
    multiplied, kept = given.get("activations", activations), given.get("kv-dtype", kv_dtype)
    one = Subject(name=name, activations=Activations.check(multiplied), kv_dtype=kept, way=way)
    _ = one.pages  # refuses what keys and values cannot be kept in
    return one


_CHECKS: dict[str, Callable[[str], object]] = {
    "activations": Activations.check,
    "kv-dtype": lambda value: EngineConfig(kv_dtype=value),
}
"""Option of a way of running -> what refuses a wrong value of it."""
