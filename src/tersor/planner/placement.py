"""Which rank has what? Layers in stages, ranks in a stage, and where those cut its weights: sizes alone, no model.

    {"version": 1, "data": 1, "stages": [
       {"layers": [0, 17], "ranks": 4, "expert_groups": 2, "cuts": {"channels": [0, 3712, 7424, 11008, 14592]}},
       {"layers": [17, 32], "ranks": 2, "whole": ["vocabulary"]}]}

A model has `data` copies; a copy is a chain of stages (pipeline), a stage the ranks that compute its layers together
(tensor), and those may be groups that have whole experts (expert). Ranks are numbered copy by copy, in a copy stage by
stage, in a stage group by group. What is not said is dealt out evenly (`layouts.shard`), aligned to the quanta of
packed weights; heads of keys and values follow the queries that read them, and several ranks have one if they must.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any, TypeAlias

from tersor import files
from tersor.errors import InputError, did_you_mean

VERSION = 1
Span: TypeAlias = tuple[int, int]
"""The first, and the one after the last."""
CUTS = ("heads", "channels", "shared_channels", "expert_channels", "experts", "vocabulary")
"""What a stage may say the cuts of: query heads, inner channels of feed-forward networks, of experts that every token
goes through and of routed ones, whole experts, and rows of embedding and head."""
WHOLE = ("heads", "channels", "experts", "vocabulary")
"""What every rank of a stage may have all of: attention, feed-forward networks, all that is behind a router, embedding
and head. What each computes whole, nobody adds up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Some layers, and the ranks that compute them together.

    Attributes:
        layers: of the model.
        ranks: how many.
        expert_groups: groups of as many ranks each, between which whole experts are dealt out; inside of a group every
            expert is cut by channels. With 1 every rank has a part of every expert, with `ranks` each has whole ones.
        cuts: one of `CUTS` -> where the share of each rank begins, and the end of the last; those of `experts` are of
            groups, and those of `expert_channels` of the ranks in a group. Even shares of what is not said.
        whole: those of `WHOLE` that every rank has all of.
    """

    layers: Span
    ranks: int = 1
    expert_groups: int = 1
    cuts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    whole: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Hold that it is one.

        Raises:
            InputError: it is none; the line says why.
        """
        where = f"layers {list(self.layers)} of a placement"
        if not 0 <= self.layers[0] < self.layers[1]:
            raise InputError(f"{where}: a stage has at least one layer")
        if self.ranks < 1 or self.expert_groups < 1 or self.ranks % self.expert_groups:
            raise InputError(f"{where}: {self.ranks} ranks are not {self.expert_groups} groups of as many each")
        for kinds, known in ((self.cuts, CUTS), (self.whole, WHOLE)):
            for kind in kinds:
                if kind not in known:
                    raise InputError(f"{where}: {kind!r}{did_you_mean(kind, known)}: there are {', '.join(known)}")
        for kind, ends in self.cuts.items():
            shares = self.shares(kind)
            if len(ends) != shares + 1 or ends[0] != 0 or any(one >= other for one, other in pairwise(ends)):
                raise InputError(f"{where}: cuts of {kind} are {list(ends)}: from 0 up, {shares} shares of something")
            if kind in self.whole:
                raise InputError(f"{where}: {kind} are cut and whole")

    def shares(self, kind: str) -> int:
        """Return how many shares there are of one of `CUTS`."""
        each = {"experts": self.expert_groups, "expert_channels": self.ranks // self.expert_groups}
        return each.get(kind, self.ranks)


@dataclass(frozen=True, slots=True)
class Place:
    """Where one rank is.

    Attributes:
        stage: its own.
        index, stages: which of how many stages of its copy of the model.
        rank: which of the ranks of its stage.
    """

    stage: Stage
    index: int = 0
    stages: int = 1
    rank: int = 0

    @property
    def first(self) -> bool:
        """Whether its stage has the embedding."""
        return self.index == 0

    @property
    def last(self) -> bool:
        """Whether its stage has the last norm and the head."""
        return self.index == self.stages - 1

    @property
    def expert_group(self) -> int:
        """Which group of its stage it is in."""
        return self.rank // self.stage.shares("expert_channels")

    @property
    def expert_rank(self) -> int:
        """Which of the ranks in its group."""
        return self.rank % self.stage.shares("expert_channels")


@dataclass(frozen=True, slots=True)
class Placement:
    """A model on ranks.

    Attributes:
        stages: in the order of layers.
        data: copies of the model; those answer different requests and know nothing of each other.
    """

    stages: tuple[Stage, ...]
    data: int = 1

    def __post_init__(self) -> None:
        """Hold that stages follow each other.

        Raises:
            InputError: they do not.
        """
        if self.data < 1 or not self.stages:
            raise InputError("a placement has at least one copy of a model and one stage")
        ends = [0, *(stage.layers[1] for stage in self.stages)]
        starts = [stage.layers[0] for stage in self.stages]
        if starts != ends[:-1]:
            spans = [list(stage.layers) for stage in self.stages]
            raise InputError(f"stages of a placement have layers {spans}: each begins where the one ahead ends, from 0")

    @staticmethod
    def even(layers: int, *, pipeline: int = 1, tensor: int = 1, expert: int = 1, data: int = 1) -> Placement:
        """Deal a model out evenly: `pipeline` stages of tensor * expert ranks each; the first stages have more layers.

        Args:
            layers: of the model.
            pipeline: stages.
            tensor: ranks that cut every weight, of an expert as well.
            expert: groups between which experts are dealt out; attention and all else is cut by tensor * expert ranks.
            data: copies.

        Raises:
            InputError: there are fewer layers than stages.
        """
        if layers < pipeline:
            raise InputError(f"pipeline_parallel is {pipeline}, and the model has {layers} layers")
        each, more = divmod(layers, pipeline)
        starts = [each * stage + min(stage, more) for stage in range(pipeline + 1)]
        return Placement(
            tuple(Stage(layers=span, ranks=tensor * expert, expert_groups=expert) for span in pairwise(starts)), data
        )

    @property
    def layers(self) -> int:
        """Layers of the model."""
        return self.stages[-1].layers[1]

    @property
    def ranks(self) -> int:
        """Ranks of one copy."""
        return sum(stage.ranks for stage in self.stages)

    def place(self, rank: int) -> Place:
        """Return where a rank of a copy is."""
        for index, stage in enumerate(self.stages):
            if rank < stage.ranks:
                return Place(stage, index, len(self.stages), rank)
            rank -= stage.ranks
        raise InputError(f"a placement of {self.ranks} ranks has none that many further: {rank}")

    def members(self, index: int) -> range:
        """Return the ranks of a copy that are in a stage."""
        start = sum(stage.ranks for stage in self.stages[:index])
        return range(start, start + self.stages[index].ranks)

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON holds of it."""
        stages = [
            {
                "layers": list(stage.layers),
                "ranks": stage.ranks,
                "expert_groups": stage.expert_groups,
                "cuts": {kind: list(ends) for kind, ends in stage.cuts.items()},
                "whole": list(stage.whole),
            }
            for stage in self.stages
        ]
        return {"version": VERSION, "data": self.data, "stages": stages}

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> Placement:
        """Make one of what JSON holds; what a plan says beside it is passed over.

        Raises:
            InputError: it is none; the line says why.
        """
        found = raw.get("version", VERSION)
        if found != VERSION:
            raise InputError(f"a placement of version {found!r}, and this Tersor reads version {VERSION}")
        stages = raw.get("stages")
        if not isinstance(stages, list | tuple):
            raise InputError("a placement has no list of stages")
        known = [one.name for one in fields(Stage)]
        made = []
        for stage in stages:
            if not isinstance(stage, Mapping) or "layers" not in stage:
                raise InputError("a stage of a placement says no layers")
            for name in stage:
                if name not in known:
                    raise InputError(f"a stage of a placement: {name!r}{did_you_mean(name, known)}")
            try:
                first, last = map(_whole, stage["layers"])
                made.append(
                    Stage(
                        layers=(first, last),
                        ranks=_whole(stage.get("ranks", 1)),
                        expert_groups=_whole(stage.get("expert_groups", 1)),
                        cuts={kind: tuple(map(_whole, ends)) for kind, ends in dict(stage.get("cuts", {})).items()},
                        whole=tuple(map(str, stage.get("whole", ()))),
                    )
                )
            except (TypeError, ValueError) as error:
                if isinstance(error, InputError):
                    raise
                raise InputError(f"stage {len(made)} of a placement is none: {error}") from None
        return Placement(tuple(made), _whole(raw.get("data", 1)))

    @staticmethod
    def read(path: str | os.PathLike[str]) -> Placement:
        """Read one from a JSON file: one alone, or what a plan calls its `placement`.

        Raises:
            InputError: it cannot be read, or is none.
        """
        try:
            raw = json.loads(files.user_path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{os.fspath(path)}: cannot be read as JSON: {error}") from None
        if isinstance(raw, dict) and isinstance(raw.get("placement"), dict):
            raw = raw["placement"]
        if not isinstance(raw, dict):
            raise InputError(f"{os.fspath(path)}: no placement: it is no JSON object")
        return Placement.from_dict(raw)


def _whole(value: Any) -> int:
    """Return a whole number of JSON.

    Raises:
        InputError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"a placement holds {value!r} where a whole number is meant")
    return value


ALONE = Placement((Stage(layers=(0, 1)),)).place(0)
"""The one rank of a model; of whose stage the layers are not looked at."""
