"""The modules that hold packed weights."""

from tersor.nn.experts import PackedExperts
from tersor.nn.linear import PackedLinear
from tersor.nn.replace import linear_shape, swap_linear, unpack_model

__all__ = ["PackedExperts", "PackedLinear", "linear_shape", "swap_linear", "unpack_model"]
