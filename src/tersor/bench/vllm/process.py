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
from tersor.checkpoint.source import CONFIG_NAME, QUANTIZATION_KEYS
from tersor.models.architectures import model_type
from tersor.models.config import DecoderConfig

_INSIDE = "tersor.bench.vllm.inside"
_GRACE = 60.0
"""Seconds that the process has to give the GPU back after its last answer."""

_COMMON: dict[str, Any] = {
    "load_format": "dummy",  # random weights
    "skip_tokenizer_init": True,
    "enable_prefix_caching": True,
    "seed": 0,
}
_ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


def answers(
    variant: Variant,
    config: Mapping[str, Any],
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
        config: config.json of the model.
        context: tokens of the longest text.
        options: of `vllm.LLM`, beside those that every run has.
        task, arguments: one of `inside.TASKS`, and what it takes, as JSON values.
        environment: variables of the process, beside those of this one.
        gpu: which of those that torch sees; `None` leaves that to vLLM.

    Raises:
        UnfitError: vLLM does not run this, or its process ended; the message names the file with its words.
    """
    with tempfile.TemporaryDirectory(prefix="tersor-vllm-") as folder:
        (Path(folder) / CONFIG_NAME).write_text(json.dumps(described(config, context)), encoding="utf-8")
        asked = Path(folder) / "asked.json"
        own = {**_COMMON, "model": folder, "max_model_len": context, **options, **variant.options}
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


def described(config: Mapping[str, Any], context: int) -> dict[str, Any]:
    """Return a config.json that transformers and vLLM read as Tersor reads this one, for plain weights.

    Args:
        config: config.json, which need not name its type.
        context: tokens of a text that the model must have positions for.
    """
    read = DecoderConfig.from_dict(config)
    return {
        **{name: value for name, value in config.items() if name not in QUANTIZATION_KEYS},
        "architectures": [read.architecture],
        "model_type": model_type(config),
        "max_position_embeddings": max(read.context, context),
    }


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
