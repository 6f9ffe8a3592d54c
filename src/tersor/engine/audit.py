"""Does everything that the scheduler hands out have exactly one owner, and does it add up?"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from tersor.engine.request import LEAVING, RUNNING, Request, Step
from tersor.errors import TersorError

if TYPE_CHECKING:
    from tersor.engine.scheduler import Scheduler


def audit(scheduler: Scheduler) -> None:
    """Check all that must hold between two calls of a scheduler.

    Raises:
        TersorError: what does not hold.
    """
    holders = [request for request in scheduler.running if request.state == RUNNING] + list(scheduler.leaving)
    scheduler.cache.audit(page for request in holders for page in request.pages)
    scheduler.admission.audit()
    _check_slots(scheduler, holders)
    _check_queues(scheduler, holders)
    under_way = _rows(scheduler)
    for request in holders:
        _check_text(request, scheduler.cache.pages.size, under_way.get(request, []))
    if scheduler.steps:
        _check_step(scheduler, scheduler.steps[-1])


def _check_slots(scheduler: Scheduler, holders: list[Request]) -> None:
    slots = [request.slot for request in holders] + list(scheduler.free_slots)
    if sorted(slots) != list(range(scheduler.limits.max_rows)):
        raise TersorError(f"slots in use and free are {sorted(slots)}, not {scheduler.limits.max_rows}")


def _check_queues(scheduler: Scheduler, holders: list[Request]) -> None:
    """Everybody is in one place: running, leaving, or without pages in a queue."""
    running = [request for request in holders if request.state == RUNNING]
    if any(a.order >= b.order for a, b in pairwise(running)):
        raise TersorError("running requests are not in order")
    if any(request.state != LEAVING for request in scheduler.leaving):
        raise TersorError("one that leaves does not")
    queued = list(scheduler.admission.everybody())
    if any(request.pages or request.slot != -1 for request in queued):
        raise TersorError("a request that waits has pages or a slot")
    live = set(scheduler.everybody())
    if any(request.finish_reason is not None for request in live):
        raise TersorError("a request that has ended is counted as one that has not")
    placed = queued + [request for request in holders if request.finish_reason is None]
    if len(placed) != len(live) or set(placed) != live:
        raise TersorError(f"{len(live)} requests have not ended, and {len(placed)} are in a queue or have pages")


def _rows(scheduler: Scheduler) -> dict[Request, list[tuple[int, int, bool]]]:
    """Return start, end and whether a token is drawn of the rows under way, by request; check their numbers."""
    found: dict[Request, list[tuple[int, int, bool]]] = {}
    for step in scheduler.steps:
        for row in step.rows:
            found.setdefault(row.request, []).append((row.start, row.start + row.count, row.draws))
    for request in {*found, *scheduler.everybody()}:
        rows = found.get(request, [])
        if request.in_flight != len(rows):
            raise TersorError(f"{request.id} counts {request.in_flight} rows under way of {len(rows)}")
        if request.finish_reason is None and request.length != request.known + sum(draws for _, _, draws in rows):
            raise TersorError(f"{request.id} is {request.length} tokens long, and {request.known} are known")
    return found


def _check_text(request: Request, size: int, rows: list[tuple[int, int, bool]]) -> None:
    """Tokens fit into the pages, and rows under way follow each other up to what is planned."""
    if request.room != len(request.pages) * size or not request.computed <= request.room:
        raise TersorError(f"{request.id} has {request.computed} tokens computed in {len(request.pages)} pages")
    if not request.computed < request.length <= request.limit:
        raise TersorError(
            f"{request.id}: {request.computed} computed of {request.length} tokens, at most {request.limit}"
        )
    if rows and [end for _, end, _ in rows] != [start for start, _, _ in rows[1:]] + [request.computed]:
        raise TersorError(f"rows {rows} of {request.id} leave a gap before token {request.computed}")


def _check_step(scheduler: Scheduler, step: Step) -> None:
    """A step keeps to its limits, and what its rows write nobody else holds or finds."""
    limits, cache = scheduler.limits, scheduler.cache
    if step.tokens != sum(row.count for row in step.rows) or not 0 < step.tokens <= limits.max_step_tokens:
        raise TersorError(f"a step says that it has {step.tokens} tokens, of at most {limits.max_step_tokens}")
    if not step.decodes <= len({row.request for row in step.rows}) == len(step.rows) <= limits.max_rows:
        raise TersorError(f"a step has {len(step.rows)} rows, of at most {limits.max_rows}, one a request")
    if any(row.count != 1 or not row.draws for row in step.rows[: step.decodes]):
        raise TersorError("a row of decoding computes more than one token")
    if step.drawing != [row for row in step.rows if row.draws]:
        raise TersorError("the rows that draw are not those of the step")
    for row in step.rows:
        pages = row.request.pages
        written = pages[row.start // cache.pages.size : -(-(row.start + row.count) // cache.pages.size)]
        if pages and any(cache.pages.holders[page] != 1 or cache.found_by_others(page) for page in written):
            raise TersorError(f"{row.request.id} writes to a page that others read")
