"""The gas dataset."""

from .gas import Gas as Gas
