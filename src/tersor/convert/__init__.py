"""How does a whole checkpoint become another? The job, the pipeline of blocks, resuming, the report."""

from tersor.convert.job import quantize
from tersor.convert.report import Report, Row

__all__ = ["Report", "Row", "quantize"]
