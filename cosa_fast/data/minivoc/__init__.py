"""MiniVOC: a small synthetic dataset in VOC2012 layout, drawn on demand, for tests and demonstrations."""

from .writer import generate

__all__ = ["generate"]
