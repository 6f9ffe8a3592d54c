"""What became of a compression: tables and sums for a person, JSON for a program."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

from tersor.cli import console
from tersor.cli.layers import collapse, scheme_words, shape_words

if TYPE_CHECKING:
    from tersor.convert.report import Report, Row


def give(report: Report, json: bool) -> None:
    """Print what was done, or in a dry run would be: as JSON where that is asked for; warnings go to stderr."""
    for warning in report.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if json:
        console.print_json(report.to_dict())
    elif report.output is None:
        _print_dry_run(report)
    else:
        _print_report(report)


def _print_dry_run(report: Report) -> None:
    """Print a line for every kind of tensor: what would become of it."""
    _warn(report)
    alike = ((row, None if row.density is not None else row.bytes_after) for row in report.rows)
    named = ((row.name, (row.shape, row.scheme, row.note, after), row) for row, after in alike)
    lines = []
    for name, rows in collapse(named):
        first = rows[0]
        kept = f"kept: {first.note}" if first.note else "kept"
        lines.append(
            [
                name.removesuffix(".weight"),
                str(len(rows)),
                shape_words(first.shape),
                scheme_words(first.scheme) if first.scheme else kept,
                f"{_mean_bits(rows):.3f}",
                console.size(sum(row.bytes_before for row in rows)),
                console.size(sum(row.bytes_after for row in rows)),
            ]
        )
    _print_method(report)
    print(f"{report.source}: what would be written, in {_files(report)}")
    console.print_table(["tensor", "count", "shape", "becomes", "bits/weight", "before", "after"], lines)
    print(_totals(report))
    _print_pruned(report)
    if report.left:
        print(_left(report))


def _print_pruned(report: Report) -> None:
    """Print how much is left of the weights that are stored sparse."""
    found = [row for row in report.rows if row.density is not None]
    if found:
        sizes = [math.prod(row.shape) for row in found]
        left = sum(size * (row.density or 0.0) for size, row in zip(sizes, found, strict=True)) / sum(sizes)
        what = f"{len(found)} pruned weight{'s' * (len(found) > 1)}"
        print(f"{what} stored sparse, of whose elements {100 * left:.1f} % are left")


def _print_report(report: Report) -> None:
    """Print a line for every scheme: tensors, bits per weight, sizes, worst error and where."""
    _warn(report)
    _print_method(report)
    groups: dict[str | None, list[Row]] = {}
    for row in report.rows:
        groups.setdefault(row.scheme, []).append(row)
    lines = []
    for scheme in sorted(groups, key=lambda scheme: (scheme is None, scheme or "")):
        rows = groups[scheme]
        worst = max(rows, key=lambda row: row.relative_error or 0.0)
        lines.append(
            [
                scheme_words(scheme) if scheme else "kept as they are",
                str(len(rows)),
                f"{_mean_bits(rows):.3f}",
                console.size(sum(row.bytes_before for row in rows)),
                console.size(sum(row.bytes_after for row in rows)),
                f"{100 * worst.relative_error:.2f} %" if worst.relative_error is not None else "-",
                worst.name.removesuffix(".weight") if scheme else "-",
            ]
        )
    console.print_table(
        ["format", "tensors", "bits/weight", "before", "after", "worst error", "where"],
        lines,
    )
    print(_totals(report))
    if report.mix is not None:
        print(_of_mix(report.mix))
    _print_pruned(report)
    if report.left:
        print(_left(report))
    rate = report.bytes_read / 1e6 / report.stream_seconds if report.stream_seconds else 0.0
    print(f"{report.output}: {_files(report)} written in {report.seconds:.1f} s, weights at {rate:.0f} MB/s")


def _warn(report: Report) -> None:
    """Say first where most of a model is not what was asked for."""
    if report.mostly_left:
        print(
            f"warning: only {100 * report.linear_share:.0f} % of the linear weights {_became(report)} compressed; what "
            "was left alone, and why, stands below"
        )


def _became(report: Report) -> str:
    return "would be" if report.output is None else "were"


def _left(report: Report) -> str:
    """Return a line for every reason for which tensors stayed as they are."""
    lines = [
        f"  {console.size(left.nbytes)} in {left.tensors} tensor{'s' * (left.tensors > 1)}: {left.reason}, such as "
        f"{left.example.removesuffix('.weight')}"
        for left in report.left
    ]
    return "\n".join(["left as they are:", *lines])


def _print_method(report: Report) -> None:
    """Print what a compressed source is decoded from: its errors come on top of those of the table."""
    if report.source_method:
        print(
            f"{report.source} is compressed by {report.source_method} already: decoded on the way, errors are against "
            "the decoded weights"
        )


def _totals(report: Report) -> str:
    ratio = report.bytes_before / report.bytes_after if report.bytes_after else 1.0
    times = f"{ratio:.2f} times smaller" if ratio >= 1 else f"{1 / ratio:.2f} times larger"
    return (
        f"{len(report.compressed)} of {len(report.rows)} tensors compressed to {report.bits_per_weight:.3f} bits a "
        f"weight; {console.size(report.bytes_before)} become {console.size(report.bytes_after)}, {times}"
    )


def _of_mix(mix: dict[str, Any]) -> str:
    """Return what the levels of output features take and are expected to lose."""
    taken = f"{mix['bits_per_weight']:.3f} true bits a weight, {console.size(mix['bytes'])}"
    if "predicted_seconds" in mix:
        taken += f", {1e3 * mix['predicted_seconds']:.4g} ms predicted for the linears of {mix['predicted_for']}"
    lost = "nats a token expected to be lost" if mix["score"] == "kl" else f"lost by the score {mix['score']}"
    return f"output features have levels of {taken}: {mix['loss']:.3g} {lost}{_price(mix)}"


def _price(mix: dict[str, Any]) -> str:
    """Return what it costs that kernels multiply features together; nothing of a count rule, which asks no kernel."""
    from tersor.layouts.blocks import UNIT_OC

    loss, pairs, free = mix["loss"], mix["loss_without_units"], mix["loss_without_pairs_and_units"]
    if not free < loss:
        return ""
    return (
        f"\n  of that {100 * (pairs - free) / loss:.1f} % because gate and up of a channel have one level, and "
        f"{100 * (loss - pairs) / loss:.1f} % because kernels take units of {UNIT_OC} rows; "
        f"{console.size(mix['padding_bytes'])} of the bytes fill units up"
    )


def _files(report: Report) -> str:
    return "1 file" if len(report.files) == 1 else f"{len(report.files)} files"


def _mean_bits(rows: list[Row]) -> float:
    from tersor.convert.report import mean_bits

    return mean_bits(rows)
