"""TFDS builder of the gas dataset."""

from collections.abc import Sequence
from pathlib import Path

from posterior_matching.data import maf
from posterior_matching.data.builders.tabular import TabularBuilder


class Gas(TabularBuilder):
    """Readings of eight chemical sensors exposed to mixtures of ethylene and carbon monoxide in air."""

    NUM_FEATURES = 8
    ROWS = (852_174, 94_685, 105_206)  # train, val, test
    GAUSSIAN_NATS = -3.58
    DRIVE_IDS = (
        "1rhhLpGY5-5YZ-GQaZq_FniAMK9cqvxW7",
        "1y4TeXr5WhMWDZIwHh4iLIVj-eV3MgwBB",
        "17aRcAFtnYg6SVtGHksDZCQ5mgJwvve6L",
    )
    ARCHIVES = (
        ("https://archive.ics.uci.edu/static/public/322/gas+sensor+array+under+dynamic+gas+mixtures.zip",),
        ("https://archive.ics.uci.edu/ml/machine-learning-databases/00322/data.zip",),
        ("ethylene_CO.txt",),
    )
    HOMEPAGE = "https://archive.ics.uci.edu/dataset/322"
    CITATION = r"""
@article{fonollosa2015reservoir,
  title={Reservoir computing compensates slow response of chemosensor arrays exposed to fast varying gas
    concentrations in continuous monitoring},
  author={Fonollosa, Jordi and Sheik, Sadique and Huerta, Ram{\'o}n and Marco, Santiago},
  journal={Sensors and Actuators B: Chemical},
  volume={215},
  year={2015}
}
"""

    def preprocess(self, files: Sequence[Path]) -> maf.Splits:
        return maf.gas(files)
