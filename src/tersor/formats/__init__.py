"""What does this bit pattern mean? Element formats, scales, exact encode and decode, tolerances."""

from tersor.formats.activations import Activations
from tersor.formats.dtypes import FLOAT_DTYPES, dtype_name, float_dtype, float_dtype_or_auto
from tersor.formats.element import ElementFormat, get, names
from tersor.formats.encoded import Encoded, Objective, dequantize
from tersor.formats.scheme import (
    SCALE_DTYPES,
    ScaleError,
    Scheme,
    get_scheme,
    scale_values,
    scheme_names,
    store_scales,
)
from tersor.formats.tolerance import product_tolerance

__all__ = [
    "FLOAT_DTYPES",
    "SCALE_DTYPES",
    "Activations",
    "ElementFormat",
    "Encoded",
    "Objective",
    "ScaleError",
    "Scheme",
    "dequantize",
    "dtype_name",
    "float_dtype",
    "float_dtype_or_auto",
    "get",
    "get_scheme",
    "names",
    "product_tolerance",
    "scale_values",
    "scheme_names",
    "store_scales",
]
