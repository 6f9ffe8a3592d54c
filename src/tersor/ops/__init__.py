"""Is the call legal, and who serves it? Torch operators over packed weights, and the reasons behind a choice."""

from tersor.kernels.dense import kernels_for
from tersor.ops.activated import activated_quantized, takes_activated
from tersor.ops.attention import attend
from tersor.ops.attention_form import PAGE, AttentionForm, PagedCache, Rows
from tersor.ops.autocast import activation_dtype
from tersor.ops.columns import load as load_columns
from tersor.ops.deciding import Decision, Gain, Normed, decide, decided_experts
from tersor.ops.dispatch import Reason, activations_for, explain, kernel_chip, preferred_layout
from tersor.ops.embedding import embedding
from tersor.ops.fold import Deferred, FoldedNorm, folds_norm, linear_norm_in, linear_norm_out
from tersor.ops.gates import Gate
from tersor.ops.gradient import wanted as gradient_wanted
from tersor.ops.grouped import obstacle as experts_obstacle
from tersor.ops.lookup import gather_rows, lookup
from tersor.ops.mixture import experts, pairs_by_expert, routed_experts
from tersor.ops.mode import Mode, batch_invariant, set_batch_invariant, using
from tersor.ops.multiply import gated_linear, linear, serve_with
from tersor.ops.newest import keep, resolve
from tersor.ops.norm import layer_norm, rms_norm
from tersor.ops.pointwise import gated, relu, softcap
from tersor.ops.quantized import (
    Quantized,
    layer_norm_quantized,
    linear_quantized,
    rms_norm_quantized,
    takes_quantized,
)
from tersor.ops.router import router_logits
from tersor.ops.routing import route
from tersor.ops.sampling import draw, draw_with_logprobs, logprobs
from tersor.ops.sampling_form import Allowed, Listed, Logprobs, SamplingRows
from tersor.ops.serve_attention import obstacle as attention_obstacle
from tersor.ops.sparse_layout import check_activations as check_sparse_activations
from tersor.ops.sparse_layout import explain as explain_sparse
from tersor.ops.sparse_layout import preferred as preferred_sparse
from tersor.ops.workspace import Workspace

__all__ = [
    "PAGE",
    "Allowed",
    "AttentionForm",
    "Decision",
    "Deferred",
    "FoldedNorm",
    "Gain",
    "Gate",
    "Listed",
    "Logprobs",
    "Mode",
    "Normed",
    "PagedCache",
    "Quantized",
    "Reason",
    "Rows",
    "SamplingRows",
    "Workspace",
    "activated_quantized",
    "activation_dtype",
    "activations_for",
    "attend",
    "attention_obstacle",
    "batch_invariant",
    "check_sparse_activations",
    "decide",
    "decided_experts",
    "draw",
    "draw_with_logprobs",
    "embedding",
    "experts",
    "experts_obstacle",
    "explain",
    "explain_sparse",
    "folds_norm",
    "gated",
    "gated_linear",
    "gather_rows",
    "gradient_wanted",
    "keep",
    "kernel_chip",
    "kernels_for",
    "layer_norm",
    "layer_norm_quantized",
    "linear",
    "linear_norm_in",
    "linear_norm_out",
    "linear_quantized",
    "load_columns",
    "logprobs",
    "lookup",
    "pairs_by_expert",
    "preferred_layout",
    "preferred_sparse",
    "relu",
    "resolve",
    "rms_norm",
    "rms_norm_quantized",
    "route",
    "routed_experts",
    "router_logits",
    "serve_with",
    "set_batch_invariant",
    "softcap",
    "takes_activated",
    "takes_quantized",
    "using",
]
