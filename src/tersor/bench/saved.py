"""Which times were taken before? A results file of a verb of `tersor bench`, read and narrowed to what is asked for."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tersor import files
from tersor.bench.contenders import CUBLAS, FP8, RIVALS, unlabelled
from tersor.bench.linear import KIND, VERSION
from tersor.errors import InputError
from tersor.formats import Activations


def read(path: str | Path, kind: str = KIND, version: int = VERSION) -> dict[str, Any]:
    """Read what a verb wrote with --output.

    Args:
        path: the file.
        kind, version: of its results; the kind is the verb, such as `tersor bench linear`.

    Raises:
        InputError: no such file, or no results of this version.
    """
    file = Path(path)
    try:
        found = json.loads(files.user_path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file}: no such results file: {kind} --output writes one") from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: cannot be read as JSON: {error}") from None
    about = (found.get("kind"), found.get("version")) if isinstance(found, dict) else (None, None)
    if about != (kind, version):
        raise InputError(f"{file}: holds no times of {kind}, version {version}")
    return found


def narrowed(
    result: dict[str, Any],
    *,
    shapes: Collection[tuple[int, int]] | None = None,
    tokens: Collection[int] | None = None,
    formats: Collection[str] | None = None,
    activations: Collection[Activations] | None = None,
    chains: Collection[str] | None = None,
    rivals: Collection[str] | None = None,
) -> dict[str, Any]:
    """Return a result with the rows that are asked for; `None` asks for all.

    Args:
        result: what `read` returned.
        shapes: (OC, IC).
        tokens: numbers of tokens.
        formats: of the weights of Tersor and humming, as `contenders.label` names them (`int4:g128`).
        activations: what Tersor and humming multiply them with.
        chains: in which Tersor was timed (`contenders.CHAINS`); rivals have one.
        rivals: of `contenders.RIVALS`.

    Raises:
        InputError: no row is left.
    """

    def stays(row: dict[str, Any]) -> bool:
        program, _, humming_kernel = row["kernel"].partition(" ")
        rival = program in RIVALS
        if rivals is not None and rival and program not in rivals:
            return False
        if chains is not None and not rival and row["chain"] not in chains:
            return False
        if program in (CUBLAS, FP8):
            return True
        kernel = humming_kernel or program
        name, multiplied = unlabelled(kernel)
        known = formats is None or name in formats
        return known and (activations is None or multiplied in activations)

    rows = [
        row
        for row in result["rows"]
        if (shapes is None or (row["oc"], row["ic"]) in shapes)
        and (tokens is None or row["n"] in tokens)
        and stays(row)
    ]
    if not rows:
        raise InputError("the results file has no such times: ask for fewer things, or for others")
    return {**result, "rows": rows}
