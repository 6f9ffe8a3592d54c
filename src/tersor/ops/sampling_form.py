"""What sampling reads: how every row's token is to be drawn, in arrays on the device.

All of it lives on the device, so that one CUDA graph serves every mixture of rows. A row without penalties, bias and
forbidden tokens has no token in the list; one without a grammar has no row of bits.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch

LEAST_TEMPERATURE = 1e-5
"""Below it, as at 0, the most probable token is taken; of equal ones the lowest."""
MOST_LOGPROBS = 20
"""Most probable tokens whose log probabilities a row may ask for."""
NEWEST = -1
"""In a list of tokens: the place of the row's newest token, where that is not listed itself."""


@dataclass(slots=True, kw_only=True)
class Listed:
    """Tokens whose logits are changed: those seen by rows with penalties, biased and forbidden ones.

    The host knows tokens a step after they are drawn. So `newest` holds, on the device, what was drawn for a row and,
    where it is pending, not counted in the list yet. A row with penalties has one token NEWEST (-1), with count and
    bias 0, which that becomes if it is not listed.

    Attributes:
        starts, ends: int32 [N]: row r has the tokens from starts[r] to ends[r] of the list; no two rows share any.
        tokens: int32 [E]: no two of a row are equal; those outside the vocabulary change nothing.
        counts: int32 [E]: times drawn; 0 of a token of the prompt alone, -1 of one that was not seen.
        biases: float32 [E]: is added last; -inf forbids the token.
        newest: int64 [N]: what was drawn last, or -1; a draw writes its token there.
        pending: int32 [N]: 1 where the list does not count that yet, else 0.
        repetition: float32 [N]: a positive logit of a token seen is divided by it, a negative one multiplied.
        presence: float32 [N]: is subtracted from the logits of tokens drawn.
        frequency: float32 [N]: is subtracted as many times as they were drawn.
    """

    starts: torch.Tensor
    ends: torch.Tensor
    tokens: torch.Tensor
    counts: torch.Tensor
    biases: torch.Tensor
    newest: torch.Tensor
    pending: torch.Tensor
    repetition: torch.Tensor
    presence: torch.Tensor
    frequency: torch.Tensor


@dataclass(slots=True, kw_only=True)
class Allowed:
    """Which tokens grammars allow.

    Attributes:
        bits: int32 [M, ceil(V / 32)]: token t of row m is allowed if bit t % 32 of bits[m, t / 32] is set.
        rows: int32 [N]: which of them is a row's; -1 allows every token.
    """

    bits: torch.Tensor
    rows: torch.Tensor


@dataclass(slots=True, kw_only=True)
class SamplingRows:
    """How a token of each of S rows is drawn.

    Options stay where they are while rows come and go: they have N slots, and `slots` says which is a row's. Without
    it N is S, and row r has slot r.

    Attributes:
        temperature: float32 [N]: divides the logits; below `LEAST_TEMPERATURE` the most probable token is taken, and
            below 0 the row is padding, whose token is -1.
        top_k: int32 [N]: so many greatest logits are kept, and those equal to the last of them; 0 or less keeps all.
        top_p: float32 [N]: of those the greatest that together reach this probability are kept, and those equal to the
            last of them; 1 keeps all.
        min_p: float32 [N]: of those what is at least this fraction as probable as the most probable token is kept.
        seeds: int64 [N]: of the noise.
        positions: int32 [S]: of the token in its text: with the seed and the token it makes the noise.
        slots: int32 [S], or `None`.
        listed: tokens whose logits are changed, or `None`.
        allowed: what grammars allow, or `None`.
        filters: the host knows that some row may have top-k, top-p or min-p; where it is false these must be off.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seeds: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor | None = None
    listed: Listed | None = None
    allowed: Allowed | None = None
    filters: bool = True

    def of_rows(self) -> SamplingRows:
        """Return the same with slot r for row r."""
        if self.slots is None:
            return self
        places = self.slots.long()
        names = ("temperature", "top_k", "top_p", "min_p", "seeds")
        listed, allowed = self.listed, self.allowed
        if listed is not None:
            own = [field.name for field in fields(listed) if field.name not in ("tokens", "counts", "biases")]
            listed = replace(listed, **{name: getattr(listed, name)[places] for name in own})
        if allowed is not None:
            allowed = replace(allowed, rows=allowed.rows[places])
        found = {name: getattr(self, name)[places] for name in names}
        return replace(self, **found, slots=None, listed=listed, allowed=allowed)


class Logprobs(NamedTuple):
    """Log probabilities, after penalties and before temperature, of S rows.

    Of a row that asks for nothing, or whose logits are not finite, and beyond what a row asks for, ranks are 0, tokens
    -1 and log probabilities -inf.

    Attributes:
        chosen: float32 [S]: of the row's token.
        ranks: int32 [S]: 1 and the number of tokens that are more probable.
        tokens: int32 [S, K]: the most probable ones, the lowest of equals first.
        values: float32 [S, K]: theirs.
    """

    chosen: torch.Tensor
    ranks: torch.Tensor
    tokens: torch.Tensor
    values: torch.Tensor
