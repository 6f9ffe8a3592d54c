"""A choice of the planner, computed: every rank of a stage with its slices of random weights, in numbers.

Every rank has activations of full size, with NaN for what it does not have; a layout is turned into another one by
putting together or taking away. So a rank that reads what it was not given ends in NaN, and a sum that nobody adds in a
wrong number. Norms, activations and attention are stand-ins that mix what theirs mix: a token, a channel of gate with
that of up, a query head with its head of keys, and in a prompt a token with those before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from tersor.planner.blocks import Replica
from tersor.planner.cuts import Piece
from tersor.planner.parts import Experts, Kind, Model
from tersor.planner.problem import Choice
from tersor.planner.ways import DECODE, Phase, Way

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


def draw(model: Model, seed: int) -> dict[tuple[str, str], Array]:
    """Return random weights [copies, OC, IC] by kind of layer and name."""
    numbers = np.random.default_rng(seed)
    found = {}
    for start, weights in [("", (model.embedding, model.out)), *((kind.name, kind.weights()) for kind in model.kinds)]:
        for one in weights:
            shape = (one.copies, one.oc, one.ic)
            found[start, one.module] = numbers.standard_normal(shape) / np.sqrt(one.ic)
    if model.head is None:
        found["", model.out.module] = found["", model.embedding.module]
    return found


def computed(replica: Replica, choice: Choice, phase: Phase, weights: dict[tuple[str, str], Array]) -> Array:
    """Return the logits of a pass, of the first rank."""
    return _Pass(replica, choice, phase, weights).logits()


class _Pass:
    """One pass through all layers, of all ranks of a stage."""

    def __init__(self, replica: Replica, choice: Choice, phase: Phase, weights: dict[tuple[str, str], Array]) -> None:
        self.replica, self.choice, self.phase, self.weights = replica, choice, phase, weights
        self.model, self.ranks = replica.setting.model, replica.setting.ranks
        self.residual, self.residual_layout = [np.zeros(())] * self.ranks, "R"

    def logits(self) -> Array:
        """Embedding, layers, norm and head."""
        tokens = np.arange(self.phase.tokens) * 7 % self.model.vocabulary
        way = self._way("embedding", "embedding")
        table = self.weights["", self.model.embedding.module][0]
        values = []
        for (piece,) in way.pieces:
            own = np.zeros((len(tokens), self.model.hidden))
            for first, last in piece.part.rows or ((0, self.model.vocabulary),):
                inside = (first <= tokens) & (tokens < last)
                own[inside] = table[tokens[inside]]
            values.append(own)
        layout = way.gives
        for number in self.model.layers:
            values, layout = self._layer(self.model.kinds[number], values, layout)
        values, layout = self._norm(self._way("final_norm", "final_norm"), values, layout)
        way = self._way("head", "head")
        values = self._turned(values, layout, way.reads)
        if self.phase.name != DECODE:
            values = [own[-1:] for own in values]
        made = [self._product("", piece, own)[0] for (piece,), own in zip(way.pieces, values, strict=True)]
        return self._turned(made, way.gives, "R")[0]

    def _way(self, group: str, block: str) -> Way:
        name = f"{self.phase.name}.{group}" if group == block else f"{self.phase.name}.{group}.{block}"
        return self.replica.way(self.choice, name)

    def _layer(self, kind: Kind, values: list[Array], layout: str) -> tuple[list[Array], str]:
        values, layout = self._norm(self._way(kind.name, "norm"), values, layout)
        attention = self._way(kind.name, "attention")
        way = self._way(kind.name, "qkv")
        values = self._turned(values, layout, way.reads)
        values = [self._qkv(kind, pieces, own) for pieces, own in zip(way.pieces, values, strict=True)]
        masks = [self._wanted(kind, attention, rank) for rank in range(self.ranks)]
        values = self._turned(values, way.gives, attention.reads, masks)
        values = [self._attended(kind, attention, rank, own) for rank, own in enumerate(values)]
        way = self._way(kind.name, "out")
        values = self._turned(values, attention.gives, way.reads, [_columns(pieces[-1]) for pieces in way.pieces])
        values = [self._product(kind.name, piece, own)[0] for (piece,), own in zip(way.pieces, values, strict=True)]
        values, layout = self._norm(self._way(kind.name, "ffn_norm"), values, way.gives)
        if kind.experts is not None:
            way = self._way(kind.name, "experts")
            values = self._turned(values, layout, way.reads)
            pairs = zip(way.pieces, values, strict=True)
            return [self._mixed(kind, kind.experts, pieces, own) for pieces, own in pairs], way.gives
        way, down = self._way(kind.name, "gate_up"), self._way(kind.name, "down")
        values = self._turned(values, layout, way.reads)
        made = [[self._product(kind.name, piece, own)[0] for piece in pieces]
                for pieces, own in zip(way.pieces, values, strict=True)]  # fmt: skip
        inner = [_activated(own, kind.ffn) for own in made]
        values = self._turned(inner, way.gives, down.reads, [_columns(pieces[-1]) for pieces in down.pieces])
        return [
            self._product(kind.name, piece, own)[0] for (piece,), own in zip(down.pieces, values, strict=True)
        ], down.gives

    def _norm(self, way: Way, values: list[Array], layout: str) -> tuple[list[Array], str]:
        """Add the residual in the layout that the norm has, and divide each token by its length."""
        values = self._turned(values, layout, way.reads)
        residual = self._turned(self.residual, self.residual_layout, way.reads)
        self.residual = [one + other for one, other in zip(values, residual, strict=True)]
        self.residual_layout = way.gives
        return [own / np.sqrt((own**2).mean(1, keepdims=True)) for own in self.residual], way.gives

    def _qkv(self, kind: Kind, pieces: Sequence[Piece], x: Array) -> Array:
        """Queries, keys and values side by side; those of few channels read what a whole weight before them gives."""
        whole = {piece.weight: self._product(kind.name, piece, x)[0] for piece in pieces if piece.weight in kind.whole}
        found = []
        for piece in pieces[len(whole) :]:
            size, own = piece.weight.ic, x
            if size != x.shape[1]:
                own = min((one for one in whole.values() if one.shape[1] >= size), key=lambda one: one.shape[1])
            found.append(self._product(kind.name, piece, own[:, :size])[0])
        return np.concatenate(found, axis=1)

    def _fields(self, kind: Kind, head: int) -> list[slice]:
        """Return the columns of all queries, keys and values that a query head reads."""
        found, offset, group = [], 0, head // (kind.heads // kind.kv_heads)
        for fields in kind.per_head:
            for which, channels in fields:
                index, count = (head, kind.heads) if which == "query" else (group, kind.kv_heads)
                found.append(slice(offset + index * channels, offset + (index + 1) * channels))
                offset += count * channels
        return found

    def _wanted(self, kind: Kind, attention: Way, rank: int) -> Mask:
        mask = np.zeros(sum(weight.oc for weight in kind.qkv), dtype=bool)
        for head in self._heads(kind, attention, rank):
            for span in self._fields(kind, head):
                mask[span] = True
        return mask

    def _heads(self, kind: Kind, attention: Way, rank: int) -> range:
        return range(*(attention.heads[rank] if attention.heads else (0, kind.heads)))

    def _attended(self, kind: Kind, attention: Way, rank: int, x: Array) -> Array:
        found = np.full((len(x), kind.heads * kind.value_dim), np.nan)
        for head in self._heads(kind, attention, rank):
            own = np.concatenate([x[:, span] for span in self._fields(kind, head)], axis=1)
            mix = _mix(head, own.shape[1], kind.value_dim)
            seen = own @ mix[1]
            if self.phase.name != DECODE:
                seen = np.cumsum(seen, axis=0) / np.arange(1, len(x) + 1)[:, None]
            found[:, head * kind.value_dim : (head + 1) * kind.value_dim] = np.tanh(own @ mix[0]) * seen
        return found

    def _mixed(self, kind: Kind, experts: Experts, pieces: Sequence[Piece], x: Array) -> Array:
        """Return what a rank's experts give, and its share of those that every token goes through."""
        routed, count = len(experts.gate_up) + 1, len(experts.shared)
        router, own, shared = pieces[0], pieces[1 : 1 + routed], pieces[1 + routed :]
        assert len(shared) == count
        logits = self._product(kind.name, router, x)[0]
        chosen = np.argsort(-logits, axis=1)[:, : experts.top_k]
        found = np.zeros_like(x)
        for expert in range(*(own[0].experts or (0, experts.count))):
            tokens = (chosen == expert).any(1)
            ups = [self._product(kind.name, piece, x, expert)[0] for piece in own[:-1]]
            inner = _activated(ups, experts.ffn, experts.interleaved)
            made = self._product(kind.name, own[-1], inner, expert)[0]
            found += np.where(tokens[:, None], np.exp(logits[:, [expert]]) * made, 0.0)
        if shared:
            ups = [self._product(kind.name, piece, x)[0] for piece in shared[:-1]]
            found += self._product(kind.name, shared[-1], _activated(ups, experts.shared_ffn))[0]
        return found

    def _product(self, group: str, piece: Piece, x: Array, copy: int = 0) -> tuple[Array, Piece]:
        """Multiply with a rank's part of a weight; rows that it has not are NaN."""
        weight = self.weights[group, piece.weight.module][copy]
        inside = slice(*(piece.part.columns or (0, piece.weight.ic)))
        found = np.full((len(x), piece.weight.oc), np.nan)
        for first, last in piece.part.rows or ((0, piece.weight.oc),):
            found[:, first:last] = x[:, inside] @ weight[first:last, inside].T
        return found, piece

    def _turned(self, values: list[Array], gives: str, reads: str, masks: Sequence[Mask] | None = None) -> list[Array]:
        """Turn a layout into another one: add up, put together, and take away what a rank does not get."""
        if gives == reads:
            return values
        if gives == "P":
            whole = np.sum(values, axis=0)
        elif gives == "R":
            whole = values[0]
            assert all(np.allclose(own, whole, equal_nan=True) for own in values), "ranks differ in what all have"
        else:
            whole = values[0].copy()
            for own in values[1:]:
                whole = np.where(np.isnan(whole), own, whole)
        if reads == "R" or not whole.shape:
            return [whole.copy() for _ in values]
        found = []
        for rank in range(self.ranks):
            if reads == "S":
                inside = np.zeros(len(whole), dtype=bool)
                inside[np.array_split(np.arange(len(whole)), self.ranks)[rank]] = True
                found.append(np.where(inside[:, None], whole, np.nan))
            else:
                assert masks is not None, f"nobody reads {reads} here"
                found.append(np.where(masks[rank][None, :], whole, np.nan))
        return found


@lru_cache(maxsize=4096)
def _mix(head: int, width: int, channels: int) -> Array:
    return np.random.default_rng(head).standard_normal((2, width, channels))


def _columns(piece: Piece) -> Mask:
    """Return the input channels that a rank's part of a weight reads."""
    mask = np.zeros(piece.weight.ic, dtype=bool)
    mask[slice(*(piece.part.columns or (0, piece.weight.ic)))] = True
    return mask


def _activated(ups: Sequence[Array], channels: int, interleaved: bool = False) -> Array:
    """Return the inner channels that gate and up make, in whatever rows they are, or that one weight makes alone."""
    if len(ups) == 2:
        gate, up = ups
    elif interleaved:
        gate, up = ups[0][:, ::2], ups[0][:, 1::2]
    elif ups[0].shape[1] == 2 * channels:
        gate, up = ups[0][:, :channels], ups[0][:, channels:]
    else:
        gate, up = ups[0], np.ones_like(ups[0])
    return np.tanh(gate) * up
