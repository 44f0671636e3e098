"""Framework-free sources of images and labels: embedded digits, CIFAR-10, Parquet, image folders, single files."""

from triptych.data.layouts import open_source
from triptych.data.source import Source

__all__ = ["Source", "open_source"]
