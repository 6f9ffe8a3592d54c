"""The modules that hold packed weights."""

from tersor.nn.embedding import PackedEmbedding, TiedLinear
from tersor.nn.experts import PackedStack, Rows
from tersor.nn.linear import PackedLinear
from tersor.nn.mixed import MixedLinear, RowSet
from tersor.nn.mixed_stack import MixedStack
from tersor.nn.packed import PackedModule, bits_per_weight
from tersor.nn.sparse import SparseLinear

__all__ = [
    "MixedLinear",
    "MixedStack",
    "PackedEmbedding",
    "PackedLinear",
    "PackedModule",
    "PackedStack",
    "RowSet",
    "Rows",
    "SparseLinear",
    "TiedLinear",
    "bits_per_weight",
]
