"""What do other engines call the same stream? Names, shapes and metadata of four checkpoint formats.

The bytes of codes and scales are the same in all of them; an export changes what they are called, how they are viewed
and what config.json says. What a format's readers cannot say, or would read as something else, is refused before the
first byte is written. Sources: humming-kernels 0.1.20 (schema/humming.py, pack_weight.cuh), compressed-tensors 0.20.0
(pack_quantized, mxfp4, mxfp6, utils/match.py), amd-quark 0.13, and the readers of the three in vLLM 0.33.
"""

from tersor.checkpoint.exports.base import Export, Layers, Stored
from tersor.checkpoint.exports.compressed_tensors import CompressedTensorsExport
from tersor.checkpoint.exports.humming import HummingExport
from tersor.checkpoint.exports.quark import QuarkExport
from tersor.errors import FormatError, did_you_mean

__all__ = ["Export", "Layers", "Stored", "get_export"]

_EXPORTS: dict[str, type[Export]] = {
    export.name: export for export in (Export, HummingExport, CompressedTensorsExport, QuarkExport)
}


def get_export(name: str, model_dtype: str = "") -> Export:
    """Return the checkpoint format called `name` for a model of a dtype.

    Raises:
        FormatError: there is none.
    """
    if name not in _EXPORTS:
        raise FormatError(f"unknown export {name!r}{did_you_mean(name, _EXPORTS)} (exports: {', '.join(_EXPORTS)})")
    return _EXPORTS[name](model_dtype)
