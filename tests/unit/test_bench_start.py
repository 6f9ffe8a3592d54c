"""bench/start.py: a checkpoint of random weights is written, and a process that starts from it is timed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from helpers import tiny_lm

START = Path(__file__).resolve().parents[2] / "bench" / "start.py"
PROGRAM = """
import sys
from pathlib import Path
sys.path[:0] = {path!r}
import start
folder = Path(sys.argv[1])
packed = start.written(sys.argv[2], "fp6_e3m2", folder)
row = start.started(packed, '{{"max_rows": 1, "device": "cpu"}}', folder / "cache")
print(row)
"""


def test_a_process_starts_from_random_weights_and_draws_a_token(tmp_path: Path) -> None:
    program = PROGRAM.format(path=[str(START.parent), *sys.path])
    run = [sys.executable, "-c", program, str(tmp_path), str(tiny_lm.TINY)]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1].replace("'", '"'))
    assert 0 < row["ready"] < row["token"]
    assert not (tmp_path / "plain").exists()
    assert (
        json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]["quant_method"] == "tersor"
    )
