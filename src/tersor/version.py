"""The version of Tersor, read by the build and by `tersor.__version__`."""

__version__ = "0.1.0"
