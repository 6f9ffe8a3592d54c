"""What rows of a step read together where reading costs nothing else, and whether they may."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from tersor.engine.shared_pages import SharedPages, shared_pages, shared_size
from tersor.kernels.attention import PAGE, SHARED_QUERIES, most_parts
from tersor.kernels.tune.shared_pages import SharedCosts
from tersor.ops.attention_form import AttentionForm, Rows


def eager_costs(rows: int, kv_heads: int = 1, ctas: int = 264, part: float = 0.0) -> SharedCosts:
    """Costs by which up to so many rows read together all that they share, in as many parts as keep CTAs busy."""
    return SharedCosts(
        rows=rows, kv_heads=kv_heads, ctas=ctas, page=1.0, again=1.0, tile=1e-6, part=part, launch=0.0, turn=1e-3
    )


def share(rows: Rows, form: AttentionForm, ctas: int = 264, most: int = SHARED_QUERIES) -> SharedPages | None:
    """Let rows of one new token read together what their tables have in common; `rows.shared` says what.

    Args:
        rows: of a step.
        form: of a layer.
        ctas: that there are to keep busy.
        most: rows of an item.

    Returns:
        The plan, by rows of one new token in their order, or `None` where they share nothing.
    """
    counts, lengths = rows.starts.diff().cpu().numpy(), rows.lengths.cpu().numpy()
    ones = np.flatnonzero((counts == 1) & (lengths > 0))
    costs = eager_costs(min(SHARED_QUERIES // (form.heads // form.kv_heads), most), form.kv_heads, ctas)
    found = shared_pages(rows.pages.cpu().numpy()[ones], (lengths[ones] - 1) // PAGE, len(lengths), costs)
    numbers = np.full(shared_size(len(lengths)), -1, np.int32)  # what is beyond the items may be anything
    if found is None:
        numbers[: 1 + 3 * len(lengths)] = 0
    else:
        own = np.zeros((len(lengths), 2), np.int32)
        own[ones] = found.own
        order = ones[found.order].astype(np.int32)
        audit(found.items, order, own, rows.pages.cpu().numpy(), (lengths - 1) // PAGE, costs.rows)
        numbers[0] = len(found.items)
        numbers[1 : 1 + len(ones)] = order
        numbers[1 + len(lengths) : 1 + 3 * len(lengths)] = own.ravel()
        numbers[1 + 3 * len(lengths) :][: 5 * len(found.items)] = np.array(found.items).ravel()
    rows.shared = torch.from_numpy(numbers).to(rows.lengths.device)
    return found


def audit(
    items: list[tuple[int, int, int, int, int]],
    order: NDArray[np.int32],
    own: NDArray[np.int32],
    tables: NDArray[np.int32],
    full: NDArray[np.int32],
    most_rows: int,
) -> None:
    """Assert that every page of every row is read exactly once, with rows that have the same page in the same place."""
    reads: list[dict[int, tuple[int, int]]] = [{} for _ in tables]
    assert len(set(order.tolist())) == len(order)
    for first, count, begin, end, part in items:
        assert 1 <= count <= most_rows and begin < end and first + count <= len(order)
        members = order[first : first + count]
        assert (tables[members, begin:end] == tables[members[0], begin:end]).all()
        for row in members.tolist():
            assert part not in reads[row]
            reads[row][part] = (begin, end)
    for row, parts in enumerate(reads):
        begin, count = own[row].tolist()
        assert sorted(parts) == list(range(count)) and count <= most_parts(len(tables))
        at = 0
        for part in range(count):
            assert parts[part][0] == at
            at = parts[part][1]
        assert at == begin <= max(int(full[row]), 0)
