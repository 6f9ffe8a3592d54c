"""How do others spread a model like a plan? A plan as the settings of transformers, vLLM, SGLang or torchtitan."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tersor.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from tersor.planner.plan import Plan

SYSTEMS = ("transformers", "vllm", "sglang", "torchtitan")
"""Whose settings a plan can be written as."""


def check_system(name: str) -> None:
    """Say that a name is none of `SYSTEMS`.

    Raises:
        InputError: it is none.
    """
    if name not in SYSTEMS:
        raise InputError(f"no export for {name!r}{did_you_mean(name, SYSTEMS)}: use one of {', '.join(SYSTEMS)}")


def exported(plan: Plan, system: str) -> str:
    """Return a plan as the settings of a system; comments in them say what of the plan they cannot.

    Args:
        plan: what is written.
        system: one of `SYSTEMS`.

    Raises:
        InputError: another system, or a plan that does not say enough of its weights.
    """
    from tersor.integrations.plans import serving, torchtitan
    from tersor.integrations.transformers import plan_settings

    writers: dict[str, Callable[[Plan], str]] = {
        "transformers": plan_settings.settings,
        "vllm": serving.vllm,
        "sglang": serving.sglang,
        "torchtitan": torchtitan.settings,
    }
    check_system(system)
    if not plan.architecture or not all(cut.block for cut in plan.cuts):
        raise InputError("the plan does not say which block a weight belongs to: make it again")
    return writers[system](plan)
