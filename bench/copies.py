"""How many more requests a second do engines on several GPUs answer than one, from the same file?

    python bench/copies.py                                   # Llama-3-8B in FP6, 1 and 2 engines
    python bench/copies.py --geometry examples/tiny-lm --requests 40 --engines 1,2 --size prefix=64 --size own=16

`tersor batch --data-parallel N` answers a workload whose prompts share prefixes (`tersor.bench.workloads`) with each
number of engines; whole groups of them go to one engine. The weights are random, and written first. Seconds are those
that the batch counts: from when all engines are ready to the last answer.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import results_file
from written import written

from tersor.bench import random_checkpoint, workloads
from tersor.models.geometries import GEOMETRIES

VOCABULARY = 8192
"""Tokens that the tokenizer knows."""


def main() -> None:
    """Parse the command line, write checkpoint and requests, measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", default="llama-3-8b", help="a name, or a folder with a config.json")
    parser.add_argument("--format", default="fp6_e3m2", help="of the weights")
    parser.add_argument("--workload", default="micro", help="a workload of tersor bench throughput")
    parser.add_argument("--requests", type=int, default=1600, help="of the workload, for each engine")
    parser.add_argument("--size", action="append", default=[], metavar="NAME=N", help="of the workload; repeatable")
    parser.add_argument("--engines", default="1,2", help="numbers of engines, with commas")
    parser.add_argument("--name", help="of the results' file; default: by GPU")
    given = parser.parse_args()
    sizes = {name: float(number) for name, _, number in (size.partition("=") for size in given.size)}
    memory = random_checkpoint.MEMORY
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        checkpoint, rows = written(given.geometry, given.format, Path(folder)), []
        for engines in (int(number) for number in given.engines.split(",")):
            requests = engines * given.requests
            made = workloads.make(given.workload, requests=requests, vocabulary=VOCABULARY, **sizes)
            rows.append({"engines": engines, **answered(checkpoint, engines, made, Path(folder))})
            rows[-1]["times"] = round(rows[-1]["requests_per_second"] / rows[0]["requests_per_second"], 3)
            print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    model = given.geometry if given.geometry in GEOMETRIES else Path(given.geometry).name
    found = {"model": model, "format": given.format, "workload": made.settings, "rows": rows}
    gpu = results_file.gpu()
    print(f"written to {results_file.write(given.name or f'copies_{gpu}', found)}")


def answered(checkpoint: Path, engines: int, made: workloads.Workload, folder: Path) -> dict[str, Any]:
    """Return what `tersor batch` says of a workload with so many engines."""
    requests, answers = folder / f"requests-{engines}.jsonl", folder / f"answers-{engines}.jsonl"
    with requests.open("w") as file:
        for number, (prompt, output) in enumerate(zip(made.prompts, made.outputs.tolist(), strict=True)):
            body = {"prompt": prompt.tolist(), "max_tokens": output, "ignore_eos": True, "temperature": 0}
            line = {"custom_id": f"{number}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(line) + "\n")
    command = [sys.executable, "-m", "tersor", "batch", "-m", str(checkpoint), "-i", str(requests), "-o", str(answers)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, "--data-parallel", str(engines), "--json"], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"copies.py: the batch failed:\n{done.stderr}")
    said = json.loads(done.stdout)
    seconds = said["seconds"]
    return {
        "requests": said["answered"],
        "seconds": round(seconds, 2),
        "requests_per_second": round(said["answered"] / seconds, 2),
        "tokens_per_second": round(said["tokens"] / seconds),
    }


if __name__ == "__main__":
    main()
