"""TFDS builder of the gas dataset."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from posterior_matching.data import maf


class Gas(maf.TabularBuilder):
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
    CITATION = """
@article{fonollosa2015reservoir, title={Reservoir computing compensates slow response of chemosensor arrays exposed to
  fast varying gas concentrations in continuous monitoring}, journal={Sensors and Actuators B: Chemical}, volume={215},
  author={Fonollosa, Jordi and Sheik, Sadique and Huerta, Ramon and Marco, Santiago}, year={2015}}
"""

    def preprocess(self, files: Sequence[Path]) -> maf.Splits:
        """Eight of sixteen sensors, for a random quarter of the readings.

        Args:
            files: `ethylene_CO.txt` or a zip archive of it: a header line, then time, two concentrations, 16 sensors.
        """
        with maf.open_member(files, "ethylene_CO.txt") as file:
            table = {"header": None, "skiprows": 1, "usecols": range(3, 19), "dtype": np.float32}
            chunks = pd.read_csv(file, sep=r"\s+", chunksize=200_000, **table)
            x = np.concatenate([chunk.to_numpy() for chunk in chunks])
        x = x[np.random.default_rng(0).permutation(len(x))[: round(len(x) / 4)]].astype(np.float64)
        x = x[:, _uncorrelated(np.corrcoef(x, rowvar=False))]
        x = (x - x.mean(axis=0)) / x.std(axis=0, ddof=1)
        train, val, test = maf.last_tenths(x)
        return maf.float32(train, val, test)


def _uncorrelated(correlation: np.ndarray) -> list[int]:
    """Returns the columns that remain when the first with a correlation above 0.98 is dropped until there is none."""
    kept = list(range(len(correlation)))
    while (redundant := (correlation[np.ix_(kept, kept)] > 0.98).sum(axis=1) > 1).any():  # 1: with itself
        del kept[redundant.argmax()]
    return kept
