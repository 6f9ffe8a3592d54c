"""integrations/transformers/process.py: settings of the process that several threads change for a while."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
from transformers import dynamic_module_utils
from transformers.utils import logging

from tersor.integrations.transformers import architecture, blocks, foreign

SETTINGS = {
    "unasked": (foreign.unasked, lambda: dynamic_module_utils.TIME_OUT_REMOTE_CODE, 0),
    "quiet": (architecture._quiet_transformers, logging.get_verbosity, logging.ERROR),
    "silent": (blocks._silent, logging.is_progress_bar_enabled, False),
}


@pytest.fixture(autouse=True)
def usual() -> Iterator[None]:
    """Settings as transformers begins with them, whatever tests before this one have said."""
    verbosity, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_warning()
    logging.enable_progress_bar()
    yield
    logging.set_verbosity(verbosity)
    if not shown:
        logging.disable_progress_bar()


@pytest.mark.parametrize("name", SETTINGS)
def test_threads_that_leave_in_any_order_leave_a_setting_as_the_first_found_it(name: str) -> None:
    inside: Callable[[], AbstractContextManager[None]]
    read: Callable[[], Any]
    inside, read, wanted = SETTINGS[name]
    before, entered, left = read(), threading.Event(), threading.Event()
    seen: list[Any] = []

    def other() -> None:
        with inside():
            entered.set()
            left.wait()
            seen.append(read())

    thread = threading.Thread(target=other)
    with inside():
        thread.start()
        entered.wait()
    left.set()
    thread.join()
    assert before != wanted and seen == [wanted] and read() == before


@pytest.mark.parametrize("name", SETTINGS)
def test_an_error_inside_leaves_a_setting_as_it_was(name: str) -> None:
    inside, read, wanted = SETTINGS[name]
    before = read()
    with pytest.raises(KeyboardInterrupt), inside(), inside():
        assert read() == wanted
        raise KeyboardInterrupt
    assert read() == before
