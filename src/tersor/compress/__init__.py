"""Which code should this weight get?"""

from tersor.compress.encode import DEFAULT_RECIPE, RECIPES, Recipe, Statistics, encode, encode_blocks, get_recipe
from tersor.compress.rtn import quantize_rtn
from tersor.formats import Encoded

__all__ = [
    "DEFAULT_RECIPE",
    "RECIPES",
    "Encoded",
    "Recipe",
    "Statistics",
    "encode",
    "encode_blocks",
    "get_recipe",
    "quantize_rtn",
]
