"""The modules that hold packed weights."""

from tersor.nn.embedding import PackedEmbedding, TiedLinear
from tersor.nn.experts import PackedExperts
from tersor.nn.linear import PackedLinear
from tersor.nn.packed import PackedModule
from tersor.nn.replace import linear_shape, multiply_with, swap_linear, unpack_model

__all__ = [
    "PackedEmbedding",
    "PackedExperts",
    "PackedLinear",
    "PackedModule",
    "TiedLinear",
    "linear_shape",
    "multiply_with",
    "swap_linear",
    "unpack_model",
]
