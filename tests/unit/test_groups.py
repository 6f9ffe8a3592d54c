"""The plan of a batch: what is shared, in which order, which groups, what is freed when."""

from __future__ import annotations

import itertools
import random
import time

import numpy as np
import pytest

from tersor.bench import workloads
from tersor.engine.groups import Pins, Plan, plan
from tersor.engine.prefix_tree import PrefixTree, Prompts, best_groups
from tersor.errors import InputError


def small(random_: random.Random, most: int = 9) -> list[list[int]]:
    """A few short prompts of two tokens, so that many begin alike and some are equal."""
    return [
        [random_.randrange(2) for _ in range(random_.randrange(1, most))] for _ in range(random_.randrange(1, most))
    ]


def tree_of(prompts: list[list[int]], page: int = 1) -> PrefixTree:
    """The tree of whole prompts, cut down to pages."""
    packed = Prompts.of(prompts)
    return PrefixTree.of(packed.common(packed.sorted()) // page * page)


def best_by_trying(prompts: list[list[int]], page: int, cost: int, nested: bool) -> int:
    """The most that any set of prefixes saves, each prompt in the longest of them."""
    shared = {
        tuple(prompt[:depth])
        for prompt in prompts
        for depth in range(page, len(prompt) + 1, page)
        if sum(other[:depth] == prompt[:depth] for other in prompts) > 1
    }
    # Of prefixes that the same prompts have, only the longest can be worth it.
    members = {
        prefix: frozenset(i for i, p in enumerate(prompts) if tuple(p[: len(prefix)]) == prefix) for prefix in shared
    }
    shared = {a for a in shared if not any(len(b) > len(a) and members[a] == members[b] for b in shared)}
    best = 0
    for size in range(len(shared) + 1):
        for chosen in itertools.combinations(sorted(shared), size):
            value = 0
            for prompt in prompts:
                value += max((len(one) for one in chosen if tuple(prompt[: len(one)]) == one), default=0)
            for one in chosen:
                around = max((len(other) for other in chosen if other != one and one[: len(other)] == other), default=0)
                value -= len(one) - (around if nested else 0) + cost
            best = max(best, value)
    return best


@pytest.mark.parametrize("nested", [False, True])
def test_groups_save_as_much_as_any_choice_of_prefixes(nested: bool) -> None:
    random_ = random.Random(1)
    for _ in range(300):
        prompts, page, cost = small(random_), random_.choice([1, 1, 2, 3]), random_.choice([0, 0, 1, 2, 5])
        found = best_groups(tree_of(prompts, page), cost=cost, nested=nested)
        assert found.saved == best_by_trying(prompts, page, cost, nested), (prompts, page, cost)


@pytest.mark.parametrize("nested", [False, True])
def test_what_groups_are_said_to_save_is_what_their_members_save(nested: bool) -> None:
    random_ = random.Random(2)
    for _ in range(200):
        tree, cost = tree_of(small(random_, 14)), random_.randrange(4)
        found = best_groups(tree, cost=cost, nested=nested)
        value = int(tree.depths[found.nodes[tree.nodes]].sum())
        for node in set(found.nodes.tolist()) - {0}:
            assert found.nodes[node] == node
            around = tree.depths[found.nodes[tree.parents[node]]] if nested else 0
            value -= int(tree.depths[node] - around) + cost
        assert value == found.saved


def test_nested_groups_without_a_cost_are_all_prefixes_and_reach_the_optimum() -> None:
    random_ = random.Random(3)
    for _ in range(100):
        prompts = small(random_, 14)
        packed, tree = Prompts.of(prompts), tree_of(prompts)
        found = best_groups(tree, nested=True)
        assert found.nodes.tolist() == list(range(tree.parents.size))
        nodes = {tuple(prompt[:depth]) for prompt in prompts for depth in range(1, len(prompt) + 1)}
        assert found.saved == sum(map(len, prompts)) - len(nodes) == packed.common(packed.sorted()).sum()


def test_common_prefixes_are_found_across_blocks_of_comparison() -> None:
    draw = np.random.default_rng(0)
    begin = draw.integers(0, 50_000, 5000, dtype=np.int32)
    places = [0, 1, 63, 64, 65, 191, 192, 193, 1000, 4000, 4999]
    prompts = [np.concatenate([begin[:place], [50_000 + place], draw.integers(0, 9, 40)]) for place in places]
    packed = Prompts.of([*prompts, begin])
    order = packed.sorted()
    rows = [[*prompts, begin][index].tolist() for index in order]
    assert rows == sorted(rows)
    expected = [0] + [
        next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        for a, b in itertools.pairwise(rows)
    ]
    assert packed.common(order).tolist() == expected


def reused_by_walking(made: Plan, prompts: list[list[int]]) -> list[int]:
    """Whole pages that each position has in common with the one before it, all but its last token."""
    rows = [prompts[index] for index in made.order]
    result = [0]
    for a, b in itertools.pairwise(rows):
        alike = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        result.append(min(alike, len(a) - 1, len(b) - 1) // made.page * made.page)
    return result


def in_pages(prompts: list[list[int]], page: int) -> int:
    """Tokens that any order must compute where whole pages are shared, the last token of a prompt never."""
    whole = {tuple(p[: d + page]) for p in prompts for d in range(0, (len(p) - 1) // page * page, page)}
    return page * len(whole) + sum(len(p) - (len(p) - 1) // page * page for p in prompts)


def test_a_plan_computes_every_shared_page_once() -> None:
    random_ = random.Random(4)
    for _ in range(300):
        prompts, page = small(random_, 16), random_.choice([1, 2, 4])
        outputs = [random_.randrange(20) for _ in prompts]
        made = plan(prompts, outputs, page=page, group_cost=0)
        assert sorted(made.order.tolist()) == list(range(len(prompts)))
        assert made.outputs.tolist() == [outputs[index] for index in made.order]
        # A page that only one prompt has is not shared, so that it is not in the tree.
        assert made.reused.tolist() == reused_by_walking(made, prompts)
        assert made.total - made.saved == in_pages(prompts, page)


def test_positions_of_a_node_are_those_that_begin_with_its_prefix() -> None:
    random_ = random.Random(5)
    for _ in range(100):
        prompts = small(random_, 16)
        made = plan(prompts, page=1)
        for node in range(1, made.parents.size):
            assert made.parents[node] < node
            assert made.depths[made.parents[node]] < made.depths[node]
            rows = [prompts[index] for index in made.order[made.firsts[node] : made.stops[node]]]
            prefix = rows[0][: made.depths[node]]
            inside = [index for index, p in enumerate(prompts) if p[: len(prefix)] == prefix and len(p) > len(prefix)]
            assert sorted(made.order[made.firsts[node] : made.stops[node]].tolist()) == inside


def test_beside_each_other_what_decodes_most_for_its_prefill_comes_first() -> None:
    random_ = random.Random(6)
    for _ in range(100):
        prompts = small(random_, 16)
        outputs = [random_.randrange(1, 50) for _ in prompts]
        made = plan(prompts, outputs, page=1)
        computed = made.lengths - made.reused
        below: dict[int, list[tuple[int, float]]] = {}
        for node in range(1, made.parents.size):
            part = slice(made.firsts[node], made.stops[node])
            above = int(made.parents[node])
            prefill = computed[part].sum() - computed[part][0] + made.lengths[part][0] - made.depths[above]
            below.setdefault(above, []).append((int(made.firsts[node]), made.outputs[part].sum() / prefill))
        for position, node in enumerate(made.nodes.tolist()):
            own = made.lengths[position] - made.depths[node]
            below.setdefault(node, []).append((position, made.outputs[position] / own))
        for items in below.values():
            ratios = [ratio for _, ratio in sorted(items)]
            assert ratios == sorted(ratios, reverse=True)


def test_pages_are_freed_after_the_last_request_that_needs_them() -> None:
    random_ = random.Random(7)
    for _ in range(100):
        made = plan(small(random_, 16), page=1)
        pins, freed = Pins(made), []
        for position in range(made.order.size):
            now = [node for node in reversed(made.path(position)) if made.stops[node] == position + 1]
            assert pins.end(position) == now
            freed += now
        assert sorted(freed) == list(range(1, made.parents.size))
        # Requests end in any order: a prefix goes with the last of its positions.
        pins, ended = Pins(made), set()
        for position in random_.sample(range(made.order.size), made.order.size):
            ended.add(position)
            for node in pins.end(position):
                assert set(range(made.firsts[node], made.stops[node])) <= ended
                assert not pins.needed(node)


def lru(order: list[list[int]], page: int, capacity: int) -> int:
    """Tokens that a cache of so many pages, least recently used first out, gives prompts one after the other."""
    cache: dict[tuple[int, ...], None] = {}
    reused = 0
    for prompt in order:
        whole = [tuple(prompt[:depth]) for depth in range(page, len(prompt), page)]
        hits = list(itertools.takewhile(cache.__contains__, whole))
        reused += page * len(hits)
        for key in reversed(whole):
            cache.pop(key, None)
            cache[key] = None
        while len(cache) > capacity:
            del cache[next(iter(cache))]
    return reused


def test_a_plan_is_never_worse_than_sorted_prompts() -> None:
    random_ = random.Random(8)
    for _ in range(200):
        prompts, capacity = small(random_, 20), random_.randrange(20, 60)
        made = plan(prompts, [random_.randrange(30) for _ in prompts], page=1)
        for order in (sorted(prompts), prompts):
            assert made.saved >= lru(order, 1, capacity)
        assert made.saved == lru(sorted(prompts), 1, 10_000)


def test_equal_prompts_of_one_kind_run_once() -> None:
    prompts = [[1, 2, 3], [4, 5], [1, 2, 3], [1, 2, 3], [4, 5], [1, 2], [1, 2, 3]]
    made = plan(prompts, page=1, alike=[0, -1, 0, 1, -1, 0, 0])
    assert made.runs_as.tolist() == [0, 1, 0, 3, 4, 5, 0]
    assert sorted(made.order.tolist()) == [0, 1, 3, 4, 5]
    assert made.total - made.saved == 3 + 1 + 1 + 2 + 1  # 123; 3 of 12; 3 of 123 again; 45; 5 again
    assert plan(prompts, page=1).runs_as.tolist() == list(range(7))


def test_equal_prompts_that_do_not_run_leave_the_plan_of_the_others() -> None:
    random_ = random.Random(9)
    for _ in range(200):
        prompts = small(random_, 16)
        made = plan(prompts, page=1, alike=0)
        once = [list(p) for p in dict.fromkeys(map(tuple, prompts))]
        alone = plan(once, page=1)
        assert [prompts[i] for i in made.order] == [once[i] for i in alone.order]
        assert made.reused.tolist() == alone.reused.tolist()
        assert all(prompts[as_] == prompts[i] and as_ <= i for i, as_ in enumerate(made.runs_as.tolist()))


def test_groups_of_attention_are_prefixes_long_and_common_enough() -> None:
    begin, other = [1] * 512, [2] * 128
    prompts = [[*begin, 10 + i] for i in range(8)] + [[*other, 10 + i] for i in range(4)]
    made = plan(prompts)
    groups = {int(index): int(made.depths[group]) for index, group in zip(made.order, made.groups, strict=True)}
    assert groups == {i: 512 if i < 8 else 0 for i in range(12)}
    assert set(made.depths[plan(prompts, group_cost=0).groups].tolist()) == {512, 128}


def test_no_prompts_and_prompts_without_tokens_have_a_plan() -> None:
    assert plan([]).order.size == 0
    made = plan([[], [1], []])
    assert sorted(made.order.tolist()) == [0, 1, 2]
    assert made.saved == 0


def test_numbers_that_cannot_be_are_refused() -> None:
    for wrong, message in [
        ({"page": 0}, "page is 0"),
        ({"group_cost": -1}, "group_cost -1"),
        ({"outputs": [1, 2]}, r"outputs has shape \[2\], expected \[1\]"),
        ({"outputs": -3}, "outputs holds -3"),
    ]:
        with pytest.raises(InputError, match=message):
            plan([[1]], **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("micro", {"requests": 1600}),
        ("micro", {"requests": 600, "members": 2}),
        ("extreme", {"requests": 160}),
        ("tree", {"requests": 1500}),
        ("snippet", {"requests": 2000}),
    ],
)
def test_whole_pages_reuse_nearly_all_that_any_sharing_could(name: str, sizes: dict[str, int]) -> None:
    made = workloads.make(name, **sizes)
    planned = plan(made.prompts, made.outputs)
    assert planned.saved >= 0.95 * planned.optimum > 0


def test_planning_a_hundred_thousand_prompts_takes_about_a_second() -> None:
    made = workloads.make("classify", members=3)
    start = time.process_time()
    plan(made.prompts, made.outputs)
    assert time.process_time() - start < 2  # 0.35 s on a quiet core
