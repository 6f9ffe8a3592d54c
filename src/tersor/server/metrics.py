"""Numbers of a server, as Prometheus reads them (text format 0.0.4)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tersor.engine.stats import ANSWERS, CopyStats, EngineStats

_FIRST = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_NEXT = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0)
_WHOLE = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0)

_COPIES: tuple[tuple[str, str, str, Callable[[CopyStats], float]], ...] = (
    ("healthy", "gauge", "1 while the copy answers.", lambda copy: int(copy.state == ANSWERS)),
    ("requests", "gauge", "Requests that the copy was given and that have not ended.", lambda copy: copy.requests),
    ("load_tokens", "gauge", "Tokens that the copy is expected to compute for them.", lambda copy: copy.load),
    ("requests_running", "gauge", "Those that have pages.", lambda copy: copy.engine.running),
    ("pages_used", "gauge", "Pages that they hold.", lambda copy: copy.engine.pages_used),
    ("pages_free", "gauge", "Pages that no request holds.", lambda copy: copy.engine.pages_free),
    ("prompt_tokens_total", "counter", "Tokens of prompts that it read.", lambda copy: copy.engine.prompt_tokens),
    ("prefix_hit_tokens_total", "counter", "Those that were there.", lambda copy: copy.engine.cached_tokens),
    ("generated_tokens_total", "counter", "Tokens that it drew.", lambda copy: copy.engine.generated_tokens),
    ("preemptions_total", "counter", "Times that a request lost its pages.", lambda copy: copy.engine.preemptions),
)
"""Name, kind, meaning and value of what is said of each of several copies, beside the sums."""


@dataclass
class Histogram:
    """Counts of observations at most as large as each of `bounds`, in seconds."""

    bounds: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    sum: float = 0.0
    count: int = 0

    def __post_init__(self) -> None:
        self.counts = [0] * len(self.bounds)

    def observe(self, seconds: float, times: int = 1) -> None:
        """Add an observation, once or several times."""
        self.sum += seconds * times
        self.count += times
        for index, bound in enumerate(self.bounds):
            if seconds <= bound:
                self.counts[index] += times

    def lines(self, name: str) -> list[str]:
        """Return it as lines of text."""
        rows = [f'{name}_bucket{{le="{bound:g}"}} {n}' for bound, n in zip(self.bounds, self.counts, strict=True)]
        return [
            *rows,
            f'{name}_bucket{{le="+Inf"}} {self.count}',
            f"{name}_sum {self.sum:.9g}",
            f"{name}_count {self.count}",
        ]


class Metrics:
    """What the server counts itself; what the engine counts is asked of it.

    Attributes:
        requests: (path, status) -> requests answered; 499 is a client that went away.
        prompt_tokens, completion_tokens: of answers, as their usage says.
        first: seconds from a request to its first token.
        next: seconds from a token to the next one of the same answer.
        whole: seconds of a request.
    """

    def __init__(self) -> None:
        self.requests: dict[tuple[str, int], int] = defaultdict(int)
        self.prompt_tokens = self.completion_tokens = 0
        self.first, self.next, self.whole = Histogram(_FIRST), Histogram(_NEXT), Histogram(_WHOLE)

    def text(self, stats: EngineStats, healthy: bool, queue: int, copies: Sequence[CopyStats] = ()) -> str:
        """Return all numbers; `queue` is how many prompts wait for their first token."""
        lines: list[str] = []

        def show(name: str, kind: str, meaning: str, value: float) -> None:
            head(name, kind, meaning)
            lines.append(f"tersor_{name} {value}")

        def head(name: str, kind: str, meaning: str) -> None:
            lines.extend((f"# HELP tersor_{name} {meaning}", f"# TYPE tersor_{name} {kind}"))

        head("requests_total", "counter", "HTTP requests answered, by path and status.")
        for (path, status), count in sorted(self.requests.items()):
            lines.append(f'tersor_requests_total{{path="{path}",status="{status}"}} {count}')
        show("prompt_tokens_total", "counter", "Tokens of prompts answered.", self.prompt_tokens)
        show("completion_tokens_total", "counter", "Tokens of answers.", self.completion_tokens)
        for name, meaning, histogram in (
            ("time_to_first_token_seconds", "From a request to its first token.", self.first),
            ("time_per_output_token_seconds", "From a token to the next one of the same answer.", self.next),
            ("request_seconds", "From a request to the end of its answer.", self.whole),
        ):
            head(name, "histogram", meaning)
            lines += histogram.lines(f"tersor_{name}")
        show("prompts_queued", "gauge", "Prompts that wait for their first token.", queue)
        show("requests_running", "gauge", "Requests that have pages.", stats.running)
        show("requests_waiting", "gauge", "Requests that have no pages yet.", stats.waiting)
        show("pages_used", "gauge", "Pages of keys and values that requests hold.", stats.pages_used)
        show("pages_free", "gauge", "Pages of keys and values that no request holds.", stats.pages_free)
        show("engine_prompt_tokens_total", "counter", "Tokens of prompts that the engine read.", stats.prompt_tokens)
        show("prefix_hit_tokens_total", "counter", "Those whose keys and values were there.", stats.cached_tokens)
        show("generated_tokens_total", "counter", "Tokens that the engine drew.", stats.generated_tokens)
        show("preemptions_total", "counter", "Times that a request lost its pages.", stats.preemptions)
        show("healthy", "gauge", "1 while the engine runs.", int(healthy))
        for name, kind, meaning, value in _COPIES if copies else ():
            head(f"copy_{name}", kind, meaning)
            lines += [f'tersor_copy_{name}{{copy="{number}"}} {value(copy)}' for number, copy in enumerate(copies)]
        return "\n".join(lines) + "\n"
