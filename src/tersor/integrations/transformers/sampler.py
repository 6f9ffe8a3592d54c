"""How a token is drawn from logits: transformers' own logits processors, then one draw."""

from __future__ import annotations

import torch

from tersor.engine.sampling import Sampling

_LOW_TEMPERATURE = 1e-3
"""Below this, logits are brought to at most 0 first, so that their quotients do not overflow."""
_LEAST_TEMPERATURE = 1e-30
"""A smaller number is 0 in float32 or nearly so; any two logits differ by far more."""


class Sampler:
    """Draws tokens from logits by resolved options, on the device, without a synchronisation.

    A call depends on tensors only, so a CUDA graph can hold one, with `generator` registered with it.
    """

    def __init__(self, options: Sampling, device: torch.device) -> None:
        from transformers import LogitsProcessorList
        from transformers.generation import logits_process

        self.processors = LogitsProcessorList()
        if options.repetition_penalty is not None and options.repetition_penalty != 1.0:
            self.processors.append(logits_process.RepetitionPenaltyLogitsProcessor(options.repetition_penalty))
        self.generator: torch.Generator | None = None
        if not options.temperature:
            return
        self.generator = torch.Generator(device)
        if options.temperature < _LOW_TEMPERATURE:
            self.processors.append(_below_zero)
        if options.temperature != 1.0:
            temperature = max(options.temperature, _LEAST_TEMPERATURE)
            self.processors.append(logits_process.TemperatureLogitsWarper(temperature))
        if options.top_k:
            self.processors.append(logits_process.TopKLogitsWarper(options.top_k))
        if options.top_p is not None and options.top_p != 1.0:
            self.processors.append(logits_process.TopPLogitsWarper(options.top_p))
        if options.min_p:
            self.processors.append(logits_process.MinPLogitsWarper(options.min_p))

    def seed(self, seed: int | None) -> None:
        """Start the draws afresh, from `seed` or from a random one."""
        if self.generator is not None:
            if seed is None:
                self.generator.seed()
            else:
                self.generator.manual_seed(seed)

    def __call__(self, history: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Return the next token of every row, int64 [B], some token where logits are not finite: `usable` tells.

        Args:
            history: int64 [B, tokens]: tokens seen; any of them may be repeated.
            logits: [B, vocabulary].
        """
        scores: torch.Tensor = self.processors(history, logits.float())  # type: ignore[arg-type]
        if self.generator is None:
            return scores.argmax(dim=-1)
        # The largest p / e with e ~ Exp(1) falls on a token with probability p: a draw without
        # torch.multinomial, which waits for the device to check its input.
        probabilities = scores.softmax(dim=-1)
        noise = torch.empty_like(probabilities).exponential_(generator=self.generator)
        return (probabilities / noise).argmax(dim=-1)


def usable(logits: torch.Tensor) -> torch.Tensor:
    """Tell, on the device, whether a token can be drawn from logits [B, vocabulary]: bool [B].

    Not where one is NaN or infinity, nor where every one is minus infinity; some may be.
    """
    return logits.amax(dim=-1).isfinite()


def _below_zero(history: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    return scores - scores.amax(dim=-1, keepdim=True)
