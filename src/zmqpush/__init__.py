"""The log shipper for Unix pipes over ZeroMQ."""

__all__ = ["__version__"]

__version__ = "0.1.0"
