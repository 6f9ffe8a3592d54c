"""bench/quality: recipes are measured into files, and docs/claims.md shows what the files say."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import calibrated, measured

from tersor.cli import main
from tersor.compress.salience import rounding_error
from tersor.errors import InputError
from tersor.integrations.transformers import load

ROOT = Path(__file__).resolve().parents[2]
MODULES = ("choice", "claims", "measure", "mixllm", "recipes", "run", "tables")


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    """The scripts as modules."""
    folder = str(ROOT / "bench" / "quality")
    sys.path.insert(0, folder)
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    finally:
        sys.path.remove(folder)
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrated.model("llama", tmp_path_factory.mktemp("llama") / "small")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrated.text(tmp_path_factory.mktemp("text") / "text.txt")


def arguments(model: Path, text: Path, results: Path, only: str) -> list[str]:
    """Return a command line of `run`: two windows of one text under two names."""
    given = ["--text", f"code={text}:2", "--text", f"prose={text}:2", "--calibration", f"{text}:3"]
    sizes = ["--group", "32", "--window", "32", "--device", "cpu"]
    return [str(model), *given, *sizes, "--results", str(results), "--only", only]


def results_of(folder: Path, text: str = "code") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"quality_small_{text}.json").read_text())
    return found


def test_the_tables_of_the_pages_are_those_of_the_results(bench: SimpleNamespace) -> None:
    made = bench.tables.pages(bench.tables.RESULTS)
    assert {path.name for path in made} == {"claims.md", "pruning.md"}
    for path, tables in made.items():
        text = path.read_text(encoding="utf-8")
        assert bench.tables.page(text, tables) == text, "make them again: python bench/quality/tables.py --write"


def test_every_recipe_that_a_claim_names_is_measured_on_some_model(bench: SimpleNamespace) -> None:
    known = {label for group in (64, 128) for recipe in bench.recipes.recipes(group) for label in recipe.labels}
    named = {label for claim in bench.claims.CLAIMS.values() for label in claim.rows}
    named |= {f"{scheme}-{how}" for scheme in bench.claims.FORMATS for how in ("rtn", "gptq", "gptq-high")}
    named |= {
        label for target in bench.claims.TARGETS for label in (target.recipe, *[target.nearest] * bool(target.share))
    }
    for claim in bench.claims.CLAIMS.values():
        for check in claim.checks:
            named |= {check.first, getattr(check, "other", check.first)}
    assert named <= known, sorted(named - known)


def test_what_is_measured_is_kept_for_reports_and_not_measured_again(
    bench: SimpleNamespace,
    model: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    some = arguments(model, text, tmp_path, "^(int8-row-rtn|uint4-g-gptq|original)$")
    assert bench.run.main([*some, "--keep", str(tmp_path / "kept")]) == 0
    result = results_of(tmp_path)
    labels = [row["label"] for row in result["models"]]
    assert labels == [
        "original@kv-dtype=fp8",
        *("uint4-g-gptq", "uint4-g-gptq@activations=int8", "int8-row-rtn", "int8-row-rtn@activations=int8"),
    ]
    plain, coarse = (result["models"][place] for place in (3, 1))
    assert 0 < plain["kl"] < coarse["kl"] and plain["bits_per_weight"] > 8 > coarse["bits_per_weight"]
    assert set(plain["per_window"]) == {"nll", "kl", "flips"} and len(plain["per_window"]["kl"]) == 2
    assert coarse["layers"] == 14 and 0 < coarse["mean_layer"] <= coarse["worst_layer"] <= 1
    assert str(tmp_path) not in json.dumps(result) and result["noise_floor"]["kl"] > 0

    # The same checkpoint as `tersor report` sees it, and in its card.
    files = [str(tmp_path / f"quality_small_{name}.json") for name in ("code", "prose")]
    page = tmp_path / "report.html"
    kept = str(tmp_path / "kept" / "uint4-g-gptq")
    assert main.run(["report", *files, kept, "-o", str(page), "--card"]) == 0
    card = (tmp_path / "kept" / "uint4-g-gptq" / "README.md").read_text()
    words = bench.tables._five(coarse)
    assert f"| {words[0]} |" in card and f"{words[0]}<" in page.read_text()

    monkeypatch.setattr(bench.run, "begin", None)
    assert bench.run.main(some) == 0
    capsys.readouterr()
    assert bench.run.main([*some[:-1], "^int", "--list"]) == 0
    assert capsys.readouterr().out.split() == [
        "int4-g-rtn",
        "int4-g-gptq",
        "int4-g-gptq-high",
        "int4-row-rtn",
        "int4-row-gptq",
        "int4-g-rtn-outliers",
        "int4-g-gptq-outliers",
    ]
    with pytest.raises(SystemExit, match="group_size is 32 there: move the file away"):
        bench.run.main([*some, "--group", "16"])


def test_a_pruned_model_is_measured_beside_dense_ones(
    bench: SimpleNamespace, model: Path, text: Path, tmp_path: Path
) -> None:
    assert bench.run.main(arguments(model, text, tmp_path, "^(magnitude-50|admm-50-int4|int4-row-rtn)$")) == 0
    dense, plain, few = results_of(tmp_path)["models"]
    assert [plain["label"], few["label"]] == ["magnitude-50", "admm-50-int4"]
    assert plain["bits_per_weight"] == 17, "float32 and a mask"
    assert few["bits_per_weight"] < dense["bits_per_weight"] < 5 and few["layers"] == 14
    assert "worst_layer" in dense or "worst_layer" not in few, "codes are compared with round to nearest, masks are not"


def test_a_linear_is_shown_with_what_was_timed_last_and_a_dash_where_nothing_was(
    bench: SimpleNamespace, tmp_path: Path
) -> None:
    one = {"oc": 28672, "ic": 7168, "n": 16, "chain": "pdl", "weight_bytes": 28672 * 7168}
    tile = {"tokens": 16, "sparsity": 0.5, "activations": "16bit", "cublas": 100.0, "bits": 4.0}
    tiles = [
        {**tile, "values": "fp6_e3m2", "microseconds": 60.0},
        {**tile, "values": "fp6_e3m2", "microseconds": 50.0},
        {**tile, "values": "fp6_e3m2", "microseconds": 40.0, "activations": "fp8"},
        {**tile, "values": "fp8_e4m3:448", "microseconds": 62.5},
        {**tile, "values": "int4", "microseconds": 80.0},
        {**tile, "values": "float16", "microseconds": 1.0, "sparsity": 0.8},
        {**tile, "values": "float16", "microseconds": 1.0, "tokens": 8},
    ]
    (tmp_path / "sparse_even_h200.json").write_text(json.dumps({"rows": tiles}))
    rows = [
        {**one, "kernel": "cublas", "chain": "plain", "microseconds": 90.0, "weight_bytes": 2 * 28672 * 7168},
        {**one, "kernel": "int4:s50", "microseconds": 30.0},
        {**one, "kernel": "int4:s50", "microseconds": 31.0, "chain": "plain"},
        {**one, "kernel": "fp6_e2m3", "microseconds": 1.0, "n": 8},
    ]
    (tmp_path / "linear_h200_some.json").write_text(json.dumps({"rows": rows}))
    found = book(bench, "small", **{"admm-50-int4": FAR, "fp6_e2m3-row-gptq": NEAR})
    lines = bench.tables.choice_table(found, bench.choice.read_times(tmp_path)).splitlines()
    assert lines[2:] == [
        "| all, 16 bits | 16 | 16.0 | 90.0 | 1.00 | 0 | 0 |",
        "| all, `fp6_e2m3` | 4.250 | - | - | - | 11.50 | +1.16 |",
        "| all, `int4` in groups | - | - | - | - | - | - |",
        "| half, 16 bits | - | - | - | - | - | - |",
        "| half, `fp8_e4m3` | - | 4.0 (`fp8_e4m3:448`) | 62.5 | 1.60 | - | - |",
        "| half, `fp6_e2m3` | - | 4.0 (`fp6_e3m2`) | 50.0 | 2.00 | - | - |",
        "| half, `int4` | 4.250 | 8.0 | 30.0 | 3.00 | 21.75 | +2.20 |",
    ]


def test_steps_of_models_are_shown_beside_those_of_16_bits_and_not_at_all_before_they_were_timed(
    bench: SimpleNamespace, tmp_path: Path
) -> None:
    assert bench.tables.steps_table(tmp_path) == ""
    step = {"name": "llama-3-8b", "context": 512, "weight_bytes": 15_000_000_000}
    few = {**step, "format": "fp6_e3m2:s50", "weight_bytes": 5_500_000_000}
    rows = [
        {**step, "format": "16bit", "batch": 8, "milliseconds": 4.2},
        {**few, "batch": 8, "milliseconds": 2.0},
        {**step, "format": "16bit", "batch": 16, "milliseconds": 4.4},
        {**few, "batch": 16, "milliseconds": 2.2},
        {**step, "name": "opt-30b", "format": "fp6_e3m2", "batch": 8, "milliseconds": 7.0},
    ]
    (tmp_path / "latency_h200_sparse.json").write_text(json.dumps({"rows": rows}))
    assert bench.tables.steps_table(tmp_path).splitlines() == [
        "| model | tokens before | weights | GB read | 8 rows: ms | 16 rows: ms |",
        "|---|---|---|---|---|---|",
        "| llama-3-8b | 512 | all, 16 bits | 15.00 | 4.20 | 4.40 |",
        "| llama-3-8b | 512 | 50 % zero, `fp6_e3m2` | 5.50 | 2.00 (2.10 times) | 2.20 (2.00 times) |",
        "| opt-30b | 512 | all, `fp6_e3m2` | 15.00 | 7.00 | - |",
    ]


def test_rows_of_another_device_go_into_a_file_and_say_so(
    bench: SimpleNamespace, model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.run.main(arguments(model, text, tmp_path, "^int8-row-rtn$")) == 0
    for path in tmp_path.iterdir():
        result = json.loads(path.read_text())
        facts = {**result["environment"], "gpu": "another"}
        path.write_text(json.dumps({**result, "device": "cuda", "environment": facts}))
    assert bench.run.main(arguments(model, text, tmp_path, "^(int8-row-rtn|int4-row-rtn)$")) == 0
    capsys.readouterr()
    result = results_of(tmp_path)
    assert [(row["recipe"], row.get("device")) for row in result["models"]] == [
        ("int4-row-rtn", "cpu"),
        *[("int8-row-rtn", None)] * 2,
    ]
    assert (result["device"], result["environment"]["gpu"]) == ("cuda", "another")
    assert bench.tables._made(result["models"][:1]).endswith(" (cpu)")
    assert bench.tables._made(result["models"][1:]).isdigit()
    again, text_file = arguments(model, text, tmp_path, "^int[48]-row-rtn$"), tmp_path / "quality_small_code.json"
    assert bench.run.main([*again, "--list"]) == 0 and not capsys.readouterr().out.strip(), (
        "what is there is not measured again"
    )
    text_file.write_text(json.dumps({**result, "device": "cpu"}))
    assert bench.run.main([*again, "--list"]) == 0
    assert capsys.readouterr().out.split() == ["int4-row-rtn"], "but on the file's own device what another one measured"


def test_a_recipe_that_fails_is_named_and_the_others_go_on(
    bench: SimpleNamespace, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = bench.recipes.Recipe("good", {"format": "int8"})
    broken = bench.recipes.Recipe("broken", {"format": "int8", "nothing": 1})
    monkeypatch.setattr(bench.run, "recipes", lambda group: [broken, good])
    command = arguments(model, text, tmp_path, "")
    assert bench.run.main(command) == 1
    result = results_of(tmp_path)
    assert [row["label"] for row in result["models"]] == ["good"]
    assert [one["recipe"] for one in result["skipped"]] == ["broken"] and "nothing" in result["skipped"][0]["why"]
    mended = bench.recipes.Recipe("broken", {"format": "int4"})
    monkeypatch.setattr(bench.run, "recipes", lambda group: [mended, good])
    assert bench.run.main(command) == 0
    result = results_of(tmp_path)
    assert [row["label"] for row in result["models"]] == ["broken", "good"] and not result["skipped"]


def test_mixllm_scores_by_the_texts_own_labels_and_stays_within_the_bytes(bench: SimpleNamespace, model: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    windows = torch.randint(2, calibrated.VOCABULARY, (1, 24), generator=draw)
    device, mix = torch.device("cpu"), bench.mixllm.levels(16)
    whole: Any = load.load_model(model, device, "float32")
    name, row, step = "model.layers.0.mlp.up_proj", 3, 0.02
    weight = whole.get_submodule(name).weight
    scores = bench.mixllm._scores(model, {name: tuple(weight.shape)}, windows, mix, device)[name]
    delta = rounding_error(weight.detach().float(), mix.levels[0])[row]

    def lost(share: float) -> float:
        with torch.no_grad():
            before = weight[row].clone()
            weight[row] += share * delta
            logits = whole(input_ids=windows).logits[0, :-1].double()
            weight[row] = before
        return float(torch.nn.functional.cross_entropy(logits, windows[0, 1:], reduction="sum"))

    change = (lost(step) - lost(-step)) / (2 * step)
    assert float(scores[0, row]) == pytest.approx(abs(change + change**2 / 2), rel=0.02)
    found = bench.mixllm.choose(model, windows, 16, 6.0, device)
    taken = found.allocation
    assert 5.9 < 8 * (taken.nbytes - taken.padding) / taken.weights <= 6.0
    with pytest.raises(InputError):
        bench.mixllm.choose(model, windows, 15, 6.0, device)


def book(bench: SimpleNamespace, model: str, **kl: tuple[float, ...]) -> Any:
    """Return results of one text with rows of such KL over windows; `_` in a name is `-`."""
    rows = [measured.model(name.replace("__", "-"), values) for name, values in kl.items()]
    more = {
        "reference": model,
        "dtype": "float32",
        "group_size": 128,
        "calibrated_in": "float32",
        "calibration": "64 windows of 512 tokens of c.txt",
    }
    result = measured.evaluation(*({**row, "seconds": 1.0, "recipe": row["label"]} for row in rows), **more)
    result["reference_model"]["label"] = model
    return bench.tables.Book([(f"quality_{model}_prose.json", result)])


NEAR, FAR = (0.010, 0.012, 0.011, 0.013), (0.020, 0.021, 0.022, 0.024)


@pytest.mark.parametrize(
    ("first", "other", "verdict"),
    [(NEAR, FAR, "holds"), (FAR, NEAR, "**does not hold**"), (NEAR, NEAR[::-1], "not certain")],
)
def test_a_claim_holds_where_the_difference_is_larger_than_its_error(
    bench: SimpleNamespace, first: tuple[float, ...], other: tuple[float, ...], verdict: str
) -> None:
    found = book(bench, "smollm2", one=first, two=other)
    for quantity in ("kl", "log_perplexity"):
        claim = bench.claims.Claim(("one", "two"), (bench.claims.Nearer("one", "two", quantity),))
        table = bench.tables.claim_tables(found, claim)
        assert table.splitlines()[-1].endswith(f"| {verdict} |")
        assert table.startswith("**smollm2**, SmolLM2-135M-Instruct: 4 windows of each text")
    claim = bench.claims.Claim(("one",), (bench.claims.Within("one", 1.5), bench.claims.Within("one", 0.5)))
    least = 100 * math.expm1(sum(first) / 4)
    shown = ["holds" if least < 1.5 else "**does not hold**", "**does not hold**"]
    assert [line.split(" | ")[-1] for line in bench.tables.claim_tables(found, claim).splitlines()[-2:]] == [
        f"{words} |" for words in shown
    ]


def test_a_claim_of_few_percents_more_has_them_in_its_favour(bench: SimpleNamespace) -> None:
    found = book(bench, "smollm2", one=NEAR, two=tuple(0.98 * value for value in NEAR))
    for slack, verdict in ((0.0, "**does not hold**"), (0.03, "holds")):
        claim = bench.claims.Claim(("one", "two"), (bench.claims.Nearer("one", "two", slack=slack),))
        assert bench.tables.claim_tables(found, claim).splitlines()[-1].endswith(f"| {verdict} |")


def test_the_summary_counts_verdicts_and_names_what_does_not_hold(bench: SimpleNamespace) -> None:
    names = {"fp6_e2m3-row-rtn": FAR, "fp6_e3m2-row-rtn": NEAR, "fp6_e3m2-g-rtn": FAR}
    lines = bench.tables.summary(book(bench, "smollm2", **names)).splitlines()
    assert "| [six](#e2m3-or-e3m2-rows-or-groups) | 0 | 1 | 2 |" in lines
    assert "- smollm2, prose: fp6_e2m3-row-rtn has less KL than fp6_e3m2-row-rtn" in lines
    assert bench.tables.summary(bench.tables.Book([])) == ""


def test_what_a_mix_chose_and_what_kernels_cost_it_stand_below_its_row(bench: SimpleNamespace) -> None:
    found = book(bench, "small", one=NEAR, mixllm=FAR)
    losses = {"loss": 0.012, "loss_without_units": 0.0115, "loss_without_pairs_and_units": 0.011}
    chosen = {"levels": ["uint4:g64:float16", "int8:row"], "shares": [0.9, 0.1], "bytes": 1000, "padding_bytes": 15}
    for row in found.models["small"]["prose"]["models"]:
        row["mix"] = {**chosen, **losses}
    lines = bench.tables.claim_tables(found, bench.claims.Claim(("one", "mixllm"), ())).splitlines()
    assert "| one | uint4:g64 90, int8:row 10 | 1.50 | 12.00 | 11.50 | 11.00 |" in lines
    assert "| mixllm | uint4:g64 90, int8:row 10 | 1.50 | - | - | - |" in lines, "its score is no KL"


def test_a_target_is_a_share_of_what_rounding_loses_or_a_divergence(bench: SimpleNamespace) -> None:
    found = book(bench, "small", **{"uint4-g-rtn": FAR, "uint4-g-gptq": NEAR})
    target = bench.claims.Target
    for given, words in (
        (target("small", "uint4-g-gptq", 0.45), "47 % | yes"),
        (target("small", "uint4-g-gptq", 0.50), "47 % | **no**"),
        (target("small", "uint4-g-gptq", kl=(("prose", 12),)), "11.50 | yes"),
        (target("small", "uint4-g-gptq", kl=(("prose", 11),)), "11.50 | **no**"),
        (target("small", "uint4-g-gptq", kl=(("prose", 11),), errors=2.0), "11.50 | yes"),
        (target("small", "uint4-g-gptq", kl=(("prose", 9),), errors=2.0), "11.50 | **no**"),
    ):
        assert " | ".join(bench.tables._reached(found, given)).endswith(words)
    assert not bench.tables._reached(found, target("small", "uint4-g-gptq", kl=(("code", 12),)))
    assert not bench.tables._reached(found, target("smollm2", "uint4-g-gptq", 0.45))
    line = bench.tables.effort_tables(found).splitlines()[-1]
    assert line.startswith("| uint4-g | 4.250 | 21.75 | 11.50 | 47 | ") and line.endswith("| - | - | - | - |")
