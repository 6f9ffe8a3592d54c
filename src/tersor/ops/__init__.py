"""Is the call legal, and who serves it? Torch operators over packed weights, and the reasons behind a choice."""

from tersor.ops.dispatch import Reason, explain, kernels_for, preferred_layout
from tersor.ops.embedding import embedding
from tersor.ops.linear import linear

__all__ = ["Reason", "embedding", "explain", "kernels_for", "linear", "preferred_layout"]
