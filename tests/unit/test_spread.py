"""Modules that are spread over processes compute and train as the whole module does."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.graph_processes import distances

CASES = ("gpt megatron", "gpt row0+weights batch0 row0 dim0", "gpt random", "unet random", "mlp row0+state")
BOTH = ("mlp random", "gpt random")


def test_two_processes_train_as_one_whatever_the_plan(tmp_path: Path) -> None:
    found = distances((2,), CASES, tmp_path)
    assert len(found) == 2 * len(CASES)
    for one in found:
        assert max(one.outputs, one.gradients, one.parameters) < 1e-5, one
    shares = {one.case: one.share for one in found}
    assert shares["gpt row0+weights batch0 row0 dim0"] < 0.6
    assert shares["mlp row0+state"] == pytest.approx(0.5)


def test_four_processes_on_two_axes_train_as_one(tmp_path: Path) -> None:
    found = distances((2, 2), BOTH, tmp_path)
    for one in found:
        assert max(one.outputs, one.gradients, one.parameters) < 1e-5, one
