"""What does this bit pattern mean? Element formats, scales, exact encode and decode, tolerances."""

from tersor.formats.activations import EIGHT_BIT, Activations
from tersor.formats.dtypes import FLOAT_DTYPES, dtype_name, float_dtype, float_dtype_or_auto
from tersor.formats.element import LUTS, ElementFormat, get, names
from tersor.formats.encoded import Encoded, Objective, dequantize
from tersor.formats.mix import MOST_LEVELS, Assignment, Mix
from tersor.formats.outliers import Outliers, add_outliers, cut_outliers, outlier_columns, outlier_values, outlier_words
from tersor.formats.scheme import (
    SCALE_DTYPES,
    TABLE_DTYPES,
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
    "EIGHT_BIT",
    "FLOAT_DTYPES",
    "LUTS",
    "MOST_LEVELS",
    "SCALE_DTYPES",
    "TABLE_DTYPES",
    "Activations",
    "Assignment",
    "ElementFormat",
    "Encoded",
    "Mix",
    "Objective",
    "Outliers",
    "Plain",
    "Pruned",
    "ScaleError",
    "Scheme",
    "Sparse",
    "Values",
    "add_outliers",
    "cut_outliers",
    "dequantize",
    "dtype_name",
    "float_dtype",
    "float_dtype_or_auto",
    "get",
    "get_scheme",
    "mask_bytes",
    "names",
    "outlier_columns",
    "outlier_values",
    "outlier_words",
    "plain_values",
    "product_tolerance",
    "scale_values",
    "scheme_names",
    "store_scales",
]
