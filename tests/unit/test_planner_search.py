"""Searches of the planner find the optimum: held to every choice there is, and to each other where those are many."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from helpers.planner_problems import model, random_problem

from tersor.errors import InputError, UnsupportedError
from tersor.planner import search
from tersor.planner.problem import Block, Choice, Edge, Problem
from tersor.planner.search import elimination
from tersor.planner.search.fold import fold
from tersor.planner.search.presolve import presolve

KINDS = {
    "any graph": {},
    "a chain": {"chain": True},
    "one limit": {"limits": 1},
    "a chain with a limit": {"chain": True, "limits": 1},
    "two limits": {"limits": 2},
    "ties": {"ties": True},
    "ties and a limit": {"ties": True, "limits": 1},
    "ties and three limits": {"ties": True, "limits": 3},
}

SEARCHES = {
    "fast": search.fast,
    "full": lambda problem: search.full(problem, gap=0.0),
    "HiGHS alone": lambda problem: search.full(problem, gap=0.0, alone=True),
}


def block(name: str, *seconds: float, taken: list[float] | None = None, tie: str = "") -> Block:
    """Return a block with options of these seconds and, of one limit, these bytes."""
    nbytes = np.zeros((len(seconds), 0)) if taken is None else np.array(taken)[:, None]
    return Block(name, tuple(f"way {place}" for place in range(len(seconds))), np.array(seconds), nbytes, tie)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SEARCHES)
def test_exact_searches_equal_all_choices_looked_at(kind: str, name: str) -> None:
    met = 0
    for seed in range(25):
        problem = random_problem(seed, **KINDS[kind])
        try:
            best = search.brute(problem)
        except InputError as error:
            with pytest.raises(InputError) as caught:
                SEARCHES[name](problem)
            assert str(caught.value) == str(error)
            continue
        found = SEARCHES[name](problem)
        assert problem.fits(found.choice) and found.seconds == problem.seconds(found.choice)
        assert found.seconds == pytest.approx(best.seconds, rel=1e-9)
        assert found.gap <= 1e-9 and found.bound <= best.seconds * (1 + 1e-9)
        met += 1
    assert met >= 10


@pytest.mark.parametrize("seed", range(12))
def test_what_is_decided_before_a_search_keeps_the_optimum(seed: int) -> None:
    problem = random_problem(seed, blocks=8, options=3, limits=seed % 3, ties=seed % 2 == 1)
    try:
        best = search.brute(problem).seconds
    except InputError:
        return
    graph = presolve(fold(problem))
    plans = np.stack(np.meshgrid(*(np.arange(size) for size in graph.sizes), indexing="ij"), axis=-1)
    plans = plans.reshape(-1, len(graph.sizes))
    seconds, taken = graph.evaluate(plans)
    fits = (taken <= graph.room).all(axis=1)
    assert seconds[fits].min() == pytest.approx(best)
    choice = graph.choice(plans[np.where(fits, seconds, np.inf).argmin()])
    assert problem.fits(choice) and problem.seconds(choice) == pytest.approx(best)
    assert len(plans) < search.brute(problem).steps  # something was decided


def test_blocks_that_imply_each_other_become_one() -> None:
    same = np.where(np.eye(3, dtype=bool), 0.0, np.inf)
    blocks = tuple(block(name, 3.0, 1.0, 2.0) for name in "abc")
    graph = presolve(fold(Problem(blocks, (Edge("a", "b", same), Edge("b", "c", same)))))
    assert graph.sizes == [1] and graph.choice([0]) == {"a": 1, "b": 1, "c": 1}


def test_an_option_that_is_beaten_whatever_is_beside_is_left_out() -> None:
    pairs = np.array([[0.0, 5.0], [1.0, 5.0], [9.0, 0.0]])
    beaten = Problem((block("a", 1.0, 1.5, 1.0), block("b", 1.0, 1.0)), (Edge("a", "b", pairs),))
    assert presolve(fold(beaten)).sizes == [2, 2]
    small = Problem(
        (block("a", 1.0, 1.5, 1.0, taken=[2, 1, 2]), block("b", 1.0, 1.0, taken=[0, 0])),
        beaten.edges,
        (("rank 0", 1.5),),
    )
    assert search.fast(small).choice == {"a": 1, "b": 0}  # the same option is the one that fits


@pytest.mark.parametrize("name", [*SEARCHES, "brute", "learned", "random"])
def test_what_does_not_fit_is_said_with_the_limit_and_what_is_missing(name: str) -> None:
    run = SEARCHES.get(name) or getattr(search, name)
    blocks = (block("a", 1.0, 2.0, taken=[9e9, 5e9]), block("b", 1.0, 2.0, taken=[8e9, 3e9]))
    edge = Edge("a", "b", np.array([[0.0, 0.0], [0.0, np.inf]]))
    with pytest.raises(InputError) as caught:
        run(Problem(blocks, (edge,), (("rank 0 in prefill", 10e9),)))
    assert str(caught.value) == (
        "rank 0 in prefill: whatever is chosen, 12.00 GB are needed of 10.00 GB, 2.00 GB are missing"
    )
    with pytest.raises(InputError, match="no option of a block is possible beside some option of every other block"):
        run(Problem((block("a", 1.0), block("b", 1.0)), (Edge("a", "b", np.array([[np.inf]])),)))
    two = np.array([[3.0, 0.0], [0.0, 3.0]])
    both = tuple(Block(name, ("x", "y"), np.ones(2), two) for name in "ab")
    with pytest.raises(InputError, match="no choice keeps all of these limits at once, though it can keep each: p, q"):
        run(Problem(both, (), (("p", 2.0), ("q", 2.0))))


def test_shared_weights_stay_tied_where_layers_are_not() -> None:
    blocks = (block("embed", 1.0, 2.0, tie="shared"), block("one", 1.0, 3.0, tie="layer"))
    blocks += (block("two", 3.0, 1.0, tie="layer"), block("head", 4.0, 2.0, tie="shared"))
    problem = Problem(blocks, ())
    assert search.fast(problem).seconds == 8.0
    found = search.fast(search.untied(problem, keep={"shared"}))
    assert found.seconds == 6.0 and found.choice == {"embed": 1, "one": 0, "two": 1, "head": 1}


@pytest.mark.parametrize("share", [None, 0.5, 0.1])
def test_the_work_of_equal_layers_does_not_grow_with_their_number(share: float | None) -> None:
    few, many = search.fast(model(8, share=share)), search.fast(model(80, share=share))
    assert few.gap == many.gap == 0.0
    assert many.steps <= 1.5 * few.steps
    free = [search.fast(search.untied(model(layers))) for layers in (2, 8)]
    assert free[1].steps > 2 * free[0].steps  # which is what ties save


@pytest.mark.parametrize("share", [None, 0.5, 0.1])
def test_eighty_layers_that_choose_for_themselves_are_within_a_thousandth(share: float | None) -> None:
    problem = model(80, share=share)
    assert len(problem.blocks) == 802
    free = search.untied(problem)
    near = search.near(problem)
    found = search.full(free, gap=1e-3, start=near.choice)
    assert free.fits(near.choice) and free.fits(found.choice) and found.gap <= 1e-3
    assert found.seconds <= near.seconds <= 1.01 * found.seconds and near.bound <= found.seconds
    tied = search.fast(problem)
    assert tied.seconds >= near.seconds * (1 - 1e-12) and problem.fits(near.choice) == (share is None)
    assert near.method.endswith("tied") and near.method.endswith("untied") == (share is not None)


def test_layers_that_may_not_choose_alike_choose_apart() -> None:
    """Two layers of 10 bytes or 2, on a rank of 12; the weights that they share stay tied."""
    blocks = tuple(block(f"layer {n}", 1.0, 5.0, taken=[10, 2], tie="layer") for n in range(2))
    shared = tuple(block(f"shared {n}", 1.0, 5.0 * n, taken=[0, 0], tie="shared") for n in range(2))
    problem = Problem((*blocks, *shared), (), (("rank 0", 12.0),))
    assert search.fast(problem).seconds == 12.0
    found = search.near(problem, keep={"shared"})
    assert found.seconds == found.bound == 8.0
    assert found.choice["layer 0"] != found.choice["layer 1"] and found.choice["shared 0"] == found.choice["shared 1"]
    assert search.near(problem).seconds == 7.0
    only = Problem(tuple(block(f"{n}", 1.0, np.inf, taken=[5 + n, 0], tie="t") for n in range(2)), (), (("r", 11.0),))
    assert search.near(only).seconds == search.fast(only).seconds == 2.0


def test_the_bound_of_highs_is_below_what_another_search_proves() -> None:
    for seed in range(4):
        problem = model(2, blocks=5, options=5, share=0.3, seed=seed)
        exact = search.fast(problem)
        alone = search.full(problem, gap=0.05, alone=True)
        assert exact.gap == 0 and alone.bound <= exact.seconds * (1 + 1e-9) and alone.gap <= 0.05


def test_a_better_choice_than_the_start_is_found_and_a_wrong_start_refused() -> None:
    problem = model(1, blocks=4, options=4, share=0.4)
    slow = search.random(problem, count=1)
    found = search.full(problem, gap=0.0, start=slow.choice)
    assert found.seconds == pytest.approx(search.brute(problem).seconds) and found.seconds < slow.seconds
    large = Choice(dict.fromkeys(slow.choice, 0))
    assert not problem.fits(large)
    with pytest.raises(InputError, match="the choice to start from does not fit"):
        search.full(problem, start=large)


def test_a_search_that_has_no_time_hands_back_what_it_started_from() -> None:
    problem = search.untied(model(20, share=0.4))
    drawn = search.random(problem, count=20)
    found = search.full(problem, seconds=0.0, gap=0.0, start=drawn.choice)
    assert found.choice == drawn.choice and found.gap == float("inf")
    assert found.method == "the choice to start from; HiGHS did not finish in 0 s"
    first = search.full(problem, seconds=0.0, gap=0.0)
    assert first.gap <= 0.01 and first.method == "elimination, memory by price; HiGHS did not finish in 0 s"
    with pytest.raises(InputError, match="no choice was found in 0 s: give the search more"):
        search.full(problem, seconds=0.0, alone=True)


def test_branches_that_run_out_leave_a_true_bound() -> None:
    open_gaps = 0
    for seed in range(6):
        problem = model(1, blocks=6, options=5, share=0.2, seed=seed)
        short, best = search.fast(problem, branches=3), search.fast(problem)
        assert problem.fits(short.choice) and best.gap == 0
        assert short.bound <= best.seconds * (1 + 1e-9) <= short.seconds * (1 + 2e-9)
        open_gaps += short.gap > 0
    assert open_gaps


def test_too_wide_a_graph_is_left_to_the_full_search(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    blocks = tuple(block(f"b{place}", *random.uniform(0, 1, 4)) for place in range(6))
    edges = tuple(
        Edge(f"b{one}", f"b{other}", random.uniform(0, 1, (4, 4))) for other in range(6) for one in range(other)
    )
    problem = Problem(blocks, edges)
    best = search.brute(problem).seconds
    monkeypatch.setattr(elimination, "LARGEST", 100)
    with pytest.raises(
        InputError, match=r"tables of [\d,]+ entries, up to 4,096 in one, and takes .* use the full search"
    ):
        search.fast(problem)
    assert search.full(problem, gap=0.0).seconds == pytest.approx(best)
    held = tuple(replace(one, bytes=np.full((4, 1), 2.0)) for one in blocks)
    with pytest.raises(
        InputError, match="rank 0: whatever is chosen, 12 bytes are needed of 11 bytes, 1 bytes are mis"
    ):
        search.full(Problem(held, edges, (("rank 0", 11.0),)))
    closed = (*edges[1:], Edge("b0", "b1", np.full((4, 4), np.inf)))
    with pytest.raises(InputError, match="no options that are possible beside each other keep all limits"):
        search.full(Problem(blocks, closed))


def test_looking_at_everything_is_refused_where_that_is_too_much() -> None:
    with pytest.raises(InputError, match=r"there are 60,466,176 choices, and 20,000,000 are the most"):
        search.brute(model(1, blocks=8, options=6))


def test_the_full_search_says_which_package_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"the full search needs scipy: pip install 'tersor\[plan\]'"):
        search.full(model(1))


def test_searches_and_stages_are_there_without_torch_and_scipy() -> None:
    code = (
        "import sys, tersor.planner.search, tersor.planner.stages, tersor.planner.stage_graph\n"
        "assert not {'torch', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_random_plans_are_the_same_for_a_seed_and_never_better_than_the_optimum() -> None:
    problem = model(2, blocks=5, options=5, share=0.3)
    best = search.fast(problem)
    drawn = [search.random(problem, seed=seed, count=50) for seed in (1, 1, 2)]
    assert drawn[0].choice == drawn[1].choice != drawn[2].choice
    assert all(problem.fits(found.choice) and found.seconds >= best.seconds for found in drawn)
    assert drawn[0].gap == float("inf") and drawn[0].method == "best of 50 at random"
