"""Which tensor parallel plan does transformers ship for an architecture? `base_model_tp_plan` of its config class."""

from __future__ import annotations


def base_plan(architecture: str) -> tuple[tuple[str, str], ...]:
    """Return (pattern of a module's name, style) of a class that continues texts; empty where there is no plan."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    kind = next((kind for kind, name in NAMES.items() if name == architecture and kind in CONFIG_MAPPING), None)
    plan = None if kind is None else getattr(CONFIG_MAPPING[kind], "base_model_tp_plan", None)
    return tuple(sorted((plan or {}).items()))
