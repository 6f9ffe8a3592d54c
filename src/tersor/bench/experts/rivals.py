"""What does a layer of experts take without Tersor? torch's grouped and batched products, and humming's kernels.

Each is a function of x [T, H] and the router's logits [T, E] that launches everything between them and the output
[T, H], reads nothing back to the host, and so can be captured in a CUDA graph. What surrounds the products runs by
torch's operators, in fewer launches than transformers takes (`integrations/moe.py`), or compiled by torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.nn import functional

from tersor.bench.contenders import HUMMING_INPUTS, UnfitError
from tersor.bench.experts.geometry import Geometry
from tersor.bench.experts.layer import Layer, route
from tersor.formats import Activations, Scheme

Product: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(rows [P, IC] sorted by expert, their experts int64 [P], where those of each start int32 [E + 1]) -> [P, OC]."""
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


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Return a function compiled as a whole by torch.compile, for any number of tokens.

    Args:
        function: of tensors and values that hold tensors.
        options: of torch's inductor.
    """
    return torch.compile(function, fullgraph=True, options=options or None)


@dataclass(frozen=True, slots=True)
class Around:
    """What runs around the products of a layer.

    Attributes:
        before: as `before`.
        between: as `between`.
        after: as `scattered` or `gathered`.
    """

    before: Callable[..., Any]
    between: Callable[..., Any]
    after: Callable[..., Any]

    @staticmethod
    def eager() -> Around:
        """Return torch's operators, one after the other."""
        return Around(before, between, scattered)

    @staticmethod
    def compiled() -> Around:
        """Return the three, each compiled."""
        return Around(compiled(before), compiled(between), compiled(gathered))


def before(
    layer: Layer, numbers: torch.Tensor, x: torch.Tensor, logits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Route tokens and sort their pairs by expert.

    Args:
        layer: sizes, and the bias of the choice.
        numbers: as in `Products`.
        x: [T, H].
        logits: float32 [T, E].

    Returns:
        rows of x [P, H], their experts int64 [P], where those of each start int32 [E + 1], the pair at each place int64
        [P], and the weights of pairs float32 [T, K].
    """
    index, weights = route(layer.geometry, logits, layer.choice_bias)
    experts, order = index.view(-1).sort()
    starts = torch.searchsorted(experts, numbers, out_int32=True)
    return x[order // layer.geometry.top_k], experts, starts, order, weights


def between(geometry: Geometry, both: torch.Tensor) -> torch.Tensor:
    """Return gate and up [P, 2 F] as one [P, F]."""
    return geometry.gate.combine(*both.chunk(2, dim=-1))


def scattered(outputs: torch.Tensor, order: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weight the outputs of pairs [P, H], put them where their tokens are, and add: [T, H]."""
    outputs.mul_(weights.view(-1)[order, None])
    pairs = torch.empty_like(outputs)
    pairs[order] = outputs
    return pairs.view(*weights.shape, -1).sum(dim=1)


def gathered(outputs: torch.Tensor, order: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Do the same from the tokens' side, which a compiler makes one loop of."""
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return (outputs[place].view(*weights.shape, -1) * weights[..., None]).sum(dim=1).to(outputs.dtype)


def sorted_forward(
    layer: Layer, products: Products, around: Around, x: torch.Tensor, logits: torch.Tensor
) -> torch.Tensor:
    """Run a layer whose products take rows sorted by expert.

    Args:
        layer: sizes, and the bias of the choice.
        products: of gate and up, and of down.
        around: what runs beside them.
        x: [T, H].
        logits: float32 [T, E].
    """
    rows, experts, starts, order, weights = around.before(layer, products.numbers, x, logits)
    both = products.gate_up(rows, experts, starts)
    outputs = products.down(around.between(layer.geometry, both), experts, starts)
    return around.after(outputs, order, weights)


def grouped_forward(layer: Layer, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Run a bfloat16 layer by `grouped_mm`, written to be compiled as a whole."""
    return sorted_forward(layer, grouped_mm(layer), Around(before, between, gathered), x, logits)


def check_gathered(layer: Layer, n: int) -> None:
    """Refuse `batched_forward` for so many tokens that copies of weights would fill the memory.

    Raises:
        UnfitError: there are so many.
    """
    nbytes = n * layer.geometry.top_k * layer.gate_up[0].nbytes
    if nbytes > GATHERED:
        raise UnfitError(f"it would copy {nbytes / 1e9:.0f} GB of weights")


def batched_forward(layer: Layer, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Run a layer by `torch.bmm` over the weights of every pair, for few tokens.

    They are copied for it; compiled with `coordinate_descent_tuning`, which makes such products sums, they are read in
    place, as gpt-fast (github.com/meta-pytorch/gpt-fast) runs Mixtral.
    """
    geometry = layer.geometry
    index, weights = route(geometry, logits, layer.choice_bias)
    experts = index.view(-1)
    rows = x[:, None].expand(-1, geometry.top_k, -1).reshape(-1, geometry.hidden, 1)
    both = torch.bmm(layer.gate_up[experts], rows).squeeze(-1)
    if layer.gate_up_bias is not None:
        both = both + layer.gate_up_bias[experts]
    outputs = torch.bmm(layer.down[experts], between(geometry, both).unsqueeze(-1)).squeeze(-1)
    if layer.down_bias is not None:
        outputs = outputs + layer.down_bias[experts]
    return (outputs.view(*index.shape, -1) * weights[..., None]).sum(dim=1).to(x.dtype)


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
    if activations != Activations.NATIVE:
        options["input_config"] = HUMMING_INPUTS[Activations.of(activations)]
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
