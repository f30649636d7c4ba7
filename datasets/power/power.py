"""TFDS builder of the power dataset."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from posterior_matching.data import maf


class Power(maf.TabularBuilder):
    """Electric power consumption of one household over 47 months, one reading a minute."""

    NUM_FEATURES = 6
    ROWS = (1_659_917, 184_435, 204_928)  # train, val, test
    GAUSSIAN_NATS = -7.74
    DRIVE_IDS = (
        "10DB7jmsqjNTLAKEoRnT07F2hcRNOCRjM",
        "1XmPwLzSKljjWB9CrBRsbn3nYhOdYxQiy",
        "1qX5O7eR6G2HOAMiNYnBvaQSuJkefRMtV",
    )
    ARCHIVES = (
        ("https://archive.ics.uci.edu/static/public/235/individual+household+electric+power+consumption.zip",),
        ("https://archive.ics.uci.edu/ml/machine-learning-databases/00235/household_power_consumption.zip",),
        ("household_power_consumption.txt",),
    )
    HOMEPAGE = "https://archive.ics.uci.edu/dataset/235"
    CITATION = r"""
@misc{hebrail2012individual, title={Individual household electric power consumption}, year={2012},
  author={H{\'e}brail, Georges and B{\'e}rard, Alice}, howpublished={UCI Machine Learning Repository}}
"""

    def preprocess(self, files: Sequence[Path]) -> maf.Splits:
        """Power, voltage, three meters and time of day, for each minute without missing values.

        Args:
            files: `household_power_consumption.txt` or a zip archive of it: `;` between the values, `?` where missing.
        """
        with maf.open_member(files, "household_power_consumption.txt") as file:
            columns = {"na_values": "?", "dtype": {"Time": "category"}, "usecols": lambda name: name != "Date"}
            frame = pd.read_csv(file, sep=";", **columns).dropna()
        clock = frame["Time"].cat
        minutes = [60 * int(time[:-6]) + int(time[-5:-3]) for time in clock.categories]  # 17:24:00
        # The published code drops two columns: reactive power, which is often exactly 0, and global intensity.
        names = ["Global_active_power", "Voltage", "Sub_metering_1", "Sub_metering_2", "Sub_metering_3"]
        minute = np.array(minutes)[clock.codes] + np.random.default_rng(0).uniform(size=len(frame))
        x = np.column_stack([frame[names], minute])
        rng = np.random.RandomState(42)  # the published shuffle, and noise of the size of the resolution
        x = x[rng.permutation(len(x))]
        x[:, 1] += 0.01 * rng.rand(len(x))
        x[:, 0] += 0.001 * rng.rand(len(x))
        x[:, 2:5] += rng.rand(len(x), 3)
        return maf.standardised(*maf.last_tenths(x))
