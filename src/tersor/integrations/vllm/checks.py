"""What is refused before vLLM starts a worker? By the headers of a checkpoint, and by what vLLM is told of ranks.

A worker that refuses ends in its own traces; what can be known ahead of it is said here, in one line.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch

from tersor.errors import InputError, TersorError, UnsupportedError
from tersor.formats import Activations, Assignment, Mix, Pruned, Scheme, Sparse
from tersor.integrations.vllm.plan import Plan, Stored
from tersor.integrations.vllm.stacks import HANDED_WHOLE
from tersor.layouts.shard import quantum
from tersor.ops.dispatch import kernel_layout

P = ParamSpec("P")
T = TypeVar("T")
GATES = ("silu", "gelu", "gelu_tanh", "gelu_pytorch_tanh")
"""How gate and up of experts become one, by the names of configurations."""
_CUT = ("o_proj", "wo", "out_proj", "down_proj", "w2", "fc2", "c_proj", "dense_4h_to_h", "output_linear")
"""What layers are called whose input channels vLLM deals out to ranks."""
_LIMITS = ("swiglu_limit", "swiglu_limits")
_LLAMA4 = ("Llama4ForCausalLM", "Llama4ForConditionalGeneration")
"""Classes for which vLLM brings the rows of queries and keys in another order, by the names of codes and scales, and
multiplies tokens by what the router says ahead of their experts."""
_REORDERED = ("BloomForCausalLM", "FalconForCausalLM", "GPTNeoXForCausalLM", "RWForCausalLM")
"""Classes for which it does so with a weight that holds queries, keys and values, whatever its tensors are called."""


@dataclass(frozen=True, slots=True)
class Started:
    """What vLLM is started with, beside the model.

    Attributes:
        ranks: that layers are cut over.
        expert_ranks: that each expert is cut over.
        whole_experts: whether ranks have whole experts (expert parallelism).
        exchanges: whether ranks exchange tokens, each with rows of its own.
        balances: whether experts move between ranks while vLLM runs.
        random: whether weights are made up.
        option: an option that moves or adds to weights, as users write it, or an empty string.
        capability: compute capability of the GPU; `None` where there is none.
    """

    ranks: int = 1
    expert_ranks: int = 1
    whole_experts: bool = False
    exchanges: bool = False
    balances: bool = False
    random: bool = False
    option: str = ""
    capability: tuple[int, int] | None = None


def in_one_line(call: Callable[P, T]) -> Callable[P, T]:
    """Return a function that vLLM calls while it makes its configuration, and whose errors are the last line printed.

    Pydantic, which checks that configuration, wraps every `ValueError` in lines of its own.

    Raises:
        TersorError: the line of an `InputError`, which is a `ValueError`; others pass.
    """

    @functools.wraps(call)
    def calling(*arguments: P.args, **options: P.kwargs) -> T:
        try:
            return call(*arguments, **options)
        except InputError as error:
            raise TersorError(str(error)) from None

    return calling


def of_checkpoint(plan: Plan, activations: Activations, text: Mapping[str, Any], methodless: frozenset[str]) -> None:
    """Hold that vLLM can have the weights of a checkpoint packed.

    Args:
        plan: of it.
        activations: what packed weights are to be multiplied with.
        text: configuration of the language model.
        methodless: of `embedding` and `head`, those that vLLM builds without asking for a quantisation method.

    Raises:
        UnsupportedError: it cannot.
    """
    for name, stored in plan.stored.items():
        need_16bit(stored, activations)
        if isinstance(stored.represented, Scheme) and activations is not Activations.NATIVE:
            kernel_layout(stored.represented, torch.float16, activations)
        last = name.rpartition(".")[2]
        if ("embedding" in methodless and name in plan.embeddings) or ("head" in methodless and last == "lm_head"):
            what = "embedding" if name in plan.embeddings else "head"
            raise UnsupportedError(
                f"{name} is packed, and vLLM builds the {what} of {plan.architecture} for plain weights alone: leave "
                "it out of the overrides"
            )
        turned = last in ("q_proj", "k_proj") and plan.architecture in _LLAMA4
        reordered = last == "query_key_value" and plan.architecture in _REORDERED
        if (turned or reordered) and not _rows_alone(stored, zero_points=reordered):
            raise UnsupportedError(
                f"{name}: vLLM brings its rows in another order while it loads {plan.architecture}, which it does with "
                f"dense weights{' without zero points' if turned else ''} alone"
            )
    for experts in dict.fromkeys(_experts(plan)):
        _check_experts(experts, plan.architecture, text)


def of_start(plan: Plan, started: Started) -> None:
    """Hold that vLLM can run a plan as it is started.

    Raises:
        UnsupportedError: it cannot.
    """
    if started.option and (plan.stored or plan.everywhere):
        raise UnsupportedError(f"{started.option} does not work with packed weights: leave it out")
    experts = next(_experts(plan), "")
    if experts and started.balances:
        raise UnsupportedError(f"{experts}: packed experts stay on their ranks: leave --enable-eplb out")
    if experts and started.exchanges:
        raise UnsupportedError(
            f"{experts}: packed experts do not run where ranks exchange tokens: leave out data parallelism or "
            "--enable-expert-parallel"
        )
    for name, stored in plan.stored.items():
        if started.random:
            need_drawable(stored)
        parts = name.split(".")
        if parts[-1] not in _CUT or not stored.channels:
            continue
        inside = "experts" in parts
        if started.whole_experts and any("expert" in part for part in parts):
            continue
        ranks = started.expert_ranks if inside else started.ranks
        own = stored.channels // ranks
        if ranks > 1:
            need_quantum(stored, (own, 2 * own))


def of_gpu(activations: Activations, capability: tuple[int, int] | None) -> None:
    """Hold that a GPU has kernels with such activations; where there is no GPU, vLLM says so.

    Raises:
        UnsupportedError: it has none.
    """
    if activations is not Activations.NATIVE and capability not in (None, (9, 0)):
        raise UnsupportedError(
            f"activations {activations} of TERSOR_VLLM_ACTIVATIONS: kernels with them need compute capability 9.0, "
            "this GPU has {}.{}: leave them 16bit".format(*capability)
        )


def need_quantum(stored: Stored, columns: tuple[int, int]) -> None:
    """Hold that a weight can be cut at these input channels.

    Raises:
        UnsupportedError: it cannot.
    """
    if stored.represented is None:
        return
    unit = _unit(stored.represented)
    if columns[0] % unit or columns[1] % unit:
        raise UnsupportedError(
            f"{stored.stem}: tensor parallelism gives a rank input channels {columns[0]} to {columns[1]}, and a weight "
            f"in {stored.represented.key()} is cut at multiples of {unit}: use fewer ranks"
        )


def need_16bit(stored: Stored, activations: Activations) -> None:
    """Hold that a weight can be multiplied with such activations.

    Raises:
        UnsupportedError: 8-bit ones with a pruned weight.
    """
    if isinstance(stored.represented, Sparse) and activations is not Activations.NATIVE:
        raise UnsupportedError(
            f"{stored.stem} is pruned, and pruned weights are multiplied with 16-bit activations alone"
        )


def need_drawable(stored: Stored) -> None:
    """Hold that a weight can be made up.

    Raises:
        UnsupportedError: a mixed or pruned one.
    """
    if isinstance(stored.represented, Mix | Sparse):
        raise UnsupportedError(
            f"{stored.stem}: random weights have one scheme; mixed and pruned ones come from a checkpoint"
        )


def _unit(represented: Scheme | Mix | Sparse) -> int:
    """Return the input channels that a weight is cut in, as `layouts.shard.quantum` says it of one that is there."""
    if isinstance(represented, Mix):
        return quantum(Assignment(represented, b""))
    if isinstance(represented, Sparse):
        return quantum(Pruned(represented, b""))
    return quantum(represented)


def _rows_alone(stored: Stored, zero_points: bool) -> bool:
    scheme = stored.represented
    return isinstance(scheme, Scheme) and scheme.outliers is None and (zero_points or not scheme.has_zero_point)


def _experts(plan: Plan) -> Iterator[str]:
    """Yield names of layers of packed experts."""
    for name in plan.stored:
        owner, dot, rest = name.partition(".experts.")
        if dot and rest.partition(".")[0].isdigit():
            yield f"{owner}.experts"


def _check_experts(experts: str, architecture: str, text: Mapping[str, Any]) -> None:
    """Hold that experts compute what kernels do, as far as the configuration of the language model says it."""
    names = (text.get(name) for name in ("hidden_activation", "hidden_act"))
    activation = next((name for name in names if name), "silu")
    why = ""
    if activation not in GATES:
        why = f"gate and up become one by {activation}"
    elif architecture not in HANDED_WHOLE and any(_clamps(text.get(name)) for name in _LIMITS):
        why = "gate and up are clamped"
    elif architecture in _LLAMA4 and text.get("num_experts_per_tok", 1) > 1:
        why = "the router's weights come before the product, of several experts a token"
    if why:
        raise UnsupportedError(f"{experts}: packed experts do not run here: {why}")


def _clamps(value: Any) -> bool:
    return any(map(_clamps, value)) if isinstance(value, list | tuple) else value is not None and value > 0
