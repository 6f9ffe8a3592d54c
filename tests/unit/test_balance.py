"""Which of several copies answers: the one that is done first, which may be one that holds a prefix."""

from __future__ import annotations

import random

from tersor.engine import prefix
from tersor.engine.balance import ROW, Held, choose, pages_of

PAGE = 4


def test_the_copy_with_fewest_tokens_to_compute_answers() -> None:
    assert choose([700, 300, 500], [0, 0, 0], [0, 0, 0]) == 1


def test_copies_with_as_much_to_do_take_turns() -> None:
    chosen, order = [0, 0, 0], []
    for now in range(1, 10):
        place = choose([5, 5, 5], [0, 0, 0], chosen)
        chosen[place] = now
        order.append(place)
    assert order == [0, 1, 2] * 3


def test_a_copy_that_holds_a_prefix_answers_while_that_saves_more_than_its_load_costs() -> None:
    for more in (0, 999, 1000, 1001, 5000):
        place = choose([more, 0], [1000, 0], [1, 2])  # at 1000 the one that was chosen before
        assert place == (0 if more <= 1000 else 1)


def test_an_answer_that_grows_counts_so_that_a_short_prefix_does_not_gather_all_requests() -> None:
    """Requests with a system prompt of 300 tokens, none of which ends: loads stay within one answer of each other."""
    loads, chosen, held = [0, 0], [0, 0], [0, 0]
    for now in range(1, 101):
        place = choose(loads, held, chosen)
        loads[place] += ROW
        chosen[place], held[place] = now, 300
    assert abs(loads[0] - loads[1]) <= 300 + ROW


def test_nobody_is_chosen_who_would_be_done_later() -> None:
    draw = random.Random(0)
    for _ in range(2000):
        count, prompt = draw.randrange(1, 9), draw.randrange(1, 5000)
        loads = [draw.choice([0, ROW, draw.randrange(9000)]) for _ in range(count)]
        shared = [draw.choice([0, draw.randrange(prompt)]) for _ in range(count)]
        done = [load + prompt - found for load, found in zip(loads, shared, strict=True)]
        place = choose(loads, shared, [draw.randrange(99) for _ in range(count)])
        assert done[place] == min(done)


def test_pages_are_known_by_the_digests_of_the_prefix_cache_and_its_salts() -> None:
    text = list(range(10))
    first = prefix.digest(prefix.root("a"), text[:4])
    assert pages_of(text, "a", PAGE) == [first, prefix.digest(first, text[4:8])]
    assert not set(pages_of(text, None, PAGE)) & set(pages_of(text, "a", PAGE))
    assert pages_of(text[:3], None, PAGE) == [] and len(pages_of(text[:4], None, PAGE)) == 1


def test_what_is_held_is_the_beginning_of_a_text_without_a_gap() -> None:
    held, text = Held(10), list(range(40))
    pages = pages_of(text, None, PAGE)
    assert held.shared(pages) == 0
    held.note(pages[:3])
    assert held.shared(pages) == 3
    assert held.shared(pages_of([9, *text[1:]], None, PAGE)) == 0
    assert held.shared(pages[1:]) == 2 and held.shared(pages[3:]) == 0


def test_texts_are_forgotten_by_age_and_by_their_end_first() -> None:
    held, texts = Held(10), [[number] * 16 for number in range(3)]
    pages = [pages_of(text, None, PAGE) for text in texts]
    for one in pages:
        held.note(one)
    assert [held.shared(one) for one in pages] == [2, 4, 4]
    held.note(pages[0])
    assert [held.shared(one) for one in pages] == [4, 2, 4]
    nothing = Held(0)
    nothing.note(pages[0])
    assert nothing.shared(pages[0]) == 0
