"""Python code that comes with a model: run where the caller says so, otherwise neither run nor asked about."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

REFUSAL = (
    "needs Python code of its own (auto_map), which is not run: read it, and add --trust-remote-code "
    "(trust_remote_code=True in Python) to run it"
)
"""What is said of a model or tokenizer that cannot be built without such code."""


@contextlib.contextmanager
def unasked() -> Iterator[None]:
    """Keep transformers from asking on the terminal whether code is to be run, also where it builds a part of a model.

    `trust_remote_code=False` does not reach the parts: what they are not told, they ask for, and read standard input.
    """
    from transformers import dynamic_module_utils

    before = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # transformers' own way to raise at once
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = before


def is_refusal(error: BaseException) -> bool:
    """Whether an exception of transformers says that code would have to be run, and was not."""
    return isinstance(error, ValueError) and "trust_remote_code=True" in str(error)


def is_foreign(value: object) -> bool:
    """Whether the class of a value is such code: whoever made the value has let the code run."""
    from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

    return type(value).__module__.split(".")[0] == TRANSFORMERS_DYNAMIC_MODULE_NAME
