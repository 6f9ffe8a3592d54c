"""How much does each output of a layer matter? Gradients of the model's loss, block by block, the last one first.

Labels are drawn from the model itself, so that the second moments of the gradients are those of the Fisher information
(YAQA, arXiv 2505.22988; GuidedQuant, arXiv 2505.07004). What goes into each block, and the gradient of what comes out
of it, is kept on disk, a file a block, so that memory does not grow with the number of blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from tersor.compress.statistics import Moments
from tersor.convert.calibrate.store import Store, read_tensor, remove, write_tensors
from tersor.convert.calibrate.streams import Streams
from tersor.convert.calibrate.tasks import Site
from tersor.errors import InputError
from tersor.integrations.transformers.blocks import BlockModel

Take: TypeAlias = Callable[[list[torch.Tensor], torch.Tensor], None]
"""Takes the tensors that a module is called with, such as a linear layer's input [..., IC], and the gradient of what
comes out [..., OC]."""

_INPUT, _GRADIENT = "input", "gradient"
_VALUE = "value"
_LEAST, _MOST = 0.1, 20.0
"""What a token counts at least and at most, times the mean: those of massive activations have next to no gradient."""
_WIDEST = 4096
"""Output features of a block of the output Hessian's diagonal: all of it up to here, a layer's memory above."""


@dataclass(frozen=True, slots=True)
class Importance:
    """What the gradients of one linear layer's outputs say.

    Attributes:
        weights: float32 [W, T] on the host, what each token counts: the mean over features of its squared gradient,
            from 0.1 to 20 times its mean, over their mean.
        hessian: mean over tokens of g g^T, float32 [OC, OC], or P blocks along the diagonal [P, OC / P, OC / P].
    """

    weights: torch.Tensor
    hessian: torch.Tensor


class Gradients:
    """The backward pass of the original model, and what is kept of it."""

    def __init__(self, model: BlockModel, store: Store, ids: torch.Tensor, seed: int) -> None:
        """Prepare; nothing is computed yet.

        Args:
            model: whose ends are loaded.
            store: where files go.
            ids: int64 [W, T], the windows.
            seed: of the labels.
        """
        self._model, self._store, self._ids, self._seed = model, store, ids, seed

    def prepare(self, streams: Streams, first: int, load: Callable[[int], None], done: Callable[[int], None]) -> None:
        """Compute and keep the gradient of what comes out of every block that is not finished.

        What an interrupted run left is taken up.

        Args:
            streams: at the entry of the model; they are left as they are.
            first: number of the first block whose gradient is needed.
            load: loads a block's weights.
            done: called with the number of a block after each of the two passes through it.

        Raises:
            InputError: activations or gradients are not finite.
        """
        count = len(self._model.blocks)
        there = [block for block in range(count) if self._store.path(_GRADIENT, block).exists()]
        if there and min(there) <= first:
            return
        last = min(there, default=count)
        if not there or not all(self._store.path(_INPUT, block).exists() for block in range(last + 1)):
            last = count - 1
            gradient = self._ends(self._forward(streams, load, done))
            self._keep(_GRADIENT, last, gradient)
        else:
            gradient = read_tensor(self._store.path(_GRADIENT, last), _VALUE)
        for block in range(last, first, -1):
            load(block)
            inputs = read_tensor(self._store.path(_INPUT, block), _VALUE)
            self._backward(streams, block, inputs, gradient, None)
            self._model.drop(block)
            self._keep(_GRADIENT, block - 1, gradient)
            remove(self._store.path(_INPUT, block))
            done(block)
        for block in range(first + 1):
            remove(self._store.path(_INPUT, block))

    def _keep(self, kind: str, block: int, value: torch.Tensor) -> None:
        write_tensors(self._store.path(kind, block), {_VALUE: value}, {})

    def _forward(self, streams: Streams, load: Callable[[int], None], done: Callable[[int], None]) -> torch.Tensor:
        """Keep what goes into every block; return what comes out of the last."""
        for block in range(len(self._model.blocks)):
            self._keep(_INPUT, block, streams.original)
            load(block)
            streams.forward(block, self._model.blocks[block])
            self._model.drop(block)
            done(block)
        out = streams.original.clone()
        streams.original.copy_(read_tensor(self._store.path(_INPUT, 0), _VALUE))
        return out

    def _ends(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the gradient [W, T, H] of what comes out of the last block, a window at a time."""
        gradient = torch.empty_like(hidden)
        for number, ids in enumerate(self._ids):
            tokens = ids[None].to(self._model.device)
            own = hidden[number][None].to(self._model.device).requires_grad_(True)
            with torch.enable_grad():
                logits = self._model.leave(own, tokens)[0]
                log_p = logits.float().log_softmax(dim=-1)
                drawing = torch.Generator(self._model.device).manual_seed(self._seed + number)
                labels = torch.multinomial(log_p.detach().exp(), 1, generator=drawing)
                (found,) = torch.autograd.grad(-log_p.gather(1, labels).sum(), own)
            if not bool(found.isfinite().all()):
                raise InputError(f"gradients of window {number} hold a NaN or an infinity at the output head")
            gradient[number] = found[0].cpu()
        return gradient

    def measure(self, streams: Streams, block: int, sites: Iterable[Site]) -> dict[Site, Importance]:
        """Run a loaded block backward and return what the gradients of its linear layers say.

        Args:
            streams: at the entry of the block.
            block: its number.
            sites: of its layers. Experts, and layers that do not see every token once, get nothing.
        """
        gradient = read_tensor(self._store.path(_GRADIENT, block), _VALUE)
        found = {site: _Seen() for site in sites if not site.part}
        self._backward(streams, block, streams.original, gradient, {site: seen.add for site, seen in found.items()})
        count, window = self._ids.shape
        return {site: seen.importance(count, window) for site, seen in found.items() if seen.tokens == count * window}

    def visit(self, streams: Streams, block: int, take: Mapping[Site, Take]) -> None:
        """Run a loaded block backward; give away what goes into its linear layers, and gradients of what comes out.

        Args:
            streams: at the entry of the block.
            block: its number.
            take: called for every batch and layer.
        """
        gradient = read_tensor(self._store.path(_GRADIENT, block), _VALUE)
        self._backward(streams, block, streams.original, gradient, take)

    def _backward(
        self,
        streams: Streams,
        block: int,
        inputs: torch.Tensor,
        gradient: torch.Tensor,
        taken: Mapping[Site, Take] | None,
    ) -> None:
        """Replace the gradient of a block's outputs by that of its inputs; with `taken` add to that instead."""
        layer, device = self._model.blocks[block], self._model.device
        for batch in streams.batches:
            hidden = inputs[batch].to(device).requires_grad_(True)
            handles = [_watch(layer.get_submodule(site.module), own) for site, own in (taken or {}).items()]
            try:
                with torch.enable_grad():
                    output = self._model.run(layer, hidden, streams.calls(batch, block))
                    (found,) = torch.autograd.grad(output, hidden, gradient[batch].to(device))
            finally:
                for handle in handles:
                    handle.remove()
            if not bool(found.isfinite().all()):
                name = self._model.name_of(block, "")
                raise InputError(f"gradients of windows {batch.start} on hold a NaN or an infinity, first in {name}")
            if taken is None:
                gradient[batch] = found.cpu()

    def forget(self, block: int) -> None:
        """Remove what was kept for a block that is finished."""
        remove(self._store.path(_GRADIENT, block))


class _Seen:
    """What the gradients of a layer's outputs sum up to, and the mean square of every token's."""

    def __init__(self) -> None:
        self.moments: Moments | None = None
        self._squares: list[torch.Tensor] = []

    @property
    def tokens(self) -> int:
        return 0 if self.moments is None else self.moments.tokens

    def add(self, _: list[torch.Tensor], gradient: torch.Tensor) -> None:
        features = gradient.shape[-1]
        if self.moments is None:
            self.moments = Moments(features, gradient.device, _parts(features))
        self.moments.add(gradient)
        self._squares.append(gradient.reshape(-1, features).float().square().mean(dim=1).cpu())

    def importance(self, count: int, window: int) -> Importance:
        assert self.moments is not None
        squares = torch.cat(self._squares)
        mean = squares.mean()
        weights = squares.clamp(_LEAST * mean, _MOST * mean) if bool(mean > 0) else torch.ones_like(squares)
        return Importance((weights / weights.mean()).view(count, window), self.moments.mean())


def _parts(features: int) -> int:
    """Return into how many equal parts the output features of a layer are divided."""
    return next(parts for parts in range(1, features + 1) if features % parts == 0 and features // parts <= _WIDEST)


def _watch(module: nn.Module, take: Take) -> Any:
    """Give away what goes into a layer and the gradient of its output, when that is there."""

    def look(_: nn.Module, arguments: Any, named: dict[str, Any], output: torch.Tensor) -> None:
        values = (*arguments, *named.values())
        given = [value.detach() for value in values if isinstance(value, torch.Tensor)]
        output.register_hook(lambda gradient: take(given, gradient))

    return module.register_forward_hook(look, with_kwargs=True)
