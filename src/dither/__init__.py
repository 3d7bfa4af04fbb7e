"""Dither: quantize large language models, prove what that cost, and run them."""

__version__ = "0.1.0"
