"""Measured choices: a table is written, read and obeyed; what is no table is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.usage import refused_in_one_line

from tersor.bench import tune as measuring
from tersor.bench.shapes import Shape
from tersor.errors import InputError
from tersor.formats import Scheme, get_scheme
from tersor.hardware import CHIPS
from tersor.kernels import tune
from tersor.kernels.tune import LinearConfig, LinearProblem, choice, table
from tersor.kernels.tune.table import Choice, Table

H200 = CHIPS["NVIDIA H200"]
A100 = CHIPS["NVIDIA A100"]
PROBLEM = LinearProblem(oc=2048, ic=8192, n=16, bits=6)
FP6 = get_scheme("fp6_e3m2")


def config(problem: LinearProblem, splits: int, schedule: str = "sm90", tile: int | None = None) -> LinearConfig:
    """The first candidate of a problem with so many splits."""
    options = [
        option
        for option in tune.candidates(problem, H200)
        if (option.schedule, option.splits) == (schedule, splits) and tile in (None, option.n_tile)
    ]
    return options[0]


def chosen(problem: LinearProblem, splits: int, **more: Any) -> Choice:
    """A choice whose configuration is one of the problem's."""
    return Choice(problem=problem, config=config(problem, splits, **more), microseconds=10.5)


def at(n: int) -> LinearProblem:
    """The problem with another number of tokens."""
    return replace(PROBLEM, n=n)


def made(choices: Sequence[Choice], kernels: str | None = None) -> Table:
    """A table for an H200."""
    hashed = table.kernels_hash() if kernels is None else kernels
    return Table(Path("t.json"), H200.name, "9.0", hashed, {"driver": "580"}, choices)


def place(choices: Sequence[Choice], path: Path, kernels: str | None = None) -> Path:
    """Write a table and forget what was read before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(made(choices, kernels).text())
    choice.forget()
    return path


def test_candidates_hold_the_choice_of_the_model() -> None:
    for n in (1, 5, 16, 64, 65, 129, 1000):
        options = tune.candidates(at(n), H200)
        assert len(set(options)) == len(options) >= (20 if n <= 64 else 5)
        assert tune.predict(at(n), H200) in options
        assert all(tune.seconds(at(n), option, H200) > 0 for option in options)
    assert {option.schedule for option in tune.candidates(at(1), H200)} == {"sm80", "sm90"}
    assert {option.schedule for option in tune.candidates(at(1), A100)} == {"sm80"}
    assert tune.candidates(at(65), A100) == ()
    crooked = replace(at(1), aligned=False)
    assert {option.schedule for option in tune.candidates(crooked, H200)} == {"sm80"}


def test_a_table_comes_back_as_it_was(tmp_path: Path) -> None:
    choices = [chosen(at(64), 3), chosen(at(8), 5), chosen(replace(PROBLEM, bits=4, scale_groups=1), 2)]
    path = place(choices, tmp_path / "t.json")
    back = table.read(path, H200, table.kernels_hash())
    assert back.choices == {one.problem: one for one in choices}
    assert back.environment == {"driver": "580"}
    assert back.text() == path.read_text()
    lines = [line for line in path.read_text().splitlines() if '"microseconds"' in line]
    assert [json.loads(line.strip(" ,"))["problem"]["n"] for line in lines] == [8, 16, 64]


def test_the_file_is_named_for_chip_and_kernels(cache_dir: Path) -> None:
    assert table.slug(H200) == "nvidia_h200_sm90"
    assert table.slug(replace(H200, name="NVIDIA H100 80GB HBM3")) == "nvidia_h100_80gb_hbm3_sm90"
    assert table.user_path(H200) == cache_dir / "tune" / f"nvidia_h200_sm90-{table.kernels_hash()}.json"
    assert len(table.kernels_hash()) == 12


def test_what_was_measured_goes_before_the_model() -> None:
    other = chosen(PROBLEM, 7)
    assert other.config != tune.predict(PROBLEM, H200)
    assert choice.measured(PROBLEM, H200) is None
    assert tune.choose(PROBLEM, H200) == tune.predict(PROBLEM, H200)
    place([other], table.user_path(H200))
    assert tune.choose(PROBLEM, H200) == choice.measured(PROBLEM, H200) == other.config
    for near in (at(15), at(17), replace(PROBLEM, oc=8193), replace(PROBLEM, bits=5), replace(PROBLEM, aligned=False)):
        assert tune.choose(near, H200) == tune.predict(near, H200)
    assert tune.choose(PROBLEM, replace(H200, name="NVIDIA H20")) == tune.predict(PROBLEM, H200)
    assert tune.choose(PROBLEM, A100) == tune.predict(PROBLEM, A100)


def test_between_measured_neighbours_of_equal_choice() -> None:
    few, many = chosen(at(9), 7), chosen(at(14), 7)
    far = [chosen(at(n), 2, tile=256) for n in (400, 700)]
    assert far[0].config.ctas != far[1].config.ctas  # they follow from the tokens
    place([few, many, chosen(at(16), 5), *far], table.user_path(H200))
    assert [tune.choose(at(n), H200).splits for n in (9, 10, 13, 14, 16)] == [7, 7, 7, 7, 5]
    assert tune.choose(at(15), H200) == tune.predict(at(15), H200)  # its neighbours differ
    assert tune.choose(at(8), H200) == tune.predict(at(8), H200)
    assert tune.choose(at(701), H200) == tune.predict(at(701), H200)
    between = tune.choose(at(600), H200)
    assert (between.n_tile, between.splits, between.token_tiles) == (256, 2, 3)
    assert between in tune.candidates(at(600), H200)


def test_files_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    place([chosen(PROBLEM, 7)], table.user_path(H200))
    reads: list[Path] = []
    real = table.read
    monkeypatch.setattr(table, "read", lambda path, *more: reads.append(path) or real(path, *more))
    for n in (1, 2, 16, 16):
        tune.choose(at(n), H200)
    assert reads == [table.user_path(H200)]


def change(path: Path, **values: Any) -> None:
    """Replace values of a written table."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


ENTRY = json.loads(made([chosen(PROBLEM, 7)]).text())["choices"][0]


def entry(part: str, **values: Any) -> list[Any]:
    """A list of one choice with some values replaced; `None` removes a field."""
    fields = {key: value for key, value in {**ENTRY[part], **values}.items() if value is not None}
    return [{**ENTRY, part: fields}]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"kind": "something else"}, "it does not say kind"),
        ({"version": 3}, "version 3, this Tersor reads version 2"),
        ({"extra": 1}, "keys ['extra'] are unknown or missing"),
        ({"choices": 3}, "TypeError"),
        ({"choices": [{"problem": {}}]}, "choice 0: expected problem, config and microseconds"),
        ({"choices": [{**ENTRY, "microseconds": -1}]}, "choice 0: -1 is no time"),
        ({"choices": entry("problem", n="16")}, "choice 0, problem: n is '16', expected int"),
        ({"choices": entry("problem", aligned=1)}, "aligned is 1, expected bool"),
        ({"choices": entry("problem", n=True)}, "n is True, expected int"),
        ({"choices": entry("config", splits=None)}, "choice 0, config: fields ['splits'] are unknown or missing"),
        ({"choices": entry("config", colour="red")}, "choice 0, config: fields ['colour'] are unknown or missing"),
        ({"chip": 7}, "chip, capability and kernels are texts"),
        ({"capability": [9, 0]}, "chip, capability and kernels are texts"),
        ({"capability": "8.0"}, "was measured on NVIDIA H200 of compute capability 8.0, this is NVIDIA H200 of 9.0"),
        ({"chip": "NVIDIA H100"}, "was measured on NVIDIA H100 of compute capability 9.0, this is NVIDIA H200 of 9.0"),
        ({"kernels": "0123456789ab"}, "was measured with kernels 0123456789ab, these are"),
        ({"choices": entry("config", splits=99)}, "no kernel runs [2048, 8192] with 16 tokens as"),
    ],
)
def test_what_is_no_table_is_refused_in_one_line(values: dict[str, Any], words: str) -> None:
    path = place([chosen(PROBLEM, 7)], table.user_path(H200))
    change(path, **values)
    with pytest.raises(InputError) as caught:
        tune.choose(PROBLEM, H200)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert words in message
    assert "remove the file" in message
    assert "\n" not in message


@pytest.mark.parametrize("content", [b"", b"not\njson", b"[]", b"\xff\xfe", b'{"kind": "tersor measured choices"}'])
def test_broken_files_are_refused(content: bytes) -> None:
    path = place([], table.user_path(H200))
    path.write_bytes(content)
    with pytest.raises(InputError, match="is no table of measured choices") as caught:
        tune.choose(PROBLEM, H200)
    assert "\n" not in str(caught.value)
    path.unlink()
    assert tune.choose(PROBLEM, H200) == tune.predict(PROBLEM, H200)


def test_the_fastest_is_picked_but_noise_does_not_count() -> None:
    slow, fast, model = (config(PROBLEM, splits) for splits in (1, 2, 3))
    assert measuring.pick({slow: 9.0, fast: 5.0, model: 6.0}, model) == fast
    assert measuring.pick({slow: 9.0, fast: 5.0, model: 5.04}, model) == model


def test_split_sums_and_predictions_beyond_reason_are_not_measured() -> None:
    least = tune.seconds(at(16), tune.predict(at(16), H200), H200)
    assert measuring.worth_measuring(at(16), H200) == [
        option
        for option in tune.candidates(at(16), H200)
        if option.schedule == "sm80" or tune.seconds(at(16), option, H200) <= 2 * least
    ]
    vocabulary = replace(at(64), oc=128256)
    many = measuring.worth_measuring(vocabulary, H200)
    assert {option.splits for option in many if option.schedule == "sm80"} == set(range(1, 9))
    assert {option.splits for option in tune.candidates(vocabulary, H200)} == set(range(1, 17))
    for problem in (at(4096), vocabulary, replace(PROBLEM, oc=57344, n=65536)):
        assert tune.predict(problem, H200) in measuring.worth_measuring(problem, H200)


def test_problems_that_are_equal_are_measured_once() -> None:
    schemes = [FP6, get_scheme("fp6_e2m3"), get_scheme("int4", 128)]
    found = measuring.problems([Shape(256, 256)], [1, 100], schemes, H200)
    assert {(scheme.name, len(problems)) for (_, scheme), problems in found.items()} == {("fp6_e3m2", 2), ("int4", 2)}
    assert found[Shape(256, 256), FP6] == [LinearProblem(oc=256, ic=256, n=n, bits=6) for n in (1, 100)]
    assert [p.n for p in measuring.problems([Shape(256, 256)], [1, 100], [FP6], A100)[Shape(256, 256), FP6]] == [1]
    assert not measuring.problems([Shape(256, 250)], [1], [FP6], H200)[Shape(256, 250), FP6][0].aligned


def test_every_candidate_is_timed_and_the_table_holds_the_best(tmp_path: Path) -> None:
    timed: list[tuple[LinearProblem, LinearConfig]] = []
    weights: list[Shape] = []

    def time(shape: Shape, scheme: Scheme) -> Any:
        weights.append(shape)

        def one(problem: LinearProblem, config: LinearConfig) -> float:
            timed.append((problem, config))
            return 5.0 if (config.schedule, config.splits, config.row_groups) == ("sm90", 2, 1) else 6.0 + config.splits

        return one

    wanted = measuring.problems([Shape(512, 512), Shape(256, 512)], [1, 8], [FP6], H200)
    steps: list[tuple[int, int]] = []
    choices = measuring.measure(wanted, H200, time, lambda done, total: steps.append((done, total)))
    assert weights == [Shape(512, 512), Shape(256, 512)]
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert timed == [
        (chosen.problem, option) for chosen in choices for option in measuring.worth_measuring(chosen.problem, H200)
    ]
    assert {(one.config.schedule, one.config.splits, one.microseconds) for one in choices} == {("sm90", 2, 5.0)}
    path = table.user_path(H200)
    first = measuring.merged(path, H200, choices[:2])
    path.parent.mkdir(parents=True)
    path.write_text(first.text())
    later = [replace(choices[0], microseconds=4.0), choices[3]]
    path.write_text(measuring.merged(path, H200, later).text())
    choice.forget()
    held = table.read(path, H200).choices
    assert len(held) == 3
    assert held[choices[0].problem].microseconds == 4.0
    assert tune.choose(choices[1].problem, H200) == choices[1].config
    rows = measuring.rows(choices, H200)
    assert rows[0]["config"] == str(choices[0].config)
    headings, cells = measuring.columns(rows)
    assert len(headings) == len(cells[0])
    assert cells[0][:4] == ["512x512", "1", "6", "5.0"]
    path.write_text("{}")
    with pytest.raises(InputError, match="is no table"):
        measuring.merged(path, H200, choices)


def test_default_tokens_leave_no_gap() -> None:
    tokens = measuring.tokens_with_edges()
    assert list(tokens) == sorted(set(tokens))
    for tile in (8, 16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256):
        assert {tile, tile + 1} <= set(tokens)


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["8x8"], 1, "timing needs a CUDA device"),
        (["8x8", "--output", "no/such/folder/t.json"], 2, "the folder no/such/folder does not exist"),
        (["lama-2-70b"], 2, "did you mean 'llama-2-70b'?"),
        (["8x8", "--format", "fp66"], 2, "--format fp66"),
        (["8x8", "--n", "1,a"], 2, "--n '1,a'"),
    ],
)
def test_wrong_usage_is_one_line(
    arguments: list[str],
    status: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    refused_in_one_line(["bench", "tune", *arguments], status, words, monkeypatch, capsys)
