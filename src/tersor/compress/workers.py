"""Threads that encode side by side, each on one thread of torch's own, with the caller's numbers untouched.

`torch.set_num_threads` in a worker changes that worker, and besides the number every thread of the process starts with
that uses torch for the first time later. The libraries below torch keep a number for each thread, and a worker sets its
own there: the caller's threads, those running and those to come, keep what they have.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

_SETTERS = ("omp_set_num_threads", "MKL_Set_Num_Threads_Local")
"""Functions of OpenMP and MKL that set the calling thread's number of threads, and no other's."""


def worker_pool(count: int, name: str) -> ThreadPoolExecutor:
    """Return a pool of `count` threads called `name`, each of which computes on one thread.

    Where torch was built without OpenMP, workers keep the number of threads that torch gives them.
    """
    return ThreadPoolExecutor(count, name, initializer=_compute_alone)


def _compute_alone() -> None:
    torch.get_num_threads()  # the first use in a thread sets the process's number, so it comes before ours
    for setter in _setters():
        setter(1)


@functools.cache
def _setters() -> tuple[Callable[[int], Any], ...]:
    """Return those of `_SETTERS` that torch is linked with."""
    library = ctypes.CDLL(torch._C.__file__)  # a name is looked up in it and in all it was linked with
    return tuple(getattr(library, name) for name in _SETTERS if hasattr(library, name))
