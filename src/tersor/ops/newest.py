"""Which tokens does a step begin with, and where are those that it drew kept? The host may not know them yet.

A step is launched before the one ahead of it is read. The device keeps the newest token of every slot, and a token that
the host has not read is named by its slot. The torch code here is the definition; where a GPU has it a kernel serves.
"""

from __future__ import annotations

import functools

import torch

from tersor.errors import ShapeError
from tersor.kernels import jit, small
from tersor.ops import current, dispatch
from tersor.ops.norm import launched_early

_resolve_launch = functools.lru_cache(1024)(small.prepare_resolve)
_keep_launch = functools.lru_cache(1024)(small.prepare_keep)


def resolve(
    tokens: torch.Tensor, newest: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor, places: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens of a step, and how long the texts are that draw.

    Args:
        tokens: int32 [T]; -1 - s is the newest token of slot s.
        newest: int64 [slots].
        starts, lengths: int32 [R + 1] and [R], the rows of the step, at least one.
        places: int32 [S], the tokens after which rows draw; what lies behind all rows counts as the last one's.

    Returns:
        int64 [T] and int32 [S].

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit.
    """
    numbers = {"tokens": tokens, "starts": starts, "lengths": lengths, "places": places}
    for name, one in numbers.items():
        if one.dim() != 1 or one.dtype != torch.int32 or one.device != newest.device:
            raise ShapeError(
                f"resolve: {name} are {list(one.shape)} {one.dtype} on {one.device}, expected one dimension of int32 "
                f"on {newest.device}"
            )
    if not len(lengths) or len(starts) != len(lengths) + 1:
        raise ShapeError(f"resolve: {len(lengths)} rows have {len(starts)} starts, expected at least one and one more")
    _check_newest("resolve", newest)
    if len(tokens) and dispatch.kernel_chip(tokens.device) is not None:
        return _resolved(tokens, newest, starts, lengths, places)
    kept = newest[(-1 - tokens.long()).clamp_min(0)]
    owners = torch.searchsorted(starts[1:], places, right=True).clamp_max(len(lengths) - 1)
    return torch.where(tokens < 0, kept, tokens.long()), lengths[owners]


def keep(newest: torch.Tensor, slots: torch.Tensor, drawn: torch.Tensor) -> None:
    """Make the tokens that rows drew the newest of their slots.

    Args:
        newest: int64 [slots]; is written.
        slots: int32 [S].
        drawn: int64 [S]; -1, where none could be drawn, counts as 0.

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit.
    """
    _check_newest("keep", newest)
    if (drawn.shape, drawn.dtype, slots.dtype) != (slots.shape, torch.int64, torch.int32) or slots.dim() != 1:
        raise ShapeError(
            f"keep: slots are {list(slots.shape)} {slots.dtype} and tokens {list(drawn.shape)} {drawn.dtype}, expected "
            "[S] in int32 and int64"
        )
    if len(slots) and dispatch.kernel_chip(drawn.device) is not None:
        _kept(newest, slots, drawn)
    else:
        newest.index_copy_(0, slots.long(), drawn.clamp_min(0))


def _check_newest(name: str, newest: torch.Tensor) -> None:
    if newest.dim() != 1 or newest.dtype != torch.int64 or not newest.is_contiguous():
        raise ShapeError(f"{name}: newest tokens are {list(newest.shape)} {newest.dtype}, expected [slots] in int64")


def _resolved(
    tokens: torch.Tensor, newest: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor, places: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    index = tokens.get_device()
    if index >= 0 and current.device() != index:
        with torch.cuda.device(index):
            return _resolved(tokens, newest, starts, lengths, places)
    tokens, starts, lengths, places = (one.contiguous() for one in (tokens, starts, lengths, places))
    count, draws = len(tokens), len(places)
    launch = _resolve_launch(jit.get(small.resolve_source(), index), tokens=count, texts=len(lengths), draws=draws)
    found = current.empty((count,), (1,), torch.int64)
    drawn_lengths = current.empty((draws,), (1,), torch.int32)
    launch(
        stream=current.stream(index),
        tokens_of_step=tokens.data_ptr(),
        newest=newest.data_ptr(),
        starts=starts.data_ptr(),
        lengths=lengths.data_ptr(),
        places=places.data_ptr(),
        found=found.data_ptr(),
        drawn_lengths=drawn_lengths.data_ptr(),
        early=launched_early(tokens.device),
    )
    return found, drawn_lengths


def _kept(newest: torch.Tensor, slots: torch.Tensor, drawn: torch.Tensor) -> None:
    index = drawn.get_device()
    if index >= 0 and current.device() != index:
        with torch.cuda.device(index):
            _kept(newest, slots, drawn)
        return
    slots, drawn = slots.contiguous(), drawn.contiguous()
    _keep_launch(jit.get(small.keep_source(), index), draws=len(slots))(
        stream=current.stream(index),
        drawn=drawn.data_ptr(),
        slots=slots.data_ptr(),
        newest=newest.data_ptr(),
        early=launched_early(drawn.device),
    )
