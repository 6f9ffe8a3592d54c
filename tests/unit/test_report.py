"""`tersor report`: what stands on the page is what the runs hold, each thing once, and nothing is fetched."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from helpers import calibrated, measured
from helpers.browser import CHROMIUM, Browser

from tersor.cli.main import run
from tersor.convert import quantize

VOID = {"meta"}
INT4, GPTQ = (0.08, 0.12, 0.10, 0.06), (0.04, 0.05, 0.06, 0.03)


class Page(HTMLParser):
    """A page, taken apart; elements that are not closed in order fail.

    Attributes:
        elements: name, attributes and text of every element, in the order of their ends.
        rows: cells of every row of a table.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str], str]] = []
        self.rows: list[list[str]] = []
        self._open: list[tuple[str, dict[str, str], list[str]]] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self._open.append((tag, {key: value or "" for key, value in attrs}, []))
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag: str) -> None:
        name, attributes, parts = self._open.pop()
        assert name == tag
        self.elements.append((name, attributes, "".join(parts)))
        if tag in ("td", "th"):
            self.rows[-1].append("".join(parts))

    def handle_data(self, data: str) -> None:
        if self._open:
            self._open[-1][2].append(data)

    def named(self, name: str, kind: str = "") -> list[tuple[dict[str, str], str]]:
        """Attributes and text of elements of a name that have a class, where one is given."""
        return [
            (attributes, text)
            for own, attributes, text in self.elements
            if own == name and (not kind or kind in attributes.get("class", "").split())
        ]

    def row(self, *beginning: str) -> list[str]:
        """The one row that begins with these cells."""
        (found,) = [cells for cells in self.rows if cells[: len(beginning)] == list(beginning)]
        return found


def reported(folder: Path, *runs: str) -> Page:
    """Write a report and return its page."""
    target = folder / "report.html"
    assert run(["report", *runs, "-o", str(target)]) == 0
    return Page(target.read_text(encoding="utf-8"))


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command line that must fail with one line, and return the line."""
    capsys.readouterr()
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("tersor: ")
    return captured.err


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint, calibrated by a recipe that takes no time, its down projections in another format."""
    from tersor.compress import RECIPES

    folder = tmp_path_factory.mktemp("checkpoint")
    model, text = calibrated.model("llama", folder / "model"), calibrated.text(folder / "text.txt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES, "gptq", calibrated.quick(RECIPES["gptq"]))
        options = {**calibrated.OPTIONS, "calibration": text, "overrides": ["down_proj=int8:row"]}
        quantize(model, folder / "out", **options)
    return folder / "out"


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
    ],
)
def test_models_that_cannot_be_compared_are_shown_apart_and_it_is_said_why(
    changes: dict[str, Any], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = measured.write(tmp_path / "one.json", measured.evaluation(measured.model("int4", INT4)))
    other = measured.evaluation(measured.model("int4", GPTQ))
    for key, changed in changes.items():
        if key == "device":
            other["device"] = changed
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


def test_without_a_reference_the_pictures_are_of_perplexity(tmp_path: Path) -> None:
    model = measured.model("int4", INT4)
    plain = {key: value for key, value in model.items() if not key.startswith(measured.COMPARED)}
    result = measured.evaluation({**plain, "per_window": {"nll": model["per_window"]["nll"]}}, floor=None)
    del result["reference_model"]
    page = reported(tmp_path, measured.write(tmp_path / "one.json", result))
    assert page.row("1")[4:] == [f"{model['perplexity']:.3f} +- {model['perplexity_error']:.3f}"]
    assert len(page.named("circle")) == 2 and ("Quality" in [words for _, words in page.named("h2")])


def test_a_checkpoint_shows_its_choice_and_every_layer(checkpoint: Path, tmp_path: Path) -> None:
    log = json.loads((checkpoint / "tersor-calibration.json").read_text())
    page = reported(tmp_path, str(checkpoint))
    assert (
        page.row("codes")[1] == "calibrated by GPTQ"
        and page.row("override")[1] == "down_proj = int8, one float16 scale a row"
    )
    assert page.row("calibration")[1] == "3 windows of 32 tokens of text.txt"
    assert page.row("format")[1] == "int4, one float16 scale a group of 16"
    assert page.row("calibrated by")[1] == log["computed_on"] and page.row("source")[1] == "model"
    for line in log["layers"]:
        cells = page.row(line["layer"])
        assert cells[1] == line["format"] and cells[5] == f"{100 * line['relative_error']:.3g} %"
        if "objective_after" in line:
            assert cells[7:9] == [f"{line['objective_before']:.4g}", f"{line['objective_after']:.4g}"]
    errors = [line["relative_error"] for line in log["layers"]]
    bars = [float(where["width"]) for where, _ in page.named("rect", "worse")]
    assert max(bars) == 100 and min(bars) == pytest.approx(100 * min(errors) / max(errors), abs=0.01)
    assert page.row("int8:row:float16")[3] == str(len([line for line in log["layers"] if "int8" in line["format"]]))


def test_layers_are_kept_beside_a_checkpoint_that_is_rounded_to_nearest(tmp_path: Path) -> None:
    model = calibrated.model("llama", tmp_path / "model")
    done = quantize(model, tmp_path / "out", format="int4", group_size=16)
    kept = json.loads((tmp_path / "out" / "tersor-layers.json").read_text())
    assert (kept["kind"], kept["version"]) == ("tersor layers", 1)
    assert {line["tensor"]: line["relative_error"] for line in kept["layers"]} == {
        row.name: pytest.approx(row.relative_error, rel=5e-4) for row in done.compressed
    }
    page = reported(tmp_path, str(tmp_path / "out"))
    for line in kept["layers"]:
        assert page.row(line["layer"])[5] == f"{100 * line['relative_error']:.3g} %"
    (tmp_path / "out" / "tersor-layers.json").unlink()
    older = reported(tmp_path, str(tmp_path / "out"))
    assert older.row(kept["layers"][0]["layer"])[5] == "-"
    assert any("an older Tersor" in words for _, words in older.named("p"))


def test_experts_of_a_layer_are_one_line(tmp_path: Path) -> None:
    from tersor.report.checkpoints import checkpoint_dict
    from tersor.report.runs import Checkpoint, read_runs

    model = calibrated.model("qwen3_moe", tmp_path / "model")
    quantize(model, tmp_path / "out", format="int4", group_size=16)
    (found,) = read_runs([str(tmp_path / "out")])
    assert isinstance(found, Checkpoint)
    experts = [line for line in checkpoint_dict(found)["layers"] if "experts" in line["layer"]]
    own = [item for item in found.found.items if item.compressed and "experts" in item.name]
    assert sum(line["bytes"] for line in experts) == sum(item.nbytes for item in own)
    assert sum(line["count"] for line in experts) == len(own) > len(experts)
    errors = {line["layer"]: line["relative_error"] for line in found.layers}
    first = experts[0]
    several = [
        error for layer, error in errors.items() if re.sub(r"\.\d+\.(?=[a-z_]+$)", ".*.", layer) == first["layer"]
    ]
    assert len(several) == first["count"]
    assert first["relative_error"] == pytest.approx(math.sqrt(sum(error**2 for error in several) / len(several)))


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


def test_runs_that_are_none_are_one_line_each(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, target = measured.evaluation(measured.model("int4", INT4)), ["-o", str(tmp_path / "x.html")]
    cases: dict[str, tuple[Any, str]] = {
        "list": ([], "is no run: neither a JSON of tersor eval, bench latency"),
        "other": ({"kind": "tersor demo", "version": 1}, "is no run"),
        "newer": ({**good, "version": 2}, "results of tersor eval, version 2, and this Tersor reads version 1"),
        "empty": ({key: value for key, value in good.items() if key != "models"}, "neither models nor tasks"),
        "lacking": ({**good, "models": [{"label": "x"}]}, "model 0: damaged: 'weight_bytes' is missing"),
        "words": ({**good, "models": [{**good["models"][0], "kl": "many"}]}, "damaged: 'kl' is 'many'"),
        "windows": ({**good, "models": [{**good["models"][0], "windows": 5}]}, "no number for every window"),
        "size": ({**good, "models": [{**good["models"][0], "weight_bytes": 0}]}, "is not positive"),
        "floor": ({**good, "noise_floor": {}}, "noise_floor: damaged: 'rounding' is missing"),
        "rows": ({**measured.latency(), "rows": [{"name": "x"}]}, "damaged: a row lacks"),
    }
    for name, (result, words) in cases.items():
        path = measured.write(tmp_path / f"{name}.json", result)
        assert words in refused(["report", path, *target], capsys), name
    for name, content, words in (
        ("text", "no JSON", "cannot be read as JSON"),
        ("nan", '{"a": NaN}', "cannot be read as JSON: NaN"),
    ):
        (tmp_path / name).write_text(content, encoding="utf-8")
        assert words in refused(["report", str(tmp_path / name), *target], capsys)
    assert "no such file or directory" in refused(["report", str(tmp_path / "none.json"), *target], capsys)
    model = calibrated.model("llama", tmp_path / "model")
    assert "is not compressed" in refused(["report", str(model), *target], capsys)
    assert "config.json" in refused(["report", str(tmp_path), *target], capsys)
    assert "is given twice" in refused(["report", str(checkpoint), f"{checkpoint}/.", *target], capsys)
    assert "nothing to write" in refused(["report", str(checkpoint)], capsys)
    assert "does not exist" in refused(["report", str(checkpoint), "-o", str(tmp_path / "no" / "x.html")], capsys)
    assert not (tmp_path / "x.html").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_browser_shows_the_page_by_itself_within_its_width(tmp_path: Path, checkpoint: Path) -> None:
    one = measured.evaluation(measured.model("a-long-name-" * 8, INT4), measured.model("gptq", GPTQ, bits=4.5))
    reported(tmp_path, measured.write(tmp_path / "one.json", one), str(checkpoint))
    address = (tmp_path / "report.html").as_uri()
    with Browser(tmp_path / "chromium", width=900) as browser:
        browser.open(address)
        assert browser.requests == [address] and not browser.problems
        assert browser.value("document.documentElement.scrollWidth <= window.innerWidth")
        box = "document.querySelector('svg.plot').getBoundingClientRect()"
        assert browser.value(f"{box}.width > 300 && {box}.height > 200")
        paper = "getComputedStyle(document.body).backgroundColor"
        shown = []
        for scheme in ("light", "dark"):
            features = [{"name": "prefers-color-scheme", "value": scheme}]
            browser.call("Emulation.setEmulatedMedia", features=features)
            shown.append(browser.value(paper))
        browser.call("Emulation.setEmulatedMedia", media="print", features=features)
        assert shown == ["rgb(255, 255, 255)", "rgb(20, 23, 26)"] and browser.value(paper) == shown[0]
