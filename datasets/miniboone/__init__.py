"""The miniboone dataset."""

from .miniboone import Miniboone as Miniboone
