"""What a search hands back: a choice, what it takes, and what is proven about every other one."""

from __future__ import annotations

from dataclasses import dataclass

from tersor.planner.problem import Choice


@dataclass(frozen=True, slots=True)
class Found:
    """The best choice that a search found.

    Attributes:
        choice: an option for each block of the problem; it fits.
        seconds: what a step takes with it.
        bound: no choice that fits takes less; minus infinity where the search proves nothing.
        searched: seconds that the search took on this machine.
        method: how it was found, in a few words.
        steps: what the search counted, whatever the machine: entries of tables, plans looked at, or actions.
    """

    choice: Choice
    seconds: float
    bound: float
    searched: float
    method: str
    steps: int = 0

    @property
    def gap(self) -> float:
        """By what part of its time the choice may at most be improved: 0 is the optimum, infinity is unknown."""
        if self.bound >= self.seconds:
            return 0.0
        return (self.seconds - self.bound) / abs(self.seconds) if self.seconds else float("inf")
