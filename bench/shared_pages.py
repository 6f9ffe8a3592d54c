"""How long does decode attention take whose rows share pages, read together and each by itself, and what was predicted?

    python bench/attention.py --groups

A step has rows of one new token in groups; each group begins with the same pages, and every row goes on by itself. Both
ways are timed as `bench/attention.py` times steps. `choice` is what `kernels.tune.shared_pages` chooses by its
constants, `loss` how much longer that takes than the better way. At the end constants are fitted to what was measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tersor import hardware, ops
from tersor.bench import timing
from tersor.engine.shared_pages import SharedPages, best, shared_size
from tersor.kernels.attention import Kind
from tersor.kernels.tune.shared_pages import SharedCosts, shared_costs
from tersor.ops.attention_form import PAGE

ROWS = (8, 16, 32, 64, 128, 256)
GROUPS = (2, 4, 8, 16, 64, 256)
PAGES = (1, 4, 8, 31, 125)
OWN = (40, 250)
"""Rows of a step, rows of a group, pages that a group shares, and tokens that each row has behind them."""
LEAST_BYTES = 300 << 20
MOST_CACHES = 60
MOST_BYTES = 24 << 30
START = 3.94e-6
"""Seconds that attention takes where there is nothing to read, which both ways have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A step, by its groups.

    Attributes:
        rows, group, pages, own: as in `ROWS`, `GROUPS`, `PAGES` and `OWN`.
    """

    rows: int
    group: int
    pages: int
    own: int

    @property
    def length(self) -> int:
        """Tokens of a text."""
        return self.pages * PAGE + self.own

    @property
    def distinct(self) -> int:
        """Pages of the step."""
        return self.rows // self.group * self.pages + self.rows * -(-self.own // PAGE)

    def table(self) -> torch.Tensor:
        """Return the pages of rows, int32 [rows, pages of a text]; numbers are in random order and begin with 1."""
        numbers = (torch.randperm(self.distinct, generator=torch.Generator().manual_seed(0)) + 1).int()
        shared = numbers[: self.rows // self.group * self.pages].view(-1, 1, self.pages)
        own = numbers[shared.numel() :].view(self.rows, -1)
        return torch.cat([shared.expand(-1, self.group, -1).reshape(self.rows, self.pages), own], 1)

    def plan(self, costs: SharedCosts) -> SharedPages:
        """Return how groups are read together, which none of them refuses."""
        full = np.full(self.rows, (self.length - 1) // PAGE, np.int32)
        willing = replace(costs, tile=costs.tile * 1e-3, part=costs.part * 1e-3)
        found = best(self.table().numpy(), full, self.rows, costs, willing)
        assert found is not None
        return found

    def apart(self, costs: SharedCosts) -> float:
        """Return the predicted seconds of rows that read by themselves."""
        repeated = self.rows // self.group * (self.group - 1) * self.pages
        return START + self.distinct * costs.page + repeated * costs.again


def cases() -> Iterator[Case]:
    """Yield steps whose texts fit the memory that they may take."""
    for rows in ROWS:
        for group in (size for size in GROUPS if size <= rows):
            for pages in PAGES:
                for own in OWN if pages in (8, 31) else OWN[1:]:
                    yield Case(rows=rows, group=group, pages=pages, own=own)


def microseconds(case: Case, form: ops.AttentionForm, dtype: torch.dtype, shared: torch.Tensor | None) -> float:
    """Return the time of one launch, or of the two where rows read pages together."""
    page_bytes = ops.PagedCache.empty(1, form, dtype).pages.nbytes
    nbytes = case.distinct * page_bytes
    count = min(max(2, -(-LEAST_BYTES // nbytes)), MOST_CACHES, max(1, MOST_BYTES // nbytes))
    caches = [ops.PagedCache.empty(1 + case.distinct, form, dtype, "cuda") for _ in range(count)]
    for cache in caches:
        cache.pages.view(torch.int8).random_(-60, 60)  # any finite numbers
    starts = torch.arange(case.rows + 1, dtype=torch.int32, device="cuda")
    lengths = torch.full((case.rows,), case.length, dtype=torch.int32, device="cuda")
    rows = ops.Rows(starts, lengths, case.table().cuda(), 1, case.length, True, shared)
    qkv = torch.randn(case.rows, form.qkv_channels, dtype=torch.float16, device="cuda")
    rotary = torch.randn(case.length, form.rotary_dim, device="cuda")
    calls = [lambda cache=cache: ops.attend(qkv, cache, rows, form, rotary) for cache in caches]
    return timing.graph_microseconds(calls * max(1, 60 // count), replays=5)


def measure(form: ops.AttentionForm, e4m3: bool) -> list[dict[str, Any]]:
    """Time all steps in both ways, print and return what was found, and print constants that fit it."""
    kind = Kind(head_dim=form.head_dim, dtype="float16", e4m3=e4m3)
    costs = shared_costs(kind, form.heads, form.kv_heads, hardware.of_device(0))
    print(costs)
    found, dtype = [], torch.float8_e4m3fn if e4m3 else torch.float16
    for case in cases():
        plan = case.plan(costs)
        numbers = np.zeros(shared_size(case.rows), np.int32)
        plan.write(numbers, case.rows)
        apart = microseconds(case, form, dtype, None)
        together = microseconds(case, form, dtype, torch.from_numpy(numbers).cuda())
        row = entry(case, plan, costs, apart, together)
        print(line(row), flush=True)
        found.append(row)
    losses = [row["loss"] for row in found]
    print(f"loss of the choice: {statistics.mean(losses):.1%} on average, {max(losses):.1%} at most")
    for name, seconds in fitted(found).items():
        print(f"{name:8} {seconds * 1e9:10.1f} ns, now {getattr(costs, name, START) * 1e9:10.1f}")
    return found


def entry(case: Case, plan: SharedPages, costs: SharedCosts, apart: float, together: float) -> dict[str, Any]:
    """Return what is written of a step: its times in microseconds, those predicted, and what the fit needs."""
    expected = case.apart(costs)
    chosen = together if plan.saved(costs) > 0 else apart
    return {
        "rows": case.rows,
        "group": case.group,
        "pages": case.pages,
        "own": case.own,
        "apart": round(apart, 2),
        "together": round(together, 2),
        "apart_predicted": round(expected * 1e6, 2),
        "together_predicted": round((expected - plan.saved(costs)) * 1e6, 2),
        "loss": chosen / min(apart, together) - 1,
        "chosen": "together" if plan.saved(costs) > 0 else "apart",
        "distinct": case.distinct,
        "again": plan.again,
        "read_alone": case.distinct - plan.pages,
        "tiles": plan.tiles,
        "parts": plan.parts,
        "turns": plan.turns(costs),
    }


def line(row: dict[str, Any]) -> str:
    """Return a step and its times as one line."""
    return (
        f"{row['rows']:4} rows by {row['group']:3}, {row['pages']:4} pages and {row['own']:4} tokens: "
        f"apart {row['apart']:8.2f} us ({row['apart_predicted']:8.2f} predicted), "
        f"together {row['together']:8.2f} ({row['together_predicted']:8.2f}), "
        f"choice {row['chosen']:8} loss {row['loss']:6.1%}"
    )


def fitted(found: list[dict[str, Any]]) -> dict[str, float]:
    """Return constants, in seconds, of the least mean square of log(predicted / measured), of both ways together.

    Rows by themselves take start + distinct page + again again. Rows together take start + alone page + launch +
    parts part + the greater of tiles tile and turns turn.
    """
    from scipy.optimize import minimize

    names = ("start", "page", "again", "launch", "tile", "part", "turn")
    count = {name: np.array([row[name] for row in found], np.float64) for name in found[0] if name != "chosen"}

    def error(logs: NDArray[np.float64]) -> float:
        cost = dict(zip(names, np.exp(logs), strict=True))
        apart = cost["start"] + count["distinct"] * cost["page"] + count["again"] * cost["again"]
        read = np.maximum(count["tiles"] * cost["tile"], count["turns"] * cost["turn"])
        together = cost["start"] + count["read_alone"] * cost["page"] + cost["launch"] + read
        together += count["parts"] * cost["part"]
        off = np.log(apart / count["apart"]), np.log(together / count["together"])
        return float(np.square(off).mean())

    begun = np.log([4, 0.06, 0.04, 2, 0.08, 0.05, 0.9])
    draw = np.random.default_rng(0)
    runs = [
        minimize(error, begun + draw.normal(0, 0.4, len(names)), method="Nelder-Mead", options={"maxiter": 8000})
        for _ in range(12)
    ]
    best = min(runs, key=lambda run: run.fun)
    return dict(zip(names, (np.exp(best.x) * 1e-6).tolist(), strict=True))
