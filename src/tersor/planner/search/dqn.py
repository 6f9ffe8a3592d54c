"""Plans by reinforcement learning, as Auto-MAP makes them (arXiv 2007.04069): a baseline, over the same costs.

A network learns what is still to be paid after a decision, and decides by that. Parts of Rainbow (arXiv 1710.02298):
double Q-learning, a dueling head, prioritised replay, returns over several steps. Options that earlier decisions rule
out are masked, and what a decision implies is decided with it. Noisy layers and distributions of returns are not there.
The best plan that was met is the answer; nothing is proven of it. A seed gives one answer on one machine's CPU.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from tersor.errors import InputError
from tersor.planner.problem import Floats, Problem
from tersor.planner.search.domains import Mask
from tersor.planner.search.fast import fast
from tersor.planner.search.fold import fold
from tersor.planner.search.found import Found
from tersor.planner.search.making import Making
from tersor.planner.search.presolve import presolve
from tersor.planner.search.unfit import UnfitError, reason

HIDDEN = 128
BATCH = 32
CAPACITY = 20_000
LEARNING_RATE = 3e-3
RETURN_STEPS = 3
"""Rewards that are summed up before the network is asked what follows."""
EVERY = 2
"""Decisions between two steps of learning."""
COPIED = 50
"""Steps of learning between two copies of the network to the one that judges."""
EXPLORED = 0.8
"""The part of all episodes in which the share of random decisions falls from 1 to `LEAST_RANDOM`."""
LEAST_RANDOM = 0.1
PRIORITY, FIRST_WEIGHT = 0.6, 0.4
"""Exponents of prioritised replay (arXiv 1511.05952); that of the weights rises to 1."""


def learned(problem: Problem, *, seed: int = 0, episodes: int = 400) -> Found:
    """Return the best plan that was met while a network learnt.

    Args:
        problem: ties are kept.
        seed: of the network and of all draws.
        episodes: plans that are made.

    Raises:
        InputError: no choice fits, or none that was made.
    """
    start = time.perf_counter()
    try:
        graph = presolve(fold(problem))
        making = Making(graph)
    except UnfitError:
        raise reason(problem) from None
    player = _Player(making, seed)
    best, least = (making.plan.copy(), 0.0) if making.done else (None, float("inf"))
    for episode in range(0 if making.done else episodes):
        share = max(LEAST_RANDOM, 1 - episode / (EXPLORED * episodes))
        if player.play(share if episode < episodes - 1 else 0.0, episode / episodes):
            seconds = float(graph.evaluate(making.plan[None])[0][0])
            if seconds < least:
                best, least = making.plan.copy(), seconds
    if best is None:
        fast(problem)  # says so where nothing fits
        raise InputError(f"none of {episodes:,} plans that were made fits: make more, or search another way")
    choice = graph.choice(best)
    took = time.perf_counter() - start
    method = f"DQN, {episodes:,} episodes, {player.learnt:,} steps of learning"
    return Found(choice, problem.seconds(choice), float("-inf"), took, method, player.decisions)


class _Network(nn.Module):
    """What is still to be paid after every option: what the state is worth, and what options differ by."""

    def __init__(self, width: int, actions: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(width, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU())
        self.worth, self.differ = nn.Linear(HIDDEN, 1), nn.Linear(HIDDEN, actions)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return [states, actions] of states [states, width]."""
        inner = self.body(states)
        differ: torch.Tensor = self.differ(inner)
        worth: torch.Tensor = self.worth(inner)
        return worth + differ - differ.mean(dim=1, keepdim=True)


@dataclass(slots=True)
class _Step:
    """One decision and what came of it: the rewards up to `after`, where nothing is open if the plan ended there."""

    state: Floats
    action: int
    reward: float
    after: Floats
    allowed: Mask


class _Replay:
    """Steps that were taken, drawn by how wrong the network was about them."""

    def __init__(self, numbers: np.random.Generator) -> None:
        self._numbers = numbers
        self._steps: list[_Step] = []
        self._weights = np.zeros(CAPACITY)
        self._next, self._largest = 0, 1.0

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, step: _Step) -> None:
        """Keep a step; the oldest makes room."""
        if len(self._steps) < CAPACITY:
            self._steps.append(step)
        else:
            self._steps[self._next] = step
        self._weights[self._next] = self._largest
        self._next = (self._next + 1) % CAPACITY

    def draw(self, exponent: float) -> tuple[Floats, list[_Step], Floats]:
        """Return places of a batch, its steps, and what each counts, so that frequent ones do not count more."""
        sums = np.cumsum(self._weights[: len(self._steps)])
        places = np.searchsorted(sums, self._numbers.uniform(0, sums[-1], BATCH)).clip(max=len(self._steps) - 1)
        chances = self._weights[places] / sums[-1]
        counts = (len(self._steps) * chances) ** -exponent
        return places, [self._steps[place] for place in places], counts / counts.max()

    def judge(self, places: Floats, errors: Floats) -> None:
        """Say how wrong the network was."""
        self._weights[places] = (np.abs(errors) + 1e-3) ** PRIORITY
        self._largest = max(self._largest, float(self._weights[places].max()))


class _Player:
    """Two networks, one that learns and one that judges, and what they remember.

    Attributes:
        decisions: that were made.
        learnt: steps of learning.
    """

    def __init__(self, making: Making, seed: int) -> None:
        self._making, self._numbers = making, np.random.default_rng(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._network = _Network(making.width, making.actions)
            self._judge = _Network(making.width, making.actions)
        self._judge.load_state_dict(self._network.state_dict())
        self._optimizer = torch.optim.Adam(self._network.parameters(), lr=LEARNING_RATE)
        self._replay = _Replay(self._numbers)
        self.decisions = self.learnt = 0

    def play(self, share: float, progress: float) -> bool:
        """Make one plan; return whether it is whole.

        Args:
            share: of random decisions.
            progress: the part of all episodes that is over.
        """
        making = self._making
        making.restart()
        steps: list[_Step] = []
        ended, reward = False, 0.0
        while not ended:
            state, allowed = making.seen(), making.allowed()
            action = self._action(state, allowed, share)
            reward, ended = making.decide(action)
            steps.append(_Step(state, action, reward, making.seen(), making.allowed() & (not ended)))
            self.decisions += 1
            if self.decisions % EVERY == 0 and len(self._replay) >= BATCH:
                self._learn(FIRST_WEIGHT + (1 - FIRST_WEIGHT) * progress)
        for place, step in enumerate(steps):
            ahead = steps[place : place + RETURN_STEPS]
            total = sum(one.reward for one in ahead)
            self._replay.add(_Step(step.state, step.action, total, ahead[-1].after, ahead[-1].allowed))
        return making.done

    def _action(self, state: Floats, allowed: Mask, share: float) -> int:
        """Return an option that is open: at random, or the one of the least still to pay."""
        if self._numbers.random() < share:
            return int(self._numbers.choice(np.flatnonzero(allowed)))
        with torch.no_grad():
            values = self._network(torch.from_numpy(state).float()[None])[0].numpy()
        return int(np.where(allowed, values, -np.inf).argmax())

    def _learn(self, exponent: float) -> None:
        """Make the network less wrong about a batch of steps."""
        places, steps, counts = self._replay.draw(exponent)
        states = torch.from_numpy(np.stack([step.state for step in steps])).float()
        after = torch.from_numpy(np.stack([step.after for step in steps])).float()
        allowed = torch.from_numpy(np.stack([step.allowed for step in steps]))
        actions = torch.tensor([step.action for step in steps])
        rewards = torch.tensor([step.reward for step in steps], dtype=torch.float32)
        with torch.no_grad():
            chosen = self._network(after).masked_fill(~allowed, -torch.inf).argmax(dim=1)
            follows = self._judge(after).gather(1, chosen[:, None])[:, 0]
            aims = rewards + torch.where(allowed.any(dim=1), follows, 0.0)
        errors = self._network(states).gather(1, actions[:, None])[:, 0] - aims
        losses = nn.functional.huber_loss(errors, torch.zeros(BATCH), reduction="none")
        loss = (torch.from_numpy(counts).float() * losses).mean()
        self._optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self._network.parameters(), 10.0)
        self._optimizer.step()
        self._replay.judge(places, errors.detach().double().numpy())
        self.learnt += 1
        if self.learnt % COPIED == 0:
            self._judge.load_state_dict(self._network.state_dict())
