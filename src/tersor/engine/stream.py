"""One continuation as the host sees it: tokens become text, and a stop ends it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from tersor.engine.outputs import STOP, CompletionOutput, Logprobs
from tersor.engine.params import SamplingParams
from tersor.engine.text import Detokenizer, StopFilter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Stream:
    """The output of one continuation while it grows.

    Attributes:
        output: what the caller sees; its text holds whole characters only and nothing that may begin a stop text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        prompt: Sequence[int],
        params: SamplingParams,
        eos: Collection[int],
        index: int = 0,
    ) -> None:
        """Begin one.

        Args:
            tokenizer: of the model; without one there is no text.
            prompt: the tokens before it.
            params: what the request asked for.
            eos: the model's end-of-sequence tokens.
            index: which continuation of the request.
        """
        self._params, self._eos = params, () if params.ignore_eos else eos
        self._text = None
        if tokenizer is not None:
            self._text = Detokenizer(tokenizer, prompt, skip_special_tokens=params.skip_special_tokens)
        self._stops = StopFilter(params.stop)
        self.output = CompletionOutput(index)
        if params.logprobs is not None:
            self.output.logprobs, self.output.cumulative_logprob = [], 0.0

    def push(self, token: int, logprobs: Logprobs | None = None, *, late: bool = False) -> bool:
        """Add a token that was drawn; return whether it ends the continuation.

        Args:
            token: which.
            logprobs: of it and of others, where they were asked for.
            late: whether its text may wait until the end, where nothing in the text can end the continuation: all
                tokens are decoded at once then, which takes half the time.
        """
        output = self.output
        output.token_ids.append(token)
        if logprobs is not None and output.logprobs is not None and output.cumulative_logprob is not None:
            output.logprobs.append(logprobs)
            output.cumulative_logprob += logprobs[token].logprob
        if token in self._eos or token in self._params.stop_token_ids:
            if token not in self._eos:
                output.stop_reason = token
            kept = self._params.include_stop_str_in_output and token not in self._eos
            self._show(self._text.push(token) if kept and self._text is not None else "")
            self.finish(STOP)
            return True
        if self._text is None:
            return False
        if late and not self._params.stop:
            self._text.add(token)
            return False
        self._show(self._text.push(token))
        return output.finish_reason is not None

    def finish(self, reason: str) -> None:
        """End it for a reason, unless something in its text has; what was held back is shown."""
        if self.output.finish_reason is not None:
            return
        self._show(self._text.flush() if self._text is not None else "")
        if self.output.finish_reason is None:
            self.output.text += self._stops.flush()
            self.output.finish_reason = reason

    def _show(self, piece: str) -> None:
        self.output.text += self._stops.push(piece)
        if self._stops.found is not None:
            self.output.finish_reason, self.output.stop_reason = STOP, self._stops.found
            if self._params.include_stop_str_in_output:
                self.output.text += self._stops.found
