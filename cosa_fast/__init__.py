"""CoSA weakly supervised semantic segmentation, from image-level tags to masks."""

__version__ = "0.1.0"
