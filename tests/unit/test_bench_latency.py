"""bench/latency.py: decode steps of a whole model are timed, and the bytes that they read are counted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.tiny_configs import DENSE, MIXTURE

from tersor.bench import latency, report, timing
from tersor.cli import bench, main
from tersor.engine import workers
from tersor.engine.request import Step
from tersor.engine.runner import Runner
from tersor.engine.sampler import Sampler
from tersor.formats import get_scheme
from tersor.models import DecoderConfig, geometries
from tersor.models.random import random_decoder
from tersor.models.streamed import Offload
from tersor.ops.attention_form import PAGE
from tersor.ops.stages import ONE


def runner(config: dict[str, object], batches: list[int], contexts: list[int]) -> Runner:
    decoder = random_decoder(DecoderConfig.from_dict(config), get_scheme("fp6_e3m2"), "cpu", torch.float32)
    sampler = Sampler(max(batches) + 1, 96, "cpu")
    made = Runner(decoder, sampler, max_rows=max(batches), max_length=max(contexts))
    made.allocate(latency.pages_for(batches, contexts))
    return made


def test_every_batch_and_context_is_timed_with_the_bytes_that_it_reads() -> None:
    batches, contexts = [1, 3], [64, 130]
    made = runner(DENSE, batches, contexts)
    rows = list(latency.measure(made, "tiny", "fp6_e3m2", batches, contexts, steps=2))
    assert [(row.context, row.batch) for row in rows] == [(64, 1), (64, 3), (130, 1), (130, 3)]
    assert all(row.milliseconds > 0 and not row.cuda_graph for row in rows)
    layers, per_token = 2, 2 * 2 * 16 * 4  # keys and values of two heads of 16 float32 numbers
    assert [row.kv_bytes for row in rows] == [row.batch * row.context * layers * per_token for row in rows]
    embedding = sum(tensor.nbytes for tensor in made.decoder.embedding.tensors())
    assert {row.weight_bytes for row in rows} == {made.decoder.nbytes - embedding}
    assert all(0.9 < float(cache.pages[1:].std()) < 1.1 for cache in made.caches)  # not the zeros of new pages


def test_what_is_timed_is_whole_steps_one_behind_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    now, free, most = 100.0, 0.0, 0
    under_way: list[float] = []

    class Device:
        """Takes 3 seconds a step and does one at a time; the host takes no time but to wait."""

        stages = ONE

        def launch(self, step: Step) -> Device:
            nonlocal free, most
            free = max(free, now) + 3
            under_way.append(free)
            most = max(most, len(under_way))
            made = Device()
            made.end = free
            return made

        def tokens(self) -> None:
            nonlocal now
            now = max(now, self.end)
            under_way.remove(self.end)

        end = 0.0

    monkeypatch.setattr(latency.time, "perf_counter", lambda: now)
    assert latency._timed(Device(), latency.decoding(1, 64, PAGE), 5) == 3  # type: ignore[arg-type]
    assert most == 2 and not under_way


def test_a_step_of_a_mixture_reads_the_experts_that_are_expected_to_be_hit() -> None:
    made = runner(MIXTURE, [1], [64])
    every = latency.step_bytes(made.decoder, 10_000)
    one, two = (latency.step_bytes(made.decoder, batch) for batch in (1, 2))
    experts = (every - one) / (1 - 2 / 8)
    assert 0 < one < two < every and two == pytest.approx(every - experts * (1 - 2 / 8) ** 2, abs=4)


def test_rows_of_a_step_have_pages_of_their_own_and_none_is_the_spare_one() -> None:
    step = latency.decoding(3, 130, PAGE)
    pages = [page for row in step.rows for page in row.request.pages]
    assert sorted(pages) == list(range(1, latency.pages_for([3], [130])))
    assert [(row.start, row.count, row.draws) for row in step.rows] == [(129, 1, True)] * 3


def test_what_was_written_is_shown_with_its_roofline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = latency.Latency(
        name="tiny",
        format="fp6_e3m2",
        batch=4,
        context=512,
        milliseconds=2.0,
        weight_bytes=3_000_000,
        kv_bytes=1_000_000,
        cuda_graph=True,
    )
    facts = {"dtype": "float16", "kv_dtype": "auto", "activations": "16bit", "read_bandwidth": 4e9}
    report.write(tmp_path / "found.json", report.text(latency.result([row], **facts)))
    assert main.run(["bench", "latency", "--from", str(tmp_path / "found.json")]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("tiny", "512", "2.000", "1.000", "50 %", "2000"))


def test_layers_that_stream_are_shown_with_the_share_of_the_link_that_they_reach(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = latency.Latency(
        name="tiny",
        format="50% sparse fp6",
        batch=1,
        context=512,
        milliseconds=50.0,
        weight_bytes=3_000_000,
        kv_bytes=1_000_000,
        cuda_graph=True,
        streamed_bytes=2_200_000_000,
        link_bandwidth=55e9,
    )
    stays = replace(row, format="int4", streamed_bytes=0, link_bandwidth=None)
    facts = {"dtype": "float16", "kv_dtype": "auto", "activations": "16bit", "read_bandwidth": 4e9}
    report.write(tmp_path / "found.json", report.text(latency.result([row, stays], **facts)))
    assert main.run(["bench", "latency", "--from", str(tmp_path / "found.json")]) == 0
    head, *lines = [line for line in capsys.readouterr().out.splitlines() if "link" in line or "tiny" in line]
    assert "streamed GB" in head and "of link" in head
    assert lines[0].split()[-5:] == ["20.0", "2.20", "55.0", "80", "%"]
    assert lines[1].split()[-3:] == ["-", "-", "-"]


def test_a_step_of_layers_that_stream_is_timed_with_the_bytes_that_it_copies() -> None:
    config = DecoderConfig.from_dict({**DENSE, "num_hidden_layers": 5})
    away = Offload(lambda layers, outside: 1)
    decoder = random_decoder(config, get_scheme("fp6_e3m2"), "cpu", torch.float32, offload=away)
    made = Runner(decoder, Sampler(2, 96, "cpu"), max_rows=1, max_length=64)
    made.allocate(latency.pages_for([1], [64]))
    (row,) = latency.measure(made, "tiny", "fp6_e3m2", [1], [64], steps=2)
    assert decoder.streamed is not None and row.streamed_bytes == decoder.streamed.nbytes > 0
    assert row.link_bandwidth is not None and row.link_bandwidth > 0
    shown = latency.result([row])["rows"][0]
    assert latency.link_share(shown) == pytest.approx(row.streamed_bytes / row.milliseconds * 1e3 / row.link_bandwidth)


def test_whole_and_pruned_weights_are_timed_in_one_run_each_in_a_row_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(geometries.GEOMETRIES, "tiny", DENSE)
    monkeypatch.setattr(bench, "need_gpu", lambda words: None)
    monkeypatch.setattr(timing, "read_bandwidth", lambda: 1e9)
    on_host = workers.Seat(torch.device("cpu"))
    monkeypatch.setattr(workers, "Seat", lambda device: on_host)
    options = ["--batch", "1", "--context", "64", "--steps", "1", "--cuda-graph", "off", "-o", str(tmp_path / "found")]
    formats = ["--format", "16bit", "--format", "fp6_e3m2"]
    assert main.run(["bench", "latency", "tiny", *formats, "--sparsity", "0,0.5,0.75", *options, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["format"] for row in rows] == [
        f"{name}{ending}" for name in ("16bit", "fp6_e3m2") for ending in ("", ":s50", ":s75")
    ]
    plain, half, quarter = (row["weight_bytes"] for row in rows[:3])
    assert plain > half > quarter


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--offload", "hosts"], "offload 'hosts', did you mean 'host'?: use host or disk"),
        (["--resident-layers", "3"], "resident_layers is 3: it goes with offload"),
        (["--kv-dtype", "fp9"], "kv_dtype 'fp9', did you mean 'fp8'?"),
        (["--cuda-graph", "of"], "cuda graph 'of', did you mean 'off'?"),
        (["llama-4"], "llama-4"),
    ],
)
def test_wrong_words_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["bench", "latency", *words]) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--pipeline-parallel", "2"], "pipeline_parallel is 2: start them all, torchrun --nproc-per-node 2 -m tersor"),
        (["--tensor-parallel", "2", "--expert-parallel", "2"], "4 ranks: start them all, torchrun --nproc-per-node 4"),
    ],
)
def test_ranks_are_timed_under_torchrun_alone(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["bench", "latency", *words]) == 2
    assert line in capsys.readouterr().err


def test_one_model_of_several_ranks_is_timed_and_no_rival(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: True)
    for words in (["llama-3-8b", "llama-2-70b"], ["--against", "vllm"]):
        assert main.run(["bench", "latency", *words, "--pipeline-parallel", "2"]) == 2
        assert "pipeline_parallel is 2: one model at a time is timed, and no rival" in capsys.readouterr().err
