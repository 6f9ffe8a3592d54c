"""All that knows transformers' classes: its quantizer, packed layers in its models, loading, and one stream of tokens.

architecture.py   which layers does the model of a config.json have?
quantizer.py      what `from_pretrained` and `save_pretrained` ask
packing.py        between a checkpoint on disk and a model on the meta device
placement.py      which layer does a stored weight belong to?
live.py           a model in memory, compressed in place
replace.py        packed layers into a model, and out of it
fuse.py           layers that read the same activations become one: joined.py holds them
experts.py        the experts of a layer, each packed
foreign.py        code that comes with a model: run, or not
load.py           a checkpoint ready to run, with one line for everything that can be wrong with it
decode.py         one stream's prefill and decode step; sampler.py draws its tokens
generate.py       text as it becomes decodable
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tersor.integrations.transformers.quantizer import NAME, TersorConfig, TersorHfQuantizer

__all__ = ["NAME", "TersorConfig", "TersorHfQuantizer"]


def __getattr__(name: str) -> Any:
    """Load the quantizer, and all of transformers with it, when one of its names is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.quantizer"), name)
