"""`tersor inspect`: what is in a checkpoint, layer by layer."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from tersor.cli import console, options
from tersor.cli.layers import collapse, scheme_words, shape_words

if TYPE_CHECKING:
    from tersor.checkpoint.inspect import Inspection, Item


def command(
    model: options.Model,
    revision: options.Revision = None,
    full: Annotated[
        bool,
        typer.Option("--full", help="A line for every tensor; layers that are alike share one otherwise."),
    ] = False,
    zeros: Annotated[
        bool,
        typer.Option("--zeros", help="Count zeros of weights that are stored dense, too, which reads them."),
    ] = False,
    trust_remote_code: options.TrustRemoteCode = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, a tensor at a time.")] = False,
) -> None:
    """Read the headers, then print format, bits and size of every layer."""
    from tersor.checkpoint.config import QUANT_METHOD
    from tersor.checkpoint.inspect import inspect
    from tersor.integrations.transformers.architecture import read_architecture

    found = inspect(model, partial(read_architecture, trust_remote_code=trust_remote_code), revision, zeros=zeros)
    if json:
        console.print_json(found.to_dict())
        return
    print(f"{found.model}: {_summary(found)}")
    own = found.method == QUANT_METHOD
    if full:
        lines = [_line(item.name, [item], own) for item in found.items]
    else:
        named = ((item.name, (item.shape, item.format, item.levels), item) for item in found.items)
        lines = [_line(name, items, own) for name, items in collapse(named)]
    headings = ["tensor", "count", "shape", "format", "bits/weight", "size"]
    if any(item.density is not None for item in found.items):
        headings.append("left")
    else:
        lines = [line[:-1] for line in lines]
    console.print_table(headings, lines)
    print(_totals(found))


def _line(name: str, items: list[Item], own: bool) -> list[str]:
    first = items[0]
    return [
        name.removesuffix(".weight"),
        str(len(items)),
        shape_words(first.shape),
        _format_words(first, own),
        f"{sum(item.bits_per_weight for item in items) / len(items):.3f}",
        console.size(sum(item.nbytes for item in items)),
        "" if first.density is None else _left(items),
    ]


def _left(items: list[Item]) -> str:
    """Say which part of pruned weights of one shape is left: the least and the most where they differ."""
    shares = [f"{100 * (item.density or 0.0):.1f} %" for item in sorted(items, key=lambda item: item.density or 0.0)]
    return shares[0] if shares[0] == shares[-1] else f"{shares[0]} to {shares[-1]}"


def _format_words(item: Item, own: bool) -> str:
    """Say how an item is represented: of a mixed weight how many output features each level has; `own` is Tersor's."""
    if item.levels:
        return "mixed: " + "; ".join(f"{rows} x {scheme_words(key)}" for key, rows in item.levels)
    return scheme_words(item.format) if item.compressed and own else item.format


def _summary(found: Inspection) -> str:
    parts = [found.architecture or "unknown architecture"]
    if found.method is None:
        parts.append("not compressed")
    else:
        parts.append(f"compressed by {found.method}")
    if found.provenance:
        parts.append(", ".join(f"{key} {value}" for key, value in found.provenance.items()))
    return "; ".join(parts)


def _totals(found: Inspection) -> str:
    compressed = [item for item in found.items if item.compressed]
    files = "1 file" if len(found.files) == 1 else f"{len(found.files)} files"
    text = f"{found.parameters / 1e6:,.1f} M elements in {console.size(found.nbytes)} ({files})"
    text += f": {found.bits_per_weight:.3f} bits each"
    if found.compressed_bits_per_weight is not None:
        text += f", {found.compressed_bits_per_weight:.3f} in the {len(compressed)} compressed weights"
    return text
