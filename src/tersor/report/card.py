"""What does a model card say that was measured of its checkpoint? A section of its own, replaced when written again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tersor import evaluate, files
from tersor.errors import InputError, OutputError
from tersor.report.quality import Group, find_groups
from tersor.report.runs import Checkpoint, Measured, Run
from tersor.report.tables import beside_reference
from tersor.report.words import measured, plus_minus, size, times

NAME = "README.md"
BEGIN, END = "<!-- measured by tersor eval -->", "<!-- end of measured by tersor eval -->"


def write_cards(runs: Sequence[Run]) -> list[Path]:
    """Write into the model card of every checkpoint among runs what the runs of `tersor eval` among them say of it.

    A run says something of a checkpoint where it measured this directory, or one of the same name elsewhere, and the
    weights had as many bytes as they have now. The section that stands there is replaced; all else in the card stays
    as it is.

    Returns:
        The cards, in the order of the checkpoints.

    Raises:
        InputError: there is no checkpoint, no run measured one of them, or a card is not there or damaged; then none is
            written.
        OutputError: a card cannot be written.
    """
    checkpoints = [run for run in runs if isinstance(run, Checkpoint)]
    evaluations = [run for run in runs if isinstance(run, Measured) and run.kind == evaluate.KIND]
    if not checkpoints:
        raise InputError("--card writes into model cards of checkpoints: give their directories beside the runs")
    cards = [_card(one, evaluations) for one in checkpoints]
    for path, content in cards:
        try:
            files.write_whole(path, content.encode())
        except OSError as error:
            raise OutputError(f"{path}: cannot be written: {error.strerror}") from error
    return [path for path, _ in cards]


def _card(one: Checkpoint, evaluations: Sequence[Measured]) -> tuple[Path, str]:
    path = one.directory / NAME
    lines = []
    for run in evaluations:
        for group in find_groups([run]):
            lines += _part(one, group, run)
    if not lines:
        raise InputError(f"{one.path}: none of the runs measured it: give a JSON of tersor eval that did, for its card")
    try:
        before = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: there is no model card to write into") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return path, replaced(before, "\n".join(lines), str(path))


def replaced(card: str, section: str, where: str) -> str:
    """Return a card with this section in place of its own, or at its end.

    Raises:
        InputError: marks of the section stand in it otherwise than once, one behind the other.
    """
    whole = f"{BEGIN}\n{section.strip()}\n{END}"
    counts = card.count(BEGIN), card.count(END)
    if counts == (0, 0):
        return f"{card.rstrip()}\n\n{whole}\n"
    before, _, rest = card.partition(BEGIN)
    _, found, behind = rest.partition(END)
    if counts != (1, 1) or not found:
        raise InputError(f"{where}: the marks {BEGIN!r} and {END!r} do not stand there once each: remove the section")
    return f"{before}{whole}{behind}"


def _part(one: Checkpoint, group: Group, run: Measured) -> list[str]:
    """Return the lines of a run that are about a checkpoint, empty where there are none."""
    models = [model for model in group.models if _is(one, model)]
    if not models:
        return []
    own, compared = run.result["environment"], group.reference is not None
    against = f" against {_plain(group.reference)}" if group.reference is not None else ""
    text = run.result.get("text")
    of_text = f" of {_plain(Path(text).name)}" if isinstance(text, str) else ""
    headings = ["run as", "bits a weight", "size", "perplexity"]
    headings += ["loss, %", "KL x 1000", "median", "p99", "flips, %"] if compared else []
    rows = [_row(model, compared) for model in models]
    floor = group.floors[0] if group.floors else None
    lines = [
        f"## Measured{against}",
        "",
        f"{group.windows} windows of {group.window} tokens{of_text}, computed on {_plain(group.computed)}; +- is one "
        "standard error over windows.",
        "",
        f"| {' | '.join(headings)} |",
        f"|{'---|' * len(headings)}",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]
    if compared:
        lines.append(
            "KL: KL(reference || model) in nats a token; its median is over windows, p99 over tokens. Loss: of"
        )
        lines.append("perplexity, above the reference's. Flips: another most probable token.")
    if floor is not None:
        value = measured(1000 * floor["kl"], times(1000, floor.get("kl_error")))
        lines.append(f"Noise floor (the reference with {_plain(floor['rounding'])}): KL x 1000 = {value}.")
    made = [f"Tersor {own.get('tersor', 'unknown')}", f"commit {own.get('commit', 'unknown')}"]
    made += [str(own[key]) for key in ("gpu", "date") if own.get(key)]
    return [*lines, f"Measured by {_plain(', '.join(made))}.", ""]


def _row(model: dict[str, Any], compared: bool) -> list[str]:
    way = [f"{model['activations']} activations"] if model.get("activations") else []
    way += [f"keys and values in {model['kv_dtype']}"] if model.get("kv_dtype") else []
    cells = [
        _plain(", ".join(way)) or "-",
        f"{model['bits_per_weight']:.3f}",
        size(model["weight_bytes"]),
        plus_minus(model["perplexity"], model.get("perplexity_error"), 3),
    ]
    if not compared:
        return cells
    return [*cells, *(["-"] * 5 if model.get("kl") is None else beside_reference(model))]


def _is(one: Checkpoint, model: dict[str, Any]) -> bool:
    """Whether a model that was measured is a checkpoint."""
    if model["weight_bytes"] != sum((one.directory / name).stat().st_size for name in one.found.files):
        return False
    label, at, way = str(model["label"]).rpartition("@")
    if (label if at and "=" in way else str(model["label"])) == one.directory.name:
        return True
    try:
        return files.user_path(str(model.get("model", ""))).resolve() == one.directory
    except OSError:
        return False


def _plain(words: object) -> str:
    """Return words on one line of a table in Markdown, in which nothing is markup."""
    flat = " ".join(str(words).split())
    return "".join(f"\\{sign}" if sign in "\\|<>`*_[]" else sign for sign in flat)
