"""Which parallel plans does transformers ship for an architecture? Those of its config class."""

from __future__ import annotations


def base_plan(architecture: str, kind: str = "base_model_tp_plan") -> tuple[tuple[str, str], ...]:
    """Return (pattern of a module's name, style) of a class that continues texts; empty where there is no plan.

    Args:
        architecture: the class, as config.json names it.
        kind: of plan: the attribute of the config class.
    """
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    model = next((model for model, name in NAMES.items() if name == architecture and model in CONFIG_MAPPING), None)
    plan = None if model is None else getattr(CONFIG_MAPPING[model], kind, None)
    return tuple(sorted((plan or {}).items()))


def expert_rules(architecture: str, module: str, kind: str) -> dict[str, str]:
    """Return what a plan says of the experts of layers: pattern of a name in the whole model -> style.

    Args:
        architecture: the class, as config.json names it.
        module: of an expert's weight as it is stored, with `{layer}`.
        kind: of plan: the attribute of the config class.
    """
    start = module.partition("{layer}")[0]
    found = {}
    for name, style in base_plan(architecture, kind):
        before, star, behind = name.partition("*")
        if star and "experts" in behind.split(".") and start.endswith(before):
            found[f"{start}*{behind}"] = style
    return found
