"""Tersor checkpoints in vLLM: an entry point of the group `vllm.general_plugins`, called in each of its processes.

`compat` is all that knows where vLLM's releases differ. `plan` says which stored weight belongs to which layer of vLLM,
`checks` what is refused before a worker starts, `arriving` makes a rank's weights of tensors as they come, `memory` has
torch use again what they leave, `parts` multiplies with the weights; none of these five needs vLLM.
"""

from __future__ import annotations

import logging


def register() -> None:
    """Enter the quantisation method `tersor`; a release of vLLM that it does not fit is left as it is, with a line.

    It runs in every process of every vLLM of an environment, whatever that serves, so it raises nothing.
    """
    try:
        from tersor.integrations.vllm.compat import register_quantization_config, when_verified
        from tersor.integrations.vllm.config import NAME, TersorVllmConfig
    except ImportError as error:
        words = "tersor: this vLLM does not know its checkpoints, 0.26 and newer do (%s)"
        logging.getLogger("vllm.tersor").warning(words, error)
        return
    register_quantization_config(NAME)(TersorVllmConfig)
    when_verified(TersorVllmConfig)
