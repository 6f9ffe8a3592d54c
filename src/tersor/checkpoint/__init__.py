"""What is it called on disk? Streaming safetensors in and out, our config, foreign formats."""

from tersor.checkpoint.config import Override, QuantizationConfig
from tersor.checkpoint.convert import quantize
from tersor.checkpoint.report import Report, Row

__all__ = ["Override", "QuantizationConfig", "Report", "Row", "quantize"]
