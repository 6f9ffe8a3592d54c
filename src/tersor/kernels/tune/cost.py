"""What does each tile of the sm90 schedule cost? Numbers of `costs/<chip>.json`, by name, read once a process.

A chip without a file of its own has the costs of an H200; what differs in bandwidth and multiprocessors the model takes
from `Chip`. `bench/costs.py` fits a file to times that `bench/sweep.py` takes on such a chip.

Where a file has no tiles for int8 activations they are those for e4m3 that have registers for it, and cost as much:
they move the same bytes and ask the same of the tensor cores. So do, with scales of activations, those of int8.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass, fields, replace
from importlib import resources
from typing import Any

from tersor.errors import InputError
from tersor.formats import Activations
from tersor.kernels.tune.tile import Tile

DEFAULT = "NVIDIA H200"
"""The chip whose costs stand for those of others."""
KIND = "tersor tile costs"
VERSION = 1
UNIT = "microseconds"

_CROWDED = 72
"""Registers beside sums that are too few for zero points and decode groups of eight."""
_KEYS = {"kind", "version", "chip", "unit", "fitted_to", "tiles"}


@dataclass(frozen=True, slots=True)
class Cost:
    """Microseconds of one tile, fitted to launches with 6-bit weights (bench/costs.py).

    Attributes:
        start: of a launch; with 8-bit activations their quantising, too.
        block: of the arithmetic of 128 channels of a tile.
        lonely: more of each block of a CTA that has a multiprocessor to itself and was meant to share it.
        item: of each wave of CTAs after the first.
        exchange, exchange_megabyte: of split sums, and for each 10^6 bytes written and read.
        part: of each part that the last CTA reads.
        gather: of each part that a cluster gathers, beside its bytes.
    """

    start: float
    block: float
    lonely: float
    item: float
    exchange: float
    exchange_megabyte: float
    part: float
    gather: float


@functools.cache
def of(chip: str) -> dict[Tile, Cost]:
    """Return the costs of every tile on a chip, named as in `hardware.CHIPS`. Chips without a file share one mapping.

    Raises:
        InputError: its file is not what `parse` reads, is for another chip, or has other tiles than the default's.
    """
    own = _read(chip)
    if own is None:
        return of(DEFAULT)
    if chip != DEFAULT and own.keys() != of(DEFAULT).keys():
        raise InputError(f"costs of {chip} are of other tiles than those of {DEFAULT}: sweep and fit them again")
    return own


def _read(chip: str) -> dict[Tile, Cost] | None:
    name = re.sub(r"[^a-z0-9]+", "_", chip.lower().removeprefix("nvidia ")) + ".json"
    file = resources.files("tersor.kernels.tune") / "costs" / name
    if not file.is_file():
        return None
    found, costs = parse(file.read_text(encoding="utf-8"), f"costs/{name}")
    if found != chip:
        raise InputError(f"costs/{name} is for {found}, not for {chip}")
    return costs


def parse(text: str, where: str) -> tuple[str, dict[Tile, Cost]]:
    """Read a file of costs.

    Args:
        text: the file, JSON.
        where: its name, for messages.

    Returns:
        The chip it is for, and the cost of each tile.

    Raises:
        InputError: not such a file, of another version, or with a field unknown, missing or of no sense.
    """
    try:
        return _parse(json.loads(text))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{where} holds no costs of tiles ({' '.join(str(error).split())})") from None


def _parse(content: Any) -> tuple[str, dict[Tile, Cost]]:
    if not isinstance(content, dict) or set(content) != _KEYS:
        raise ValueError(f"expected an object with {', '.join(sorted(_KEYS))}")
    if (content["kind"], content["version"], content["unit"]) != (KIND, VERSION, UNIT):
        raise ValueError(f"expected {KIND}, version {VERSION}, in {UNIT}")
    if not isinstance(content["chip"], str) or not isinstance(content["tiles"], list):
        raise ValueError("chip is a text, tiles is a list")
    found: dict[Tile, Cost] = {}
    for index, entry in enumerate(content["tiles"]):
        if not isinstance(entry, dict) or set(entry) != {"tile", "cost"}:
            raise ValueError(f"entry {index}: expected tile and cost")
        if not all(isinstance(part, dict) for part in entry.values()):
            raise ValueError(f"entry {index}: tile and cost are objects")
        sizes = _numbers(Tile, {key: value for key, value in entry["tile"].items() if key != "activations"}, int, index)
        tile = Tile(**sizes, activations=Activations(entry["tile"]["activations"]))
        if tile in found:
            raise ValueError(f"entry {index}: {tile} is there twice")
        found[tile] = Cost(**_numbers(Cost, entry["cost"], float, index))
    if not any(tile.activations is Activations.INT8 for tile in found):
        found |= {
            replace(tile, activations=Activations.INT8): costs
            for tile, costs in found.items()
            if tile.activations is Activations.E4M3 and tile.registers - tile.tokens // 2 > _CROWDED
        }
    if not any(tile.activations is Activations.INT8_GROUPS for tile in found):
        found |= {
            replace(tile, activations=Activations.INT8_GROUPS): costs
            for tile, costs in found.items()
            if tile.activations is Activations.INT8 and (tile.grouped or tile.in_pieces)
        }
    return content["chip"], found


def _numbers(cls: type[Any], values: dict[str, Any], kind: type[int] | type[float], index: int) -> dict[str, Any]:
    """Return the fields of a dataclass, all but `activations`: counts are positive, times are not negative."""
    wanted = {field.name for field in fields(cls)} - {"activations"}
    if set(values) != wanted:
        raise ValueError(f"entry {index}: fields {sorted(set(values) ^ wanted)} are unknown or missing")
    for name, value in values.items():
        number = isinstance(value, int) or (kind is float and isinstance(value, float))
        if not number or isinstance(value, bool) or not (value > 0 if kind is int else 0 <= value < float("inf")):
            raise ValueError(f"entry {index}: {name} is {value!r}")
    return {name: kind(value) for name, value in values.items()}
