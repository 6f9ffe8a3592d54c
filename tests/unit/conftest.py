"""Unit tests see no setting and no cache of whoever runs them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tersor import settings


@pytest.fixture(autouse=True)
def plain_environment(cache_dir: Path) -> Iterator[None]:
    """No TERSOR_ variable is set but the cache directory, which is the test's own."""
    with pytest.MonkeyPatch.context() as patch:
        for name in settings.SETTINGS.keys() - {"TERSOR_CACHE_DIR"}:
            patch.delenv(name, raising=False)
        yield
