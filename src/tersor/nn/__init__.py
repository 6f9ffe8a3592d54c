"""The modules that hold packed weights."""

from tersor.nn.embedding import PackedEmbedding, TiedLinear
from tersor.nn.experts import PackedExperts
from tersor.nn.fuse import fuse, unfuse
from tersor.nn.joined import GatedMLP, PackedPart
from tersor.nn.linear import PackedLinear
from tersor.nn.packed import PackedModule
from tersor.nn.replace import linear_shape, multiply_with, swap_linear, unpack_model

__all__ = [
    "GatedMLP",
    "PackedEmbedding",
    "PackedExperts",
    "PackedLinear",
    "PackedModule",
    "PackedPart",
    "TiedLinear",
    "fuse",
    "linear_shape",
    "multiply_with",
    "swap_linear",
    "unfuse",
    "unpack_model",
]
