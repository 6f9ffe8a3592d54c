"""Steps are CUDA graphs on all ranks or on none, and who insists on them hears why they are not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import checkpoints

from tersor import models, ops
from tersor.engine import graphs
from tersor.engine.config import EngineConfig
from tersor.errors import UnsupportedError


def runner(other: int = 1, **own: Any) -> Any:
    """Return what is asked of a runner, one of two ranks of which the other can capture or not."""
    ranks = SimpleNamespace(least=lambda number, device: min(number, other))
    return SimpleNamespace(ranks=ranks, device=torch.device("cuda"), eager_reason="", **{"repeats": False, **own})


@pytest.mark.parametrize(
    ("waits", "other", "asked", "reason"),
    [
        ("", 1, None, ""),
        ("", 1, True, ""),
        ("", 1, False, "not asked for"),
        ("the host waits", 1, None, "the host waits"),
        ("", 0, None, "another rank waits for its device in a step"),
    ],
)
def test_graphs_are_there_where_every_rank_can_have_them(
    waits: str, other: int, asked: bool | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "_waits", lambda runner: waits)
    one = runner(other)
    assert graphs.captures(one, EngineConfig(cuda_graph=asked)) == (not reason)
    assert one.eager_reason == reason
    if reason and asked is None:
        with pytest.raises(UnsupportedError, match=f"no CUDA graph for this model: {reason}"):
            graphs.captures(one, EngineConfig(cuda_graph=True))


def test_attention_without_kernels_and_experts_that_are_waited_for_are_reasons(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = models.load(checkpoints.save("mixtral", tmp_path / "model"), "cpu")
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *sizes, **options: empty(*sizes, **{**options, "device": "cpu"}))
    one = runner(decoder=decoder, kv_dtype=torch.float32)
    assert graphs._waits(one) == "kernels need a CUDA device, this is cpu"
    monkeypatch.setattr(ops, "attention_obstacle", lambda *arguments: "")
    assert graphs._waits(one) == decoder.waits != ""
    one.device = torch.device("cpu")
    assert graphs._waits(one) == "the model is on cpu"
