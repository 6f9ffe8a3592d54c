"""How is vLLM run? In a process of its own (`inside`), which has the GPU while it lasts; answers come a line each."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tersor.bench.contenders import UnfitError
from tersor.bench.vllm.variants import Variant

_INSIDE = "tersor.bench.vllm.inside"
_GRACE = 60.0
"""Seconds that the process has to give the GPU back after its last answer."""

_COMMON: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "enable_prefix_caching": True,
    "seed": 0,
}
_ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


def answers(
    variant: Variant,
    model: Path,
    context: int,
    options: Mapping[str, Any],
    task: str,
    arguments: Mapping[str, Any],
    environment: Mapping[str, str] | None = None,
    gpu: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Run vLLM once, and yield what it answers as it does.

    Args:
        variant: the format of its weights.
        model: folder of its 16-bit checkpoint, which it quantises as it loads.
        context: tokens of the longest text.
        options: of `vllm.LLM`, beside those that every run has.
        task, arguments: one of `inside.TASKS`, and what it takes, as JSON values.
        environment: variables of the process, beside those of this one.
        gpu: which of those that torch sees; `None` leaves that to vLLM.

    Raises:
        UnfitError: vLLM does not run this, or its process ended; the message names the file with its words.
    """
    with tempfile.TemporaryDirectory(prefix="tersor-vllm-") as folder:
        asked = Path(folder) / "asked.json"
        own = {**_COMMON, "model": str(model), "max_model_len": context, **options, **variant.options}
        variables = {**_ENVIRONMENT, **(environment or {}), **variant.environment}
        asked.write_text(
            json.dumps({"llm": own, "environment": variables, "gpu": gpu, "task": task, "arguments": dict(arguments)}),
            encoding="utf-8",
        )
        handle, log = tempfile.mkstemp(prefix="tersor-vllm-", suffix=".log")
        try:
            with open(handle, "w", encoding="utf-8") as words:
                yield from _run(asked, words)
        except UnfitError as error:
            raise UnfitError(f"{' '.join(str(error).split())} (its words: {log})") from None
        except BaseException:
            os.unlink(log)
            raise
        os.unlink(log)


def _run(asked: Path, words: Any) -> Iterator[dict[str, Any]]:
    """Yield answers until the last; what the process prints otherwise goes to a file."""
    process = subprocess.Popen(
        [sys.executable, "-m", _INSIDE, str(asked)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=words,
        text=True,
        encoding="utf-8",
        start_new_session=True,  # vLLM's own processes end with it
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            answer = json.loads(line)
            if "error" in answer:
                raise UnfitError(answer["error"])
            if "done" in answer:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_GRACE)
                return
            yield answer
        raise UnfitError(f"its process ended with status {process.wait()}")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process.stdout.close()
