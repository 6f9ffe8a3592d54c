"""A call of every operator that has a rule, on random operands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

aten = torch.ops.aten
Made = tuple[Any, list[Any], dict[str, Any]]


class Maker:
    """Makes random operands of sizes that ranks divide."""

    def __init__(self, ranks: int, seed: int) -> None:
        self.n = ranks
        self.generator = torch.Generator().manual_seed(seed)

    def x(self, *shape: int) -> torch.Tensor:
        """Random floats."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def i(self, below: int, *shape: int) -> torch.Tensor:
        """Random indices."""
        return torch.randint(below, shape, generator=self.generator)


def _calls() -> dict[str, Callable[[Maker], Made]]:
    """Name -> an operator on operands whose sizes are multiples of the ranks, where a rule lets them be cut."""
    return {
        "linear": lambda m: (aten.linear.default, [m.x(2, m.n, 2 * m.n), m.x(3 * m.n, 2 * m.n), m.x(3 * m.n)], {}),
        "linear without bias": lambda m: (aten.linear.default, [m.x(m.n, 2 * m.n), m.x(m.n, 2 * m.n)], {}),
        "mm": lambda m: (aten.mm.default, [m.x(m.n, 2 * m.n), m.x(2 * m.n, m.n)], {}),
        "addmm": lambda m: (aten.addmm.default, [m.x(m.n), m.x(2 * m.n, m.n), m.x(m.n, m.n)], {}),
        "addmm of a matrix": lambda m: (aten.addmm.default, [m.x(2, m.n), m.x(2, m.n), m.x(m.n, m.n)], {}),
        "bmm": lambda m: (aten.bmm.default, [m.x(m.n, 2, m.n), m.x(m.n, m.n, 2 * m.n)], {}),
        "baddbmm": lambda m: (aten.baddbmm.default, [m.x(m.n, 1, m.n), m.x(m.n, 2, m.n), m.x(m.n, m.n, m.n)], {}),
        "mv": lambda m: (aten.mv.default, [m.x(m.n, m.n), m.x(m.n)], {}),
        "dot": lambda m: (aten.dot.default, [m.x(2 * m.n), m.x(2 * m.n)], {}),
        "convolution": lambda m: (
            aten.convolution.default,
            [m.x(m.n, m.n, 4, 4), m.x(2 * m.n, m.n, 3, 3), m.x(2 * m.n), [1, 1], [1, 1], [1, 1], False, [0, 0], 1],
            {},
        ),
        "convolution of groups": lambda m: (
            aten.convolution.default,
            [m.x(2, m.n * m.n, 4), m.x(2 * m.n * m.n, m.n, 3), None, [2], [1], [1], False, [0], m.n],
            {},
        ),
        "transposed convolution": lambda m: (
            aten.convolution.default,
            [m.x(m.n, m.n, 2, 2), m.x(m.n, 2 * m.n, 2, 2), m.x(2 * m.n), [2, 2], [0, 0], [1, 1], True, [0, 0], 1],
            {},
        ),
        "embedding": lambda m: (aten.embedding.default, [m.x(3 * m.n, 2 * m.n), m.i(3 * m.n, m.n, 5)], {}),
        "attention": lambda m: (
            aten.scaled_dot_product_attention.default,
            [m.x(m.n, m.n, m.n, 4), m.x(m.n, m.n, 5, 4), m.x(m.n, m.n, 5, m.n), m.x(1, m.n, m.n, 5)],
            {},
        ),
        "causal attention": lambda m: (
            aten.scaled_dot_product_attention.default,
            [m.x(2, m.n, m.n, 4), m.x(2, m.n, m.n, 4), m.x(2, m.n, m.n, 4), None, 0.0, True],
            {},
        ),
        "grouped queries": lambda m: (
            aten.scaled_dot_product_attention.default,
            [m.x(1, 2 * m.n * m.n, 3, 4), m.x(1, 2 * m.n, 3, 4), m.x(1, 2 * m.n, 3, 4)],
            {"enable_gqa": True},
        ),
        "add": lambda m: (aten.add.Tensor, [m.x(m.n, 1, 2 * m.n), m.x(3, 2 * m.n)], {}),
        "add of a number": lambda m: (aten.add.Tensor, [m.x(m.n, m.n), 2.0], {}),
        "sub": lambda m: (aten.sub.Tensor, [m.x(m.n, m.n), m.x(m.n, m.n)], {}),
        "mul": lambda m: (aten.mul.Tensor, [m.x(m.n, 2 * m.n), m.x(2 * m.n)], {}),
        "div": lambda m: (aten.div.Tensor, [m.x(m.n, 2 * m.n), m.x(2 * m.n).abs() + 1], {}),
        "where": lambda m: (aten.where.self, [m.i(2, m.n, 4) > 0, m.x(m.n, 4), m.x(m.n, 1)], {}),
        "tanh": lambda m: (aten.tanh.default, [m.x(m.n, 3)], {}),
        "gelu": lambda m: (aten.gelu.default, [m.x(m.n, 2 * m.n)], {}),
        "cast": lambda m: (aten._to_copy.default, [m.x(m.n, 2)], {"dtype": torch.float64}),
        "dropout of nothing": lambda m: (aten.native_dropout.default, [m.x(m.n, 4), 0.0, True], {}),
        "view that splits": lambda m: (aten.view.default, [m.x(2, m.n * 2 * m.n), [2, m.n, 2 * m.n]], {}),
        "view that merges": lambda m: (aten.view.default, [m.x(m.n, 2 * m.n, 3), [m.n * 2 * m.n, 3]], {}),
        "view that regroups": lambda m: (aten.view.default, [m.x(2 * m.n, 3 * m.n), [2, m.n, 3, m.n]], {}),
        "view across": lambda m: (aten.view.default, [m.x(3, 4 * m.n), [4, 3 * m.n]], {}),
        "unsqueeze": lambda m: (aten.unsqueeze.default, [m.x(m.n, 2), 1], {}),
        "squeeze": lambda m: (aten.squeeze.dims, [m.x(m.n, 1, 2), [1]], {}),
        "permute": lambda m: (aten.permute.default, [m.x(m.n, 2, 2 * m.n), [2, 0, 1]], {}),
        "transpose": lambda m: (aten.transpose.int, [m.x(m.n, 2, 2 * m.n), -1, 0], {}),
        "expand": lambda m: (aten.expand.default, [m.x(2 * m.n, 1), [3, 2 * m.n, m.n]], {}),
        "repeat": lambda m: (aten.repeat.default, [m.x(m.n, 2), [m.n, m.n, 2]], {}),
        "split": lambda m: (aten.split_with_sizes.default, [m.x(2, 6 * m.n), [2 * m.n] * 3, -1], {}),
        "split by size": lambda m: (aten.split.Tensor, [m.x(2, 6 * m.n), 2 * m.n, -1], {}),
        "unbind": lambda m: (aten.unbind.int, [m.x(m.n, 3, 2), 1], {}),
        "uneven split": lambda m: (aten.split_with_sizes.default, [m.x(m.n, 3 * m.n), [m.n, 2 * m.n], 1], {}),
        "slice": lambda m: (aten.slice.Tensor, [m.x(m.n, 4 * m.n), 1, 2 * m.n, 2**63 - 1], {}),
        "slice from the end": lambda m: (aten.slice.Tensor, [m.x(m.n, 4 * m.n), 1, -m.n, 2**63 - 1], {}),
        "slice of a few": lambda m: (aten.slice.Tensor, [m.x(m.n, 4 * m.n), 1, 1, 4], {}),
        "select": lambda m: (aten.select.int, [m.x(m.n, 3, 2 * m.n), 1, -1], {}),
        "cat": lambda m: (aten.cat.default, [[m.x(m.n, 2 * m.n), m.x(m.n, 2 * m.n)], -1], {}),
        "uneven cat": lambda m: (aten.cat.default, [[m.x(m.n, 2 * m.n), m.x(m.n, m.n)], 1], {}),
        "stack": lambda m: (aten.stack.default, [[m.x(m.n, 2), m.x(m.n, 2)], 1], {}),
        "pad": lambda m: (aten.constant_pad_nd.default, [m.x(m.n, 4), [1, 1]], {}),
        "slice_scatter": lambda m: (aten.slice_scatter.default, [m.x(m.n, 4), m.x(m.n, 2), 1, 1, 3], {}),
        "select_scatter": lambda m: (aten.select_scatter.default, [m.x(m.n, 4, m.n), m.x(m.n, m.n), 1, 2], {}),
        "copy": lambda m: (aten.copy.default, [m.x(m.n, 4), m.x(1, 4)], {}),
        "sum": lambda m: (aten.sum.dim_IntList, [m.x(m.n, 2 * m.n, 3), [1]], {}),
        "sum of all": lambda m: (aten.sum.default, [m.x(m.n, 2 * m.n)], {}),
        "mean": lambda m: (aten.mean.dim, [m.x(m.n, 2 * m.n, 3), [-2, -1], True], {}),
        "amax": lambda m: (aten.amax.default, [m.x(m.n, 2 * m.n), [1]], {}),
        "max": lambda m: (aten.max.dim, [m.x(m.n, 2 * m.n), 1], {}),
        "min": lambda m: (aten.min.dim, [m.x(m.n, 2 * m.n), 0, True], {}),
        "argmax": lambda m: (aten.argmax.default, [m.x(m.n, 2 * m.n), 1], {}),
        "amin": lambda m: (aten.amin.default, [m.x(m.n, 2 * m.n), [0], True], {}),
        "argmin": lambda m: (aten.argmin.default, [m.x(m.n, 2 * m.n), 0], {}),
        "var": lambda m: (aten.var.correction, [m.x(m.n, 2 * m.n), [1]], {"correction": 0}),
        "std": lambda m: (aten.std.correction, [m.x(m.n, 2 * m.n), [1]], {"correction": 0}),
        "prod": lambda m: (aten.prod.dim_int, [m.x(m.n, 3), 1], {}),
        "logsumexp": lambda m: (aten.logsumexp.default, [m.x(m.n, 2 * m.n), [1]], {}),
        "any": lambda m: (aten.any.dim, [m.i(2, m.n, 2 * m.n) > 0, 1], {}),
        "all": lambda m: (aten.all.dim, [m.i(2, m.n, 2 * m.n) > 0, 1], {}),
        "softmax": lambda m: (aten.softmax.int, [m.x(m.n, 2 * m.n), -1], {}),
        "log_softmax": lambda m: (aten.log_softmax.int, [m.x(m.n, 2 * m.n), 0], {}),
        "cumsum": lambda m: (aten.cumsum.default, [m.x(m.n, 2 * m.n), 1], {}),
        "cumprod": lambda m: (aten.cumprod.default, [m.x(m.n, 3), 1], {}),
        "older softmax": lambda m: (aten._softmax.default, [m.x(m.n, 2 * m.n), 1, False], {}),
        "older log_softmax": lambda m: (aten._log_softmax.default, [m.x(m.n, 2 * m.n), 1, False], {}),
        "roll": lambda m: (aten.roll.default, [m.x(m.n, 2 * m.n), [1], [1]], {}),
        "sort": lambda m: (aten.sort.default, [m.x(m.n, 2 * m.n), 1], {}),
        "topk": lambda m: (aten.topk.default, [m.x(m.n, 2 * m.n), 2], {}),
        "flip": lambda m: (aten.flip.default, [m.x(m.n, 2 * m.n), [0]], {}),
        "layer_norm": lambda m: (
            aten.layer_norm.default,
            [m.x(m.n, 2, 2 * m.n), [2 * m.n], m.x(2 * m.n), m.x(2 * m.n)],
            {},
        ),
        "rms_norm": lambda m: (aten.rms_norm.default, [m.x(m.n, 2 * m.n), [2 * m.n], m.x(2 * m.n)], {}),
        "layer_norm with statistics": lambda m: (
            aten.native_layer_norm.default,
            [m.x(m.n, 2, 2 * m.n), [2 * m.n], m.x(2 * m.n), m.x(2 * m.n), 1e-5],
            {},
        ),
        "fused rms_norm": lambda m: (aten._fused_rms_norm.default, [m.x(m.n, 4), [4], m.x(4), 1e-5], {}),
        "group_norm": lambda m: (
            aten.group_norm.default,
            [m.x(m.n, 4 * m.n, 3, 3), 2 * m.n, m.x(4 * m.n), m.x(4 * m.n)],
            {},
        ),
        "batch_norm": lambda m: (
            aten._native_batch_norm_legit_no_training.default,
            [m.x(m.n, 2 * m.n, 3), m.x(2 * m.n), m.x(2 * m.n), m.x(2 * m.n), m.x(2 * m.n).abs() + 1, 0.1, 1e-5],
            {},
        ),
        "batch_norm of a batch": lambda m: (
            aten._native_batch_norm_legit_functional.default,
            [m.x(m.n, 2 * m.n, 3), m.x(2 * m.n), m.x(2 * m.n), m.x(2 * m.n), m.x(2 * m.n).abs(), True, 0.1, 1e-5],
            {},
        ),
        "norm of instances": lambda m: (
            aten._native_batch_norm_legit.no_stats,
            [m.x(1, 2 * m.n, 3), m.x(2 * m.n), m.x(2 * m.n), True, 0.1, 1e-5],
            {},
        ),
        "max_pool2d": lambda m: (aten.max_pool2d_with_indices.default, [m.x(m.n, m.n, 4, 4), [2, 2]], {}),
        "avg_pool2d": lambda m: (aten.avg_pool2d.default, [m.x(m.n, m.n, 4, 4), [2, 2]], {}),
        "adaptive pool": lambda m: (aten._adaptive_avg_pool2d.default, [m.x(m.n, m.n, 4, 4), [1, 1]], {}),
        "upsample": lambda m: (aten.upsample_nearest2d.vec, [m.x(m.n, m.n, 2, 2), None, [2.0, 2.0]], {}),
        "bilinear": lambda m: (aten.upsample_bilinear2d.vec, [m.x(m.n, m.n, 2, 2), None, False, [2.0, 2.0]], {}),
        "gather": lambda m: (aten.gather.default, [m.x(m.n, 2 * m.n), 1, m.i(2 * m.n, m.n, m.n)], {}),
        "index_select": lambda m: (aten.index_select.default, [m.x(m.n, 5, m.n), 1, m.i(5, m.n)], {}),
        "scatter_add": lambda m: (
            aten.scatter_add.default,
            [m.x(m.n, 5), 1, m.i(5, m.n, 2 * m.n), m.x(m.n, 2 * m.n)],
            {},
        ),
        "scatter": lambda m: (aten.scatter.src, [m.x(m.n, 5), 1, m.i(5, m.n, 1), m.x(m.n, 1)], {}),
        "index": lambda m: (aten.index.Tensor, [m.x(5, m.n), [m.i(5, m.n, 2)]], {}),
        "index of two": lambda m: (aten.index.Tensor, [m.x(m.n, 5, 3), [None, m.i(5, m.n), m.i(3, m.n)]], {}),
        "index apart": lambda m: (aten.index.Tensor, [m.x(5, m.n, 3), [m.i(5, m.n), None, m.i(3, m.n)]], {}),
        "index_put": lambda m: (aten.index_put.default, [m.x(5, m.n), [torch.tensor([1, 3])], m.x(2, m.n)], {}),
        "grouped product": lambda m: (
            aten._grouped_mm.default,
            [m.x(8, 16 * m.n).bfloat16(), m.x(2, 16 * m.n, 16 * m.n).bfloat16(), torch.tensor([3, 8]).int()],
            {},
        ),
    }


CALLS = _calls()
