"""How long does it take from the start of a process to the first token? With caches of kernels empty, then full.

    python bench/start.py                        # Llama-3-8B, written with random weights and compressed first
    python bench/start.py CHECKPOINT             # a compressed checkpoint that is there

A process imports Tersor, makes `tersor.LLM`, which loads weights, compiles or loads kernels, captures graphs and makes
pages (`ready`), and draws one token (`token`); the clock starts before the process does. The first process finds no
kernel in the cache, as on a machine that never ran Tersor; the others find all. Weights are in the page cache of the
system: the disk is not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import results_file
from written import written

WARM = 2
"""Processes that find all kernels."""
CHILD = """
import json, sys, time
import tersor
llm = tersor.LLM(sys.argv[1], **json.loads(sys.argv[2]))
ready = time.time()
llm.generate([[1, 2, 3, 4]], tersor.SamplingParams(max_tokens=1, temperature=0))
print(json.dumps({"ready": ready, "token": time.time()}))
"""


def main() -> None:
    """Parse the command line, write a checkpoint where none is given, measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path, help="a compressed checkpoint; default: one is written")
    parser.add_argument(
        "--geometry",
        default="llama-3-8b",
        help="of the checkpoint that is written: a name, or a folder with a config.json",
    )
    parser.add_argument("--format", default="fp6_e3m2", help="of its weights")
    parser.add_argument("--options", default="{}", help="of tersor.LLM, as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = arguments.checkpoint or written(arguments.geometry, arguments.format, Path(folder))
        rows = [
            {
                "cache": "empty" if turn == 0 else "full",
                **started(checkpoint, arguments.options, Path(folder) / "cache"),
            }
            for turn in range(1 + WARM)
        ]
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    name = arguments.geometry if arguments.checkpoint is None else checkpoint.name
    found = {"model": name, "format": arguments.format, "options": json.loads(arguments.options), "rows": rows}
    gpu = results_file.gpu()
    print(f"written to {results_file.write(f'start_{gpu}', found)}")


def started(checkpoint: Path, options: str, cache: Path) -> dict[str, Any]:
    """Start a process, and return the seconds until it had an engine, and until it had drawn a token."""
    environment = {**os.environ, "TERSOR_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(sys.path)}
    begun = time.time()
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(checkpoint), options], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"start.py: the process failed:\n{done.stderr}")
    times = json.loads(done.stdout.splitlines()[-1])
    return {name: round(at - begun, 2) for name, at in times.items()}


if __name__ == "__main__":
    main()
