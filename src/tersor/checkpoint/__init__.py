"""What is it called on disk? Streaming safetensors in and out, our config, foreign formats."""

from tersor.checkpoint.config import Override, QuantizationConfig

__all__ = ["Override", "QuantizationConfig"]
