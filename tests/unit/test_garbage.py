"""engine/garbage.py: what is there before an engine runs is not looked through while it does."""

from __future__ import annotations

import gc
import weakref

from tersor.engine.garbage import left_alone


class _Ring:
    """An object that refers to itself."""

    def __init__(self) -> None:
        self.self = self


def test_what_is_there_before_stays_until_the_context_ends_and_what_comes_then_goes() -> None:
    gc.collect()
    before = weakref.ref(_Ring())
    with left_alone():
        assert gc.get_freeze_count() > 0
        during = weakref.ref(_Ring())
        gc.collect()
        assert before() is not None and during() is None
        with left_alone():
            pass
        assert gc.get_freeze_count() > 0
    assert not gc.get_freeze_count()
    gc.collect()
    assert before() is None
