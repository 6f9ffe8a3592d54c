"""What do others call it? Registration with transformers and peft, without importing them."""

from __future__ import annotations

from _tersor_hook import register

__all__ = ["register"]
