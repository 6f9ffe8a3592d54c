"""How much does each output of a layer matter? Gradients of the model's loss, block by block, the last one first.

Labels are drawn from the model itself, so that the second moments of the gradients are those of the Fisher information
(YAQA, arXiv 2505.22988; GuidedQuant, arXiv 2505.07004). What goes into each block, and the gradient of what comes out
of it, is kept in a file a block, so that memory does not grow with the number of blocks. These files outlast a process
that is killed, and no loss of power: what goes into the last blocks is read and removed before a disk has it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

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


class Backward(Protocol):
    """Runs a block backward; the gradient of its outputs becomes that of its inputs where `replace` says so."""

    def __call__(self, taken: Mapping[Site, Take], *, replace: bool) -> None:
        """Give away what modules see."""


Visit: TypeAlias = Callable[[int, Backward], None]
"""Takes a block that is loaded, and runs it backward: any number of times, and last with `replace`."""

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

    def __init__(self, model: BlockModel, store: Store, ids: torch.Tensor, seed: int | None) -> None:
        """Prepare; nothing is computed yet.

        Args:
            model: whose ends are loaded.
            store: where files go.
            ids: int64 [W, T], the windows.
            seed: of the labels; `None` takes those of the text itself.
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
        there = self._there()
        if there and min(there) <= first:
            return
        last, gradient = self._start(streams, there, load, done)
        inputs = self._pinned(gradient)
        for block in range(last, first, -1):
            load(block)
            read_tensor(self._store.path(_INPUT, block), _VALUE, inputs)
            self._backward(streams, block, inputs, gradient, {}, replace=True)
            self._model.drop(block)
            self._keep(_GRADIENT, block - 1, gradient)
            remove(self._store.path(_INPUT, block))
            done(block)
        for block in range(first + 1):
            remove(self._store.path(_INPUT, block))

    def visit(
        self,
        streams: Streams,
        load: Callable[[int], None],
        done: Callable[[int], None],
        visit: Visit,
        *,
        keep: bool,
    ) -> None:
        """Run all blocks backward, and have each visited while it does.

        What an interrupted run left is taken up: a block whose gradient is kept is visited, and all before it.

        Args:
            streams, load, done: as for `prepare`.
            visit: runs a block backward.
            keep: whether gradients are kept that are needed no more here.

        Raises:
            InputError: activations or gradients are not finite.
        """
        last, gradient = self._start(streams, self._there(), load, done)
        inputs = self._pinned(gradient)
        for block in range(last, -1, -1):
            load(block)
            read_tensor(self._store.path(_INPUT, block), _VALUE, inputs)
            visit(block, functools.partial(self._backward, streams, block, inputs, gradient))
            self._model.drop(block)
            if block:
                self._keep(_GRADIENT, block - 1, gradient)
            if not keep:
                self.forget(block)
            remove(self._store.path(_INPUT, block))
            done(block)

    def _there(self) -> list[int]:
        """Return the blocks whose gradients are kept."""
        return [block for block in range(len(self._model.blocks)) if self._store.path(_GRADIENT, block).exists()]

    def _start(
        self, streams: Streams, there: list[int], load: Callable[[int], None], done: Callable[[int], None]
    ) -> tuple[int, torch.Tensor]:
        """Return the last block that is to run backward, and the gradient of what comes out of it.

        What goes into that block and into all ahead of it is kept then.
        """
        last = min(there, default=0)
        if there and all(self._store.path(_INPUT, block).exists() for block in range(last + 1)):
            return last, read_tensor(self._store.path(_GRADIENT, last), _VALUE, self._pinned(streams.original))
        last = len(self._model.blocks) - 1
        gradient = self._ends(self._forward(streams, load, done))
        self._keep(_GRADIENT, last, gradient)
        return last, gradient

    def _pinned(self, like: torch.Tensor) -> torch.Tensor:
        """Return memory for such a tensor on the host, from which a GPU copies at once."""
        return torch.empty_like(like, pin_memory=self._model.device.type == "cuda")

    def _keep(self, kind: str, block: int, value: torch.Tensor) -> None:
        write_tensors(self._store.path(kind, block), {_VALUE: value}, {}, durable=False)

    def _forward(self, streams: Streams, load: Callable[[int], None], done: Callable[[int], None]) -> torch.Tensor:
        """Keep what goes into every block; return what comes out of the last."""
        for block in range(len(self._model.blocks)):
            self._keep(_INPUT, block, streams.original)
            load(block)
            streams.forward(block, self._model.blocks[block])
            self._model.drop(block)
            done(block)
        out = streams.original.clone()
        read_tensor(self._store.path(_INPUT, 0), _VALUE, streams.original)
        return out

    def _ends(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the gradient [W, T, H] of what comes out of the last block, a window at a time."""
        gradient = self._pinned(hidden)
        for number, ids in enumerate(self._ids):
            tokens = ids[None].to(self._model.device)
            own = hidden[number][None].to(self._model.device).requires_grad_(True)
            with torch.enable_grad():
                logits = self._model.leave(own, tokens)[0]
                log_p = logits.float().log_softmax(dim=-1)
                if self._seed is None:
                    log_p, labels = log_p[:-1], tokens[0, 1:, None]
                else:
                    drawing = torch.Generator(self._model.device).manual_seed(self._seed + number)
                    labels = torch.multinomial(log_p.detach().exp(), 1, generator=drawing)
                (found,) = torch.autograd.grad(-log_p.gather(1, labels).sum(), own)
            if not bool(found.isfinite().all()):
                raise InputError(f"gradients of window {number} hold a NaN or an infinity at the output head")
            gradient[number].copy_(found[0])
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
        takes = {site: seen.add for site, seen in found.items()}
        self._backward(streams, block, streams.original, gradient, takes, replace=False)
        count, window = self._ids.shape
        return {site: seen.importance(count, window) for site, seen in found.items() if seen.tokens == count * window}

    def _backward(
        self,
        streams: Streams,
        block: int,
        inputs: torch.Tensor,
        gradient: torch.Tensor,
        taken: Mapping[Site, Take],
        *,
        replace: bool,
    ) -> None:
        """Give away what layers see, and replace the gradient of a block's outputs by that of its inputs if asked."""
        layer, device = self._model.blocks[block], self._model.device
        for batch in streams.batches:
            hidden = inputs[batch].to(device, non_blocking=True).requires_grad_(True)
            handles = [_watch(layer.get_submodule(site.module), own) for site, own in taken.items()]
            try:
                with torch.enable_grad():
                    output = self._model.run(layer, hidden, streams.calls(batch, block))
                    (found,) = torch.autograd.grad(output, hidden, gradient[batch].to(device, non_blocking=True))
            finally:
                for handle in handles:
                    handle.remove()
            if not bool(found.isfinite().all()):
                name = self._model.name_of(block, "")
                raise InputError(f"gradients of windows {batch.start} on hold a NaN or an infinity, first in {name}")
            if replace:
                gradient[batch].copy_(found)

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
