"""Is the call legal, and who serves it? Torch operators over packed weights, and the reasons behind a choice."""

from tersor.ops.dispatch import Reason, check_activations, explain, kernels_for, preferred_layout
from tersor.ops.embedding import embedding
from tersor.ops.linear import linear
from tersor.ops.measuring import launches

__all__ = [
    "Reason",
    "check_activations",
    "embedding",
    "explain",
    "kernels_for",
    "launches",
    "linear",
    "preferred_layout",
]
