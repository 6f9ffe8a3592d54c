"""Which rows does a step begin and end with? Those of a table of embeddings, and the hidden states that need logits.

The torch code here is the definition; where a GPU has it a kernel serves. Nothing is read by the host.
"""

from __future__ import annotations

import functools

import torch

from tersor.errors import ShapeError
from tersor.kernels import jit, small
from tersor.ops import current
from tersor.ops.attention_form import Rows
from tersor.ops.norm import TARGETS, kernel_serves, launched_early

_launch = functools.lru_cache(1024)(small.prepare_rows)


def lookup(
    tokens: torch.Tensor,
    table: torch.Tensor,
    *,
    scale: float = 1.0,
    positions: torch.Tensor | None = None,
    first: int = 0,
    rows: Rows | None = None,
) -> torch.Tensor:
    """Return a row of a table for every token, scaled, and the row of its position added; rounded once.

    A token that is not in the table, as the -1 of a row that could not draw, gets zeros in place of its row; so does,
    in place of a position's, padding and a position that is not in that table.

    Args:
        tokens: int64 or int32 [T].
        table: [V, H] float16, bfloat16 or float32.
        scale: multiplies the rows (Gemma: the square root of H).
        positions: [P, H] in the same dtype, or `None`: learned positions (OPT, arXiv 2205.01068).
        first: row of `positions` that is of position 0 (2 for OPT).
        rows: the texts that the tokens belong to: token i of row r stands at position
            lengths[r] - (starts[r + 1] - i); needed where there are positions.

    Returns:
        [T, H] in the table's dtype.

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit.
    """
    if tokens.dim() != 1 or tokens.dtype not in (torch.int64, torch.int32) or tokens.device != table.device:
        raise ShapeError(
            f"lookup: tokens are {list(tokens.shape)} {tokens.dtype} on {tokens.device}, expected [T] in int64 or "
            f"int32 on {table.device}"
        )
    _check_table("lookup", table)
    if positions is not None:
        shape = ["P", table.shape[1]]
        if (positions.dim(), positions.shape[-1], positions.dtype) != (2, table.shape[1], table.dtype):
            raise ShapeError(
                f"lookup: positions are {list(positions.shape)} {positions.dtype}, expected {shape} {table.dtype}"
            )
        if rows is None:
            raise ShapeError("lookup: positions are learned, and rows, which say where a token stands, are missing")
    if len(tokens) and kernel_serves(table, positions):
        return _launched(tokens, table, scale, positions, first, rows)
    y = _rows(table, tokens)
    if scale == 1.0 and positions is None:
        return y
    y = y.float() * scale
    if positions is not None and rows is not None:
        y = y + _rows(positions, places(rows, len(tokens), first)).float()
    return y.to(table.dtype)


def places(rows: Rows, tokens: int, first: int = 0) -> torch.Tensor:
    """Return the position of every token of a step in its text plus `first`, int64 [T]; -1 of padding."""
    at = torch.arange(tokens, device=rows.starts.device)
    if not len(rows.lengths):
        return torch.full_like(at, -1)
    ends = rows.starts[1:].long()
    row = torch.searchsorted(ends, at, right=True)
    padded = row >= len(ends)
    row = row.clamp(max=len(ends) - 1)
    lengths = rows.lengths.long()[row]
    found = lengths - (ends[row] - at) + first
    return torch.where(padded | (lengths == 0), -1, found)


def gather_rows(x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Return the rows of x that an index names, zeros where it names none.

    Args:
        x: [T, H] float16, bfloat16 or float32.
        chosen: int64 or int32 [S].

    Returns:
        [S, H] in x's dtype.

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit.
    """
    _check_table("gather_rows", x)
    if chosen.dim() != 1 or chosen.dtype not in (torch.int64, torch.int32) or chosen.device != x.device:
        raise ShapeError(
            f"gather_rows: the index is {list(chosen.shape)} {chosen.dtype} on {chosen.device}, expected [S] in int64 "
            f"or int32 on {x.device}"
        )
    if len(chosen) and kernel_serves(x):
        return _launched(chosen, x, 1.0, None, 0, None)
    return _rows(x, chosen)


def _check_table(name: str, table: torch.Tensor) -> None:
    if table.dim() != 2 or table.dtype not in (*TARGETS, torch.float32):
        raise ShapeError(
            f"{name}: rows are taken from {list(table.shape)} {table.dtype}, expected two dimensions in float16, "
            "bfloat16 or float32"
        )


def _rows(table: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    there = (chosen >= 0) & (chosen < table.shape[0])
    if not table.shape[0]:
        return table.new_zeros(len(chosen), table.shape[1])
    return torch.where(there[:, None], table[torch.where(there, chosen, 0).long()], torch.zeros_like(table[:1]))


def _launched(
    tokens: torch.Tensor,
    table: torch.Tensor,
    scale: float,
    positions: torch.Tensor | None,
    first: int,
    rows: Rows | None,
) -> torch.Tensor:
    index = table.get_device()
    if index >= 0 and current.device() != index:
        with torch.cuda.device(index):
            return _launched(tokens, table, scale, positions, first, rows)
    tokens, table = tokens.contiguous(), table.contiguous()
    positions = None if positions is None else positions.contiguous()
    starts, lengths = (None, None) if rows is None or positions is None else (rows.starts, rows.lengths)
    count, channels = len(tokens), table.shape[1]
    out = current.empty((count, channels), (channels, 1), table.dtype)
    source = small.rows_source(TARGETS[table.dtype], tokens.dtype == torch.int64, positions is not None)
    launch = _launch(
        jit.get(source, index),
        rows=count,
        channels=channels,
        table_rows=table.shape[0],
        position_rows=0 if positions is None else positions.shape[0],
        first=first,
        texts=0 if lengths is None else len(lengths),
        scale=float(scale),
    )
    launch(
        stream=current.stream(index),
        index=tokens.data_ptr(),
        table=table.data_ptr(),
        positions=0 if positions is None else positions.data_ptr(),
        starts=0 if starts is None else starts.data_ptr(),
        lengths=0 if lengths is None else lengths.data_ptr(),
        out=out.data_ptr(),
        early=launched_early(table.device),
    )
    return out
