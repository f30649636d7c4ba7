"""The power dataset."""

from .power import Power as Power
