"""What every test starts from: nothing that an earlier one set, and a cache of its own where it asks for one."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

_numbers = itertools.count()


def forget() -> None:
    """Drop what Tersor keeps of the environment, of its mode, of launches and of choices, as far as it is imported."""
    for name in ("tersor.ops.prepared", "tersor.kernels.tune.choice"):
        if name in sys.modules:
            sys.modules[name].forget()
    for module in [module for name, module in sys.modules.items() if name.startswith("tersor.ops.")]:
        for kept in vars(module).values():
            if hasattr(kept, "cache_clear"):
                kept.cache_clear()


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Leave nothing to the next test: prepared launches, the mode of linears, choices read from a file."""
    yield
    forget()


@pytest.fixture
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep kernels and choices in a directory of the test's own, which is not made yet; none is in memory."""
    from tersor.kernels.jit import build

    folder = tmp_path_factory.getbasetemp() / f"cache{next(_numbers)}"
    with pytest.MonkeyPatch.context() as patch:  # of its own, so that a test may undo what it patched itself
        patch.setenv("TERSOR_CACHE_DIR", str(folder))
        patch.setattr(build, "_memory", {})
        forget()
        yield folder


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Return a list that every launch's kernel is put into, by name; nothing is prepared before or left behind."""
    from tersor.kernels.jit import Function

    names: list[str] = []
    launch = Function.launch

    def noted(self: Function, *args: object, **options: object) -> None:
        names.append(self.source.name)
        launch(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Function, "launch", noted)
    forget()
    yield names


@pytest.fixture(scope="module")
def vllm() -> Iterator[SimpleNamespace]:
    """Let the plug-in be in a vLLM that is not there; what it is told of ranks can be set."""
    from helpers import vllm_stand_in

    from tersor.integrations import vllm as plugin

    with vllm_stand_in.installed() as current:
        plugin.register()
        yield current
    assert "tersor" in vllm_stand_in.REGISTERED


@pytest.fixture
def one_vllm_rank(vllm: SimpleNamespace) -> Iterator[None]:
    """Leave nothing of ranks to the next test."""
    yield
    vllm.ranks, vllm.rank, vllm.load_config.load_format = 1, 0, "auto"
