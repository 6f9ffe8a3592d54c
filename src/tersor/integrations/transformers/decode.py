"""The model, cache and sampler of a prompt's continuations: a prefill, then one step a token, on a GPU as a CUDA graph.

A step has no input from the host: it reads its token, position and history from tensors and writes the next
ones there, so that the same function runs eagerly on a CPU and replays as a graph on a GPU. An eager step of
a model with 32 layers launches about a thousand kernels; a slow host needs longer for that than the GPU for
the weights.
"""

from __future__ import annotations

import inspect
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from tersor import ops
from tersor.engine.sampling import Sampling
from tersor.errors import TersorError, UnsupportedError
from tersor.integrations.transformers.sampler import Sampler, usable
from tersor.integrations.transformers.step_experts import StepExperts
from tersor.ops.capture import beside, capturing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WARM_UP = 2
"""Eager steps before a capture: they compile kernels and let libraries allocate what a capture must not."""
NO_TOKEN = -1
"""What the host gets for a token that cannot be drawn, because its logits are not finite."""
ROUND = 128
"""A static cache's length is rounded up to a multiple of this, so that a graph serves other prompts too."""


class Decoder:
    """Prefill and decode of one prompt at a time, continued once or several times.

    Several continuations are the rows of a batch: all have read the prompt, and all have as many tokens.

    Attributes:
        length: tokens the cache holds, prompt included.
        samples: continuations of a prompt.
        graph: the captured step, once there is one.
        eager_reason: why steps are launched one kernel at a time, when they are.
        capture_seconds: what warming up and capturing took in this stream.
        workspace: device memory of split products, given back when the decoder goes, and the graph with it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        options: Sampling,
        length: int,
        use_graph: bool | None = None,
        samples: int = 1,
    ) -> None:
        """Make a decoder.

        Args:
            model: a causal language model of transformers.
            options: resolved sampling options.
            length: tokens of prompt and continuation together.
            use_graph: True insists on a CUDA graph, False forbids it, None uses one where it works.
            samples: continuations of a prompt, at least 1.

        Raises:
            UnsupportedError: `use_graph` is True where no graph is possible.
        """
        self.model = model
        self.samples = samples
        self.device = model.device
        self.sampler = Sampler(options, self.device)
        self.workspace = ops.Workspace()
        weakref.finalize(self, self.workspace.close).atexit = False  # a process that ends frees everything anyway
        self.graph: torch.cuda.CUDAGraph | None = None
        self.capture_seconds = 0.0
        self.insist = bool(use_graph)
        self._experts = StepExperts(model, graph=use_graph is not False and self.device.type == "cuda")
        static = _wants_static(self.device)
        self.length = -(-length // ROUND) * ROUND if static else length
        self.cache: Any = _static_cache(model, self.length) if static else None
        self.static = self.cache is not None
        self.eager_reason = "not asked for" if use_graph is False else self._unsupported_reason()
        if self.insist and self.eager_reason is not None:
            raise UnsupportedError(f"no CUDA graph for this model: {self.eager_reason}")
        self.token = torch.zeros(samples, 1, dtype=torch.int64, device=self.device)
        self.drawn = torch.zeros(samples, 1, dtype=torch.int64, device=self.device)
        self.position = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.history = torch.zeros(samples, self.length, dtype=torch.int64, device=self.device)
        parameters = inspect.signature(model.forward).parameters
        self._prefill_options = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        # Newer versions of transformers (5.24) call it `cache`.
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"

    @torch.inference_mode()
    def prefill(self, ids: list[int], seed: int | None) -> None:
        """Forget the stream before, read the prompt and draw the first token of every continuation."""
        if self.static:
            self.cache.reset()
        else:
            self.cache = _dynamic_cache(self.model)
        self.capture_seconds = 0.0
        self.sampler.seed(seed)
        prompt = torch.tensor([ids], dtype=torch.int64, device=self.device)
        # Beyond the tokens seen the history holds a token of the prompt, which a penalty counts anyway.
        self.history.fill_(ids[0])
        self.history[:, : len(ids)] = prompt
        self.position.fill_(len(ids))
        self._draw(self._read(prompt))

    def _read(self, prompt: torch.Tensor) -> torch.Tensor:
        """Run a prompt [1, tokens] through the model, once where the cache can be repeated; return logits of all rows.

        The cache that reads it for all rows is one as they have, so that what it holds does not depend on them.
        """
        if self.samples == 1:
            return self._logits(prompt, self.cache, **self._prefill_options)
        own = _static_cache(self.model, self.length) if self.static else self.cache
        if not self.static and not _repeatable(own):
            return self._logits(prompt.expand(self.samples, -1), self.cache, **self._prefill_options)
        logits = self._logits(prompt, own, **self._prefill_options)[:, -1:]
        if self.static:
            for index, layer in enumerate(own.layers):
                if layer.is_initialized:
                    keys, values = (
                        one[:, :, : prompt.shape[1]].expand(self.samples, -1, -1, -1)
                        for one in (layer.keys, layer.values)
                    )
                    self.cache.update(keys, values, index)
        else:
            self.cache.batch_repeat_interleave(self.samples)
        return logits.expand(self.samples, -1, -1)

    @torch.inference_mode()
    def step(self) -> None:
        """Run the model on the last token and draw the next one."""
        if self.graph is None and self.eager_reason is None:
            self._capture()
        if self.graph is None:
            self._forward()
        else:
            self.graph.replay()

    @torch.inference_mode()
    def publish(self) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """Begin to copy the last tokens [B, 1], or `NO_TOKEN`, to the host; `fetch` waits for them, steps need not."""
        if self.device.type != "cuda":
            return self.drawn.clone(), None
        slot = torch.empty(self.samples, 1, dtype=torch.int64, pin_memory=True)
        slot.copy_(self.drawn, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return slot, event

    @staticmethod
    def fetch(published: tuple[torch.Tensor, torch.cuda.Event | None]) -> list[int]:
        """Return the tokens that `publish` began to copy, one a row; `NO_TOKEN` where logits were not finite."""
        slot, event = published
        if event is not None:
            event.synchronize()
        return [int(token) for token in slot.flatten().tolist()]

    def _forward(self) -> None:
        with self._experts.step():
            logits = self._logits(self.token, self.cache)
        self._draw(logits)

    def _logits(self, ids: torch.Tensor, cache: Any, **options: Any) -> torch.Tensor:
        with ops.using(workspace=self.workspace):
            output = self.model(input_ids=ids, use_cache=True, **{self._cache_name: cache}, **options)
        logits: torch.Tensor = output.logits
        return logits

    def _draw(self, logits: torch.Tensor) -> None:
        token = self.sampler(self.history, logits[:, -1])
        self.token.copy_(token.view(-1, 1))
        # The model goes on with a token it has, in steps that are under way before the host knows.
        self.drawn.copy_(token.masked_fill(~usable(logits[:, -1]), NO_TOKEN).view(-1, 1))
        self.history.index_copy_(1, self.position, self.token)
        self.position.add_(1)

    def _capture(self) -> None:
        """Capture one step; the stream's state afterwards is what it was before."""
        started = time.perf_counter()
        state = self._state()
        before = [tensor.clone() for tensor in state]
        generator = self.sampler.generator
        random_state = None if generator is None else generator.get_state()
        graph = torch.cuda.CUDAGraph()
        try:
            with beside(torch.cuda.Stream(self.device)):
                for _ in range(WARM_UP):
                    self._forward()
                    _restore(state, before)
            generators = () if generator is None else (generator,)
            with capturing(graph, self.device, generators=generators), FilledScalars():
                self._forward()
            self.graph = graph
        except torch.OutOfMemoryError:
            message = f"GPU memory ran out while a step with a cache of {self.length} tokens was captured"
            raise TersorError(f"{message}: use fewer tokens, or no CUDA graph") from None
        except RuntimeError as error:  # the model synchronises, or allocates in a way a capture forbids
            self.eager_reason = f"capture failed: {str(error).splitlines()[0]}"
            if self.insist:
                raise UnsupportedError(f"no CUDA graph for this model: {self.eager_reason}") from error
        _restore(state, before)
        if generator is not None and random_state is not None:
            generator.set_state(random_state)
        torch.cuda.synchronize(self.device)
        self.capture_seconds = time.perf_counter() - started

    def _unsupported_reason(self) -> str | None:
        """Why a step cannot be a CUDA graph, as far as that shows without trying."""
        model = self.model
        if model.device.type != "cuda":
            return f"the model is on {model.device.type}"
        if len({tensor.device for tensor in (*model.parameters(), *model.buffers())}) > 1:
            return "the model spans several devices"
        if not self.static:
            return "the model has layers whose state is not a static key-value cache"
        return self._experts.obstacle or None

    def _state(self) -> list[torch.Tensor]:
        """Every tensor that a step changes, but for cache slots, which the next step writes again."""
        return [
            self.token,
            self.position,
            self.history,
            *(layer.cumulative_length for layer in self.cache.layers),
        ]


class FilledScalars(TorchFunctionMode):
    """Makes of `torch.tensor(number)` a tensor that its device fills, where a capture forbids a copy from the host.

    Models of transformers whose attention is its eager one, gpt-oss among them, make their masks from such numbers.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`, or `torch.full` in the place of `torch.tensor` of one number."""
        options = kwargs or {}
        if func is torch.tensor and len(args) == 1 and isinstance(args[0], bool | int | float):
            return torch.full((), args[0], **options)
        return func(*args, **options)


def _restore(state: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    for tensor, value in zip(state, values, strict=True):
        tensor.copy_(value)


def _wants_static(device: torch.device) -> bool:
    """A static cache makes attention read its whole length, which pays where a step can be a graph."""
    return device.type == "cuda"


def _dynamic_cache(model: PreTrainedModel) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def _repeatable(cache: Any) -> bool:
    """Whether all that a growing cache holds of a prompt can be repeated for several rows."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)


def _static_cache(model: PreTrainedModel, length: int) -> Any:
    """A static cache whose layers count their tokens in tensors; None where the model needs other layers.

    transformers' sliding-window layers count in Python integers, which a graph would freeze. A full layer
    under the sliding-window mask computes the same at the price of memory.
    """
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

    cache = StaticCache(config=model.config, max_cache_len=length)
    cache.layers = [
        StaticLayer(max_cache_len=length) if type(layer) is StaticSlidingWindowLayer else layer
        for layer in cache.layers
    ]
    return cache if all(type(layer) is StaticLayer for layer in cache.layers) else None
