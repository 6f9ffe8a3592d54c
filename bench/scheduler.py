"""Time what the scheduler costs on the host, with a model that does nothing.

    python bench/scheduler.py --requests 32,512

Requests of 500 tokens that all decode, as an engine runs them: step N + 1 is scheduled, then step N is finished, whose
tokens are a list at hand. Microseconds a step, of several hundred of them, new pages and published ones among them: the
median, the mean, and the 99th of 100. `begin` is the step in which all of them are admitted, their prompts digested.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time

from tersor.engine.limits import Limits
from tersor.engine.params import SamplingParams
from tersor.engine.request import continuations
from tersor.engine.scheduler import Scheduler

PROMPT = 500
STEPS = 512


def main() -> None:
    """Parse the command line, measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", default="1,32,128,512,1024", help="numbers of requests")
    arguments = parser.parse_args()
    for count in (int(count) for count in arguments.requests.split(",")):
        print("  ".join(f"{key} {value:.0f}" for key, value in measure(count).items()), flush=True)


def measure(count: int) -> dict[str, float]:
    """Return microseconds a step of so many requests."""
    limits = Limits(
        pages=count * ((PROMPT + STEPS) // 64 + 3), max_rows=count, max_step_tokens=count * (PROMPT + 1), context=4096
    )
    scheduler = Scheduler(limits)
    for number in range(count):
        prompt = [number, *range(PROMPT - 1 - number % 64)]
        for request in continuations(str(number), prompt, SamplingParams(max_tokens=STEPS + 8), stop_tokens=STOPS):
            scheduler.add(request)
    drawn = [7] * count
    start = time.perf_counter()
    before = scheduler.schedule()
    begin = time.perf_counter() - start
    assert before is not None and len(before.rows) == count
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        step = scheduler.schedule()
        scheduler.finish(before, drawn)
        times.append(time.perf_counter() - start)
        assert step is not None and step.decodes == count
        before = step
    times.sort()
    found = {"median": statistics.median(times), "mean": statistics.mean(times), "99 %": times[len(times) * 99 // 100]}
    return {"requests": count} | {name: 1e6 * seconds for name, seconds in {**found, "begin": begin}.items()}


STOPS = frozenset((2, 128001))

if __name__ == "__main__":
    gc.collect()
    main()
