"""How does lm-eval ask a Tersor model? `model` answers its requests, `tasks` finds and runs its tasks.

Both import lm_eval, the extra `tasks`; `check` says whether it is there.
"""

from __future__ import annotations

import importlib.util

from tersor.errors import UnsupportedError

__all__ = ["check"]


def check() -> None:
    """Say in one line what to install where lm-eval is not there.

    Raises:
        UnsupportedError: it is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UnsupportedError("--tasks needs lm-eval, which is not installed: pip install 'tersor[tasks]'")
