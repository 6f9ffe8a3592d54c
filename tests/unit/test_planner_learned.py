"""Auto-MAP's network finds the optimum of small problems, keeps limits, and gives one answer for a seed."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.planner_problems import model, random_problem

from tersor.errors import InputError
from tersor.planner import search
from tersor.planner.problem import Block, Edge, Problem
from tersor.planner.search.fold import fold
from tersor.planner.search.making import DEAD_END, Making

EPISODES = 300


@pytest.mark.parametrize(("seed", "share"), [(0, None), (2, 0.4), (3, 0.6)])
def test_the_network_finds_the_optimum_of_six_blocks(seed: int, share: float | None) -> None:
    problem = model(1, blocks=4, options=4, share=share, seed=seed)
    assert len(problem.blocks) == 6
    best = search.brute(problem)
    found = search.learned(problem, seed=seed, episodes=EPISODES)
    assert problem.fits(found.choice)
    assert found.seconds == pytest.approx(best.seconds, rel=1e-12)
    assert best.steps == 4096 > 2 * EPISODES  # it did not look at everything
    assert 0 < found.steps <= EPISODES * 6 and found.searched > 0
    assert found.bound == float("-inf") and found.gap == float("inf")
    assert f"{EPISODES} episodes" in found.method and "steps of learning" in found.method


def test_what_it_learns_is_worth_more_than_as_many_plans_at_random() -> None:
    problem = model(4, blocks=8, options=5, seed=5)
    best = search.fast(problem).seconds
    learned = search.learned(problem, seed=0, episodes=200).seconds
    drawn = search.random(problem, seed=0, count=200).seconds
    assert best <= learned <= best + (drawn - best) / 4


def test_a_seed_gives_one_answer_and_leaves_torch_as_it_was() -> None:
    import torch

    problem = model(1, blocks=6, options=5, seed=7)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    one, two = (search.learned(problem, seed=1, episodes=30) for _ in range(2))
    assert torch.equal(torch.rand(1), expected)
    assert (one.choice, one.steps, one.seconds) == (two.choice, two.steps, two.seconds)
    assert one.seconds >= search.fast(problem).seconds * (1 - 1e-12)
    assert len({search.learned(problem, seed=seed, episodes=1).seconds for seed in range(4)}) > 1


@pytest.mark.parametrize("seed", range(8))
def test_plans_that_are_made_pay_what_the_problem_says(seed: int) -> None:
    problem = random_problem(seed, limits=1)
    graph, numbers = fold(problem), np.random.default_rng(seed)
    try:
        best = search.brute(problem)
    except InputError:
        return
    making, rewards, seconds = Making(graph), [], []
    for _ in range(40):
        making.restart()
        total, ended = 0.0, making.done
        while not ended:
            assert making.seen().shape == (making.width,)
            reward, ended = making.decide(int(numbers.choice(np.flatnonzero(making.allowed()))))
            total += reward
        if making.done:
            choice = graph.choice(making.plan)
            assert problem.fits(choice) and problem.seconds(choice) >= best.seconds - 1e-12
            rewards.append(total)
            seconds.append(problem.seconds(choice))
        else:
            assert total <= DEAD_END
    if len(set(seconds)) > 1:  # a reward is a line of the seconds, and falls
        slope = (rewards[0] - rewards[np.argmax(np.array(seconds) != seconds[0])]) / (
            seconds[0] - seconds[np.argmax(np.array(seconds) != seconds[0])]
        )
        assert slope < 0
        np.testing.assert_allclose(rewards, rewards[0] + slope * (np.array(seconds) - seconds[0]), atol=1e-9)


def test_a_decision_closes_what_it_rules_out_and_decides_what_it_implies() -> None:
    def block(name: str, *taken: float) -> Block:
        return Block(name, ("x", "y"), np.array([1.0, 2.0]), np.array(taken)[:, None])

    same = np.array([[0.0, np.inf], [np.inf, 0.0]])
    blocks = (block("a", 0, 1), block("b", 0, 1), block("c", 0, 5), block("d", 0, 0))
    making = Making(fold(Problem(blocks, (Edge("a", "b", same),), (("rank 0", 6.0),))))
    assert making.node == 0 and making.allowed().tolist() == [True, True]
    making.decide(1)  # b follows, and then there is no room for the second way of c
    assert making.node == 3 and making.plan.tolist() == [1, 1, 0, -1]
    assert making.decide(0)[1] and making.done
