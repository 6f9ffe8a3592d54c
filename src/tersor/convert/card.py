"""What does the model card say? What a checkpoint holds, what loads it, and what happens elsewhere."""

from __future__ import annotations

import math
from typing import Any

from tersor.checkpoint.config import MIXED_FORMAT, Represented
from tersor.checkpoint.conversion import Conversion
from tersor.checkpoint.exports import Export
from tersor.checkpoint.source import Source
from tersor.compress import get_recipe
from tersor.compress.prune import ALGORITHMS
from tersor.convert.transforms import CALIBRATED
from tersor.formats import Assignment, Mix, Plain, Pruned, Scheme, Sparse
from tersor.version import __version__

_LOADING = """
## Load it

Tersor {version} or newer must be installed where the model is loaded: `pip install .` in its checkout, or
`pip install '.[cuda]'` for an NVIDIA GPU to compute from the compressed weights. Then transformers loads it like any
other model, and so do programs that load through transformers (`lm_eval --model hf`, `transformers serve`, pipelines):

```python
from transformers import {name}

model = {name}.from_pretrained("path/to/this/directory"{trust})
```

Write `import tersor` before that where the environment variable TERSOR_HOOK is 0, or where Tersor is not installed but
found through PYTHONPATH.

**Without Tersor the model is noise.** transformers then warns of an unknown quantization type, leaves the compressed
weights aside, and goes on with random numbers in their place: what such a model writes or scores means nothing.
"""


def model_card(source: Source, conversion: Conversion, export: Export, recipe: str) -> str:
    """Return README.md of a compressed checkpoint: metadata that the Hub reads, and text.

    Args:
        source: what was compressed.
        conversion: what became of it.
        export: whose names and metadata the checkpoint has.
        recipe: how codes were chosen, a key of `compress.RECIPES`, or zeros, one of `compress.prune.ALGORITHMS`.
    """
    said, levels = _said(conversion.config.scheme)
    base = [f"base_model: {source.label}", "base_model_relation: quantized"] if source.from_hub else []
    front = ["---", *base, "library_name: transformers", "tags:", "- tersor", f"- {said}", "---"]
    body = [
        f"# {source.label} in {said}",
        "",
        f"Linear weights are {levels}, {_made(conversion.config.scheme, recipe)} by Tersor {__version__}.",
        *_taken(conversion),
        *_levels(conversion),
        *_pruned(conversion),
        *_calibrated(conversion, recipe),
        *_transformed(conversion),
        *_before(conversion),
        *(_use(source) if export.name == "tersor" else [_elsewhere(export)]),
    ]
    return "\n".join([*front, "", *body, ""])


def _said(scheme: Represented) -> tuple[str, str]:
    """Return the name of what weights are represented in, and what it means in words."""
    if isinstance(scheme, Mix):
        levels = "; ".join(map(_codes, scheme.levels))
        return MIXED_FORMAT, f"a mix, each output feature one of: {levels}"
    if isinstance(scheme, Sparse):
        values = scheme.values
        kept = f"{values.name} numbers" if isinstance(values, Plain) else _codes(values)
        return f"sparse-{values.name}", kept
    return scheme.name, _codes(scheme)


def _codes(scheme: Scheme) -> str:
    group = "row" if scheme.group_size is None else f"group of {scheme.group_size}"
    shared = "table" if scheme.has_table else "scale"
    codes = f"{scheme.format.name} codes with one {scheme.scale_dtype} {shared} a {group}"
    kept = scheme.outliers
    return codes if kept is None else f"{codes} and {kept.percent:g} % of every row kept in {kept.dtype}"


def _made(scheme: Represented, recipe: str) -> str:
    """Say how numbers were chosen; plain ones that Tersor did not prune stay as they were."""
    if recipe in ALGORITHMS:
        return ALGORITHMS[recipe].summary
    if isinstance(scheme, Sparse) and scheme.scheme is None:
        return "repacked without loss"
    return get_recipe(recipe).summary


def _taken(conversion: Conversion) -> list[str]:
    """Say how much weights take, scales and levels counted, and all tensors."""
    made = [step for step in conversion.steps if step.scheme is not None]
    if not made:
        return []
    bits = 8 * sum(step.output_bytes for step in made) / sum(math.prod(step.source.spec.shape) for step in made)
    before = sum(step.source.nbytes for step in conversion.steps)
    return [
        f"They take {bits:.3f} bits a weight, scales counted; all tensors take {conversion.output_bytes:,} bytes, "
        f"where those of the source take {before:,}."
    ]


def _levels(conversion: Conversion) -> list[str]:
    """Say for what the levels of a mix were chosen, and how many output features have each."""
    chosen = [step.scheme for step in conversion.steps if isinstance(step.scheme, Assignment)]
    if not chosen:
        return []
    counts = [sum(rows) for rows in zip(*(one.rows for one in chosen), strict=True)]
    shares = (100 * count / sum(counts) for count in counts)
    pairs = zip(shares, chosen[0].mix.levels, strict=True)
    each = ", ".join(f"{share:.1f} % are {level.format.name}" for share, level in pairs)
    target = conversion.config.provenance.get("target")
    asked = f", chosen for {target}; tersor-mix.json says what that is expected to lose" if target else ""
    return [f"Of all output features {each}{asked}."]


def _pruned(conversion: Conversion) -> list[str]:
    """Say how much is left of what is stored sparse."""
    found = [step for step in conversion.steps if isinstance(step.scheme, Pruned) and step.layer is not None]
    if not found:
        return []
    left = sum(step.scheme.nonzeros for step in found if isinstance(step.scheme, Pruned))
    weights = sum(step.layer.shape[0] * step.layer.shape[1] for step in found if step.layer is not None)
    return [f"{len(found)} pruned weights are stored sparse: {100 * left / weights:.1f} % of their elements are left."]


def _calibrated(conversion: Conversion, recipe: str) -> list[str]:
    """Say what text was read, and for what: of a mix that is rounded to nearest, for its levels alone."""
    said = conversion.config.provenance
    if "calibration" not in said:
        return []
    changing = any(name in said.get("transforms", "").split(", ") for name in CALIBRATED)
    if recipe not in ALGORITHMS and not get_recipe(recipe).needs and not changing:
        return [f"Its output features were scored on {said['calibration']}."]
    return [
        f"It was calibrated on {said['calibration']}, effort {said['effort']}; tersor-calibration.json has the log."
    ]


def _transformed(conversion: Conversion) -> list[str]:
    done = conversion.config.provenance.get("transforms")
    return [f"Before or beside that it was changed by transforms: {done}."] if done else []


def _before(conversion: Conversion) -> list[str]:
    method = conversion.config.provenance.get("source_method")
    if not method:
        return []
    return [f"Its weights were compressed by {method} before: Tersor decoded them, and compressed the result."]


def _elsewhere(export: Export) -> str:
    return f"The metadata is that of {export.name}; load it with an engine that reads it."


def _use(source: Source) -> list[str]:
    name = _class_name(source.config)
    trust = ", trust_remote_code=True" if source.config.get("auto_map") else ""
    loading = _LOADING.format(version=__version__, name=name, trust=trust)
    return ["", *loading.strip().splitlines()]


def _class_name(config: dict[str, Any]) -> str:
    """Return the class of transformers to load a model with: an automatic one, or that which config.json names."""
    stated = config.get("architectures")
    name = str(stated[0]) if isinstance(stated, list) and stated else ""
    own = config.get("auto_map")
    if isinstance(own, dict):
        tasks = [task for task, reference in own.items() if str(reference).endswith(f".{name}")]
        return tasks[0] if tasks else "AutoModelForCausalLM"
    return name if name and not name.endswith(("ForCausalLM", "LMHeadModel")) else "AutoModelForCausalLM"
