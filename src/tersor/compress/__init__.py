"""Which code should this weight get?"""

from tersor.compress.rtn import Encoded, quantize_rtn

__all__ = ["Encoded", "quantize_rtn"]
