"""How does a router of transformers choose experts? Its module is asked, with random weights and tokens.

A router takes hidden states [T, H] and returns its logits [T, E], the weights of the chosen experts and their numbers
[T, K]. Most are one of the forms that `ops.route` has; which, shows in what the module returns.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from tersor import ops
from tersor.errors import ShapeError

_TOKENS = 48
"""Tokens that a router is tried with."""
_SPREAD = 2.0
"""Standard deviation of the logits that it is tried with."""
_BIAS = 0.3
"""That of biases."""
_GROUPS = (("num_group", "topk_group"), ("n_group", "topk_group"))
_SCALES = ("routed_scaling_factor", "route_scale", "router_scaling_factor")
_known: dict[Any, RouterForm | None] = {}


@dataclass(frozen=True, slots=True)
class RouterForm:
    """How a router makes logits of hidden states, and chooses by them; as in `ops.route` where it says nothing else.

    Attributes:
        top_k: K.
        scoring, normalize, groups, top_groups, scale: as in `ops.route`.
        choice_bias: name of the tensor [E] that is the `bias` of the choice, or `None`.
        wide: whether the product is computed in float32.
        widened: whether logits become float32 after it.
    """

    top_k: int
    scoring: str
    normalize: bool
    groups: int
    top_groups: int
    scale: float
    choice_bias: str | None
    wide: bool = False
    widened: bool = False

    def logits(self, router: Any, x: torch.Tensor) -> torch.Tensor:
        """Return the logits [T, E] of hidden states [..., H]."""
        x, weight, bias = x.reshape(-1, x.shape[-1]), router.weight, getattr(router, "bias", None)
        if self.wide:
            x, weight = x.float(), weight.float()
        found = functional.linear(x, weight, bias)
        return found.float() if self.widened else found

    def options(self, router: Any) -> dict[str, Any]:
        """Return how experts are chosen: the arguments of `ops.route` but for logits, its bias as `choice_bias`."""
        return {
            "top_k": self.top_k,
            "scoring": self.scoring,
            "normalize": self.normalize,
            "choice_bias": None if self.choice_bias is None else getattr(router, self.choice_bias),
            "groups": self.groups,
            "top_groups": self.top_groups,
            "scale": self.scale,
        }

    def route(self, router: Any, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the index int32 [T, K] of logits [T, E] and the weights float32 [T, K]."""
        options = self.options(router)
        return ops.route(logits, options.pop("top_k"), bias=options.pop("choice_bias"), **options)


def is_router(module: nn.Module, experts: int, hidden: int) -> bool:
    """Whether a module may be a router: it holds a weight [E, H], no modules, and is no linear layer."""
    weight = module._parameters.get("weight")
    plain = not isinstance(module, nn.Linear | nn.Embedding) and not any(module.children())
    return plain and weight is not None and tuple(weight.shape) == (experts, hidden)


def router_form(router: Any) -> RouterForm | None:
    """Return how a module that `is_router` chooses experts; `None` where that is none of the forms of `ops.route`."""
    kept = {name: value for name, value in vars(router).items() if isinstance(value, int | float | str | None)}
    tensors = [*router._parameters.items(), *router._buffers.items()]
    shapes = tuple((name, None if one is None else (one.shape, one.dtype)) for name, one in tensors)
    key = (type(router), tuple(sorted(kept.items(), key=lambda item: item[0])), shapes)
    if key not in _known:
        _known[key] = _found(router)
    return _known[key]


def _found(router: Any) -> RouterForm | None:
    exact = _tried(router, torch.float32, torch.float32)
    if exact is None:
        return None
    trial, x, (logits, weights, index) = exact
    for form in _forms(trial, index):
        try:
            chosen, factors = form.route(trial, logits)
        except ShapeError:
            continue
        same_logits = torch.allclose(form.logits(trial, x), logits, rtol=1e-5, atol=1e-5)
        if same_logits and torch.allclose(_dense(chosen, factors, logits), _dense(index, weights, logits), atol=1e-5):
            return _with_dtypes(form, router)
    return None


def _with_dtypes(form: RouterForm, router: Any) -> RouterForm | None:
    """Return a form with what it computes in float32, found from 16-bit hidden states; `None` where that is unclear."""
    # A weight in float32 is kept so beside 16-bit hidden states, or all of the model is in float32.
    kept = [torch.float32] if router.weight.dtype is torch.float32 else []
    for dtype in (*kept, torch.bfloat16):
        tried = _tried(router, torch.bfloat16, dtype)
        if tried is None:
            continue
        trial, x, (logits, *_) = tried
        for wide, widened in ((False, False), (True, False), (False, True)):
            new = replace(form, wide=wide, widened=widened)
            if dtype is torch.float32 and not wide:
                continue
            found = new.logits(trial, x)
            if found.dtype is logits.dtype and torch.equal(found, logits):
                return new
    return None


def _tried(
    router: Any, dtype: torch.dtype, weight_dtype: torch.dtype
) -> tuple[Any, torch.Tensor, tuple[torch.Tensor, ...]] | None:
    """Return a copy with random tensors on the CPU, hidden states of `dtype`, and what it makes of them, if it can."""
    generator = torch.Generator().manual_seed(0)
    trial = copy.copy(router)
    trial.__dict__ = {name: value for name, value in vars(router).items() if name != "forward"}
    for held, own in (("_parameters", weight_dtype), ("_buffers", torch.float32)):
        made = {}
        for name, tensor in getattr(router, held).items():
            if tensor is not None and not tensor.is_floating_point():
                return None
            made[name] = None if tensor is None else _random(tensor.shape, generator).to(own)
        trial.__dict__[held] = made
    experts, hidden = trial.weight.shape
    x = torch.randn(_TOKENS, hidden, generator=generator, device="cpu").to(dtype)
    try:
        with torch.no_grad():
            returned = type(trial).forward(trial.eval(), x)
    except Exception:  # it needs more than hidden states, dtypes do not go together, or it is no router at all
        return None
    if not isinstance(returned, tuple) or len(returned) != 3:
        return None
    logits, weights, index = returned
    fits = logits.shape == (_TOKENS, experts) and index.shape == weights.shape and index.dim() == 2
    return (trial, x, returned) if fits and not index.is_floating_point() else None


def _random(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Return a weight that gives logits of `_SPREAD`, or a bias."""
    made = torch.randn(shape, generator=generator, device="cpu")
    return made * (_SPREAD / shape[1] ** 0.5 if len(shape) == 2 else _BIAS)


def _dense(index: torch.Tensor, weights: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return weights [T, K] where their experts are, [T, E]; none is -1."""
    dense = torch.full(like.shape, -1.0, device="cpu")
    return dense.scatter_(1, index.long(), weights.float())


def _forms(router: Any, index: torch.Tensor) -> Iterator[RouterForm]:
    experts = router.weight.shape[0]
    tensors = {**router._parameters, **router._buffers}
    biases = [
        name for name, one in tensors.items() if one is not None and name != "bias" and tuple(one.shape) == (experts,)
    ]
    groups = [(1, 1)]
    for names in _GROUPS:
        count, kept = (getattr(router, name, None) for name in names)
        if isinstance(count, int) and isinstance(kept, int):
            groups.append((count, kept))
    scales = {1.0, *(float(value) for name in _SCALES if isinstance(value := getattr(router, name, None), int | float))}
    for scoring, normalize, bias, (group, top), scale in product(
        ("softmax", "sigmoid"), (True, False), [*biases, None], groups, sorted(scales)
    ):
        yield RouterForm(index.shape[1], scoring, normalize, group, top, scale, bias)
