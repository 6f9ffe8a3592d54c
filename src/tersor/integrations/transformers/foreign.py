"""Python code that comes with a model: run where the caller says so, otherwise neither run nor asked about."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from tersor.integrations.transformers.process import Changed

REFUSAL = (
    "needs Python code of its own (auto_map), which is not run: read it, and add --trust-remote-code "
    "(trust_remote_code=True in Python) to run it"
)
"""What is said of a model or tokenizer that cannot be built without such code."""

AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForSeq2SeqLM", "AutoModel")
"""The tasks that a model is built for, where its config names no class: the first that it has one for."""


def _timeout() -> int:
    from transformers import dynamic_module_utils

    return dynamic_module_utils.TIME_OUT_REMOTE_CODE


def _wait(seconds: int) -> None:
    from transformers import dynamic_module_utils

    dynamic_module_utils.TIME_OUT_REMOTE_CODE = seconds


_answering = Changed(_timeout, _wait)


def unasked() -> contextlib.AbstractContextManager[None]:
    """Keep transformers from asking on the terminal whether code is to be run, also where it builds a part of a model.

    `trust_remote_code=False` does not reach the parts: what they are not told, they ask for, and read standard input.
    """
    return _answering.to(0)  # transformers' own way to raise at once


def is_refusal(error: BaseException) -> bool:
    """Whether an exception of transformers says that code would have to be run, and was not."""
    return isinstance(error, ValueError) and "trust_remote_code=True" in str(error)


def classes(config: Any) -> dict[str, str]:
    """Return the classes of a model that a config's `auto_map` names: task -> file and class, in order of preference.

    A class that the program has registered itself is not asked for among files: then there are none.
    """
    import transformers

    stated = getattr(config, "auto_map", None)
    if not isinstance(stated, Mapping) or not (
        type(config).__module__.startswith("transformers.") or is_foreign(config)
    ):
        return {}
    tasks = dict.fromkeys([*AUTO_CLASSES, *(name for name in stated if name.startswith("AutoModel"))])
    return {name: stated[name] for name in tasks if isinstance(stated.get(name), str) and hasattr(transformers, name)}


def load_class(config: Any, own: Mapping[str, str]) -> Any:
    """Run the code of a model and return its class: of those in `own` the one that `architectures` names, or the first.

    Args:
        config: of the model; `name_or_path` says where its code is.
        own: what `classes` found, not empty.
    """
    from transformers.dynamic_module_utils import get_class_from_dynamic_module
    from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model

    named = [task for task, reference in own.items() if reference.split(".")[-1] in (config.architectures or ())]
    task = (named or list(own))[0]
    found = add_generation_mixin_to_remote_model(get_class_from_dynamic_module(own[task], config.name_or_path))
    found.register_for_auto_class(task)
    return found


def is_foreign(value: object) -> bool:
    """Whether the class of a value is such code: whoever made the value has let the code run."""
    from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

    return type(value).__module__.split(".")[0] == TRANSFORMERS_DYNAMIC_MODULE_NAME
