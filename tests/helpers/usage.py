"""Wrong usage of a verb is one line on stderr."""

from __future__ import annotations

import pytest
import torch

from tersor.cli.main import run


def refused_in_one_line(
    words: list[str],
    status: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Run a command line where there is no GPU: it ends with a status, and says one line that holds a message."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(words) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1
