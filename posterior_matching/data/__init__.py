"""Data: the one door (`source`), and what lies behind it: built-in and TFDS arrays, users' tables and images."""

from posterior_matching.data.builtin import mixture_log_prob
from posterior_matching.data.dataset import Dataset, decode
from posterior_matching.data.gaussian import GaussianCheck
from posterior_matching.data.images.source import ImageFormat, ImageOptions, read_images
from posterior_matching.data.source import ArraySource, DataOptions, Source, load, open_source, saved_schema
from posterior_matching.data.tables.read import Table, TableOptions, read_table
from posterior_matching.data.tables.schema import TableSchema
from posterior_matching.data.tfds import gaussian_check

__all__ = [
    "ArraySource",
    "DataOptions",
    "Dataset",
    "GaussianCheck",
    "ImageFormat",
    "ImageOptions",
    "Source",
    "Table",
    "TableOptions",
    "TableSchema",
    "decode",
    "gaussian_check",
    "load",
    "mixture_log_prob",
    "open_source",
    "read_images",
    "read_table",
    "saved_schema",
]
