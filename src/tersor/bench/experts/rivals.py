"""What does a layer of experts take without Tersor? torch's grouped and batched products, and humming's kernels.

Each is a function of x [T, H] and the router's logits [T, E] that launches everything between them and the output
[T, H], reads nothing back to the host, and so can be captured in a CUDA graph. Tokens are routed, sorted by expert and
put together again by torch's operators, in fewer launches than transformers takes (`integrations/moe.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.nn import functional

from tersor.bench.contenders import UnfitError
from tersor.bench.experts.layer import Layer, route
from tersor.formats import Activations, Scheme

Product: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(rows [P, IC] sorted by expert, their experts int64 [P], where those of each start int32 [E + 1]) -> [P, OC]."""
Together: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(outputs of pairs [P, H] sorted by expert, order int64 [P], weights float32 [T, K]) -> [T, H]."""

GATHERED = 8 << 30
"""The most bytes of weights that `batched_forward` copies in front of a product."""
_GROUPED = '{"gemm_type": "grouped_contiguous"}'
_BLOCK = 1 << 29
"""Weights that humming rounds at once."""


@dataclass(frozen=True, slots=True)
class Products:
    """The two products of a layer, over rows sorted by expert, with their biases.

    Attributes:
        gate_up: [P, H] -> [P, 2 F].
        down: [P, F] -> [P, H].
        numbers: int64 0 .. E, to find where the rows of each expert start.
    """

    gate_up: Product
    down: Product
    numbers: torch.Tensor

    @staticmethod
    def of(layer: Layer, product: Callable[[torch.Tensor, torch.Tensor | None], Product]) -> Products:
        """Make both of a layer by a function of weights [E, OC, IC] and biases [E, OC]."""
        numbers = torch.arange(layer.geometry.experts + 1, device=layer.down.device)
        return Products(product(layer.gate_up, layer.gate_up_bias), product(layer.down, layer.down_bias), numbers)


def scatter_sum(outputs: torch.Tensor, order: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weight the outputs of pairs, put them where their tokens are, and add."""
    outputs.mul_(weights.view(-1)[order, None])
    pairs = torch.empty_like(outputs)
    pairs[order] = outputs
    return pairs.view(*weights.shape, -1).sum(dim=1)


def embedding_bag(outputs: torch.Tensor, order: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Gather, weight and add by one operator, which wants to know where each pair went."""
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return functional.embedding_bag(
        place.view(weights.shape), outputs, mode="sum", per_sample_weights=weights.to(outputs.dtype)
    )


TOGETHER: dict[str, Together] = {"scatter and sum": scatter_sum, "embedding_bag": embedding_bag}
"""Ways from the outputs of pairs to those of tokens; which is the faster depends on the number of tokens."""


def sorted_forward(
    layer: Layer, products: Products, together: Together, x: torch.Tensor, logits: torch.Tensor
) -> torch.Tensor:
    """Run a layer whose products take rows sorted by expert.

    Args:
        layer: sizes, and the bias of the choice.
        products: of gate and up, and of down.
        together: one of `TOGETHER`.
        x: [T, H].
        logits: float32 [T, E].
    """
    index, weights = route(layer.geometry, logits, layer.choice_bias)
    experts, order = index.view(-1).sort()
    starts = torch.searchsorted(experts, products.numbers, out_int32=True)
    both = products.gate_up(x[order // layer.geometry.top_k], experts, starts)
    outputs = products.down(layer.geometry.gate.combine(*both.chunk(2, dim=-1)), experts, starts)
    return together(outputs, order, weights)


def batched_forward(layer: Layer, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Run a layer by `torch.bmm` over a copy of the weights for every pair: for few tokens alone.

    Raises:
        UnfitError: the copies are too large.
    """
    geometry = layer.geometry
    pairs = len(x) * geometry.top_k
    if pairs * layer.gate_up[0].nbytes > GATHERED:
        raise UnfitError(f"it would copy {pairs * layer.gate_up[0].nbytes / 1e9:.0f} GB of weights")
    index, weights = route(geometry, logits, layer.choice_bias)
    experts = index.view(-1)
    rows = x[:, None].expand(-1, geometry.top_k, -1).reshape(pairs, -1, 1)
    both = torch.bmm(layer.gate_up[experts], rows).squeeze(-1)
    if layer.gate_up_bias is not None:
        both += layer.gate_up_bias[experts]
    inner = geometry.gate.combine(*both.chunk(2, dim=-1))
    outputs = torch.bmm(layer.down[experts], inner.unsqueeze(-1)).squeeze(-1)
    if layer.down_bias is not None:
        outputs += layer.down_bias[experts]
    return outputs.mul_(weights.view(-1, 1)).view(*index.shape, -1).sum(dim=1)


def grouped_mm(layer: Layer) -> Products:
    """Return the products of a bfloat16 layer by `torch.nn.functional.grouped_mm`."""

    def product(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        def multiply(rows: torch.Tensor, experts: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
            found = functional.grouped_mm(rows, weight.transpose(1, 2), offs=starts[1:])
            return found if bias is None else found.add_(bias[experts])

        return multiply

    return Products.of(layer, product)


def humming(layer: Layer, scheme: Scheme, activations: Activations | str) -> Products:
    """Return the products of a layer by the grouped kernels of humming-kernels, its own tuner choosing.

    vLLM calls them the same way where tensors are read by tensor maps: rows sorted by expert, and where those of each
    expert start.
    """

    def product(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        module = _humming_layer(weight, bias, scheme, activations)

        def multiply(rows: torch.Tensor, experts: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
            return module(rows, expert_layout=starts, valid_shape_m=len(rows), compute_config=_GROUPED)

        return multiply

    return Products.of(layer, product)


def humming_dtype(scheme: Scheme) -> str:
    """Return what humming calls a format, such as `float6e3m2`."""
    name = scheme.format.name
    return f"float{scheme.format.bits}{name.partition('_')[2]}" if scheme.format.kind == "float" else name


def _humming_layer(
    weight: torch.Tensor, bias: torch.Tensor | None, scheme: Scheme, activations: Activations | str
) -> Any:
    from humming.layer import HummingLayer
    from humming.schema import HummingWeightSchema

    experts, oc, ic = weight.shape
    config: dict[str, Any] = {"dtype": humming_dtype(scheme)}
    if scheme.group_size is not None:
        config["group_size"] = scheme.group_size
    options: dict[str, Any] = {"weight_config": config, "torch_dtype": weight.dtype, "num_experts": experts}
    if activations == Activations.E4M3:
        options["input_config"] = {"dtype": "float8e4m3"}
    with weight.device:
        module = HummingLayer(
            shape_n=oc, shape_k=ic, has_bias=bias is not None, pad_n_to_multiple=256, pad_k_to_multiple=128, **options
        )
    rounded = [
        HummingWeightSchema.quant_tensor(part, module.weight_schema, weight.dtype)
        for part in weight.split(max(1, _BLOCK // (oc * ic)))
    ]
    tensors = {name: torch.cat([part[name] for part in rounded]) for name in rounded[0]}
    module.load_from_tensors(tensors if bias is None else {**tensors, "bias": bias})
    module.transform()
    return module
