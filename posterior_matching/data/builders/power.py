"""TFDS builder of the power dataset."""

from collections.abc import Sequence
from pathlib import Path

from posterior_matching.data import maf
from posterior_matching.data.builders.tabular import TabularBuilder


class Power(TabularBuilder):
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
@misc{hebrail2012individual,
  title={Individual household electric power consumption},
  author={H{\'e}brail, Georges and B{\'e}rard, Alice},
  howpublished={UCI Machine Learning Repository},
  year={2012}
}
"""

    def preprocess(self, files: Sequence[Path]) -> maf.Splits:
        return maf.power(files)
