"""What drawing a token means, in plain torch on any device: the definition of the kernels. Nothing is read by the host.

A token's score is logit * (log2(e) / T) + noise, in float32; the greatest is drawn, which is a draw from the softmax
of logits / T where noise is Gumbel's (over ln 2). Noise is a function of seed, position and token alone, so it does not
matter which other rows are there. Weights behind top-p and min-p are integers in units of 2^-40 of the greatest one.

Kernel and reference agree to the last bit on every device: noise and weights are polynomials in float32 whose products
and sums are rounded one by one, and sums of weights are sums of integers, which have no order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from tersor.ops.sampling_form import LEAST_TEMPERATURE, Listed, Logprobs, SamplingRows

LOG2E = 1.44269504
UNIT = 1 << 40
"""The weight of the greatest logit."""
GOLDEN = 0x9E3779B97F4A7C15
_MIXING = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_POWER = (0.6931459903717041, -0.24020171165466309, 0.05536210909485817, -0.00928252749145031, 0.0009762839181348681)
"""1 - 2^-x over x, of x from 0 to 1, within 1e-7."""
_PART = (
    0.721348226070404, 0.18027079105377197, 0.06111815571784973, 0.016909509897232056, 0.023567546159029007,
    -0.014380085282027721, 0.011164899915456772,
)  # fmt: skip
"""-log2(1 - y / 2) over y, of y from 0 to 1, within 1e-6."""
_LOGARITHM = (
    1.4426847696304321, -0.7209243774414062, 0.475799024105072, -0.33270955085754395, 0.20469112694263458,
    -0.0873480886220932, 0.017807774245738983,
)  # fmt: skip
"""log2(1 + x) over x, of x from 0 to 1, within 1e-6."""


def draw(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """Return `ops.draw`: int64 [S]. The logits stay as they are."""
    return draw_adjusted(adjusted(logits, rows), rows)


def draw_adjusted(values: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """Return a token for every row of `adjusted`, int64 [S], which becomes its newest one; of equals the first."""
    given, rows = rows, rows.of_rows()
    tokens, sampled = values.argmax(1), rows.temperature >= LEAST_TEMPERATURE
    if values.device.type == "cpu":  # where asking costs nothing, and noise much
        places = sampled.nonzero()[:, 0]
        if len(places):
            some = replace(rows, slots=places, positions=rows.positions[places], listed=None, allowed=None).of_rows()
            tokens[places] = _sampled(values[places], some)
    else:
        tokens = torch.where(sampled, _sampled(values, rows), tokens)
    tokens = torch.where(_usable(values) & (rows.temperature >= 0), tokens, -1)
    if given.listed is not None:
        slots = slice(None) if given.slots is None else given.slots.long()
        given.listed.newest[slots] = tokens
    return tokens


def _sampled(values: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """Return a token drawn for every row, int64 [S]; any one where the temperature is not high enough to."""
    heat = torch.where(rows.temperature >= LEAST_TEMPERATURE, rows.temperature, 1.0)
    scale = torch.full_like(heat, LOG2E) / heat  # a quotient: of a number and a tensor torch makes a reciprocal
    scores = values * scale[:, None] + noise(rows.seeds, rows.positions, values.shape[1])
    if rows.filters:
        scores = scores.masked_fill(~kept(values, scale, rows), -torch.inf)
    return scores.argmax(1)


def adjusted(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """Return logits after penalties, bias and bits, float32 [S, V]; infinity where one that is listed is not finite."""
    rows, values = rows.of_rows(), logits.float()
    listed, allowed = rows.listed, rows.allowed
    if listed is not None:
        values = _penalised(values, listed)
    if allowed is not None:
        bits = allowed.bits[allowed.rows.clamp(min=0).long()]  # [S, words]
        shifts = torch.arange(32, device=bits.device, dtype=bits.dtype)
        open_ = ((bits[:, :, None] >> shifts) & 1).flatten(1)[:, : values.shape[1]].bool()
        open_ = open_ | (allowed.rows < 0)[:, None] | ~(values < torch.inf)
        values = values.masked_fill(~open_, -torch.inf)
    return values


def _penalised(values: torch.Tensor, listed: Listed) -> torch.Tensor:
    rows, vocabulary = values.shape
    size, some = len(listed.tokens), listed.starts < listed.ends
    owners = torch.where(some, torch.arange(1, rows + 1, device=values.device), 0)
    steps = torch.zeros(size + 1, dtype=torch.int64, device=values.device)
    steps.index_add_(0, listed.starts.clamp(0, size), owners).index_add_(0, listed.ends.clamp(0, size), -owners)
    row = steps.cumsum(0)[:size] - 1
    inside = row >= 0
    row = row.clamp(min=0)
    newest = torch.where(listed.pending > 0, listed.newest, -1)[row]
    tokens, counts = listed.tokens.long(), listed.counts
    is_newest = inside & (tokens == newest) & (newest >= 0)
    found = torch.zeros(rows, dtype=torch.int32, device=values.device).index_add_(0, row, is_newest.int()) > 0
    replaced = (tokens < 0) & (newest >= 0) & ~found[row]
    tokens = torch.where(replaced, newest, tokens)
    counts = torch.where(replaced, 1, torch.where(is_newest, counts.clamp(min=0) + 1, counts))
    inside &= (tokens >= 0) & (tokens < vocabulary)
    tokens = torch.where(inside, tokens, 0)
    before = values[row, tokens]
    repetition = listed.repetition[row]
    value = torch.where(counts >= 0, torch.where(before > 0, before / repetition, before * repetition), before)
    fine = listed.frequency[row] * counts.float() + listed.presence[row]
    value = torch.where(counts > 0, value - fine, value) + listed.biases
    value = torch.where(before < torch.inf, value, torch.inf)
    # One element more takes what is not inside, so that shapes depend on nothing.
    flat = torch.cat([values.flatten(), values.new_zeros(1)])
    place = torch.where(inside, row * vocabulary + tokens, rows * vocabulary)
    return flat.index_put((place,), value)[:-1].view(rows, vocabulary)


def kept(values: torch.Tensor, scale: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """Return which tokens top-k, top-p and min-p keep, bool [S, V]: by value, so of equal ones all or none.

    Args:
        values: float32 [S, V] of `adjusted`.
        scale: float32 [S]: log2(e) / T.
        rows: the rows.
    """
    vocabulary = values.shape[1]
    order = values.sort(dim=1, descending=True).values
    weights = weights_of((order[:, :1] - order) * scale[:, None])
    last = (rows.top_k.long().clamp(1, vocabulary) - 1)[:, None]
    all_ = ((rows.top_k <= 0) | (rows.top_k >= vocabulary))[:, None]
    least = torch.where(all_, -torch.inf, order.gather(1, last))
    weights = torch.where(order >= least, weights, 0)
    sums = weights.cumsum(1)
    need = (sums[:, -1].double() * rows.top_p.double()).ceil().long()
    end = (sums < need[:, None]).sum(1, keepdim=True).clamp(max=vocabulary - 1)
    least = torch.where((rows.top_p < 1)[:, None], torch.maximum(least, order.gather(1, end)), least)
    light = (rows.min_p.double() * UNIT).ceil().long()
    weighs = weights_of((order[:, :1] - values) * scale[:, None])
    return (values >= least) & (weighs >= light[:, None])


def weights_of(x: torch.Tensor) -> torch.Tensor:
    """Return 2^-x of x >= 0 in units of 2^-40, int64; 0 from 41 on."""
    some = x < 41
    x = torch.where(some, x, 0.0)
    whole = x.long()
    part = x - whole
    power = 1.0 - part * _polynomial(_POWER, part)
    return torch.where(some, ((power * 2.0**24).long() << 16) >> whole, 0)


def noise(seeds: torch.Tensor, positions: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Return the noise of every token, float32 [S, vocabulary]: -log2 of numbers with an exponential distribution.

    An exponential number over ln 2 is n + f: n is n with probability 2^-(n + 1), as the leading zeros of random bits,
    and f in [0, 1] is -log2(1 - y / 2) of a uniform y. So small numbers, which win, have all of their bits.
    """
    streams = _mixed(_mixed(seeds + _wrapped(GOLDEN)) + (positions.long() + 1) * _wrapped(GOLDEN))
    tokens = torch.arange(1, vocabulary + 1, device=seeds.device) * _wrapped(GOLDEN)
    words = _mixed(streams[:, None] + tokens)
    high = _shifted(words, 32)
    zeros = 32.0 - torch.frexp(high.double()).exponent.float()  # 2^(e - 1) <= high < 2^e, and e is 0 of 0
    y = ((words & 0xFFFFFFFF) | 1).float() * 2.0**-32
    bits = (zeros + y * _polynomial(_PART, y)).view(torch.int32)
    fraction = ((bits & 0x007FFFFF) | 0x3F800000).view(torch.float32) - 1.0
    exponent = ((bits >> 23) - 127).float()
    return -(fraction * _polynomial(_LOGARITHM, fraction) + exponent)


def logprobs(values: torch.Tensor, targets: torch.Tensor, asks: torch.Tensor, most: int) -> Logprobs:
    """Return `ops.logprobs` of logits that are adjusted, float32 [S, V]; the other arguments as there."""
    usable = _usable(values) & (asks >= 0)
    vocabulary = values.shape[1]
    values = torch.where(usable[:, None], values, 0.0)
    all_ = values.log_softmax(1)
    inside = (targets >= 0) & (targets < vocabulary)
    at = torch.where(inside, targets, 0)[:, None]
    there = usable & inside & (values.gather(1, at)[:, 0] > -torch.inf)
    chosen = torch.where(there, all_.gather(1, at)[:, 0], -torch.inf)
    ranks = torch.where(there, (values > values.gather(1, at)).sum(1) + 1, 0).int()
    count = min(most, vocabulary)
    tokens = values.sort(dim=1, descending=True, stable=True).indices[:, :count]
    found = all_.gather(1, tokens)
    blank = (torch.arange(count, device=asks.device) >= asks[:, None]) | ~usable[:, None] | (found == -torch.inf)
    rest = (0, most - count)
    return Logprobs(
        chosen,
        ranks,
        torch.nn.functional.pad(tokens.masked_fill(blank, -1).int(), rest, value=-1),
        torch.nn.functional.pad(found.masked_fill(blank, -torch.inf), rest, value=-torch.inf),
    )


def _usable(values: torch.Tensor) -> torch.Tensor:
    """Return which rows have a token to draw and no NaN or infinity: bool [S]."""
    return (values < torch.inf).all(1) & (values > -torch.inf).any(1)


def _polynomial(terms: Sequence[float], x: torch.Tensor) -> torch.Tensor:
    """Return terms[0] + terms[1] * x + ..., each product and sum rounded; no operator of torch fuses two of them."""
    total = torch.full_like(x, terms[-1])
    for term in reversed(terms[:-1]):
        total = total * x
        total = total + term
    return total


def _wrapped(word: int) -> int:
    """Return 64 bits as the signed number that they are in int64."""
    return word - (1 << 64) if word >> 63 else word


def _shifted(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Return int64 words shifted right, zeros from the left."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def _mixed(words: torch.Tensor) -> torch.Tensor:
    """Return the mixing of SplitMix64 (Steele, Lea and Flood 2014); int64 products wrap around."""
    for bits, factor in _MIXING:
        words = (words ^ _shifted(words, bits)) * _wrapped(factor)
    return words ^ _shifted(words, 31)
