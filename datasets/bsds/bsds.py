"""TFDS builder of the bsds dataset."""

import tarfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from posterior_matching.data import maf
from posterior_matching.data.builtin import patch_features
from posterior_matching.errors import UserError


class Bsds(maf.TabularBuilder):
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
@inproceedings{martin2001database, title={A database of human segmented natural images and its application to
  evaluating segmentation algorithms and measuring ecological statistics}, year={2001},
  author={Martin, David and Fowlkes, Charless and Tal, Doron and Malik, Jitendra}, booktitle={ICCV}}
"""

    def preprocess(self, files: Sequence[Path]) -> maf.Splits:
        """Grey 8x8 patches of the BSDS300 photographs as `patch_features`, [N, 63], at distinct random positions.

        As in Uria et al. (2016), 180 of the 200 training photographs give the training patches and 20 those for
        validation.

        Args:
            files: `BSDS300-images.tgz`: JPEG files in folders `train` and `test`.
        """
        photographs = _photographs(files)
        rng = np.random.default_rng(0)
        order = rng.permutation(len(photographs["train"]))
        num_val = len(order) // 10
        train, val = ([photographs["train"][i] for i in part] for part in (order[num_val:], order[:num_val]))
        first, second, third = (
            _patches(part, size, rng) for part, size in zip((train, val, photographs["test"]), self.ROWS, strict=True)
        )
        return first, second, third


def _photographs(files: Sequence[Path]) -> dict[str, list[np.ndarray]]:
    """Returns [H, W] uint8 photographs by folder, in the order of their names."""
    found: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    with tarfile.open(files[0]) as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            folder = PurePosixPath(member.name).parent.name
            if folder in found and member.name.endswith(".jpg") and (file := archive.extractfile(member)):
                found[folder].append(np.asarray(Image.open(file).convert("L")))  # luma, rounded
    if not (found["test"] and len(found["train"]) >= 10):
        counts = f"{len(found['train'])} and {len(found['test'])}"
        raise UserError(f"'{files[0]}' has {counts} .jpg files in folders train and test, not 200 and 100")
    return found


def _patches(photographs: list[np.ndarray], num_rows: int, rng: np.random.Generator) -> np.ndarray:
    ends = np.linspace(0, num_rows, len(photographs) + 1).astype(int)  # shares that differ by at most one
    x = np.empty((num_rows, 63), np.float32)
    for photograph, start, end in zip(photographs, ends, ends[1:], strict=False):
        windows = np.lib.stride_tricks.sliding_window_view(photograph, (8, 8))
        chosen = rng.choice(np.prod(windows.shape[:2]), end - start, replace=False)
        x[start:end] = patch_features(windows[np.unravel_index(chosen, windows.shape[:2])].reshape(-1, 64), rng)
    return x[rng.permutation(num_rows)]
