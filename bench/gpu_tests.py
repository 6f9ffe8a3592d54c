"""Run the tests of tests/gpu and keep a summary of what passed, where and with what, as results/gpu_tests.json.

    python bench/gpu_tests.py [further arguments of pytest]
    python bench/gpu_tests.py --again [files of tests/gpu] [further arguments of pytest]

`--again` runs the files that are named, or else the functions of which a test failed last time, and no others, and puts
what they do now in its place: for tests that were wrong, and for what a change can have reached. What is mended in what
all kernels share asks for all of them. With pytest-xdist's `-n`, tests marked `alone`, which time the host or count the
GPU's memory, run behind the others, one after the other. The exit status is pytest's, or 1 where every test was
skipped: then nothing was tested, and no summary is written.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

import results_file

AGAIN = "--again"
ROOT = Path(__file__).resolve().parents[1]
NOTHING_COLLECTED = 5
"""Pytest's status where no test is left, as where none of the files named is marked."""


def main() -> None:
    """Run pytest, write the summary, exit."""
    again = AGAIN in sys.argv[1:]
    before = results_file.read("gpu_tests") if again else {}
    options = [option for option in sys.argv[1:] if option != AGAIN]
    files = sorted(option for option in options if option.endswith(".py")) if again else []
    functions = sorted({name.partition("[")[0] for name in before.get("failed", ())})
    if again and not files and not functions:
        raise SystemExit("no test failed last time")
    tests = files or [f"tests/gpu/{name.replace('.', '.py::', 1)}" for name in functions] or ["tests/gpu"]
    further = [option for option in options if option not in files]
    result, status = run([*tests, *further])
    if result["counts"].keys() <= {"skipped"}:
        raise SystemExit("no test ran: tests/gpu needs a CUDA device")
    if again:
        result = joined(before, result, [Path(file).stem for file in files] or functions)
    print(f"written to {results_file.write('gpu_tests', result)}")
    raise SystemExit(status)


def run(arguments: list[str]) -> tuple[dict[str, Any], int]:
    """Run pytest, twice where tests run side by side; return the summary, and the first status that is not 0."""
    at_once = any(argument.startswith("-n") for argument in arguments)
    parts = (["-m", "not alone"], ["-n", "0", "-m", "alone"]) if at_once else ([],)
    junits, statuses = [], []
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            junit = Path(folder) / f"junit{len(junits)}.xml"
            command = [sys.executable, "-m", "pytest", *arguments, f"--junitxml={junit}", *part]
            statuses.append(subprocess.run(command, cwd=ROOT, check=False).returncode)
            if not junit.exists():
                raise SystemExit(f"pytest ended with status {statuses[-1]} before it ran a test")
            junits.append(junit)
        result = summary(*junits)
    return result, next((status for status in statuses if status not in (0, NOTHING_COLLECTED)), 0)


def joined(before: dict[str, Any], after: dict[str, Any], again: list[str]) -> dict[str, Any]:
    """Return a summary of all tests, of which those of some functions, or of whole modules, ran again."""

    def ran(name: str) -> bool:
        function = name.partition("[")[0]
        return function in again or function.partition(".")[0] in again

    tests = {function: counts for function, counts in before["tests"].items() if not ran(function)} | after["tests"]
    total: Counter[str] = sum((Counter(counts) for counts in tests.values()), Counter())
    return {
        "counts": dict(total),
        "seconds": before["seconds"],
        "failed": [name for name in before["failed"] if not ran(name)] + after["failed"],
        "ran_again": [
            *before.get("ran_again", ()),
            {"tests": again, "seconds": after["seconds"], "failed_before": [n for n in before["failed"] if ran(n)]},
        ],
        "tests": dict(sorted(tests.items())),
    }


def summary(*junits: Path) -> dict[str, Any]:
    """Read pytest's junit files: counts in all and for each test function, seconds, and the names that failed."""
    suites = [suite for junit in junits for suite in xml.etree.ElementTree.parse(junit).getroot().iter("testsuite")]
    assert len(suites) == len(junits)
    tests: dict[str, Counter[str]] = {}
    failed = []
    for case in (case for suite in suites for case in suite.iter("testcase")):
        name = case.get("name", "")
        outcome = next((tag for tag in ("failure", "error", "skipped") if case.find(tag) is not None), "passed")
        function = f"{case.get('classname', '').removeprefix('tests.gpu.')}.{name.partition('[')[0]}"
        tests.setdefault(function, Counter())[outcome] += 1
        if outcome in ("failure", "error"):
            failed.append(f"{function.rpartition('.')[0]}.{name}")
    total: Counter[str] = sum(tests.values(), Counter())
    return {
        "counts": dict(total),
        "seconds": sum(float(suite.get("time", 0)) for suite in suites),
        "failed": failed,
        "tests": {function: dict(counts) for function, counts in sorted(tests.items())},
    }


if __name__ == "__main__":
    main()
