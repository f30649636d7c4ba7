"""The bsds dataset."""

from .bsds import Bsds as Bsds
