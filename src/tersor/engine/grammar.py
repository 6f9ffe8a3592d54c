"""Which tokens may follow so that a text matches a grammar? By xgrammar (arXiv 2411.15100), the extra `grammar`."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch

from tersor.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KINDS = ("json_schema", "json_object", "regex", "ebnf", "choice")
"""Keys of `SamplingParams.grammar`."""
MOST_BLANKS = 8
"""Blanks side by side in JSON: a text may else go on with them for ever."""
_CACHE_BYTES = 256 << 20


class Matcher:
    """How far a text has come in its grammar."""

    def __init__(self, matcher: Any, words: int) -> None:
        self._matcher = matcher
        self._bits = torch.full((words,), -1, dtype=torch.int32)

    def mask(self) -> torch.Tensor:
        """Return the tokens that may come next: int32 [ceil(V / 32)], bit t % 32 of word t / 32 for token t."""
        bits = torch.full_like(self._bits, -1)
        self._matcher.fill_next_token_bitmask(bits.view(1, -1).numpy())
        return bits

    def accept(self, token: int) -> bool:
        """Go on by a token; return whether the text is whole, so that nothing may follow."""
        self._matcher.accept_token(token)
        return bool(self._matcher.is_terminated())


class Grammars:
    """Compiles grammars for the tokens of one model, and keeps those that were compiled."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, ends: Collection[int]) -> None:
        """Read the tokens.

        Args:
            tokenizer: of the model.
            vocabulary: tokens that there are logits for.
            ends: those that end a text.

        Raises:
            UnsupportedError: xgrammar is not installed.
        """
        if importlib.util.find_spec("xgrammar") is None:
            raise UnsupportedError("texts that match a grammar need xgrammar: pip install 'tersor[grammar]'")
        import xgrammar

        self._module, self._words = xgrammar, -(-vocabulary // 32)
        tokens = xgrammar.TokenizerInfo.from_huggingface(
            tokenizer, vocab_size=vocabulary, stop_token_ids=sorted(ends) or None
        )
        self._compiler = xgrammar.GrammarCompiler(tokens, cache_limit_bytes=_CACHE_BYTES)

    def compile(self, grammar: Mapping[str, Any]) -> Any:
        """Compile a grammar, or take what was compiled before.

        Raises:
            InputError: none that there is, or one that cannot be.
        """
        if len(grammar) != 1 or next(iter(grammar)) not in KINDS:
            raise InputError(f"a grammar is one of {', '.join(KINDS)}, not {', '.join(map(str, grammar)) or 'nothing'}")
        kind, value = next(iter(grammar.items()))
        try:
            return self._compilers()[kind](value)
        except InputError:
            raise
        except Exception as error:  # whatever the compiler of another language raises
            line = " ".join(str(error).split())
            raise InputError(f"{kind}: not a grammar: {line}") from None

    def matcher(self, grammar: Mapping[str, Any]) -> Matcher:
        """Begin a text that is to match a grammar."""
        return Matcher(self._module.GrammarMatcher(self.compile(grammar)), self._words)

    def _compilers(self) -> dict[str, Callable[[Any], Any]]:
        compiler = self._compiler

        def schema(value: Any) -> Any:
            text = value if isinstance(value, str) else json.dumps(value)
            return compiler.compile_json_schema(text, max_whitespace_cnt=MOST_BLANKS)

        def choice(values: Any) -> Any:
            if not values or not all(isinstance(value, str) and value for value in values):
                raise InputError("choice: expected texts, at least one, none of them empty")
            return compiler.compile_grammar("root ::= " + " | ".join(json.dumps(value) for value in values))

        return {
            "json_schema": schema,
            "json_object": lambda value: schema({"type": "object"}),
            "regex": compiler.compile_regex,
            "ebnf": compiler.compile_grammar,
            "choice": choice,
        }
