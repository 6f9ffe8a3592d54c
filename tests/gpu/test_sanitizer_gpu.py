"""compute-sanitizer finds no illegal access and no race in small products through every tile."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu.sanitized import PARTS

TOOL = shutil.which("compute-sanitizer")

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or TOOL is None, reason="needs a CUDA device and compute-sanitizer"
)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_it_finds_nothing(tool: str, part: str) -> None:
    assert TOOL is not None
    script = Path(__file__).with_name("sanitized.py")
    command = [
        TOOL,
        "--tool",
        tool,
        "--report-api-errors",
        "no",
        "--error-exitcode",
        "9",
        sys.executable,
        str(script),
        part,
    ]
    paths = [str(script.parents[1]), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "done" in done.stdout
