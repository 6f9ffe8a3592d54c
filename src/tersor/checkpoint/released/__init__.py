"""Which checkpoints that others compressed are read, and how? Weights are decoded in blocks of rows.

`methods` holds the table of methods and says what a checkpoint is compressed by; a module for each family of methods
finds the tensors of a weight, checks them and says how rows are decoded.
"""

from tersor.checkpoint.released.methods import Released, compression_of, read_released
from tersor.checkpoint.released.parts import DecodedTensor

__all__ = ["DecodedTensor", "Released", "compression_of", "read_released"]
