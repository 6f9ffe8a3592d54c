"""Every page is free, held or idle, and counted once."""

from __future__ import annotations

import pytest

from tersor.engine.pages import Pages
from tersor.errors import InputError, TersorError


def test_page_0_is_never_handed_out() -> None:
    pages = Pages(5, 64)
    assert sorted(pages.take() for _ in range(pages.free)) == [1, 2, 3, 4]
    assert pages.usable == 4 and pages.free == 0


def test_a_page_is_free_again_when_its_last_holder_drops_it_and_its_owner_says_so() -> None:
    pages = Pages(3, 64)
    page = pages.take()
    pages.hold(page)
    pages.audit([page, page], ())
    assert not pages.drop(page) and pages.drop(page)
    pages.audit([], [page])
    pages.free_again(page)
    pages.audit([], ())
    assert pages.free == 2


def test_a_page_is_not_given_back_twice() -> None:
    pages = Pages(3, 64)
    page = pages.take()
    pages.drop(page)
    with pytest.raises(TersorError, match=f"page {page} is given back though nobody holds it"):
        pages.drop(page)


def test_needed_pages_are_rounded_up() -> None:
    assert [Pages(3, 64).needed(tokens) for tokens in (0, 1, 64, 65)] == [0, 1, 1, 2]


@pytest.mark.parametrize(
    ("held", "idle", "words"),
    [
        ([1], [], "1 free, 1 held, 0 idle of 3 pages"),
        ([1, 2, 2], [], "page 2 counts 1 holders, and 2 hold it"),
        ([1, 3], [], "a page is in two places"),
        ([1], [0], "page 0 was handed out"),
    ],
)
def test_an_audit_says_what_does_not_add_up(held: list[int], idle: list[int], words: str) -> None:
    pages = Pages(4, 64)
    assert (pages.take(), pages.take()) == (1, 2)
    with pytest.raises(TersorError, match=words):
        pages.audit(held, idle)


def test_an_audit_finds_a_page_that_is_free_twice() -> None:
    pages = Pages(4, 64)
    page = pages.take()
    pages.drop(page)
    pages.free_again(page)
    pages.free_again(page)
    with pytest.raises(TersorError, match="free twice"):
        pages.audit([], ())


def test_no_pages_are_an_error() -> None:
    with pytest.raises(InputError, match="there are 1 pages of 64 tokens"):
        Pages(1, 64)
