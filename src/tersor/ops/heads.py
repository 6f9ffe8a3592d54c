"""How do latent vectors become heads that `ops.attend` takes? Put side by side by a kernel where a GPU has it.

The torch code here is the definition (MLA: DeepSeek-V2, arXiv 2405.04434, section 2.1).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch.nn import functional

from tersor.errors import ShapeError
from tersor.kernels import jit, small
from tersor.ops import current
from tersor.ops.norm import kernel_serves, launched_early

_TURNED = 2 * small.CHANNELS
"""Channels that turn are a multiple of so many for the kernel."""
_heads_launch = functools.lru_cache(1024)(small.prepare_heads)
_trim_launch = functools.lru_cache(1024)(small.prepare_trim)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentHeads:
    """Channels of the heads of attention with latent vectors.

    Attributes:
        heads: how many.
        fixed, turned: channels of a query or key that do not turn, and that do.
        value: channels of a value, at most those of a key.
        interleaved: whether partners of a rotation stand side by side.
    """

    heads: int
    fixed: int
    turned: int
    value: int
    interleaved: bool

    @property
    def width(self) -> int:
        """Channels of a query or key."""
        return self.fixed + self.turned

    @property
    def whole(self) -> bool:
        """Whether the kernel that puts them side by side takes such sizes."""
        return not (self.fixed % small.CHANNELS or self.value % small.CHANNELS or self.turned % _TURNED)

    @property
    def trims(self) -> bool:
        """Whether the kernel that takes values out again takes such sizes."""
        return not (self.value % small.CHANNELS or self.width % small.CHANNELS)

    def apart(self, x: torch.Tensor) -> torch.Tensor:
        """Return channels that turn in the order of `ops.attend`: the partners of the first half in the second."""
        return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) if self.interleaved else x


def side_by_side(queries: torch.Tensor, both: torch.Tensor, turning: torch.Tensor, of: LatentHeads) -> torch.Tensor:
    """Return queries, keys and values of all heads, those of a token one behind the other.

    Args:
        queries: [T, heads * (fixed + turned)] in that order, float16, bfloat16 or float32.
        both: [T, heads * (fixed + value)]: keys' channels that do not turn, then values.
        turning: [T, turned], of the keys of all heads.
        of: sizes.

    Returns:
        [T, 3 * heads * width] as `ops.attend` takes it: channels that turn come first, and values end with zeros.

    Raises:
        ShapeError: sizes or dtypes that do not fit.
    """
    tokens, heads, width = queries.shape[0], of.heads, of.width
    for name, one, channels in (
        ("queries", queries, heads * width),
        ("both", both, heads * (of.fixed + of.value)),
        ("turning", turning, of.turned),
    ):
        if one.shape != (tokens, channels) or one.dtype != queries.dtype:
            raise ShapeError(
                f"side_by_side: {name} is {list(one.shape)} {one.dtype}, expected {[tokens, channels]} {queries.dtype}"
            )
    if of.whole and kernel_serves(queries, both, turning, most=None):
        return _launched(queries, both, turning, of)
    query_fixed, query_turned = queries.unflatten(-1, (heads, width)).split([of.fixed, of.turned], dim=-1)
    key_fixed, values = both.unflatten(-1, (heads, of.fixed + of.value)).split([of.fixed, of.value], dim=-1)
    key_turned = of.apart(turning)[:, None].expand(-1, heads, -1)
    q = torch.cat((of.apart(query_turned), query_fixed), dim=-1)
    k = torch.cat((key_turned, key_fixed), dim=-1)
    v = functional.pad(values, (0, width - of.value))
    return torch.stack((q, k, v), dim=1).flatten(1)


def values_of(mixed: torch.Tensor, of: LatentHeads) -> torch.Tensor:
    """Return [T, heads * value] of what `ops.attend` made of such heads, [T, heads * width], without the zeros.

    Raises:
        ShapeError: sizes that do not fit.
    """
    if mixed.dim() != 2 or mixed.shape[1] != of.heads * of.width:
        raise ShapeError(f"values_of: x is {list(mixed.shape)}, expected [T, {of.heads * of.width}]")
    if of.value == of.width:
        return mixed
    if of.trims and kernel_serves(mixed, most=None):
        return _trimmed(mixed, of)
    return mixed.unflatten(-1, (of.heads, of.width))[..., : of.value].flatten(1)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Return rows whose elements stand side by side and that start on 16 bytes; copied only where they do not."""
    return x if x.stride(1) == 1 and x.stride(0) % small.CHANNELS == 0 else x.contiguous()


def _launched(queries: torch.Tensor, both: torch.Tensor, turning: torch.Tensor, of: LatentHeads) -> torch.Tensor:
    index = queries.get_device()
    if index >= 0 and current.device() != index:
        with torch.cuda.device(index):
            return _launched(queries, both, turning, of)
    queries, both, turning = _rows(queries), _rows(both), _rows(turning)
    tokens, channels = queries.shape[0], 3 * of.heads * of.width
    function = jit.get(small.heads_source(of.interleaved), index)
    launch = _heads_launch(
        function, tokens=tokens, heads=of.heads, fixed=of.fixed, turned=of.turned, value=of.value
    )  # fmt: skip
    out = current.empty((tokens, channels), (channels, 1), queries.dtype)
    launch(
        stream=current.stream(index),
        queries=queries.data_ptr(),
        both=both.data_ptr(),
        turning=turning.data_ptr(),
        out=out.data_ptr(),
        strides=(queries.stride(0), both.stride(0), turning.stride(0)),
        early=launched_early(queries.device),
    )
    return out


def _trimmed(mixed: torch.Tensor, of: LatentHeads) -> torch.Tensor:
    index = mixed.get_device()
    if index >= 0 and current.device() != index:
        with torch.cuda.device(index):
            return _trimmed(mixed, of)
    mixed = mixed.contiguous()
    rows, channels = len(mixed), of.heads * of.value
    launch = _trim_launch(jit.get(small.trim_source(), index), heads=rows * of.heads, width=of.width, kept=of.value)
    out = current.empty((rows, channels), (channels, 1), mixed.dtype)
    launch(stream=current.stream(index), x=mixed.data_ptr(), out=out.data_ptr(), early=launched_early(mixed.device))
    return out
