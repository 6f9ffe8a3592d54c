"""Which claims are checked, by which recipes? The tables of docs/claims.md follow this list.

Names are those of `recipes.recipes`, with the way of running behind @ as in results.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from recipes import BESIDE, TRANSFORMED, VALUES

MODELS = {"small": "a model of 27.8 M parameters", "smollm2": "SmolLM2-135M-Instruct"}
"""Name in results -> what the model is, in the order of the tables."""
FORMATS = ("uint4-g", "uint3-g", "int4-g", "fp4_e2m1-row", "fp5_e2m2-row", "fp6_e3m2-row", "fp6_e2m3-row")
"""What is measured rounded to nearest, by gptq and by gptq with high effort."""


@dataclass(frozen=True, slots=True)
class Nearer:
    """The claim that one recipe is better than another on the same windows.

    Attributes:
        first: the better one.
        other: what it is compared with.
        quantity: `kl`, the divergence from the original, or `log_perplexity`.
        slack: the share of the other's that the first may have more, of `kl`.
    """

    first: str
    other: str
    quantity: str = "kl"
    slack: float = 0.0


@dataclass(frozen=True, slots=True)
class Within:
    """The claim that a recipe loses no more perplexity than so much.

    Attributes:
        first: the recipe.
        most: per cent.
    """

    first: str
    most: float


@dataclass(frozen=True, slots=True)
class Claim:
    """What a table is about.

    Attributes:
        rows: labels of results, in order.
        checks: what is held against the numbers.
    """

    rows: tuple[str, ...]
    checks: tuple[Nearer | Within, ...]


@dataclass(frozen=True, slots=True)
class Target:
    """What a recipe is to reach.

    Attributes:
        model: name in results.
        recipe: its label.
        share: of the KL of `nearest` that it is to remove, on every text or, where `text` says so, on one.
        kl: KL x 1000 that it is to have at most, by text.
        errors: standard errors of what is measured by which it may exceed that.
        text: the one text that counts; empty for all.
    """

    model: str
    recipe: str
    share: float | None = None
    kl: tuple[tuple[str, float], ...] = ()
    errors: float = 0.0
    text: str = ""

    @property
    def nearest(self) -> str:
        """The same format rounded to nearest."""
        return self.recipe.replace("-gptq-high", "-rtn").replace("-gptq", "-rtn")


_E2M3, _E3M2, _FP5 = "fp6_e2m3-row", "fp6_e3m2-row", "fp5_e2m2-row"
_RTN8, _GPTQ8 = f"{_E2M3}-rtn", f"{_E2M3}-gptq"
_HALF = "admm-50"
_WAYS = ("", "@activations=fp8", "@kv-dtype=fp8", "@activations=fp8,kv-dtype=fp8")

CLAIMS = {
    "coarse": Claim(
        ("int4-row-rtn", "int4-row-gptq", "int4-g-rtn", "int4-g-gptq", f"{_E3M2}-rtn", f"{_E2M3}-rtn"),
        (
            Nearer(f"{_E3M2}-rtn", "int4-row-rtn", "log_perplexity"),
            Nearer(f"{_E3M2}-rtn", "int4-g-rtn", "log_perplexity"),
            Nearer(f"{_E3M2}-rtn", "int4-g-gptq", "log_perplexity"),
            Within(f"{_E3M2}-rtn", 1.0),
            Within(f"{_E2M3}-rtn", 1.0),
        ),
    ),
    "calibrated": Claim(
        tuple(f"{scheme}-{how}" for scheme in (_FP5, _E3M2, _E2M3) for how in ("rtn", "gptq", "gptq-high")),
        (
            *(Nearer(f"{scheme}-gptq", f"{scheme}-rtn") for scheme in (_FP5, _E3M2, _E2M3)),
            *(Nearer(f"{scheme}-gptq", f"{scheme}-rtn", "log_perplexity") for scheme in (_FP5, _E3M2, _E2M3)),
            Nearer(f"{_FP5}-gptq", f"{_E3M2}-rtn"),
            Nearer(f"{_FP5}-gptq", f"{_E2M3}-rtn"),
        ),
    ),
    "mix": Claim(
        (
            *("uint4-g-gptq", "uint4-g64-gptq", "mix-4.5-rtn", "mix-4.5-gptq", "mix-4.5-gptq-high"),
            *("mix48-4.5-gptq", "mixllm-4.5-gptq", "uint4-g32-gptq", "mix-5.0-rtn", "mix-5.0-gptq"),
            *("mix-5.0-gptq-high", "mix48-5.0-gptq", "mixllm-5.0-gptq", f"{_FP5}-gptq", "uint5-g-gptq"),
        ),
        (
            Nearer("mix-4.5-gptq", "mixllm-4.5-gptq"),
            Nearer("mix-4.5-gptq", "mix48-4.5-gptq"),
            Nearer("mix-4.5-gptq", "uint4-g32-gptq"),
            Nearer("mix-5.0-gptq", "mixllm-5.0-gptq"),
            Nearer("mix-5.0-gptq", "mix48-5.0-gptq"),
            Nearer("mix-5.0-gptq", f"{_FP5}-gptq"),
            Nearer("mixllm-5.0-gptq", f"{_FP5}-gptq"),
        ),
    ),
    "six": Claim(
        (
            *(f"{scheme}-{how}-rtn" for scheme in ("fp6_e3m2", "fp6_e2m3") for how in ("row", "g")),
            *("mxfp6_e3m2-rtn", "mxfp6_e2m3-rtn"),
        ),
        (
            Nearer(f"{_E2M3}-rtn", f"{_E3M2}-rtn"),
            Nearer("fp6_e3m2-g-rtn", f"{_E3M2}-rtn"),
            Nearer("fp6_e2m3-g-rtn", f"{_E2M3}-rtn"),
            Nearer(f"{_E2M3}-rtn", "fp6_e3m2-g-rtn"),
            Nearer("mxfp6_e2m3-rtn", "mxfp6_e3m2-rtn"),
            Nearer("mxfp6_e2m3-rtn", f"{_E2M3}-rtn"),
        ),
    ),
    "eight": Claim(
        (
            "original@kv-dtype=fp8",
            *(f"{_RTN8}{way}" for way in _WAYS),
            *(f"{_GPTQ8}{way}" for way in _WAYS[:2]),
            *("int8-row-rtn", "int8-row-rtn@activations=int8"),
            *(f"fp4_e2m1-row-gptq{way}" for way in _WAYS[:2]),
            *("uint4-g-gptq", "uint4-g-gptq@activations=int8"),
        ),
        (
            Nearer("original@kv-dtype=fp8", _RTN8),
            Nearer("int8-row-rtn@activations=int8", f"{_RTN8}@activations=fp8"),
            Nearer(f"{_GPTQ8}@activations=fp8", _RTN8),
        ),
    ),
    "transforms": Claim(
        tuple(dict.fromkeys(label for base, name in TRANSFORMED for label in (base, f"{base}-{name}"))),
        tuple(Nearer(f"{base}-{name}", base) for base, name in TRANSFORMED),
    ),
    "pruned": Claim(
        (
            *("magnitude-50", "wanda-50", "sparsegpt-50", _HALF, f"{_HALF}-allocate"),
            *(f"{_HALF}-{values}" for values in VALUES),
            *("int4-g-gptq", _GPTQ8),
        ),
        (
            *(Nearer(better, worse) for worse, better in pairwise(("magnitude-50", "wanda-50", "sparsegpt-50", _HALF))),
            Nearer(f"{_HALF}-allocate", _HALF),
            Nearer(f"{_HALF}-fp6_e2m3", _HALF, slack=0.03),
            Nearer(_HALF, _GPTQ8),
            Nearer(f"{_HALF}-fp6_e2m3", "int4-g-gptq"),
        ),
    ),
    "few": Claim(
        (
            *(name for base in BESIDE if base != "lut3-row-gptq" for name in (base, f"{base}-outliers")),
            *("lut3-row-rtn", "lut3-row-gptq", "lut3-row-gptq-outliers"),
        ),
        (
            *(Nearer(f"{base}-outliers", base) for base in BESIDE),
            Nearer("lut3-row-gptq", "uint3-g-gptq"),
        ),
    ),
}
"""Claim -> its table, in the order of the page."""


def _both(code: float, prose: float) -> tuple[tuple[str, float], ...]:
    return ("code", code), ("prose", prose)


TARGETS = (
    Target("small", "uint4-g-gptq", 0.45),
    Target("small", "uint4-g-gptq", kl=_both(12.2, 17.9)),
    Target("small", "uint3-g-gptq", 0.53),
    *(Target("small", f"{scheme}-gptq", 0.40) for scheme in ("fp4_e2m1-row", _FP5, _E3M2, _E2M3)),
    Target("small", "uint4-g-gptq-high", kl=_both(10.7, 14.8)),
    Target("small", "int4-g-gptq-high", kl=_both(12.3, 17.0)),
    Target("small", "uint3-g-gptq-high", kl=_both(43, 59)),
    Target("small", "fp4_e2m1-row-gptq-high", kl=_both(13.7, 19.4)),
    Target("small", f"{_FP5}-gptq-high", kl=_both(3.3, 4.75)),
    Target("small", f"{_E3M2}-gptq-high", kl=_both(2.9, 4.0)),
    Target("small", f"{_E2M3}-gptq-high", kl=_both(0.86, 1.2)),
    Target("small", "mix-4.5-gptq", kl=_both(6.6, 9.4)),
    Target("small", "mix-5.0-gptq", kl=_both(3.2, 4.6)),
    Target("small", "mix-4.5-gptq-high", kl=_both(5.4, 7.2)),
    Target("small", "mix-5.0-gptq-high", kl=_both(2.6, 3.5)),
    Target("small", "sparsegpt-50", kl=_both(126, 169), errors=2.0),
    Target("small", _HALF, kl=_both(86, 120), errors=2.0),
    Target("smollm2", "uint4-g-gptq", 0.70, text="prose"),
    Target("smollm2", "uint4-g-gptq", kl=(("prose", 113),)),
    Target("smollm2", f"{_FP5}-gptq", 0.58, text="prose"),
    Target("smollm2", f"{_FP5}-gptq", kl=(("prose", 44),)),
    Target("smollm2", f"{_E2M3}-gptq", 0.55, text="prose"),
    Target("smollm2", f"{_E2M3}-gptq", kl=(("prose", 12),)),
)
"""Set before anything of this was built."""
