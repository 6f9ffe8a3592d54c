"""A plan shared out over workers, and the pages that requests which run will need."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tersor.bench import workloads
from tersor.engine.forecast import Admission, OutputLengths
from tersor.engine.groups import Plan, plan
from tersor.engine.shares import Share, share_out
from tersor.errors import InputError


def real_cost(made: Plan, share: Share, token_cost: float) -> float:
    """What a worker computes that runs its ranges in order with nothing in pages."""
    total = 0.0
    for start, stop in share.ranges:
        part = slice(start, stop)
        total += float((made.lengths - made.reused + token_cost * made.outputs)[part].sum()) + int(made.reused[start])
    return total


def some_plan(random_: random.Random) -> Plan:
    """Groups of many sizes."""
    prompts = []
    for group in range(random_.randrange(1, 12)):
        begin = [group] * random_.randrange(0, 60)
        for _ in range(random_.randrange(1, 30)):
            prompts.append([*begin, *(random_.randrange(99) for _ in range(random_.randrange(1, 30)))])
    return plan(prompts, [random_.randrange(1, 40) for _ in prompts], page=4)


def test_every_request_has_one_worker_and_costs_are_what_the_worker_computes() -> None:
    random_ = random.Random(1)
    for _ in range(100):
        made, workers, token_cost = some_plan(random_), random_.randrange(1, 9), random_.choice([0.0, 1.0, 3.5])
        shares = share_out(made, workers, token_cost=token_cost)
        assert len(shares) == workers
        found = np.concatenate([share.positions for share in shares])
        assert sorted(found.tolist()) == list(range(made.order.size))
        for share in shares:
            assert share.cost == pytest.approx(real_cost(made, share, token_cost))
        costs = [share.cost for share in shares]
        assert costs == sorted(costs, reverse=True)


def test_whole_groups_stay_together_where_they_balance() -> None:
    made = plan([[group] * 40 + [99, i] for group in range(8) for i in range(5)], 10, page=4)
    for share in share_out(made, 4):
        assert [stop - start for start, stop in share.ranges] == [5, 5]


def test_an_oversized_group_is_split_where_its_prefix_costs_less_than_the_imbalance() -> None:
    shares = share_out(plan([[1] * 8 + [i, i] for i in range(100)], 10, page=4), 4)
    assert [len(share.ranges) for share in shares] == [1, 1, 1, 1]
    assert shares[0].cost < 1.1 * shares[-1].cost


def test_a_group_is_not_split_where_its_prefix_costs_more_than_the_imbalance() -> None:
    prompts = [[group] * 4000 + [i, i] for group in (1, 2) for i in range(10 * group)]
    shares = share_out(plan(prompts, 10, page=4), 2)
    assert [len(share.positions) for share in shares] == [20, 10]


def test_shares_of_the_workloads_differ_by_little() -> None:
    for name in ("micro", "snippet", "tree"):
        made = workloads.make(name, requests=1000)
        shares = share_out(plan(made.prompts, made.outputs), 8)
        assert shares[0].cost < 1.05 * sum(share.cost for share in shares) / 8


def test_no_workers_are_refused() -> None:
    with pytest.raises(InputError, match="workers is 0"):
        share_out(plan([[1]]), 0)


def test_outputs_are_expected_to_be_a_quantile_of_what_earlier_ones_were() -> None:
    lengths = OutputLengths(0.9)
    assert lengths.expected([100, 7]).tolist() == [100, 7]
    for drawn in range(1, 101):
        lengths.observe(drawn, 200)
    assert lengths.ratio == pytest.approx(0.45, abs=0.01)
    assert lengths.expected(1000).tolist() == pytest.approx(450, abs=10)
    assert lengths.expected([10, 10], [9, 10]).tolist() == [10, 10]
    with pytest.raises(InputError, match="quantile is 0"):
        OutputLengths(0)


def needed(made: Plan, running: dict[int, int], most: np.ndarray, waiting: set[int]) -> int:
    """Pages at the worst moment where each running position draws all its tokens, counted moment by moment."""
    highest = 0
    begun = set(range(made.order.size)) - waiting
    nodes = {node for position in begun for node in made.path(position)}
    for moment in range(max((int(most[p]) - drawn for p, drawn in running.items()), default=0) + 1):
        alive = {p: drawn + moment for p, drawn in running.items() if int(most[p]) - drawn >= moment}
        pages = sum(
            -(-int(made.lengths[p] - made.depths[made.nodes[p]] + drawn) // made.page) for p, drawn in alive.items()
        )
        for node in nodes:
            if any(made.firsts[node] <= p < made.stops[node] for p in {*alive, *waiting}):
                pages += int(made.depths[node] - made.depths[made.parents[node]]) // made.page
        highest = max(highest, pages)
    return highest


def test_predicted_pages_are_never_too_few_and_less_than_one_a_request_too_many() -> None:
    random_ = random.Random(2)
    for _ in range(6):
        made = some_plan(random_)
        most = np.array([random_.randrange(1, 40) for _ in made.order])
        admission, running = Admission(made, 100, most), dict[int, int]()
        waiting = set(range(made.order.size))
        for position in range(made.order.size):
            foreseen = admission.high_water(position)
            exact = needed(made, {**running, position: 0}, most, waiting - {position})
            assert exact <= foreseen <= exact + len(running) + 1
            assert admission.fits(position) == (foreseen <= 100)
            admission.admit(position)
            running[position] = 0
            waiting.discard(position)
            for other in list(running):
                step = random_.randrange(0, int(most[other]) - running[other] + 1)
                admission.drew(other, step)
                running[other] += step
                if running[other] == most[other]:
                    admission.end(other)
                    del running[other]
            if running:
                exact = needed(made, running, most, waiting)
                assert exact <= admission.high_water() <= exact + len(running)
        for other in list(running):
            admission.end(other)
        assert admission.high_water() == 0


def test_workloads_are_the_same_for_the_same_seed_and_another_for_another() -> None:
    for name in workloads.WORKLOADS:
        one, two, other = (workloads.make(name, requests=60, seed=seed) for seed in (3, 3, 4))
        assert [p.tolist() for p in one.prompts] == [p.tolist() for p in two.prompts]
        assert one.outputs.tolist() == two.outputs.tolist()
        assert [p.tolist() for p in one.prompts] != [p.tolist() for p in other.prompts]
        assert len(one.prompts) == len(one.outputs) == 60
        assert all(p.size and p.dtype == np.int32 and p.min() >= 1 for p in one.prompts)
        assert one.outputs.min() >= 1
        assert one.settings["seed"] == 3


def test_orders_of_a_workload_hold_the_same_prompts() -> None:
    made = {order: workloads.make("snippet", requests=50, order=order) for order in workloads.ORDERS}
    rows = {
        order: [(p.tolist(), int(o)) for p, o in zip(w.prompts, w.outputs, strict=True)] for order, w in made.items()
    }
    assert rows["shuffled"] != rows["grouped"]
    assert sorted(rows["shuffled"]) == sorted(rows["grouped"]) == sorted(rows["sorted"])
    assert [p for p, _ in rows["sorted"]] == sorted(p for p, _ in rows["sorted"])


def test_snippets_have_the_means_that_they_are_named_for() -> None:
    made = workloads.make("snippet")
    planned = plan(made.prompts, made.outputs, page=1)
    assert planned.optimum / planned.total == pytest.approx(0.62, abs=0.04)
    assert made.tokens / len(made.prompts) == pytest.approx(1600, rel=0.1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": "mirco"}, "did you mean 'micro'"),
        ({"name": "micro", "order": "sort"}, "did you mean 'sorted'"),
        ({"name": "micro", "prefixes": 3}, "did you mean 'prefix'"),
        ({"name": "micro", "requests": 0}, "requests is 0"),
        ({"name": "micro", "members": 0}, "members is 0"),
    ],
)
def test_a_workload_that_is_not_there_is_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        workloads.make(**wrong)  # type: ignore[arg-type]
