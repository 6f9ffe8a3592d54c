"""What does a server need of an engine? What any engine that answers many requests at once can be asked."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from tersor.engine.outputs import RequestOutput
from tersor.engine.params import SamplingParams
from tersor.engine.stats import CopyStats, EngineStats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The model behind an engine.

    Attributes:
        name: what it is called where nobody says otherwise.
        context: tokens of the longest text, prompt and answer together.
        vocabulary: tokens are 0 to vocabulary - 1.
        tokenizer: of the model. Whoever encodes with it does so in one thread at a time.
    """

    name: str
    context: int
    vocabulary: int
    tokenizer: PreTrainedTokenizerBase


class AsyncEngine(Protocol):
    """Answers many requests at once; every method is called in the event loop that serves them, but `check_grammar`.

    What is not legal alone is refused alone: an error of one request leaves all others as they are.
    """

    @property
    def info(self) -> ModelInfo:
        """The model."""

    @property
    def healthy(self) -> bool:
        """Whether steps still run; once `False` it stays so."""

    def stats(self) -> EngineStats:
        """Return how the engine stands; cheap, since pages ask often."""

    def copies(self) -> Sequence[CopyStats]:
        """Return how each of several copies of the model stands; nothing where there is one. As cheap."""

    def generate(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams | None,
        *,
        request_id: str,
        salt: str | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Answer one prompt.

        Every output holds all there is so far, so a reader may skip some; the last one is `finished`. Texts hold whole
        characters and nothing that may begin a stop text, and never the text of an end-of-sequence token; tokens, log
        probabilities and text of a finished output agree. Log probabilities of the prompt are whole from the first
        output on. What the params leave `None` the engine fills. A request that fails alone ends with finish reason
        "error" and `RequestOutput.error`; `abort` ends it with "abort".

        Args:
            prompt_token_ids: at least one token.
            params: how to draw; a seed holds whatever else runs. `None` asks for the last state: of the one output,
                which is finished, its `embedding`.
            request_id: a name that no other open request has.
            salt: prompts share keys and values only with prompts of the same salt.

        Raises:
            InputError: at the first step, a request that can never be served (longer than all pages, a grammar that
                is none).
            TersorError: at any step, an engine that has failed; `healthy` is `False` then.
        """

    async def abort(self, request_id: str) -> None:
        """End a request within a step and free its pages; nothing happens where it has ended or never was."""

    def check_grammar(self, grammar: Mapping[str, Any]) -> None:
        """Compile a grammar of `SamplingParams`; called in a thread of its own, which may be given up.

        Raises:
            InputError: not a grammar that this engine can hold a text to, or the package for grammars is missing.
        """

    async def close(self) -> None:
        """End every request and the engine's thread; safe to call twice."""
