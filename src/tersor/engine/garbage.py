"""What does Python's collector not look through while an engine runs? All that was there before.

torch, transformers and the plan of a large batch are a million objects, which stay. To look through them for garbage
stops the engine for a tenth of a second and more, again and again as requests come.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def left_alone() -> Iterator[None]:
    """Keep the collector from what exists now until the context ends, unless someone else keeps it from something."""
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
