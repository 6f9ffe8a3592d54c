"""What does a plan have to know of a model? Its weights with their bytes and quanta, its layers by kind, and the work.

Nothing here reads a checkpoint: a front end (`models.parts`) makes a `Model` of a config and the headers of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

from tersor.checkpoint.names import Form, stored_tensors
from tersor.errors import InputError
from tersor.formats import Assignment, Pruned, Scheme
from tersor.layouts.shard import Part, Span, quantum

PLAIN_BYTES = 2
"""Bytes of a number of a plain weight, and of an activation."""
PAGE = 64
"""Tokens of a page of keys and values (`ops.attention_form.PAGE`)."""
WHOLE = Part()
"""All of a weight."""


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight [OC, IC], or those of all experts of a layer.

    Attributes:
        module: its name in a layer, or in the whole model; `{expert}` stands for the number of an expert.
        oc, ic: of one copy.
        form: how it is packed; `None` is plain, 16 bits a number.
        copies: experts that have one each.
        biased: whether a bias of [OC] belongs to each copy.
    """

    module: str
    oc: int
    ic: int
    form: Form | None = None
    copies: int = 1
    biased: bool = False

    @property
    def quantum(self) -> int:
        """Input channels that stay together where columns are cut."""
        return quantum(self.form)

    def nbytes(self, part: Part = WHOLE, copies: int | None = None) -> int:
        """Return the bytes of a part of so many copies; of a pruned weight's columns, the share of its mean."""
        oc, ic = part.shape((self.oc, self.ic))
        bias = PLAIN_BYTES * oc * self.biased
        return (self.copies if copies is None else copies) * (_matrix_bytes(self, part, oc, ic) + bias)

    def levels(self, part: Part = WHOLE) -> tuple[tuple[Scheme | None, int], ...]:
        """Return the schemes of the rows of a part, each with how many there are; `None` is plain."""
        oc, _ = part.shape((self.oc, self.ic))
        if isinstance(self.form, Assignment):
            own = self.form if part.rows is None else self.form.of(part.rows)
            return tuple((scheme, rows) for scheme, rows in zip(own.mix.levels, own.rows, strict=True) if rows)
        return ((self.form if isinstance(self.form, Scheme) else None, oc),) if oc else ()


@lru_cache(maxsize=65536)
def _matrix_bytes(weight: Weight, part: Part, oc: int, ic: int) -> int:
    form = weight.form
    if form is None or not oc or not ic:
        return PLAIN_BYTES * oc * ic
    if isinstance(form, Pruned):
        whole = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in _stored(form, weight.oc, weight.ic))
        return -(-whole * oc * ic // (weight.oc * weight.ic))
    if isinstance(form, Assignment) and part.rows is not None:
        form = form.of(part.rows)
    return sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in _stored(form, oc, ic))


def _stored(form: Form, oc: int, ic: int) -> list:  # type: ignore[type-arg]
    size = form.group_size if isinstance(form, Scheme) else None
    padded = ic if not size else -(-ic // size) * size  # the last group may be short
    return list(stored_tensors(form, oc, padded).values())


@dataclass(frozen=True, slots=True)
class Experts:
    """The experts of a layer.

    Attributes:
        top_k: experts of a token.
        ffn: channels inside one.
        router: its weight.
        gate_up, down: theirs, with `copies`; gate and up of all in one alternate row by row (`interleaved`).
        interleaved: see there.
        shared: gate and up, and down, of what every token goes through; empty for none.
        shared_ffn: channels inside it.
    """

    top_k: int
    ffn: int
    router: Weight
    gate_up: tuple[Weight, ...]
    down: Weight
    interleaved: bool = False
    shared: tuple[Weight, ...] = ()
    shared_ffn: int = 0

    @property
    def count(self) -> int:
        """How many there are."""
        return self.down.copies


@dataclass(frozen=True, slots=True)
class Kind:
    """Layers that are equal in everything that a plan asks.

    Attributes:
        layers: their numbers.
        start: name of a layer with `{layer}`, such as `model.layers.{layer}.`.
        heads, kv_heads, head_dim: of attention.
        value_dim: channels of a head where `out` reads it.
        window: tokens that a token sees; 0 is all.
        whole: weights that every rank has whatever the cut (what queries and keys of DeepSeek come from).
        qkv: queries, keys and values: three weights, one that holds the three, or those made for every head.
        per_head: of `qkv`, channels that a weight has for a query head and for a kv head, in the order of its rows.
        out: of attention.
        ffn: channels inside the feed-forward network; 0 where there are experts.
        gate_up, down: of the feed-forward network.
        experts: instead of it, or `None`.
        vectors: elements of norms and the like, on every rank.
    """

    layers: tuple[int, ...]
    start: str
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    window: int
    whole: tuple[Weight, ...]
    qkv: tuple[Weight, ...]
    per_head: tuple[tuple[tuple[str, int], ...], ...]
    out: Weight
    ffn: int = 0
    gate_up: tuple[Weight, ...] = ()
    down: Weight | None = None
    experts: Experts | None = None
    vectors: int = 0

    @property
    def name(self) -> str:
        """How the report calls them, such as `layers.0-79`."""
        return _layers_words(self.layers)

    def weights(self) -> Iterator[Weight]:
        """Yield every weight of one layer."""
        yield from (*self.whole, *self.qkv, self.out, *self.gate_up)
        if self.down is not None:
            yield self.down
        if self.experts is not None:
            yield from (self.experts.router, *self.experts.gate_up, self.experts.down, *self.experts.shared)


@lru_cache(maxsize=4096)
def _layers_words(layers: tuple[int, ...]) -> str:
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    words = [str(first) if first == last else f"{first}-{last}" for first, last in runs[:3]]
    more = len(layers) - sum(last - first + 1 for first, last in runs[:3])
    return "layers." + ",".join(words) + (f"+{more}" if more else "")


@dataclass(frozen=True)
class Model:
    """A decoder.

    Attributes:
        label: what it is called.
        digest: of its config and the headers of its tensors: a plan is for one model.
        architecture: class in config.json.
        hidden, vocabulary, context: sizes.
        gated: whether gate and up become one.
        kinds: of its layers; every layer is in one.
        embedding: its weight.
        head: its weight, `None` where it is the embedding.
        vectors: elements of norms and positions outside layers.
        head_name: what the head is called, whether it is stored or not.
        own_plan: (pattern of a module's name, style of transformers), where transformers has a plan for it.
    """

    label: str
    digest: str
    architecture: str
    hidden: int
    vocabulary: int
    context: int
    gated: bool
    kinds: tuple[Kind, ...]
    embedding: Weight
    head: Weight | None
    vectors: int = 0
    head_name: str = "lm_head"
    own_plan: tuple[tuple[str, str], ...] = field(default=(), compare=False)

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The kind of every layer, by its number."""
        found = {layer: number for number, kind in enumerate(self.kinds) for layer in kind.layers}
        return tuple(found[layer] for layer in range(len(found)))

    @cached_property
    def out(self) -> Weight:
        """The weight of the output head; one that is the embedding has its own name for that."""
        return replace(self.embedding, module=self.head_name) if self.head is None else self.head

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        ends = self.embedding.nbytes() + (0 if self.head is None else self.head.nbytes())
        vectors = self.vectors + sum(kind.vectors * len(kind.layers) for kind in self.kinds)
        inside = sum(len(kind.layers) * sum(one.nbytes() for one in kind.weights()) for kind in self.kinds)
        return ends + PLAIN_BYTES * vectors + inside


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What a replica of the model is to do.

    Attributes:
        batch: rows of a decode step of one replica.
        context: tokens of the longest text.
        prompt: tokens of a prompt, which prefill computes at once.
        kv_bytes: bytes of a number of keys and values: 2, or 1 with a float32 scale a token and head.
        phases: which of `decode` and `prefill` count.
    """

    batch: int = 64
    context: int = 2048
    prompt: int = 512
    kv_bytes: int = 2
    phases: tuple[str, ...] = ("decode", "prefill")

    def __post_init__(self) -> None:
        if min(self.batch, self.context, self.prompt) < 1:
            raise InputError("batch, context and prompt are at least 1")
        if self.prompt > self.context:
            raise InputError(f"a prompt of {self.prompt} tokens is longer than the context, {self.context}")

    @property
    def prefills(self) -> float:
        """Prompts that come for every decode step: each row draws the rest of its context, then another begins."""
        return self.batch / max(1, self.context - self.prompt)

    def token_bytes(self, kv_heads: int, head_dim: int) -> int:
        """Return the bytes of keys and values of a token in one layer."""
        return 2 * kv_heads * (head_dim * self.kv_bytes + (4 if self.kv_bytes == 1 else 0))

    def pages_bytes(self, kv_heads: int, head_dim: int, rows: int | None = None) -> int:
        """Return the bytes of the pages of so many rows in one layer; `None` is all of them."""
        return (
            (self.batch if rows is None else rows)
            * (-(-self.context // PAGE) * PAGE)
            * self.token_bytes(kv_heads, head_dim)
        )


def spans_words(spans: tuple[Span, ...]) -> str:
    """Return spans as text, such as `0-4096+8192-9216`."""
    return "+".join(f"{first}-{last}" for first, last in spans)
