"""The version of seal-fast that is installed."""

from importlib import metadata

try:
    __version__ = metadata.version("seal-fast")
except metadata.PackageNotFoundError:
    __version__ = "unknown (seal-fast is not installed: run `pip install -e .`)"
