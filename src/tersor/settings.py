"""Every environment variable Tersor reads, once: name, type, default, one sentence.

A malformed value is an error that names the variable; an unset or empty variable gives the default.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tersor.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One environment variable; `parse` turns its text into a value or raises ValueError; a secret is never shown."""

    name: str
    default: Any
    parse: Callable[[str], Any]
    expects: str
    meaning: str
    secret: bool = False


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def _one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(text)
        return text

    return parse


SETTINGS: dict[str, Setting] = {
    setting.name: setting
    for setting in (
        Setting(
            name="TERSOR_CACHE_DIR",
            default=Path.home() / ".cache" / "tersor",
            parse=lambda text: Path(text).expanduser(),
            expects="a directory",
            meaning="Where compiled kernels, measured choices and what --offload disk writes are kept.",
        ),
        Setting(
            name="TERSOR_KERNEL",
            default="auto",
            parse=_one_of("auto", "reference"),
            expects="auto or reference",
            meaning="Set to reference to serve every linear by decoding and a plain product.",
        ),
        Setting(
            name="TERSOR_BATCH_INVARIANT",
            default="0",
            parse=_one_of("0", "1"),
            expects="0 or 1",
            meaning="Set to 1 to make a token's result independent of how many other tokens a call has.",
        ),
        Setting(
            name="TERSOR_FOLD_NORMS",
            default="1",
            parse=_one_of("0", "1"),
            expects="0 or 1",
            meaning="Set to 0 to run the norms of a decode step as kernels of their own.",
        ),
        Setting(
            name="TERSOR_HOOK",
            default="1",
            parse=_one_of("0", "1"),
            expects="0 or 1",
            meaning="Set to 0 to keep transformers from knowing Tersor in programs that do not import it.",
        ),
        Setting(
            name="TERSOR_JIT_JOBS",
            default=min(16, os.cpu_count() or 1),
            parse=_positive_int,
            expects="a positive integer",
            meaning="How many kernels are compiled at the same time.",
        ),
        Setting(
            name="TERSOR_VLLM_FORMAT",
            default="fp6",
            parse=str,
            expects="FORMAT, FORMAT:g64 or FORMAT:row:bfloat16",
            meaning="What vLLM's --quantization tersor packs the linear layers of a plain checkpoint to.",
        ),
        Setting(
            name="TERSOR_VLLM_ACTIVATIONS",
            default="16bit",
            parse=_one_of("16bit", "8bit", "fp8", "int8", "int8:g128"),
            expects="16bit, 8bit, fp8, int8 or int8:g128",
            meaning="What packed weights are multiplied with in vLLM.",
        ),
        Setting(
            name="TERSOR_API_KEY",
            default=None,
            parse=str,
            expects="ASCII text",
            meaning="What clients of a server must send as their bearer token; without one everyone is let in.",
            secret=True,
        ),
    )
}


def get(name: str) -> Any:
    """Return the value of the environment variable `name`, or its default.

    Raises:
        InputError: the variable's text is not of its type.
    """
    setting = SETTINGS[name]
    text = os.environ.get(name, "")
    if not text:
        return setting.default
    try:
        return setting.parse(text)
    except ValueError:
        raise InputError(f"environment variable {name} is {text!r}: expected {setting.expects}") from None
