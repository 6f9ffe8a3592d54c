"""`tersor report`: what stands on the page is what the runs hold, each thing once, and nothing is fetched."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from helpers import measured
from helpers.pages import Page, reported

from tersor.cli.main import run

INT4, GPTQ = (0.08, 0.12, 0.10, 0.06), (0.04, 0.05, 0.06, 0.03)


def test_numbers_of_the_table_are_those_of_the_runs(tmp_path: Path) -> None:
    one = measured.write(tmp_path / "one.json", measured.evaluation(measured.model("int4", INT4)))
    more = {"kv_dtype": "fp8", "size": 6_000_000, "bits": 4.5}
    two = measured.write(tmp_path / "two.json", measured.evaluation(measured.model("gptq", GPTQ, **more)))
    page = reported(tmp_path, one, two)
    int4, gptq, base = page.row("1"), page.row("2"), page.row("", "base")
    assert int4[1:4] == ["int4", "4.250", "5.6 MB"] and gptq[1:4] == ["gptq (kv-dtype=fp8)", "4.500", "6.0 MB"]
    mean, error = measured.mean([1000 * value for value in INT4])
    assert int4[6] == f"{mean:.0f} +- {error:.0f}" == "90 +- 13"
    assert int4[5] == "+9.4 +- 1.4" and int4[7:] == ["90.00", "900.0", "12.5 +- 2.0"]
    assert base[2] == "16.000" and base[4].startswith(f"{math.exp(3.0625):.3f} +- ") and base[5:] == [""] * 5
    floors = [cells for cells in page.rows if len(cells) > 1 and cells[1].startswith("noise floor")]
    assert [cells[6] for cells in floors] == ["2.00 +- 0.10"] * 2 and "bfloat16" in floors[0][1]


def test_models_of_two_runs_are_compared_window_by_window(tmp_path: Path) -> None:
    one = measured.write(tmp_path / "one.json", measured.evaluation(measured.model("int4", INT4)))
    two = measured.write(tmp_path / "two.json", measured.evaluation(measured.model("gptq", GPTQ)))
    gap, error = measured.mean([1000 * (b - a) for a, b in zip(INT4, GPTQ, strict=True)])
    cells = reported(tmp_path, one, two).row("2 gptq", "1 int4")
    assert cells[2:] == ["-0.0450 +- 0.0087", "0 of 4", f"{gap:.1f} +- {error:.1f}", "0 of 4"]


def test_error_bars_stand_where_the_axis_says_one_standard_error_is(tmp_path: Path) -> None:
    """The axis is read from its labels: two of them and their places say what every other place is."""
    models = [measured.model("int4", INT4), measured.model("gptq", GPTQ, bits=4.5)]
    one = measured.write(tmp_path / "one.json", measured.evaluation(*models))
    assert run(["report", one, "-o", str(tmp_path / "report.html")]) == 0
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    pictures = [Page(picture) for picture in re.findall(r'<svg viewBox="0 0 470 .*?</svg>', text, re.DOTALL)]
    assert len(pictures) == 4, "bits and size, against KL and loss"
    for picture, quantity, factor, shift in (
        (pictures[0], "kl", 1000, 0.0),
        (pictures[1], "perplexity_ratio", 100, 1.0),
        (pictures[2], "kl", 1000, 0.0),
        (pictures[3], "perplexity_ratio", 100, 1.0),
    ):
        logarithmic = quantity == "kl"
        ticks = [(float(words), float(where["y"]) - 4) for where, words in picture.named("text", "tick-y")]

        def value(place: float, ticks: Any = ticks, logarithmic: bool = logarithmic) -> float:
            (low, start), (high, end) = ticks[0], ticks[-1]
            share = (place - start) / (end - start)
            return low * (high / low) ** share if logarithmic else low + (high - low) * share

        bars, marks = picture.named("line", "error"), picture.named("circle")
        assert len(bars) == len(marks) == 2
        for model, (bar, _), (mark, _) in zip(models, bars, marks, strict=True):
            expected = factor * (model[quantity] - shift)
            error = factor * model[f"{quantity}_error"]
            near = {"rel": 0.01, "abs": 0.05}
            assert value(float(mark["cy"])) == pytest.approx(expected, **near)
            assert value(float(bar["y1"])) == pytest.approx(expected - error, **near)
            assert value(float(bar["y2"])) == pytest.approx(expected + error, **near)
            assert bar["x1"] == bar["x2"] == mark["cx"]
        levels = [value(float(line["y1"])) for line, _ in picture.named("line", "level")]
        assert levels == ([] if logarithmic else [pytest.approx(0.0, abs=0.05)]), "the floor is far below"
    assert "A noise floor of KL x 1000 = 2 is far below the pictures." in text


def test_a_bar_down_to_nothing_ends_at_the_frame_and_a_near_noise_floor_is_a_line(tmp_path: Path) -> None:
    wide, same = measured.model("wide", (0.0, 0.0, 0.0, 0.01)), measured.model("base", (0.0,) * 4)
    one = measured.write(tmp_path / "one.json", measured.evaluation(wide, {**same, "kl_error": 0.0}))
    assert wide["kl_error"] == pytest.approx(wide["kl"])
    page = reported(tmp_path, one)
    bars, levels = page.named("line", "error"), page.named("line", "level")
    assert bars[0][0]["y1"] == "274" and len(levels) == 4, "two of the noise floor, two of the reference"
    assert "Models with a KL of 0 are not in the pictures of KL." in [words for _, words in page.named("p")]
    assert not [cells for cells in page.rows if cells[:2] == ["", "base"]], "the reference stands there as a model"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"window": 32}, "other windows (4 windows of 32 tokens, not 4 windows of 64 tokens)"),
        ({"windows_sha256": "11"}, "other tokens (though 4 windows of 64 tokens, too)"),
        ({"reference_perplexity": 30.0}, "another model as reference, which is called base, too"),
        ({"label of the reference": "other"}, "another reference (other, not base)"),
        ({"device": "cuda:0"}, "computed otherwise (cuda in the checkpoint's dtype, not cpu in float32)"),
        ({"text": "other.txt", "windows_sha256": "11"}, "another text (other.txt, not text.txt)"),
    ],
)
def test_models_that_cannot_be_compared_are_shown_apart_and_it_is_said_why(
    changes: dict[str, Any], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = measured.write(tmp_path / "one.json", measured.evaluation(measured.model("int4", INT4)))
    other = measured.evaluation(measured.model("int4", GPTQ))
    for key, changed in changes.items():
        if key in ("device", "text"):
            other[key] = changed
        elif key == "label of the reference":
            other["reference_model"]["label"] = changed
        else:
            other["models"][0][key] = changed
    two = measured.write(tmp_path / "two.json", other)
    page = reported(tmp_path, one, two)
    assert capsys.readouterr().out.startswith(f"int4: shown apart: {reason}\n")
    notes = [words for _, words in page.named("p", "note")]
    assert f"Shown apart from the models above, and not compared with them: {reason}." in notes
    assert len([cells for cells in page.rows if cells[:2] == ["1", "int4"]]) == 2
    assert "Paired differences" not in [words for _, words in page.named("h3")]


def test_names_are_text_whatever_they_hold_and_the_page_fetches_nothing(tmp_path: Path) -> None:
    name = "<script>alert('x')</script> & \"quoted\""
    models = [measured.model(name, INT4), measured.model("plain", GPTQ, bits=4.5)]
    result = measured.evaluation(*models, text="</style><b>.txt", environment={"tersor": "<i>1"})
    one = measured.write(tmp_path / "<b>&.json", result)
    target = tmp_path / "report.html"
    assert run(["report", one, "-o", str(target), "--title", "A <b>title</b>"]) == 0
    text = target.read_text(encoding="utf-8")
    page = Page(text)
    assert page.row("1")[1] == name and page.named("h1")[0][1] == "A <b>title</b>"
    assert not page.named("script") and not page.named("b") and not page.named("i")
    assert any(name in words for _, words in page.named("title"))
    assert not re.search(r"\b(?:src|href|onload|onclick)=|https?:|url\(|@import", text)
    assert "default-src 'none'" in text and "prefers-color-scheme: dark" in text and "@media print" in text


def test_models_that_are_called_alike_are_told_apart_by_their_runs(tmp_path: Path) -> None:
    one = measured.evaluation(measured.model("int4", INT4), measured.model("int4", GPTQ))
    paths = [
        measured.write(tmp_path / "one.json", one),
        measured.write(tmp_path / "two.json", measured.evaluation(measured.model("int4", GPTQ))),
    ]
    page = reported(tmp_path, *paths)
    labels = [page.row(str(number))[1] for number in (1, 2, 3)]
    assert labels == ["int4 (one.json), number 1", "int4 (one.json), number 2", "int4 (two.json)"]


def test_of_many_models_those_of_neighbouring_sizes_are_compared_in_the_table(tmp_path: Path) -> None:
    bits = [4.0, 8.0, 5.0, *(6 + step / 10 for step in range(10))]
    models = [measured.model(f"m{width}", INT4, bits=width) for width in bits]
    page = reported(tmp_path, measured.write(tmp_path / "many.json", measured.evaluation(*models)))
    pairs = {tuple(sorted(cells[:2])) for cells in page.rows if re.fullmatch(r"\d+ m.*", cells[0])}
    assert len(pairs) == len(models) - 1
    assert ("1 m4.0", "3 m5.0") in pairs and ("1 m4.0", "2 m8.0") not in pairs
    notes = [words for _, words in page.named("p", "note")]
    assert "Of 78 pairs those that stand beside each other by bits a weight; --json has all of them." in notes


def test_without_a_reference_the_pictures_are_of_perplexity(tmp_path: Path) -> None:
    model = measured.model("int4", INT4)
    plain = {key: value for key, value in model.items() if not key.startswith(measured.COMPARED)}
    result = measured.evaluation({**plain, "per_window": {"nll": model["per_window"]["nll"]}}, floor=None)
    del result["reference_model"]
    page = reported(tmp_path, measured.write(tmp_path / "one.json", result))
    assert page.row("1")[4:] == [f"{model['perplexity']:.3f} +- {model['perplexity_error']:.3f}"]
    assert len(page.named("circle")) == 2 and ("Quality" in [words for _, words in page.named("h2")])


def test_times_tasks_and_where_they_were_measured_are_shown(tmp_path: Path) -> None:
    task = {"label": "int4", "task": "cloze", "metric": "acc", "value": 0.5, "error": 0.02, "documents": 7}
    result = measured.evaluation(measured.model("int4", INT4), limit=7, tasks=[task])
    paths = [measured.write(tmp_path / "one.json", result), measured.write(tmp_path / "two.json", measured.latency())]
    page = reported(tmp_path, *paths)
    assert page.row("int4", "cloze")[2:] == ["acc", paths[0], "7", "0.500 +- 0.020"]
    assert page.row("llama-3-8b")[1:] == ["fp6_e3m2", "512", "8", "2.500", "1.500", "60 %", "3200"]
    assert "Not measured: opt-30b, int4, it does not fit." in [words for _, words in page.named("p")]
    assert page.row(paths[1])[1:] == [
        "tersor bench latency",
        "abc1234",
        "0.1.0",
        "2.11.0",
        "NVIDIA H200",
        "2026-11-30",
        "",
    ]


def test_json_is_what_the_page_is_made_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tersor.report.page import page

    models = [measured.model("int4", INT4), measured.model("gptq", GPTQ)]
    one = measured.write(tmp_path / "one.json", measured.evaluation(*models))
    assert run(["report", one, "--json", "-o", str(tmp_path / "report.html")]) == 0
    captured = capsys.readouterr()
    made = json.loads(captured.out)
    assert (made["kind"], made["version"]) == ("tersor report", 1) and captured.err.startswith("written to ")
    assert made["quality"][0]["models"][0]["kl"] == models[0]["kl"]
    assert made["quality"][0]["comparisons"][0]["kl_difference"] == pytest.approx(models[1]["kl"] - models[0]["kl"])
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page(made)


def test_results_that_are_kept_in_the_tree_can_be_reported(tmp_path: Path) -> None:
    results = Path(__file__).resolve().parents[2] / "bench" / "results"
    names = ("latency_h200", "linear_h200_bf16", "throughput_micro_h200", "experts_h200_more")
    page = reported(tmp_path, *(str(results / f"{name}.json") for name in names))
    assert len(page.named("h2")) == 1 + len(names) and len(page.rows) > 50


def test_one_broken_model_leaves_the_others_room_and_one_window_has_no_bars(tmp_path: Path) -> None:
    """A loss of 430,000 per cent beside one of 1: the axis of losses is logarithmic, as that of KL is."""
    alone = {"windows": 1, "per_window": {"nll": [3.0]}}
    good, broken = (
        {**measured.model(name, INT4), **alone, "perplexity_ratio": ratio}
        for name, ratio in (("good", 1.01), ("broken", 4301.0))
    )
    for model in (good, broken):
        for name in ("perplexity", "perplexity_ratio", "kl", "flips"):
            del model[f"{name}_error"]
    page = reported(tmp_path, measured.write(tmp_path / "one.json", measured.evaluation(good, broken)))
    assert page.row("1")[5] == "+1.000" and page.row("2")[5] == "+430000" and not page.named("line", "error")
    heights = [float(where["cy"]) for where, _ in page.named("circle")]
    scale = (320 - 46 - 14) / (2 * 0.08 + 1)
    assert heights[2] - heights[3] == pytest.approx(scale, abs=0.02), "log, with 8 % of room at both ends"
