"""A causal language model of which little is in memory: its two ends, and one decoder block at a time.

The model is built with its weights on torch's meta device. A block gets its weights from tensors with a checkpoint's
names, by transformers' own renamings and converters, is called as the whole model would call it, and gives them back.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from tersor.errors import CheckpointError, InputError
from tersor.integrations.transformers import foreign
from tersor.integrations.transformers.architecture import model_class, untie
from tersor.integrations.transformers.process import Changed


@dataclass(frozen=True, slots=True)
class Call:
    """What the model hands to a block beside the hidden state: masks, rotary embeddings and the like."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class _Enough(Exception):
    """Ends a forward of which nothing more is needed."""


class _WeightsOnMeta(TorchFunctionMode):
    """Puts what modules make with `torch.empty`, their weights, on the meta device; buffers are computed as ever."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func is torch.empty and given.get("device") is None:
            given["device"] = "meta"
        return func(*args, **given)


class BlockModel:
    """A model of transformers whose weights come and go.

    Attributes:
        model: the whole model; weights that are not loaded are on the meta device.
        device: where weights that are loaded lie, and where blocks compute.
        dtype: of weights and activations.
        prefix: name of the list that holds the decoder's blocks, such as `model.layers`.
    """

    def __init__(
        self,
        directory: Path,
        device: torch.device,
        dtype: torch.dtype,
        weights: Iterable[tuple[str, int]],
        *,
        trust_remote_code: bool = False,
        untied: bool = False,
    ) -> None:
        """Build the model; no weight is read.

        Args:
            directory: where config.json is.
            device, dtype: as the attributes.
            weights: parameters that are to be compressed, and how many elements each has: the list of modules with
                most of them holds the blocks.
            trust_remote_code: whether Python code that comes with the model is run.
            untied: whether the output head has a weight of its own, whatever config.json says.

        Raises:
            CheckpointError: transformers cannot build the model.
            InputError: it does not continue a text, or has no list of blocks.
        """
        from transformers import AutoConfig
        from transformers.conversion_mapping import get_model_conversion_mapping

        with foreign.unasked():
            config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
            if untied:
                untie(config)
            build = model_class(config, trust_remote_code=trust_remote_code)
            if config.is_encoder_decoder or not build.can_generate():
                raise InputError(
                    f"{directory}: a {build.__name__} does not continue a text, which calibration needs: use "
                    "--algorithm rtn"
                )
            try:
                with _WeightsOnMeta():
                    self.model = build._from_config(config, dtype=dtype)
            except Exception as error:
                raise CheckpointError(f"{directory}: transformers cannot build this model: {error}") from None
        self.model.eval().requires_grad_(False)
        self.device, self.dtype = device, dtype
        self._mapping = get_model_conversion_mapping(self.model)
        self.prefix = self._find_prefix(weights, directory)
        self._tuples = False
        for block in range(len(self.blocks)):
            self.drop(block)
        for name, buffer in self.model.named_buffers():
            if buffer.device.type == "meta" and not self.block_of(name):
                raise InputError(f"{directory}: {name} is made in a way that blocks cannot follow: use --algorithm rtn")
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.device.type != "meta":
                    module._buffers[name] = buffer.to(device)

    def _find_prefix(self, weights: Iterable[tuple[str, int]], directory: Path) -> str:
        lists = {name for name, module in self.model.named_modules() if isinstance(module, nn.ModuleList)}
        sizes: dict[str, int] = {}
        for parameter, elements in weights:
            parts = parameter.split(".")
            starts = (".".join(parts[:count]) for count in range(1, len(parts)))
            outermost = next((start for start in starts if start in lists), None)
            if outermost is not None:
                sizes[outermost] = sizes.get(outermost, 0) + elements
        if not sizes:
            raise InputError(f"{directory}: no decoder block holds a layer to calibrate: use --algorithm rtn")
        return max(sizes, key=lambda name: sizes[name])

    @property
    def blocks(self) -> Any:
        """The list of decoder blocks."""
        return self.model.get_submodule(self.prefix)

    @property
    def positions(self) -> int | None:
        """How many tokens a text may have; `None` where the model does not say."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def block_of(self, parameter: str) -> int | None:
        """Return the number of the block that a parameter is in, `None` for one outside."""
        if not parameter.startswith(f"{self.prefix}."):
            return None
        return int(parameter.removeprefix(f"{self.prefix}.").partition(".")[0])

    def name_of(self, block: int, module: str) -> str:
        """Return the whole name of a module of a block."""
        return f"{self.prefix}.{block}.{module}" if module else f"{self.prefix}.{block}"

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Give parameters the values of stored tensors, which have a checkpoint's names and shapes.

        Raises:
            CheckpointError: transformers cannot make the model's parameters of them.
        """
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        config = LoadStateDictConfig(device_map={"": self.device}, dtype=self.dtype, weight_mapping=self._mapping)
        with _silent():
            info, _ = convert_and_load_state_dict_in_model(self.model, dict(tensors), config)
        wrong = [*(name for name, *_ in info.mismatched_keys), *info.conversion_errors, *info.unexpected_keys]
        if wrong:
            raise CheckpointError(f"transformers does not take {wrong[0]} (of {len(wrong)} tensors) as it is stored")
        self.model.requires_grad_(False)

    def tie(self) -> None:
        """Let what shares a weight that was loaded share it again."""
        self.model.tie_weights()
        self.model.requires_grad_(False)

    def twin(self, block: int) -> nn.Module:
        """Return a second module like a block, which shares its weights until it is given others."""
        layer = self.blocks[block]
        shared: dict[int, Any] = {id(tensor): tensor for tensor in (*layer.parameters(), *layer.buffers())}
        for module in layer.modules():
            config = module.__dict__.get("config")
            shared[id(config)] = config
        found: nn.Module = copy.deepcopy(layer, shared)
        return found

    @contextlib.contextmanager
    def standing_in(self, block: int, twin: nn.Module) -> Iterator[None]:
        """Put a twin in the place of its block, so that `load` gives weights to the twin."""
        own = self.blocks[block]
        self.blocks[block] = twin
        try:
            yield
        finally:
            self.blocks[block] = own

    def drop(self, block: int) -> None:
        """Take a block's weights out of memory."""
        for module in self.blocks[block].modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), False)

    def run(self, layer: nn.Module, hidden: torch.Tensor, call: Call) -> torch.Tensor:
        """Return what a block makes of hidden states [B, T, H].

        Raises:
            InputError: the block leaves something for others to read, such as keys and values.
        """
        output = layer(hidden, *call.args, **call.kwargs)
        self._check_apart(call)
        if isinstance(output, tuple):
            self._tuples = True
            return output[0]
        return output

    def enter(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[Call]]:
        """Run what is ahead of the blocks.

        Args:
            ids: int64 [B, T] on the device.

        Returns:
            The hidden states [B, T, H] that the first block gets, and with what else each block is called.

        Raises:
            InputError: the model calls its blocks in another order, or hands something from one to the next.
        """
        seen: list[tuple[torch.Tensor, Call]] = []

        def record(number: int, hidden: torch.Tensor, call: Call) -> torch.Tensor:
            if number != len(seen):
                raise InputError(self._odd("its blocks do not run one after the other"))
            seen.append((hidden, call))
            if len(seen) == len(self.blocks):
                raise _Enough
            return hidden

        with contextlib.suppress(_Enough), self._replaced(record):
            self.model(input_ids=ids, use_cache=False)
        if len(seen) != len(self.blocks):
            raise InputError(self._odd("not every block runs"))
        if len(seen) > 1 and seen[1][0].shape != seen[0][0].shape:
            if self._tuples:
                raise InputError(self._odd("its hidden state changes its shape"))
            self._tuples = True
            return self.enter(ids)
        return seen[0][0], [call for _, call in seen]

    def leave(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Run what is behind the blocks on hidden states [B, T, H] of tokens [B, T]: returns logits [B, T, V]."""
        with self._replaced(lambda _number, _hidden, _call: hidden):
            logits: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits

    def check_calls(self, one: Iterable[Call], other: Iterable[Call]) -> None:
        """Check that blocks get nothing beside the hidden state that depends on the tokens.

        Raises:
            InputError: they do.
        """
        for first, second in zip(one, other, strict=True):
            mine, yours = list(_tensors((first.args, dict(first.kwargs)))), list(_tensors((second.args, second.kwargs)))
            if any(not torch.equal(a, b) for a, b in zip(mine, yours, strict=True)):
                raise InputError(self._odd("its blocks read the tokens, beside their hidden state"))

    def _check_apart(self, call: Call) -> None:
        shared = [value for value in (*call.args, *call.kwargs.values()) if isinstance(value, MutableMapping)]
        if any(shared):
            raise InputError(self._odd("its blocks depend on each other by more than their hidden state"))

    def _odd(self, why: str) -> str:
        return f"{type(self.model).__name__} cannot be calibrated block by block ({why}): use --algorithm rtn"

    @contextlib.contextmanager
    def _replaced(self, stand_in: Callable[[int, torch.Tensor, Call], torch.Tensor]) -> Iterator[None]:
        """Let every block call `stand_in` with its number, hidden states and the rest instead of what it computes."""

        def forward_of(number: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                rest = dict(kwargs)
                hidden = args[0] if args else rest.pop("hidden_states")
                found = stand_in(number, hidden, Call(args[1:], rest))
                return (found,) if self._tuples else found

            return forward

        layers = list(self.blocks)
        for number, layer in enumerate(layers):
            layer.forward = forward_of(number)
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward


def first_not_finite(layer: nn.Module, run: Callable[[], torch.Tensor]) -> str:
    """Run a block once more and return the name of its first module whose output holds a NaN or an infinity.

    Args:
        layer: the block.
        run: runs it.
    """
    found: list[str] = []

    def watch(name: str) -> Any:
        def look(module: nn.Module, arguments: Any, output: Any) -> None:
            if not found and any(not bool(tensor.isfinite().all()) for tensor in _tensors(output)):
                found.append(name)

        return look

    inner = [(name, module) for name, module in layer.named_modules() if name and not any(module.children())]
    handles = [module.register_forward_hook(watch(name)) for name, module in inner]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else ""


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of floats inside of tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _shown() -> bool:
    from transformers.utils import logging

    return logging.is_progress_bar_enabled()


def _show(shown: bool) -> None:
    from transformers.utils import logging

    logging.enable_progress_bar() if shown else logging.disable_progress_bar()


_showing = Changed(_shown, _show)


def _silent() -> contextlib.AbstractContextManager[None]:
    """Keep transformers' progress bar off the terminal while weights are loaded."""
    return _showing.to(False)
