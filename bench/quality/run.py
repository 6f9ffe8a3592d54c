"""Measure recipes on a model: KL, flips and perplexity on texts, bits and seconds, in files that `tersor report` reads.

    python bench/quality/run.py MODEL --text code=code.txt:32 --text prose=prose.txt:32 --calibration calibration.txt:64
    python bench/quality/run.py MODEL ... --only 'fp6|int4' --device cuda --jobs 4
    python bench/quality/run.py MODEL ... --list

Of every text the first windows are predicted, so many as its number says; of the calibration text as many are taken,
spread evenly. A text's results are bench/results/quality_NAME_TEXT.json, a JSON of `tersor eval`, written again after
every recipe. What stands there is not measured again, so that the same command goes on where another was interrupted,
on another device too: such rows say on which, and are measured again where the file's own device is there.
`bench/quality/tables.py` makes the tables of docs/claims.md of them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import sys
import tempfile
import traceback
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from measure import DTYPE, Bench, Setting, Text
from recipes import Recipe, recipes

from tersor import evaluate
from tersor.bench import report
from tersor.errors import TersorError, one_line
from tersor.hardware import resolve_device

RESULTS = Path(__file__).resolve().parents[1] / "results"

_OWN = ("environment", "device")
"""What may be another's in a file that goes on: its rows are of one setting all the same."""

Rows = list[tuple[str, dict[str, Any]]]
"""(text, what was measured there)."""

_benches: list[Bench] = []
"""The one of a worker's process."""


class Files:
    """The results of one model: a file for each text."""

    def __init__(self, folder: Path, setting: Setting) -> None:
        """Read what is there.

        Args:
            folder: of the files.
            setting: the model's.

        Raises:
            SystemExit: a file was made with another setting, other than its device.
        """
        self._paths = {text.name: folder / f"quality_{setting.name}_{text.name}.json" for text in setting.texts}
        self._results: dict[str, dict[str, Any]] = {}
        self._device = setting.device.partition(":")[0]
        labels = (label for recipe in recipes(setting.group) for label in recipe.labels)
        self._order = {label: place for place, label in enumerate(labels)}
        for text in setting.texts:
            facts = _facts(setting, text)
            path = self._paths[text.name]
            found = json.loads(path.read_text()) if path.exists() else {**facts, "models": [], "skipped": []}
            other = [key for key, value in facts.items() if key not in _OWN and found.get(key) != value]
            if other:
                raise SystemExit(f"{path}: {other[0]} is {found.get(other[0])!r} there: move the file away")
            self._results[text.name] = found

    def lacks(self, recipe: Recipe) -> bool:
        """Whether a recipe has yet to be measured, on some text or in some way, or was elsewhere and may be here."""
        known = [
            {row["label"] for row in result["models"] if "device" not in row or result["device"] != self._device}
            for result in self._results.values()
        ]
        return any(label not in labels for labels in known for label in recipe.labels)

    @property
    def lacks_floor(self) -> bool:
        """Whether the original has yet to be measured."""
        return any("noise_floor" not in result for result in self._results.values())

    def add_floor(self, found: dict[str, dict[str, Any]]) -> None:
        """Keep what `Bench.noise_floor` returned."""
        for name, facts in found.items():
            self._results[name] |= facts
        self._write()

    def add(self, recipe: Recipe, rows: Rows, why: str = "") -> None:
        """Keep what was measured of a recipe, or why it was not."""
        for name, result in self._results.items():
            elsewhere = {} if result["device"] == self._device else {"device": self._device}
            new = {row["label"]: {**row, **elsewhere} for text, row in rows if text == name}
            models = {row["label"]: row for row in result["models"]} | new
            result["models"] = sorted(models.values(), key=self._place)
            left = [one for one in result["skipped"] if one["recipe"] != recipe.name]
            result["skipped"] = [*left, {"recipe": recipe.name, "why": why}] if why else left
        self._write()

    def _place(self, row: dict[str, Any]) -> int:
        return self._order.get(row["label"], len(self._order))

    def _write(self) -> None:
        for name, path in self._paths.items():
            result = self._results[name]
            ours = {"environment": report.environment()} if result["device"] == self._device else {}
            report.write(path, report.text({**result, **ours}))


def _facts(setting: Setting, text: Text) -> dict[str, Any]:
    """Return what a results file says of all its rows."""
    calibration = setting.calibration
    return {
        "kind": evaluate.KIND,
        "version": evaluate.VERSION,
        "environment": report.environment(),
        "text": text.path.name,
        "reference": setting.name,
        "device": setting.device.partition(":")[0],
        "dtype": DTYPE,
        "group_size": setting.group,
        "calibrated_in": "the model's dtype" if setting.own_dtype and setting.device != "cpu" else DTYPE,
        "calibration": f"{calibration.windows} windows of {setting.window} tokens of {calibration.path.name}",
    }


def work(recipe: Recipe) -> tuple[Rows, str]:
    """Measure a recipe in a worker's process; what failed is said in a line, so that the others go on."""
    rows: Rows = []
    try:
        rows += _benches[0].measure(recipe)
    except TersorError as error:
        return rows, str(error)
    except Exception as error:
        traceback.print_exc()
        return rows, one_line(error)
    return rows, ""


def begin(setting: Setting, threads: int) -> None:
    """Make ready for `work` in this process.

    Args:
        setting: the model's.
        threads: of torch on the CPU.
    """
    torch.set_num_threads(threads)
    _benches[:] = [Bench(setting)]


def measured(setting: Setting, wanted: list[Recipe], jobs: int) -> Iterator[tuple[Recipe, Rows, str]]:
    """Yield (recipe, rows, why there are none) in the order in which they are finished.

    Args:
        setting: the model's.
        wanted: in the order in which they are begun.
        jobs: processes that share the device; of one it is this one.
    """
    if jobs == 1:
        for recipe in wanted:
            yield recipe, *work(recipe)
        return
    threads = max(1, torch.get_num_threads() // jobs)
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawned, initializer=begin, initargs=(setting, threads)) as pool:
        going = {pool.submit(work, recipe): recipe for recipe in wanted}
        for done in as_completed(going):
            yield going[done], *done.result()


def parse_text(text: str, named: bool = True) -> Text:
    """Return the text that `NAME=FILE:WINDOWS`, or `FILE:WINDOWS`, stands for.

    Raises:
        argparse.ArgumentTypeError: it is neither.
    """
    match = re.fullmatch(r"(?:(\w+)=)?(.+):(\d+)", text)
    if match is None or (match[1] is None) is named:
        form = "NAME=FILE:WINDOWS" if named else "FILE:WINDOWS"
        raise argparse.ArgumentTypeError(f"{text!r} is not {form}")
    return Text(match[1] or "calibration", Path(match[2]), int(match[3]))


def parse(arguments: Iterable[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory of a checkpoint")
    parser.add_argument("--name", help="of the model in results; its directory's if not given")
    parser.add_argument("--text", type=parse_text, action="append", required=True, help="NAME=FILE:WINDOWS; repeatable")
    parser.add_argument("--calibration", type=lambda text: parse_text(text, False), required=True, help="FILE:WINDOWS")
    parser.add_argument("--group", type=int, default=128, help="input channels that share a scale")
    parser.add_argument("--window", type=int, default=512, help="tokens in a window")
    parser.add_argument("--device", default="auto", help="cpu, cuda or cuda:N")
    parser.add_argument("--own-dtype", action="store_true", help="calibrate in the model's dtype on a GPU, not float32")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the device")
    parser.add_argument("--only", type=re.compile, help="recipes in whose name this regular expression is found")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave checkpoints there, for tersor report")
    parser.add_argument("--list", action="store_true", help="only name what would be measured")
    return parser.parse_args(None if arguments is None else list(arguments))


def main(arguments: Iterable[str] | None = None) -> int:
    """Measure what is not there yet; return how many recipes did not work."""
    given = parse(arguments)
    if given.keep is not None:
        given.keep.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="tersor-quality-") as folder:
        setting = Setting(
            model=given.model.resolve(),
            name=given.name or given.model.resolve().name,
            texts=tuple(given.text),
            calibration=given.calibration,
            group=given.group,
            window=given.window,
            device=str(resolve_device(given.device)),
            own_dtype=given.own_dtype,
            scratch=given.keep or Path(folder),
            keep=given.keep is not None,
        )
        files = Files(given.results, setting)
        chosen = [one for one in recipes(given.group) if given.only is None or given.only.search(one.name)]
        wanted = [one for one in chosen if files.lacks(one)]
        if given.list:
            print("\n".join(one.name for one in wanted))
            return 0
        if files.lacks_floor or (wanted and given.jobs == 1):
            begin(setting, torch.get_num_threads())
        if files.lacks_floor:
            files.add_floor(_benches[0].noise_floor())
        if given.jobs > 1:
            _benches.clear()
        failed = 0
        for number, (recipe, rows, why) in enumerate(measured(setting, wanted, given.jobs), 1):
            files.add(recipe, rows, why)
            failed += bool(why)
            print(f"{number} of {len(wanted)}: {recipe.name}: {why or _words(rows)}", flush=True)
    return failed


def _words(rows: Rows) -> str:
    """Return what is shown of a recipe while others are measured."""
    kl = ", ".join(f"{name} {1000 * row['kl']:.2f}" for name, row in rows)
    return f"KL x 1000 {kl}; {rows[0][1]['seconds']} s and {rows[-1][1]['seconds_of_measuring']} s"


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
