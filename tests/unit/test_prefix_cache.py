"""Which pages are found again, which are evicted first, and which are kept."""

from __future__ import annotations

import pytest

from tersor.engine.pages import Pages
from tersor.engine.prefix import PrefixCache, digest, root, root_of_one
from tersor.errors import TersorError

SIZE = 4


def chain(tokens: str, salt: str | None = None) -> list[bytes]:
    """The digests of the full pages of a text whose tokens are letters."""
    found = [root(salt)]
    for start in range(0, len(tokens) // SIZE * SIZE, SIZE):
        found.append(digest(found[-1], [ord(letter) for letter in tokens[start : start + SIZE]]))
    return found[1:]


def filled(cache: PrefixCache, tokens: str) -> list[int]:
    """Compute the full pages of a text, publish them and give them back."""
    names = chain(tokens)
    pages = cache.take(len(names))
    for name, page in zip(names, pages, strict=True):
        cache.publish(name, page)
    cache.audit(pages)
    cache.release(pages)
    cache.audit([])
    return pages


def test_a_text_finds_the_pages_of_the_longest_beginning() -> None:
    cache = PrefixCache(Pages(9, SIZE))
    pages = filled(cache, "abcdefghijkl")
    assert cache.find(chain("abcdefghijklmnop")) == pages
    assert cache.find(chain("abcdefghXjkl")) == pages[:2]
    assert cache.find(chain("Xbcdefghijkl")) == []


def test_a_page_is_found_after_its_own_beginning_alone() -> None:
    cache = PrefixCache(Pages(9, SIZE))
    filled(cache, "abcdefgh")
    assert cache.find(chain("efghefgh")) == []


def test_salts_are_worlds_apart() -> None:
    names = [chain("abcd", salt)[0] for salt in (None, "", "none", "a", "b")] + [digest(root_of_one(1), [97] * 4)]
    assert len(set(names)) == len(names) and all(len(name) == 32 for name in names)


def test_who_was_released_first_is_evicted_first_and_the_end_of_a_text_before_its_beginning() -> None:
    cache = PrefixCache(Pages(6, SIZE))
    first, second = filled(cache, "abcdefgh"), filled(cache, "ABCDEFGH")
    taken = cache.take(2)
    assert taken[1] == first[1]
    assert cache.find(chain("abcdefgh")) == first[:1]
    cache.hold(cache.find(chain("abcd")))
    cache.release(first[:1])
    cache.take(1)
    assert cache.find(chain("ABCDEFGH")) == second[:1] and cache.find(chain("abcd")) == first[:1]


def test_pages_that_somebody_holds_are_not_evicted() -> None:
    cache = PrefixCache(Pages(4, SIZE))
    pages = filled(cache, "abcdefgh")
    cache.hold(cache.find(chain("abcdefgh")))
    assert cache.available == 1
    with pytest.raises(TersorError, match="2 pages are wanted of 1"):
        cache.take(2)
    cache.audit(pages)
    cache.release(pages)
    assert cache.available == 3


def test_of_two_pages_with_one_text_the_first_is_found_and_the_other_is_free_when_it_is_released() -> None:
    cache = PrefixCache(Pages(4, SIZE))
    (first,) = filled(cache, "abcd")
    (second,) = cache.take(1)
    cache.publish(chain("abcd")[0], second)
    assert cache.find(chain("abcd")) == [first] and not cache.found_by_others(second)
    cache.release([second])
    cache.audit([])
    assert cache.pages.free == 2


def test_a_pinned_prefix_outlives_everything_else_until_it_is_unpinned() -> None:
    cache = PrefixCache(Pages(6, SIZE))
    pages = filled(cache, "abcdefgh")
    filled(cache, "ABCD")
    cache.pin(chain("abcdefgh"))
    cache.audit([])
    assert cache.available == 3 and cache.pinned == 2
    taken = cache.take(3)
    assert cache.find(chain("abcdefgh")) == pages and cache.find(chain("ABCD")) == []
    cache.release(taken)
    newer = filled(cache, "ABCD")
    cache.unpin(chain("abcdefgh"))
    cache.audit([])
    cache.take(4)
    assert cache.find(chain("ABCD")) == newer and cache.find(chain("abcd")) == []


def test_a_prefix_is_pinned_before_it_is_computed() -> None:
    cache = PrefixCache(Pages(4, SIZE))
    cache.pin(chain("abcd"))
    pages = filled(cache, "abcd")
    assert (cache.available, cache.pinned, cache.cached) == (2, 1, 1)
    assert cache.find(chain("abcd")) == pages


def test_two_pins_are_taken_back_twice() -> None:
    cache = PrefixCache(Pages(4, SIZE))
    filled(cache, "abcdefgh")
    cache.pin(chain("abcd"))
    cache.pin(chain("abcdefgh"))
    cache.unpin(chain("abcdefgh"))
    assert cache.pinned == 1
    cache.unpin(chain("abcd"))
    assert cache.pinned == 0
    with pytest.raises(TersorError, match="not pinned"):
        cache.unpin(chain("abcd"))


def test_a_pin_gives_way_only_when_it_is_said() -> None:
    cache = PrefixCache(Pages(4, SIZE))
    filled(cache, "abcd")
    cache.pin(chain("abcd"))
    with pytest.raises(TersorError, match="3 pages are wanted of 2"):
        cache.take(3)
    assert len(cache.take(3, pinned_too=True)) == 3 and cache.find(chain("abcd")) == []


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda cache, page: cache._page_of.clear(), "digest that is not its own"),
        (lambda cache, page: cache._idle.setdefault(cache.take(1)[0]), "idle and cannot be found"),
        (lambda cache, page: cache._pins.update(chain("abcd")), "may be evicted with one"),
        (lambda cache, page: cache.pages.hold(page), "counts 1 holders, and 0 hold it"),
    ],
)
def test_an_audit_says_what_is_wrong(harm: object, words: str) -> None:
    cache = PrefixCache(Pages(4, SIZE))
    (page,) = filled(cache, "abcd")
    assert callable(harm)
    harm(cache, page)
    with pytest.raises(TersorError, match=words):
        cache.audit([])
