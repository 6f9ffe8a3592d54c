"""Pictures of `tersor bench latency` and `tersor bench throughput`: what they show, and the files that verbs write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tersor.bench import latency, plot_latency, plot_throughput, report, throughput
from tersor.bench.latency import Latency
from tersor.bench.throughput import Throughput
from tersor.cli.main import run
from tersor.errors import InputError

matplotlib = pytest.importorskip("matplotlib")


@pytest.fixture
def steps() -> dict[str, Any]:
    """Times of Tersor, which reads 4 and 5 MB of 4 GB a second, and of vLLM, beside texts of two lengths."""
    rows = [
        Latency(
            name="tiny",
            format=format,
            batch=batch,
            context=context,
            milliseconds=2.0 + batch,
            weight_bytes=None if format.startswith("vllm") else 3_000_000,
            kv_bytes=None if format.startswith("vllm") else 1_000_000 * batch,
            cuda_graph=True,
        )
        for context in (64, 128)
        for format in ("fp6_e3m2", "vllm 16bit")
        for batch in (2, 1)
    ]
    facts = {"dtype": "float16", "kv_dtype": "auto", "activations": "16bit", "read_bandwidth": 4e9}
    return latency.result(rows, {"vllm": "0.26.0"}, **facts)


def runs(roofline_seconds: float | None) -> dict[str, Any]:
    """Runs of two workloads, by Tersor with a roofline and by vLLM."""
    rows = [
        Throughput(
            name="tiny",
            format=format,
            workload=workload,
            order=order,
            requests=20,
            prompt_tokens=100,
            output_tokens=40,
            seconds=10.0 if order == "planned" else 20.0,
            plan_seconds=0.1,
            reuse=None,
            optimum=0.5,
            roofline_seconds=None if format.startswith("vllm") else roofline_seconds,
        )
        for workload in ("micro", "tree")
        for format, order in (("vllm 16bit", "shuffled"), ("fp6_e3m2", "planned"), ("fp6_e3m2", "shuffled"))
    ]
    return throughput.result(rows, engine={"max_rows": 8})


def drawn(plot: Any, result: dict[str, Any], folder: Path) -> Any:
    """Return the figure of a result instead of writing it."""
    figures: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tersor.plots.save", lambda figure, path, about: figures.append((figure, about)))
        plot(result, folder / "picture.svg")
    ((figure, about),) = figures
    assert f"{len(result['rows'])} times, sha256 " in about
    return figure


def test_a_line_is_a_format_beside_texts_of_one_length_and_its_roofline_is_dashed(
    steps: dict[str, Any], tmp_path: Path
) -> None:
    figure = drawn(plot_latency.plot, steps, tmp_path)
    assert [panel.get_title() for panel in figure.axes] == ["tiny, texts of 64 tokens", "tiny, texts of 128 tokens"]
    for panel in figure.axes:
        ours, roof, theirs = panel.lines
        assert [line.get_label() for line in panel.lines] == ["Tersor fp6_e3m2", "fp6_e3m2: roofline", "vLLM 16bit"]
        assert ours.get_xdata().tolist() == [1, 2] and ours.get_ydata().tolist() == [3.0, 4.0]
        assert roof.get_ydata().tolist() == [1.0, 1.25] and roof.get_linestyle() == "--"
        assert (roof.get_color(), theirs.get_linestyle()) == (ours.get_color(), "-")
        assert panel.get_xscale() == "log" and panel.get_ylim()[0] == 0


def test_steps_without_a_bandwidth_have_no_roofline(steps: dict[str, Any], tmp_path: Path) -> None:
    figure = drawn(plot_latency.plot, {**steps, "read_bandwidth": None}, tmp_path)
    assert [len(panel.lines) for panel in figure.axes] == [2, 2]


def test_a_bar_is_an_order_and_a_format_and_its_roofline_a_mark(tmp_path: Path) -> None:
    figure = drawn(plot_throughput.plot, runs(5.0), tmp_path)
    assert [panel.get_title() for panel in figure.axes] == ["micro, 20 requests", "tree, 20 requests"]
    for panel in figure.axes:
        assert [bar.get_width() for bar in panel.patches] == [1.0, 2.0, 1.0]
        labels = [label.get_text() for label in panel.get_yticklabels()]
        assert labels == ["vLLM 16bit, shuffled", "Tersor fp6_e3m2, planned", "Tersor fp6_e3m2, shuffled"]
        (marks,) = panel.lines
        assert list(marks.get_xdata()) == [4.0, 4.0] and list(marks.get_ydata()) == [1, 2]
        assert panel.get_xlim()[1] > 4.0
        vllm, planned, shuffled = (bar.get_facecolor() for bar in panel.patches)
        assert vllm == shuffled != planned


def test_runs_of_a_cpu_have_no_marks(tmp_path: Path) -> None:
    figure = drawn(plot_throughput.plot, runs(None), tmp_path)
    assert [len(panel.lines) for panel in figure.axes] == [0, 0]


@pytest.mark.parametrize("verb", ["latency", "throughput"])
def test_a_verb_draws_what_was_measured_before(
    verb: str, steps: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved, copy, picture = (tmp_path / name for name in ("found.json", "copy.json", "found.svg"))
    report.write(saved, report.text(steps if verb == "latency" else runs(5.0)))
    assert run(["bench", verb, "--from", str(saved), "--plot", str(picture), "-o", str(copy)]) == 0
    shown = capsys.readouterr().out
    assert "roofline" in shown and shown.endswith(f"written to {copy}\nwritten to {picture}\n")
    assert copy.read_bytes() == saved.read_bytes()
    assert b" times, sha256 " in picture.read_bytes()


@pytest.mark.parametrize("verb", ["latency", "throughput"])
def test_a_picture_of_another_type_is_refused_before_anything_runs(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", verb, "--plot", "times.txt"]) == 2
    shown = capsys.readouterr().err
    assert "a plot is written as one of" in shown and shown.count("\n") == 1


@pytest.mark.parametrize("plot", [plot_latency.plot, plot_throughput.plot])
def test_without_times_there_is_nothing_to_draw(plot: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there are no times to draw"):
        plot({"rows": []}, tmp_path / "times.svg")


def test_requests_a_second_stand_beside_their_roofline_where_a_file_has_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = runs(5.0)
    old = {**new, "rows": [{key: row[key] for key in row if key != "roofline_seconds"} for row in new["rows"]]}
    for name, result, roofs in (("new", new, ["4.00", "50 %"]), ("old", old, ["-", "-"])):
        headings, cells = throughput.columns(result)
        places = [headings.index(head) for head in ("requests/s", "roofline\nrequests/s", "of\nroofline")]
        assert [cells[1][place] for place in places] == ["2.00", *roofs]
        report.write(tmp_path / f"{name}.json", report.text(result))
        assert run(["bench", "throughput", "--from", str(tmp_path / f"{name}.json")]) == 0
        assert "requests/s" in capsys.readouterr().out
