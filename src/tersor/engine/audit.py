"""Does everything that the scheduler hands out have exactly one owner, and does it add up?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tersor.engine.request import LEAVING, RUNNING, Request, Row, Step
from tersor.errors import TersorError

if TYPE_CHECKING:
    from tersor.engine.scheduler import Scheduler


def audit(scheduler: Scheduler) -> None:
    """Check all that must hold between two calls of a scheduler.

    Raises:
        TersorError: what does not hold.
    """
    running = [request for request in scheduler.running if request.state == RUNNING]
    holders = [*running, *scheduler.leaving]
    scheduler.cache.audit([page for request in holders for page in request.pages])
    scheduler.admission.audit()
    _check_places(scheduler, running)
    under_way: dict[Request, list[Row]] = {}
    for step in scheduler.steps:
        for row in step.rows:
            under_way.setdefault(row.request, []).append(row)
    for request in scheduler.everybody():
        _check_length(request, under_way.get(request, []))
    for request in holders:
        _check_text(request, scheduler.cache.pages.size, under_way.get(request, []))
    if scheduler.steps:
        _check_step(scheduler, scheduler.steps[-1])


def _check_places(scheduler: Scheduler, running: list[Request]) -> None:
    """Everybody is in one place: running, leaving, or in a queue without pages; every slot has one owner."""
    slots = [*scheduler.free_slots]
    placed = []
    before = None
    for request in running:
        slots.append(request.slot)
        placed.append(request)
        if before is not None and before.order >= request.order:
            raise TersorError(f"{before.id} and {request.id} do not run in order")
        before = request
    for request in scheduler.leaving:
        slots.append(request.slot)
        if request.state != LEAVING or not request.in_flight:
            raise TersorError(f"{request.id} is {request.state} among those that leave, {request.in_flight} under way")
        if request.finish_reason is None:
            placed.append(request)
    for request in scheduler.admission.everybody():
        placed.append(request)
        if request.pages or request.slot != -1:
            raise TersorError(f"{request.id} is {request.state} and has pages or a slot")
    if sorted(slots) != list(range(scheduler.limits.max_rows)):
        raise TersorError(f"slots in use and free are {sorted(slots)}, not {scheduler.limits.max_rows}")
    live = set(scheduler.everybody())
    if scheduler.unfinished != len(live):
        raise TersorError(f"{scheduler.unfinished} requests are counted that have not ended, and {len(live)} are there")
    if len(placed) != len(live) or set(placed) != live:
        raise TersorError(f"{len(live)} requests have not ended, and {len(placed)} are in a queue or have pages")


def _check_length(request: Request, rows: list[Row]) -> None:
    """Who has not ended knows its rows under way and how long its text becomes by them."""
    if request.finish_reason is not None:
        raise TersorError(f"{request.id} has ended and is counted as one that has not")
    if request.in_flight != len(rows):
        raise TersorError(f"{request.id} counts {request.in_flight} rows under way of {len(rows)}")
    if request.length != request.known + sum([row.draws for row in rows]):
        raise TersorError(f"{request.id} is {request.length} tokens long, and {request.known} are known")


def _check_text(request: Request, size: int, rows: list[Row]) -> None:
    """Tokens fit into the pages, and rows under way follow each other up to what is planned."""
    if request.room != len(request.pages) * size or request.computed > request.room:
        raise TersorError(f"{request.id} has {request.computed} tokens computed in {len(request.pages)} pages")
    if not request.computed < request.length <= request.limit:
        raise TersorError(
            f"{request.id}: {request.computed} computed of {request.length} tokens, at most {request.limit}"
        )
    end = request.computed
    for row in reversed(rows):
        if row.start + row.count != end:
            raise TersorError(f"{request.id}: a row ends at token {row.start + row.count}, the next is {end}")
        end = row.start


def _check_step(scheduler: Scheduler, step: Step) -> None:
    """A step keeps to its limits, and what its rows write nobody else holds or finds."""
    limits, size, holders = scheduler.limits, scheduler.limits.page_size, scheduler.cache.pages.holders
    if step.tokens != sum([row.count for row in step.rows]) or not 0 < step.tokens <= limits.max_step_tokens:
        raise TersorError(f"a step says that it has {step.tokens} tokens, of at most {limits.max_step_tokens}")
    if sum([row.logits for row in step.rows]) > limits.max_rows + limits.max_prompt_logits:
        raise TersorError(f"a step gives more logits than of {limits.max_prompt_logits} tokens and a row each")
    if not step.decodes <= len({row.request for row in step.rows}) == len(step.rows) <= limits.max_rows:
        raise TersorError(f"a step has {len(step.rows)} rows, of at most {limits.max_rows}, one a request")
    if step.drawing != [row for row in step.rows if row.draws]:
        raise TersorError("the rows that draw are not those of the step")
    for place, row in enumerate(step.rows):
        if place < step.decodes and not (row.count == 1 and row.draws):
            raise TersorError("a row of decoding computes more than one token")
        for page in row.request.pages[row.start // size : -(-(row.start + row.count) // size)]:
            if holders[page] != 1 or scheduler.cache.found_by_others(page):
                raise TersorError(f"{row.request.id} writes to page {page}, which others read")
