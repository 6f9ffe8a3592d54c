"""Engines of a Ray cluster answer a batch, here a cluster of this machine's CPUs."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.batches import MIXED, MakeEcho, MakeMortal, MakeNone, MakeSlow, go, read, write

from tersor.engine.params import SamplingParams
from tersor.errors import InputError, TersorError, UnsupportedError
from tersor.integrations.ray import AnswerBatches, RayEngines


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    ray = pytest.importorskip("ray")
    ray.init(
        num_cpus=2,
        log_to_driver=False,
        include_dashboard=False,
        runtime_env={"env_vars": {"PYTHONPATH": ":".join(sys.path)}},
    )
    yield ray
    ray.shutdown()


def test_a_batch_over_a_cluster_is_that_of_one_engine_also_where_a_worker_is_lost(cluster: Any, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "in.jsonl", MIXED)
    go(tmp_path / "one")
    with RayEngines(MakeMortal(tmp_path / "mark"), 2, gpus=0) as engines:
        report = go(tmp_path / "two", engines)
    assert (tmp_path / "mark").exists()
    assert (report.progress.done, report.progress.failed) == (50, 8)
    one, two = (sorted((tmp_path / name / "out.jsonl").read_bytes().splitlines()) for name in ("one", "two"))
    assert one == two


def test_a_cluster_drains_when_told_to_stop(cluster: Any, tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", MIXED[:40])
    with RayEngines(MakeSlow(), 1, gpus=0) as engines:
        report = go(
            tmp_path,
            engines,
            on_progress=lambda now: signal.raise_signal(signal.SIGINT) if now.done == 5 else None,
        )
        assert report.interrupted
        assert 5 <= len(read(tmp_path / "out.jsonl")) < 40
        assert go(tmp_path, engines, resume=True).progress.done == 40


def test_an_engine_that_cannot_be_made_on_a_cluster_is_one_line(cluster: Any, tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", MIXED[:3])
    with RayEngines(MakeNone(), 1, gpus=0) as engines, pytest.raises(TersorError, match="cannot be made: no GPU"):
        go(tmp_path, engines)
    with pytest.raises(InputError, match="no room for an actor with 1 GPUs"):
        RayEngines(MakeNone())


def test_rows_of_a_dataset_are_answered_in_place() -> None:
    prompts = np.empty(3, dtype=object)
    prompts[:] = [[1, 2], [0, 1], [3]]
    answered = AnswerBatches(MakeEcho(), SamplingParams(max_tokens=4))(
        {"prompt_token_ids": prompts, "id": np.arange(3)}
    )
    assert answered["id"].tolist() == [0, 1, 2]
    assert answered["error"].tolist() == ["", "no pages", ""]
    assert [len(text) for text in answered["text"]] == [4, 0, 4]
    assert [tokens.size for tokens in answered["token_ids"]] == [4, 0, 4]


def test_without_ray_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'tersor\[ray\]'"):
        RayEngines(MakeNone(), 1)
