"""What do others call it? Registration with transformers, without importing it."""

from __future__ import annotations

from _tersor_hook import register

__all__ = ["register"]
