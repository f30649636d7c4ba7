"""TFDS builder of the bsds dataset."""

from collections.abc import Sequence
from pathlib import Path

from posterior_matching.data import maf
from posterior_matching.data.builders.tabular import TabularBuilder


class Bsds(TabularBuilder):
    """Grey 8x8 patches of the BSDS300 photographs, dequantised, patch mean subtracted, last pixel dropped."""

    NUM_FEATURES = 63
    ROWS = (1_000_000, 50_000, 250_000)  # train, val, test
    GAUSSIAN_NATS = 96.67
    DRIVE_IDS = (
        "1YKOxuYRC-79h9ZUHQ0d7v1bi9ozKE608",
        "1ySm47-7yvoQOHi3_Gbvme6vD2hAzt3Yq",
        "1ZoqOzNzfSe33cWkjKYeUuJ9C57Nf2YlO",
    )
    ARCHIVES = (("https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/bsds/BSDS300-images.tgz",),)
    HOMEPAGE = "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/bsds/"
    CITATION = """
@inproceedings{martin2001database,
  title={A database of human segmented natural images and its application to evaluating segmentation algorithms and
    measuring ecological statistics},
  author={Martin, David and Fowlkes, Charless and Tal, Doron and Malik, Jitendra},
  booktitle={International Conference on Computer Vision},
  year={2001}
}
"""

    def preprocess(self, files: Sequence[Path]) -> maf.Splits:
        return maf.bsds(files, self.ROWS)
