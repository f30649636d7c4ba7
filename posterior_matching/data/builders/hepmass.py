"""TFDS builder of the hepmass dataset."""

from collections.abc import Sequence
from pathlib import Path

from posterior_matching.data import maf
from posterior_matching.data.builders.tabular import TabularBuilder


class Hepmass(TabularBuilder):
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
@article{baldi2016parameterized,
  title={Parameterized neural networks for high-energy physics},
  author={Baldi, Pierre and Cranmer, Kyle and Faucett, Taylor and Sadowski, Peter and Whiteson, Daniel},
  journal={The European Physical Journal C},
  volume={76},
  year={2016}
}
"""

    def preprocess(self, files: Sequence[Path]) -> maf.Splits:
        return maf.hepmass(files)
