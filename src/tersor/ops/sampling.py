"""Which token is drawn from these logits, and how probable was it? Checked, then by kernels where a GPU has them.

`sampling_form` says what is read, `sampling_reference` what is computed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from tersor.errors import ShapeError
from tersor.hardware import Chip
from tersor.kernels import jit, sampling
from tersor.ops import current, dispatch, mode, sampling_reference
from tersor.ops.sampling_form import MOST_LOGPROBS, Allowed, Listed, Logprobs, SamplingRows

_DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
_PREPARED = 1024
"""Prepared launches that are kept, of each kind."""

_adjust_launch = functools.lru_cache(_PREPARED)(sampling.prepare_adjust)
_peaks_launch = functools.lru_cache(_PREPARED)(sampling.prepare_peaks)
_weigh_launch = functools.lru_cache(_PREPARED)(sampling.prepare_weigh)
_choose_launch = functools.lru_cache(_PREPARED)(sampling.prepare_choose)
_logprobs_launch = functools.lru_cache(_PREPARED)(sampling.prepare_logprobs)


def draw(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """Return a token for every row, and leave the logits undefined where tokens are listed.

    Args:
        logits: [S, V] float16, bfloat16 or float32; elements of a row stand side by side.
        rows: how each is drawn, on the same device.

    Returns:
        int64 [S]: -1 for padding, for a row with a logit that is NaN or infinity, and for one without a token that may
        be drawn.

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit.
    """
    return _draw(logits, rows)[0]


def draw_with_logprobs(
    logits: torch.Tensor, rows: SamplingRows, asks: torch.Tensor, most: int = MOST_LOGPROBS
) -> tuple[torch.Tensor, Logprobs]:
    """Return what `draw` returns, and the log probabilities of the tokens drawn and of the most probable ones.

    Args:
        logits, rows: as in `draw`.
        asks: as in `logprobs`; where rows have slots, one a slot.
        most: as there.

    Raises:
        ShapeError: shapes, dtypes, devices or numbers that do not fit.
    """
    _check_rows(logits, rows)
    _check_logprobs(logits, asks, most, len(rows.temperature))
    chip = _chip(logits)
    if chip is None:
        values = sampling_reference.adjusted(logits, rows)
        tokens = sampling_reference.draw_adjusted(values, rows)
        asked = asks if rows.slots is None else asks[rows.slots.long()]
        return tokens, sampling_reference.logprobs(values, tokens, asked, most)
    tokens, seen = _draw(logits, rows)
    return tokens, _logprobs(logits, tokens, asks, most, seen, chip)


def logprobs(logits: torch.Tensor, targets: torch.Tensor, asks: torch.Tensor, most: int = MOST_LOGPROBS) -> Logprobs:
    """Return log probabilities of given tokens, as of a prompt, and of the most probable ones.

    Args:
        logits: as in `draw`.
        targets: int64 [S]: tokens; one outside the vocabulary has no log probability.
        asks: int32 [S]: so many most probable tokens, up to `most`; -1 for nothing at all.
        most: K of the result, up to `MOST_LOGPROBS`.

    Raises:
        ShapeError: shapes, dtypes, devices or numbers that do not fit.
    """
    _check_logits("logprobs", logits)
    _check_logprobs(logits, asks, most, logits.shape[0])
    _check("logprobs", logits, {"targets": (targets, torch.int64, (logits.shape[0],))})
    chip = _chip(logits)
    if chip is None:
        return sampling_reference.logprobs(logits.float(), targets, asks, most)
    return _logprobs(logits, targets, asks, most, _Seen.without(), chip)


def _check_logits(name: str, logits: torch.Tensor) -> None:
    if logits.dim() != 2 or logits.dtype not in _DTYPES or not logits.shape[1]:
        raise ShapeError(
            f"{name}: logits are {list(logits.shape)} {logits.dtype}, expected [S, V] in float16, bfloat16 or float32"
        )


def _check(
    name: str, logits: torch.Tensor, tensors: dict[str, tuple[torch.Tensor, torch.dtype, tuple[int, ...]]]
) -> None:
    for role, (tensor, dtype, shape) in tensors.items():
        if (tuple(tensor.shape), tensor.dtype, tensor.device) != (shape, dtype, logits.device):
            raise ShapeError(
                f"{name}: {role} is {list(tensor.shape)} {tensor.dtype} on {tensor.device}, expected {list(shape)} "
                f"{dtype} on {logits.device}"
            )
        if not tensor.is_contiguous():
            raise ShapeError(f"{name}: {role} has strides {list(tensor.stride())}, expected contiguous elements")


def _check_logprobs(logits: torch.Tensor, asks: torch.Tensor, most: int, slots: int) -> None:
    _check("logprobs", logits, {"asks": (asks, torch.int32, (slots,))})
    if not 0 <= most <= MOST_LOGPROBS:
        raise ShapeError(f"logprobs: most is {most}, expected 0 to {MOST_LOGPROBS}")


def _check_rows(logits: torch.Tensor, rows: SamplingRows) -> None:
    _check_logits("draw", logits)
    vocabulary, each = logits.shape[1], (len(rows.temperature) if rows.slots is not None else logits.shape[0],)
    wanted: dict[str, tuple[torch.Tensor, torch.dtype, tuple[int, ...]]] = {
        "temperature": (rows.temperature, torch.float32, each),
        "top_k": (rows.top_k, torch.int32, each),
        "top_p": (rows.top_p, torch.float32, each),
        "min_p": (rows.min_p, torch.float32, each),
        "seeds": (rows.seeds, torch.int64, each),
        "positions": (rows.positions, torch.int32, (logits.shape[0],)),
    }
    if rows.slots is not None:
        wanted["slots"] = (rows.slots, torch.int32, (logits.shape[0],))
    if rows.listed is not None:
        listed = rows.listed
        of_list = (len(listed.tokens),)
        wanted |= {
            "starts of the list": (listed.starts, torch.int32, each),
            "ends of the list": (listed.ends, torch.int32, each),
            "tokens of the list": (listed.tokens, torch.int32, of_list),
            "counts of the list": (listed.counts, torch.int32, of_list),
            "biases of the list": (listed.biases, torch.float32, of_list),
            "newest": (listed.newest, torch.int64, each),
            "pending": (listed.pending, torch.int32, each),
            "repetition": (listed.repetition, torch.float32, each),
            "presence": (listed.presence, torch.float32, each),
            "frequency": (listed.frequency, torch.float32, each),
        }
    if rows.allowed is not None:
        bits, words = rows.allowed.bits, -(-vocabulary // 32)
        wanted |= {
            "bits of allowed tokens": (bits, torch.int32, (bits.shape[0], words)),
            "rows of allowed tokens": (rows.allowed.rows, torch.int32, each),
        }
    _check("draw", logits, wanted)


@dataclass(slots=True, kw_only=True)
class _Seen:
    """A row as kernels see it (row.cuh): addresses, and what must live until they have run."""

    row: tuple[int, ...]
    words: int
    scratch: torch.Tensor | None

    @staticmethod
    def without() -> _Seen:
        """Return rows without lists and bits."""
        return _Seen(row=(0,) * 7, words=0, scratch=None)


def _chip(logits: torch.Tensor) -> Chip | None:
    """Return the GPU whose kernels serve logits; `None` where the reference does."""
    if not logits.shape[0] or logits.shape[1] > sampling.MOST_VOCABULARY or torch.compiler.is_compiling():
        return None
    return dispatch.kernel_chip(logits.device)


def _early(chip: Chip) -> bool:
    """Tell whether kernels may start before the one ahead of them has ended."""
    return mode.current().early and chip.capability >= (9, 0)


def _aligned(logits: torch.Tensor) -> bool:
    """Tell whether chunks of every row start on 16 bytes, and none is cut short."""
    size = logits.element_size()
    return not (logits.shape[1] % sampling.CHUNK or logits.data_ptr() % 16 or logits.stride(0) * size % 16)


def _check_side_by_side(name: str, logits: torch.Tensor) -> None:
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        raise ShapeError(f"{name}: logits have strides {list(logits.stride())}, expected rows of adjacent elements")


def _draw(logits: torch.Tensor, rows: SamplingRows) -> tuple[torch.Tensor, _Seen]:
    """Draw, and return what `_logprobs` needs to see the same rows."""
    _check_rows(logits, rows)
    _check_side_by_side("draw", logits)
    chip = _chip(logits)
    if chip is None:
        return sampling_reference.draw(logits, rows), _Seen.without()
    index = logits.get_device()
    if index >= 0 and current.device() != index:
        with torch.cuda.device(index):
            return _draw(logits, rows)
    (count, vocabulary), dtype = logits.shape, _DTYPES[logits.dtype]
    listed, allowed, stream, early = rows.listed, rows.allowed, current.stream(index), _early(chip)
    places = sampling.Scratch.of(count, vocabulary, 0 if listed is None else len(listed.tokens), rows.filters)
    scratch = current.empty((places.nbytes // 8,), (1,), torch.int64)
    base = scratch.data_ptr()
    words = 0 if allowed is None else allowed.bits.shape[1]
    bits = (0, 0) if allowed is None else (allowed.bits.data_ptr(), allowed.rows.data_ptr())
    slots = 0 if rows.slots is None else rows.slots.data_ptr()
    of_list = (0, 0, 0, 0)
    common = {"stream": stream, "logits": logits.data_ptr(), "stride": logits.stride(0), "early": early}
    if listed is not None:
        lists = (listed.starts.data_ptr(), listed.ends.data_ptr())
        of_list = (*lists, base + places.placed, base + places.values)
        function = jit.get(sampling.adjust_source(dtype), index)
        launch = _adjust_launch(function, rows=count, vocabulary=vocabulary, words=words)
        launch(**common, listed=(slots, *_addresses(listed)), allowed=bits, placed=of_list[2], values=of_list[3])
    seen = _Seen(row=(slots, *of_list, *bits), words=words, scratch=scratch)
    out = current.empty((count,), (1,), torch.int64)
    outs = (out.data_ptr(), 0 if listed is None else listed.newest.data_ptr())
    arrived = mode.current().workspace.split_sums(index, stream, 0, count)[1]
    options = tuple(
        one.data_ptr()
        for one in (rows.temperature, rows.top_k, rows.top_p, rows.min_p, rows.seeds, rows.positions)
    )  # fmt: skip
    sizes = {"rows": count, "vocabulary": vocabulary, "words": words, "aligned": _aligned(logits)}
    states, weights = base + places.states, base + places.weights if rows.filters else 0
    launch = _peaks_launch(jit.get(sampling.peaks_source(dtype), index), **sizes)
    launch(
        **common,
        row=seen.row,
        options=options,
        partial=base + places.partial,
        groups=base + places.groups,
        arrived=arrived,
        states=states,
        weights=weights,
        out=outs,
    )
    if rows.filters:
        again = {**common, "row": seen.row, "options": options, "states": states}
        launch = _weigh_launch(jit.get(sampling.weigh_source(dtype), index), **sizes, multiprocessors=chip.sms)
        launch(**again, weights=weights)
        launch = _choose_launch(jit.get(sampling.choose_source(dtype), index), **sizes, multiprocessors=chip.sms)
        launch(**again, candidates=base + places.candidates, out=outs)
    return out, seen


def _addresses(listed: Listed) -> tuple[int, ...]:
    """Return the addresses of a list, in the order of `prepare_adjust`."""
    tensors = (
        listed.starts, listed.ends, listed.tokens, listed.counts, listed.biases, listed.newest, listed.pending,
        listed.repetition, listed.presence, listed.frequency,
    )  # fmt: skip
    return tuple(one.data_ptr() for one in tensors)


def _logprobs(
    logits: torch.Tensor, targets: torch.Tensor, asks: torch.Tensor, most: int, seen: _Seen, chip: Chip
) -> Logprobs:
    _check_side_by_side("logprobs", logits)
    index = logits.get_device()
    if index >= 0 and current.device() != index:
        with torch.cuda.device(index):
            return _logprobs(logits, targets, asks, most, seen, chip)
    count, vocabulary = logits.shape
    function = jit.get(sampling.logprobs_source(_DTYPES[logits.dtype]), index)
    aligned = _aligned(logits)
    launch = _logprobs_launch(
        function, rows=count, vocabulary=vocabulary, words=seen.words, aligned=aligned, most=most
    )  # fmt: skip
    found = Logprobs(
        current.empty((count,), (1,), torch.float32),
        current.empty((count,), (1,), torch.int32),
        current.empty((count, most), (most, 1), torch.int32),
        current.empty((count, most), (most, 1), torch.float32),
    )
    launch(
        stream=current.stream(index),
        logits=logits.data_ptr(),
        stride=logits.stride(0),
        row=seen.row,
        targets=targets.data_ptr(),
        asks=asks.data_ptr(),
        out=tuple(one.data_ptr() for one in found),
        early=_early(chip),
    )
    return found


__all__ = ["Allowed", "Listed", "Logprobs", "SamplingRows", "draw", "draw_with_logprobs", "logprobs"]
