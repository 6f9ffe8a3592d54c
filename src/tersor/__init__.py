"""Tersor: run large language models from compressed weights.

Importing this package registers Tersor's quantizer with transformers (when transformers is imported) and
imports nothing heavy; the names below are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tersor.integrations import register as _register
from tersor.version import __version__

if TYPE_CHECKING:
    from tersor import formats, nn, ops
    from tersor.convert import quantize
    from tersor.convert.prune import prune
    from tersor.engine.params import SamplingParams
    from tersor.integrations.transformers import TersorConfig
    from tersor.llm import LLM
    from tersor.planner.graph.plan import plan_module

_LAZY = {
    "formats": ("tersor.formats", None),
    "ops": ("tersor.ops", None),
    "nn": ("tersor.nn", None),
    "prune": ("tersor.convert.prune", "prune"),
    "quantize": ("tersor.convert", "quantize"),
    "plan_module": ("tersor.planner.graph.plan", "plan_module"),
    "LLM": ("tersor.llm", "LLM"),
    "SamplingParams": ("tersor.engine.params", "SamplingParams"),
    "TersorConfig": ("tersor.integrations.transformers", "TersorConfig"),
}

__all__ = [
    "LLM",
    "SamplingParams",
    "TersorConfig",
    "__version__",
    "formats",
    "nn",
    "ops",
    "plan_module",
    "prune",
    "quantize",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'tersor' has no attribute {name!r}")
    module_name, attribute = _LAZY[name]
    module = importlib.import_module(module_name)
    value = module if attribute is None else getattr(module, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


_register()
