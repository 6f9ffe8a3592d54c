"""What tokens are as text: those of several together, and of each by itself, which is made once."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TokenTexts(dict[int, str]):
    """Texts of the tokens of one tokenizer: `texts[token]` is that of a token by itself, made when it is first asked.

    Attributes:
        joined: whether the bytes of several tokens are those of each, one after the other. A token whose own text is
            whole characters then adds just this text to whatever is before it: whole characters never begin in the
            middle of one.
    """

    def __init__(self, decode: Callable[[list[int]], Any], *, joined: bool) -> None:
        """Begin with no text made.

        Args:
            decode: makes a text of tokens, of the same tokens the same text.
            joined: see above.
        """
        super().__init__()
        self._decode, self.joined = decode, joined

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, *, skip_special_tokens: bool) -> TokenTexts:
        """Return the texts of a tokenizer, which all requests share where its Rust library alone decodes.

        Args:
            tokenizer: which. What transformers' own `decode` does around the library takes four times as long as the
                decoding, so it is left out where it changes nothing; a tokenizer that decodes in Python, or whose
                class has a `decode` of its own, is asked as it is.
            skip_special_tokens: whether special tokens are no text.
        """
        backend = _backend(tokenizer)
        if backend is None:
            options = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
            return cls(functools.partial(tokenizer.decode, **options), joined=False)
        made, key = _MADE.setdefault(tokenizer, {}), (skip_special_tokens, len(tokenizer))
        if key not in made:
            decode = functools.partial(backend.decode, skip_special_tokens=skip_special_tokens)
            made[key] = cls(decode, joined=type(backend.decoder).__name__ == "ByteLevel")
        return made[key]

    def __missing__(self, token: int) -> str:
        """Make the text of a token by itself."""
        text = self[token] = self.together([token])
        return text

    def together(self, tokens: list[int]) -> str:
        """Return the text of several tokens."""
        text = self._decode(tokens)
        assert isinstance(text, str)
        return text


_MADE: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, dict[tuple[bool, int], TokenTexts]]
_MADE = weakref.WeakKeyDictionary()
"""The texts of each tokenizer there is, by whether special tokens are left out and how many tokens it has by now."""

_PLAIN = ("transformers.tokenization_utils_base", "transformers.tokenization_utils_tokenizers")
"""Where `decode` and `_decode` of a class are defined that adds nothing to what the Rust library makes of tokens."""


def _backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return what decodes for a tokenizer in Rust, `None` where its class has a say in it, too."""
    kind = type(tokenizer)
    methods = (getattr(kind, "decode", None), getattr(kind, "_decode", None))
    plain = tuple(getattr(method, "__module__", None) for method in methods) == _PLAIN
    return tokenizer.backend_tokenizer if plain else None
