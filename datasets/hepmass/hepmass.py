"""TFDS builder of the hepmass dataset."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from posterior_matching.data import maf


class Hepmass(maf.TabularBuilder):
    """Simulated particle collisions that produce a particle of mass 1000, described by 21 kinematic features."""

    NUM_FEATURES = 21
    ROWS = (315_123, 35_013, 174_987)  # train, val, test
    GAUSSIAN_NATS = -27.93
    DRIVE_IDS = (
        "13PF7GfAhKy1WFgoFodpFlHEMK4ImDQsn",
        "13w__3XmdCMSuXO3io9sKdxclefXV5GQP",
        "1cgrGD-915n52buzHoMyaH9gRq1th-BDF",
    )
    ARCHIVES = (
        (
            "https://archive.ics.uci.edu/ml/machine-learning-databases/00347/1000_train.csv.gz",
            "https://archive.ics.uci.edu/ml/machine-learning-databases/00347/1000_test.csv.gz",
        ),
        ("https://archive.ics.uci.edu/static/public/347/hepmass.zip",),  # larger, with the other masses
        ("1000_train.csv", "1000_test.csv"),
    )
    HOMEPAGE = "https://archive.ics.uci.edu/dataset/347"
    CITATION = """
@article{baldi2016parameterized, title={Parameterized neural networks for high-energy physics}, year={2016},
  author={Baldi, Pierre and Cranmer, Kyle and Faucett, Taylor and Sadowski, Peter and Whiteson, Daniel},
  journal={The European Physical Journal C}, volume={76}}
"""

    def preprocess(self, files: Sequence[Path]) -> maf.Splits:
        """Signal events among the first tenth of the simulated collisions, in 21 kinematic features.

        Args:
            files: `1000_train.csv.gz` and `1000_test.csv.gz`, or a zip archive of them: a header line, then the label
                (1 = signal) and 27 features. The header names only 26, and the published tables lack the last.
        """
        x, test = _signals(files, "1000_train.csv", 700_000), _signals(files, "1000_test.csv", 350_000)
        varied = ~maf.has_spike(x)
        x, test = x[:, varied], test[:, varied]
        mean, std = x.mean(axis=0), x.std(axis=0, ddof=1)
        train, val = np.split((x - mean) / std, [-int(0.1 * len(x))])
        return maf.float32(train, val, (test - mean) / std)


def _signals(files: Sequence[Path], name: str, num_rows: int) -> np.ndarray:
    with maf.open_member(files, name) as file:
        x = pd.read_csv(file, skiprows=1, header=None, usecols=range(27), nrows=num_rows).to_numpy()
    return x[x[:, 0] == 1, 1:]
