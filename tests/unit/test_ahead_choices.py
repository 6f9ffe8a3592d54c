"""No number of tokens meets a tile that was not compiled ahead; kernels are compiled beside what else a start does."""

from __future__ import annotations

import logging
import random
import threading
from pathlib import Path

import pytest
from helpers.jit_kernels import axpy

from tersor.cli import console
from tersor.engine import ahead
from tersor.errors import KernelError
from tersor.formats import Activations, get_scheme
from tersor.hardware import CHIPS
from tersor.kernels import dense, experts, tune
from tersor.kernels.jit import KernelSource, build
from tersor.kernels.tune import choice, table
from tersor.kernels.tune import experts as tune_experts
from tersor.layouts.gated import gated_rows
from tersor.layouts.packing import Packing
from tersor.models.geometries import geometry

H200 = CHIPS["NVIDIA H200"]
MOST = 8192


def linears(name: str) -> list[tuple[int, int, bool]]:
    """Output and input channels of a model's products, and whether they are gated."""
    config = geometry(name)
    form, hidden = config.layers[0].attention, config.hidden
    return [
        (form.qkv_channels, hidden, False),
        (hidden, form.heads * form.head_dim, False),
        (gated_rows(config.ffn), hidden, True),
        (hidden, config.ffn, False),
        (config.vocabulary, hidden, False),
    ]


@pytest.mark.parametrize(("chip", "activations"), [("NVIDIA H200", "16bit"), ("NVIDIA H200", "fp8")])
def test_linears_of_any_number_of_tokens_have_a_tile_that_was_listed(chip: str, activations: str) -> None:
    way = Activations.of(activations)
    packing = Packing.of(get_scheme("fp6_e3m2"), "float8_e4m3fn" if way is Activations.E4M3 else "bfloat16")
    counts = [*range(1, 65), *random.Random(0).sample(range(65, MOST + 1), 400)]
    for oc, ic, gated in linears("llama-3-8b"):
        problem = tune.LinearProblem.of(packing, (oc, ic), MOST, activations=way)
        listed = {dense.fused_source(packing, "bfloat16", one, gated) for one in tune.choices(problem, CHIPS[chip])}
        for n in counts:
            one = tune.choose(tune.LinearProblem.of(packing, (oc, ic), n, activations=way), CHIPS[chip])
            assert dense.fused_source(packing, "bfloat16", one, gated) in listed, (oc, ic, n)
        assert len(listed) < 30


@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "mixtral-8x7b", "gpt-oss-120b"])
def test_experts_of_any_number_of_tokens_have_tiles_that_were_listed(name: str) -> None:
    config = geometry(name)
    form, packing = config.layers[0].experts, Packing.of(get_scheme("fp6_e3m2"), "bfloat16")
    assert form is not None
    shapes = ((form.count, gated_rows(form.ffn), config.hidden), (form.count, config.hidden, form.ffn))

    def problems(tokens: int) -> tuple[tune_experts.ExpertsProblem, tune_experts.ExpertsProblem]:
        up, down = (tune_experts.ExpertsProblem.of(packing, shape, tokens, form.top_k) for shape in shapes)
        return up, down

    def sources(pair: tuple[tune_experts.EitherConfig, tune_experts.EitherConfig]) -> tuple[KernelSource, ...]:
        return tuple(experts.source(packing, "bfloat16", one, 1 - i, False) for i, one in enumerate(pair))

    listed = {sources(pair) for pair in tune_experts.choices(*problems(MOST), H200)}
    for tokens in random.Random(0).sample(range(65, MOST + 1), 150):
        assert sources(tune_experts.choose_pair(*problems(tokens), H200)) in listed, tokens


def test_measured_choices_are_listed_beside_those_predicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packing = Packing.of(get_scheme("fp6_e3m2"), "float16")
    problem = tune.LinearProblem.of(packing, (4096, 4096), 80)
    predicted = tune.choose(problem, H200)
    other = next(one for one in tune.candidates(problem, H200) if one.n_tile != predicted.n_tile)
    measured = table.Choice(problem=problem, config=other, microseconds=1.0)
    known = table.Table(tmp_path / "table.json", H200.name, "9.0", "", {}, [measured])
    monkeypatch.setattr(choice, "users_table", lambda chip: known)
    choice._looked_up.cache_clear()
    try:
        tiles = {one.n_tile for one in tune.choices(problem, H200)}
        assert {other.n_tile, predicted.n_tile} <= tiles  # 70 tokens, not measured, have what is predicted for 80
    finally:
        choice._looked_up.cache_clear()


def test_kernels_are_there_once_the_rest_of_a_start_is_done(cache_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    sources, meanwhile = [axpy(0), axpy(1)], threading.Event()

    def found() -> list[KernelSource]:
        assert meanwhile.wait(10)
        return sources

    with caplog.at_level(logging.INFO, logger="tersor"), ahead.compiling(found, H200):
        meanwhile.set()
    assert {source for source, _ in build._memory} == set(sources)
    assert [record.getMessage() for record in caplog.records] == ["compiling 2 kernels for sm_90a"]
    caplog.clear()
    build._memory.clear()
    with caplog.at_level(logging.INFO, logger="tersor"), ahead.compiling(lambda: sources, H200):
        pass
    assert {source for source, _ in build._memory} == set(sources) and not caplog.records  # they are on the disk


def test_a_start_that_fails_says_why_and_waits_for_no_kernel_that_was_not_begun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun: list[object] = []

    def many(sources: list[KernelSource], arch: str, on_done: object) -> None:
        begun.append(on_done)
        assert callable(on_done)
        for source in sources:
            stopped.wait(10)
            on_done(source, None)
            begun.append(source)

    stopped = threading.Event()
    monkeypatch.setattr(ahead, "compile_many", many)
    with pytest.raises(KernelError, match="the disk is gone"), ahead.compiling(lambda: [axpy(2), axpy(3)], H200):
        threading.Timer(0.05, stopped.set).start()
        raise KernelError("the disk is gone")
    assert len(begun) <= 1


def test_a_kernel_that_does_not_compile_ends_a_start() -> None:
    def broken() -> list[KernelSource]:
        raise KernelError("no such header")

    with pytest.raises(KernelError, match="no such header"), ahead.compiling(broken, H200):
        pass


@pytest.mark.parametrize("terminal", [True, False])
def test_a_verb_says_on_a_terminal_that_kernels_are_compiled(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    with console.telling():
        logging.getLogger("tersor").info("compiling %d kernels for %s", 41, "sm_90a")
    logging.getLogger("tersor").info("nobody hears this")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "compiling 41 kernels for sm_90a\n" if terminal else "")
