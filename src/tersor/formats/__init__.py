"""What does this bit pattern mean? Element formats, scales, exact encode and decode, tolerances."""

from tersor.formats.activations import Activations
from tersor.formats.element import ElementFormat, get, names
from tersor.formats.scheme import (
    SCALE_DTYPES,
    Scheme,
    get_scheme,
    scale_values,
    scheme_names,
    store_scales,
)
from tersor.formats.tolerance import product_tolerance

__all__ = [
    "SCALE_DTYPES",
    "Activations",
    "ElementFormat",
    "Scheme",
    "get",
    "get_scheme",
    "names",
    "product_tolerance",
    "scale_values",
    "scheme_names",
    "store_scales",
]
