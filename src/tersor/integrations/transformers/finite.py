"""Where do numbers stop being finite? A model is run once more, and its layers are watched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.inference_mode()
def first_not_finite(model: PreTrainedModel, ids: torch.Tensor) -> str:
    """Run a model on tokens and say which layer is the first whose output holds a NaN or an infinity.

    Args:
        model: a causal language model of transformers.
        ids: int64 [1, tokens], on the model's device.

    Returns:
        Words for the end of a sentence, such as `, first in model.layers.3.mlp.down_proj`; empty where every layer's
        output is finite in this run, or where there is no memory for it.
    """
    found: list[str] = []

    def watch(name: str) -> Any:
        def look(module: torch.nn.Module, arguments: Any, output: Any) -> None:
            tensors = output if isinstance(output, (tuple, list)) else (output,)
            if not found and any(_not_finite(tensor) for tensor in tensors):
                found.append(name)

        return look

    leaves = [(name, module) for name, module in model.named_modules() if name and not any(module.children())]
    handles = [module.register_forward_hook(watch(name)) for name, module in leaves]
    try:
        model(input_ids=ids, use_cache=False)
    except torch.OutOfMemoryError:
        return ""
    finally:
        for handle in handles:
            handle.remove()
    return f", first in {found[0]}" if found else ""


def _not_finite(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and not bool(value.isfinite().all())
