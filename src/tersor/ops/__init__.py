"""Is the call legal, and who serves it? Torch operators over packed weights, and the reasons behind a choice."""

from tersor.ops.dispatch import Reason, check_activations, explain, kernels_for, preferred_layout
from tersor.ops.embedding import embedding
from tersor.ops.invariance import batch_invariant, set_batch_invariant
from tersor.ops.linear import gated_linear, linear
from tersor.ops.measuring import launches

__all__ = [
    "Reason",
    "batch_invariant",
    "check_activations",
    "embedding",
    "explain",
    "gated_linear",
    "kernels_for",
    "launches",
    "linear",
    "preferred_layout",
    "set_batch_invariant",
]
