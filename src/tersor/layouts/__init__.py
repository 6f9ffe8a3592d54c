"""Where does the code sit in memory? The stored stream, kernel tiles, and a packed weight in either."""

from tersor.layouts.weight import STREAM, PackedWeight

__all__ = ["STREAM", "PackedWeight"]
