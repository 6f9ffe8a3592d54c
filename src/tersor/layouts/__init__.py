"""Where does the code sit in memory? The stored stream, kernel tiles, and packed weights in either."""

from tersor.layouts.mixed import MixedWeight
from tersor.layouts.sparse import SparseWeight
from tersor.layouts.stacked import StackedWeight
from tersor.layouts.stacked_mixed import Stacked, StackedMixedWeight, sets_of
from tersor.layouts.tiled_sparse import TiledSparseWeight
from tersor.layouts.weight import STREAM, PackedWeight

__all__ = [
    "STREAM",
    "MixedWeight",
    "PackedWeight",
    "SparseWeight",
    "Stacked",
    "StackedMixedWeight",
    "StackedWeight",
    "TiledSparseWeight",
    "sets_of",
]
