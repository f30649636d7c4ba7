"""TFDS builder of the miniboone dataset."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from posterior_matching.data import maf


class Miniboone(maf.TabularBuilder):
    """Electron neutrino events of the MiniBooNE experiment, described by 43 features."""

    NUM_FEATURES = 43
    ROWS = (29_556, 3_284, 3_648)  # train, val, test
    GAUSSIAN_NATS = -37.24
    DRIVE_IDS = (
        "14CJDG_EWpocULPFWde_eLJ_ixlavm3L-",
        "1LH7d70p3oScUXNLiWXN1ZzDT9oc3i5mf",
        "1QsJ9RW_-VdMIdM87i-_y3VSmBlibcdr1",
    )
    ARCHIVES = (
        ("https://archive.ics.uci.edu/ml/machine-learning-databases/00199/MiniBooNE_PID.txt",),
        ("https://archive.ics.uci.edu/static/public/199/miniboone+particle+identification.zip",),
    )
    HOMEPAGE = "https://archive.ics.uci.edu/dataset/199"
    CITATION = """
@article{roe2005boosted, title={Boosted decision trees as an alternative to artificial neural networks for particle
  identification}, journal={Nuclear Instruments and Methods in Physics Research A}, volume={543}, year={2005},
  author={Roe, Byron P. and Yang, Hai-Jun and Zhu, Ji and Liu, Yong and Stancu, Ion and McGregor, Gordon}}
"""

    def preprocess(self, files: Sequence[Path]) -> maf.Splits:
        """Electron neutrino events, in 43 features.

        Args:
            files: `MiniBooNE_PID.txt` or a zip archive of it: a line with the numbers of signal and background events,
                then the events, 50 features each.
        """
        with maf.open_member(files, "MiniBooNE_PID.txt") as file:
            num_signals = int(file.readline().split()[0])
            x = pd.read_csv(file, sep=r"\s+", header=None, nrows=num_signals).to_numpy()
        x = x[x[:, 0] >= -100]  # 11 events have -999 everywhere
        return maf.standardised(*maf.last_tenths(x[:, ~maf.has_spike(x)]))
