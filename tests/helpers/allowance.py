"""Results against exact numbers and what they may err by: an assertion that says where, and how many times that."""

from __future__ import annotations

import torch


def within(y: torch.Tensor, exact: torch.Tensor, allowed: torch.Tensor, what: str) -> None:
    """Hold results [N, OC] against exact numbers: an error says where it is largest, how many times the allowance."""
    share = (y.double() - exact).abs() / allowed
    share = torch.where(share.isnan(), torch.inf, share).masked_fill(y.double() == exact, 0.0)
    at = int(share.argmax())
    token, row = divmod(at, y.shape[-1])
    assert float(share.max()) <= 1, (
        f"{what}: {float(share.flatten()[at]):.2f} of what is allowed at token {token}, row {row}: "
        f"{float(y.flatten()[at])} for {float(exact.flatten()[at])}; {int((share > 1).sum())} of {y.numel()} are beyond"
    )
