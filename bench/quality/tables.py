"""Make the tables of docs/claims.md, and those of docs/pruning.md, of results in `bench/results`.

    python bench/quality/tables.py
    python bench/quality/tables.py --write

A page holds each table between `<!-- claim NAME -->` and `<!-- end -->`; a test compares them with what is made here.
`--write` puts them there, otherwise they are printed.
"""

from __future__ import annotations

import argparse
import json
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import choice
from claims import CLAIMS, FORMATS, MODELS, TARGETS, Claim, Nearer, Target, Within

from tersor.evaluate import PerWindow, Quality, compare
from tersor.report.tables import loss
from tersor.report.words import measured, times

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "claims.md"
CHOICE_PAGE = ROOT / "docs" / "pruning.md"
RESULTS = ROOT / "bench" / "results"
SECTION = re.compile(r"(<!-- claim (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
HOLDS, UNSURE, FAILS = VERDICTS = ("holds", "not certain", "**does not hold**")
REACHED = "yes"
FREER = ("of single rows", "of single rows, gate and up apart")
"""What a mix might lose if kernels did not multiply units of rows, and rows of gate and up as one."""
ANCHORS = {
    "coarse": "fp6-with-coarse-scales-holds-where-int4-loses",
    "calibrated": "calibrated-fp5-and-fp6",
    "mix": "a-mix-for-a-budget-of-true-bytes",
    "six": "e2m3-or-e3m2-rows-or-groups",
    "eight": "eight-bit-activations-and-keys-and-values-in-e4m3",
    "transforms": "transforms-rotation-awq-norm-tweaking",
    "pruned": "half-of-the-weights-zero",
    "few": "outliers-and-tables",
    "targets": "targets",
}
"""Claim -> its heading on the page."""
_SURE = 2.0
"""Standard errors that a difference has to have before it says something."""


class Book:
    """All results: what was measured of each model on each text."""

    def __init__(self, results: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
        """Take (name of a file, its content) of every file."""
        found: dict[str, dict[str, Mapping[str, Any]]] = {}
        for name, result in sorted(results, key=lambda pair: pair[0]):
            text = Path(name).stem.removeprefix(f"quality_{result['reference']}_")
            found.setdefault(str(result["reference"]), {})[text] = result
        self.models = {name: found[name] for name in MODELS if name in found}

    @staticmethod
    def read(folder: Path) -> Book:
        """Return the results in a folder."""
        return Book((path.name, json.loads(path.read_text())) for path in folder.glob("quality_*_*.json"))

    def row(self, model: str, text: str, label: str) -> Mapping[str, Any] | None:
        """Return what was measured, `None` where nothing was."""
        return next((row for row in self.models[model][text]["models"] if row["label"] == label), None)

    def rows(self, model: str, label: str) -> list[Mapping[str, Any]] | None:
        """Return what was measured on every text, `None` where it lacks on one."""
        found = [self.row(model, text, label) for text in self.models[model]]
        return None if None in found else [row for row in found if row is not None]


def tables(book: Book) -> dict[str, str]:
    """Return claim -> its tables in Markdown."""
    found = {name: claim_tables(book, claim) for name, claim in CLAIMS.items()}
    return {"summary": summary(book), **found, "efforts": effort_tables(book), "targets": target_table(book)}


def pages(folder: Path) -> dict[Path, dict[str, str]]:
    """Return page -> the tables of it, from the results in a folder."""
    book = Book.read(folder)
    chosen = {"choice": choice_table(book, choice.read_times(folder)), "steps": steps_table(folder)}
    return {PAGE: tables(book), CHOICE_PAGE: chosen}


def summary(book: Book) -> str:
    """Return how many comparisons of every claim hold, and each that does not."""
    cells, against = [], []
    for name, claim in CLAIMS.items():
        lines = [line for check in claim.checks for line in _checked(book, check)]
        counts = [sum(line[-1] == verdict for line in lines) for verdict in VERDICTS]
        if lines:
            cells.append([f"[{name}](#{ANCHORS[name]})", *map(str, counts)])
        against += [f"- {model}, {text}: {said}" for said, model, text, _, _, verdict in lines if verdict == FAILS]
    targets = [found for target in TARGETS if (found := _reached(book, target))]
    if targets:
        reached = sum(found[-1] == REACHED for found in targets)
        cells.append([f"[targets](#{ANCHORS['targets']})", str(reached), "0", str(len(targets) - reached)])
    if not cells:
        return ""
    parts = _table(["claim", *VERDICTS], cells)
    return "\n".join([*parts, *(["", "Against what was claimed:", "", *against] if against else [])])


def claim_tables(book: Book, claim: Claim) -> str:
    """Return what was measured for a claim, a table for each model, and below it what of the claim holds."""
    parts: list[str] = []
    for model, results in book.models.items():
        cells = [
            [label, f"{found[0]['bits_per_weight']:.3f}", *(cell for row in found for cell in _five(row)), _made(found)]
            for label in claim.rows
            if (found := book.rows(model, label)) is not None
        ]
        if not cells:
            continue
        heads = [f"{text}: KL x 1000 | median | p99 | flips, % | loss, %" for text in results]
        parts += [caption(model, results), "", *_table(["recipe", "bits", *heads, "s"], cells), ""]
        chosen = [_chosen(found[0]) for label in claim.rows if (found := book.rows(model, label)) and "mix" in found[0]]
        if chosen:
            parts += [*_table(["mix", "rows of each level, %", "padding, %", "expected KL x 1000", *FREER], chosen), ""]
    checked = [line for check in claim.checks for line in _checked(book, check)]
    if checked:
        heads = ["claim", "model", "text", "measured", "windows", ""]
        parts += _table(heads, checked)
    return "\n".join(parts).strip()


def effort_tables(book: Book) -> str:
    """Return what each effort leaves of the KL of round to nearest, a table for each model, and the guard's line."""
    parts: list[str] = []
    for model, results in book.models.items():
        cells = []
        for scheme in FORMATS:
            nearest = book.rows(model, f"{scheme}-rtn")
            if nearest is None:
                continue
            line = [scheme, f"{nearest[0]['bits_per_weight']:.3f}", _pair(_kl(row) for row in nearest)]
            for effort in ("gptq", "gptq-high"):
                found = book.rows(model, f"{scheme}-{effort}")
                if found is None:
                    line += ["-"] * 4
                    continue
                removed = (100 * (1 - one["kl"] / own["kl"]) for one, own in zip(found, nearest, strict=True))
                lost = (measured(loss(row), times(100, row.get("perplexity_ratio_error")), sign=True) for row in found)
                line += [_pair(_kl(row) for row in found), _pair(f"{share:.0f}" for share in removed), _pair(lost)]
                line.append(_made(found))
            cells.append(line)
        if cells:
            heads = ["format", "bits", "rtn: KL x 1000"]
            heads += [f"{how}: KL x 1000 | removed, % | loss, % | s" for how in ("gptq", "high")]
            parts += [caption(model, results), "", *_table(heads, cells), "", *_guard(model, results), ""]
    return "\n".join(parts).strip()


def target_table(book: Book) -> str:
    """Return which targets are reached, those that were measured."""
    cells = [cells for target in TARGETS if (cells := _reached(book, target))]
    return "\n".join(_table(["model", "recipe", "target", "measured", "reached"], cells)) if cells else ""


def caption(model: str, results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return what all rows of a model have in common, in lines of Markdown."""
    first = next(iter(results.values()))
    facts, groups = first["environment"], first["group_size"]
    own = ", ".join(
        f"{text} {result['reference_model']['perplexity']:.3f} (noise floor {1000 * result['noise_floor']['kl']:.3f})"
        for text, result in results.items()
        if "noise_floor" in result
    )
    where = f"{facts.get('gpu') or first['device']} in {first['dtype']}, torch {facts['torch']}"
    windows = first["models"][0]["windows"] if first["models"] else 0
    said = (
        f"**{model}**, {MODELS[model]}: {windows} windows of each text, calibrated on {first['calibration']} in "
        f"{first['calibrated_in']}; -g is groups of {groups}. Perplexity of the original: {own}. On {where}, commit "
        f"{facts['commit']}."
    )
    return "\n".join(textwrap.wrap(said, 120))


def _checked(book: Book, check: Nearer | Within) -> list[list[str]]:
    lines = []
    for model, results in book.models.items():
        for text in results:
            judge: Callable[..., list[str] | None] = _nearer if isinstance(check, Nearer) else _within
            found = judge(book, model, text, check)
            if found is not None:
                lines.append([found[0], model, text, *found[1:]])
    return lines


def _nearer(book: Book, model: str, text: str, check: Nearer) -> list[str] | None:
    one, two = (book.row(model, text, label) for label in (check.first, check.other))
    if one is None or two is None:
        return None
    found = compare(_quality(one), _quality(two, 1 + check.slack))
    if check.quantity == "kl":
        gap, error, better, factor, what = found.kl_difference, found.kl_difference_error, found.kl_better, 1000, "KL"
    else:
        gap, error, better = (
            found.log_perplexity_difference,
            found.log_perplexity_difference_error,
            found.log_perplexity_better,
        )
        factor, what = 100, "perplexity"
    assert gap is not None
    shown = measured(-factor * gap, times(factor, error), sign=True)
    said = f"{what} x 1000: {shown}" if factor == 1000 else f"log perplexity x 100: {shown}"
    much = f" times {1 + check.slack:g}" if check.slack else ""
    claim = f"{check.first} has less {what} than {check.other}{much}"
    return [claim, said, f"{better} of {found.windows}", _verdict(gap, error)]


def _within(book: Book, model: str, text: str, check: Within) -> list[str] | None:
    row = book.row(model, text, check.first)
    if row is None:
        return None
    error = times(100, row.get("perplexity_ratio_error"))
    claim = f"{check.first} loses at most {check.most:g} % of perplexity"
    return [claim, f"loss: {measured(loss(row), error, sign=True)} %", "", _verdict(check.most - loss(row), error)]


def _verdict(gap: float, error: float | None) -> str:
    """Return whether a claim holds, by how much the difference in its favour exceeds its standard error."""
    if error is None or abs(gap) <= _SURE * error:
        return UNSURE
    return HOLDS if gap > 0 else FAILS


def _reached(book: Book, target: Target) -> list[str]:
    """Return the cells of a target, none where it was not measured."""
    if target.model not in book.models:
        return []
    texts = [text for text in book.models[target.model] if target.text in ("", text)]
    if target.kl:
        wanted = dict(target.kl)
        found = {text: book.row(target.model, text, target.recipe) for text in wanted if text in texts}
        if len(found) < len(wanted) or None in found.values():
            return []
        rows = {text: row for text, row in found.items() if row is not None}
        values = {text: 1000 * row["kl"] for text, row in rows.items()}
        beyond = {text: values[text] - most for text, most in wanted.items()}
        good = all(gap <= 1000 * target.errors * (rows[text].get("kl_error") or 0.0) for text, gap in beyond.items())
        words = " / ".join(f"{most:g}" for most in wanted.values())
        words += f" and {target.errors:g} standard errors" if target.errors else ""
        said = f"KL x 1000 at most {words} ({', '.join(wanted)})"
        shown = " / ".join(measured(value) for value in values.values())
        return [target.model, target.recipe, said, shown, REACHED if good else "**no**"]
    pairs = [[book.row(target.model, text, label) for label in (target.recipe, target.nearest)] for text in texts]
    shares = [1 - one["kl"] / own["kl"] for one, own in pairs if one is not None and own is not None]
    if len(shares) < len(texts) or not texts:
        return []
    assert target.share is not None
    said = f"removes {100 * target.share:.0f} % of the KL of round to nearest ({', '.join(texts)})"
    good = min(shares) >= target.share
    shown = " / ".join(f"{100 * share:.0f} %" for share in shares)
    return [target.model, target.recipe, said, shown, REACHED if good else "**no**"]


def _guard(model: str, results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a line that says whether anything of a model exploded, where something was calibrated."""
    rows = [row for result in results.values() for row in result["models"] if "worst_layer" in row]
    if not rows:
        return []
    calibrated = {row["recipe"] for row in rows}
    worst = max(rows, key=loss)
    layers = max(row["worst_layer"] for row in rows)
    said = (
        f"{model}: of {len(calibrated)} calibrated recipes the largest loss of perplexity is {loss(worst):+.1f} % "
        f"({worst['label']}); the layer that gained least has {layers:.3f} of the loss that round to nearest has there."
    )
    return textwrap.wrap(said, 120)


def _quality(row: Mapping[str, Any], factor: float = 1.0) -> Quality:
    """Return what was measured, with a multiple of its divergences."""
    kept = {name: tuple(values) for name, values in row["per_window"].items()}
    if "kl" in kept:
        kept["kl"] = tuple(factor * value for value in kept["kl"])
    return Quality(
        windows=row["windows"],
        window=row["window"],
        tokens=row["tokens"],
        perplexity=row["perplexity"],
        perplexity_error=row.get("perplexity_error"),
        per_window=PerWindow(**kept),
    )


def _five(row: Mapping[str, Any]) -> list[str]:
    return [
        _kl(row, error=True),
        measured(1000 * row["kl_median"]),
        measured(1000 * row["kl_p99"]),
        measured(100 * row["flips"], times(100, row.get("flips_error"))),
        measured(loss(dict(row)), times(100, row.get("perplexity_ratio_error")), sign=True),
    ]


def _kl(row: Mapping[str, Any], error: bool = False) -> str:
    return measured(1000 * row["kl"], times(1000, row.get("kl_error")) if error else None)


def _made(found: Sequence[Mapping[str, Any]]) -> str:
    """Return the seconds that a checkpoint took to make, and on what, where that is not the device of the others."""
    row = found[0]
    return f"{row['seconds']:.0f}" + (f" ({row['device']})" if "device" in row else "")


def _chosen(row: Mapping[str, Any]) -> list[str]:
    """Return how many rows got each level of a mix, and what its losses are expected to be, where they are a KL."""
    mix = row["mix"]
    shares = ", ".join(
        f"{level.removesuffix(':float16')} {100 * share:.0f}"
        for level, share in zip(mix["levels"], mix["shares"], strict=True)
    )
    losses = (mix[name] for name in ("loss", "loss_without_units", "loss_without_pairs_and_units"))
    known = not row["recipe"].startswith("mixllm")
    expected = [measured(1000 * value) if known else "-" for value in losses]
    return [row["label"], shares, f"{100 * mix['padding_bytes'] / mix['bytes']:.2f}", *expected]


def _pair(values: Iterable[str]) -> str:
    return " / ".join(values)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    first = f"| {' | '.join(heads)} |"
    return [first, "|" + "---|" * (first.count("|") - 1), *(f"| {' | '.join(row)} |" for row in rows)]


def choice_table(book: Book, times: choice.Times) -> str:
    """Return what dense weights and half of them take and lose."""
    heads, cells = choice.cells(times, list(book.models), book.rows)
    return "\n".join(_table(heads, cells))


def steps_table(folder: Path) -> str:
    """Return what decode steps of whole models take, empty where none was timed."""
    heads, cells = choice.steps(folder)
    return "\n".join(_table(heads, cells)) if cells else ""


def page(text: str, made: Mapping[str, str]) -> str:
    """Return a page with these tables in their places.

    Raises:
        SystemExit: it has a place for a table that there is not, or none for one that there is.
    """
    places = [match[2] for match in SECTION.finditer(text)]
    if sorted(places) != sorted(made):
        raise SystemExit(f"places for {', '.join(places)}, and tables {', '.join(made)}")
    shown = {name: f"\n{table}\n\n" if table else "" for name, table in made.items()}
    return SECTION.sub(lambda match: f"{match[1]}{shown[match[2]]}{match[4]}", text)


def main() -> None:
    """Print the tables, or write them into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--write", action="store_true", help="put the tables into their pages")
    given = parser.parse_args()
    for path, made in pages(given.results).items():
        if given.write:
            path.write_text(page(path.read_text(), made))
        else:
            print("\n\n".join(f"## {name}\n\n{table}" for name, table in made.items()), end="\n\n")


if __name__ == "__main__":
    main()
