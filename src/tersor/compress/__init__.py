"""Which code should this weight get?"""

from tersor.compress.encode import (
    CALIBRATED_RECIPE,
    DEFAULT_RECIPE,
    RECIPES,
    Recipe,
    Statistics,
    encode,
    encode_blocks,
    get_recipe,
)
from tersor.compress.gptq import quantize_gptq
from tersor.compress.rtn import quantize_rtn
from tersor.compress.statistics import (
    HESSIAN,
    OUTPUT_HESSIAN,
    SHIFT,
    LayerSums,
    Moments,
)
from tersor.formats import Encoded

__all__ = [
    "CALIBRATED_RECIPE",
    "DEFAULT_RECIPE",
    "HESSIAN",
    "OUTPUT_HESSIAN",
    "RECIPES",
    "SHIFT",
    "Encoded",
    "LayerSums",
    "Moments",
    "Recipe",
    "Statistics",
    "encode",
    "encode_blocks",
    "get_recipe",
    "quantize_gptq",
    "quantize_rtn",
]
