"""The hepmass dataset."""

from .hepmass import Hepmass as Hepmass
