"""What does this bit pattern mean? Element formats, scales, exact encode and decode, tolerances."""

from tersor.formats.activations import Activations
from tersor.formats.dtypes import FLOAT_DTYPES, dtype_name, float_dtype, float_dtype_or_auto
from tersor.formats.element import ElementFormat, get, names
from tersor.formats.encoded import Encoded, Objective, dequantize
from tersor.formats.mix import MOST_LEVELS, Assignment, Mix
from tersor.formats.scheme import (
    SCALE_DTYPES,
    ScaleError,
    Scheme,
    get_scheme,
    scale_values,
    scheme_names,
    store_scales,
)
from tersor.formats.sparse import Plain, Pruned, Sparse, Values, mask_bytes, plain_values
from tersor.formats.tolerance import product_tolerance

__all__ = [
    "FLOAT_DTYPES",
    "MOST_LEVELS",
    "SCALE_DTYPES",
    "Activations",
    "Assignment",
    "ElementFormat",
    "Encoded",
    "Mix",
    "Objective",
    "Plain",
    "Pruned",
    "ScaleError",
    "Scheme",
    "Sparse",
    "Values",
    "dequantize",
    "dtype_name",
    "float_dtype",
    "float_dtype_or_auto",
    "get",
    "get_scheme",
    "mask_bytes",
    "names",
    "plain_values",
    "product_tolerance",
    "scale_values",
    "scheme_names",
    "store_scales",
]
