"""Datasets by name, as arrays in host memory (`load`), and the step from stored rows to model input (`decode`).

| name | rows | from |
|---|---|---|
| `digits` | [8, 8, 1] images, values 0..16 | scikit-learn's handwritten digits, no download |
| `mixture` | [8] features | samples of a known Gaussian mixture (`mixture_log_prob`), no download |
| `patches` | [63] features | natural image patches of scikit-learn's sample photographs, no download |
| `gas` `power` `hepmass` `miniboone` `bsds` | [8] [6] [21] [43] [63] features | TFDS builders, `data/builders/` |
| `mnist16`, `mnist16_flat` | [16, 16, 1] images, [256] features in [0, 1] | `mnist`, resized |
| `celeb_a` | [64, 64, 3] images | TFDS, cropped and resized |
| any other TFDS name | its `image` (uint8, fixed shape) or `features` | TFDS |
| a path to `.npy`, `.npz` or `.csv` | features, NaN = missing, standardised | your own table |
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from posterior_matching.data import builtin, files, tfds_reader
from posterior_matching.data.builtin import mixture_log_prob
from posterior_matching.data.splits import resolve_split, unknown_split
from posterior_matching.errors import UserError

if TYPE_CHECKING:
    import jax

__all__ = ["Dataset", "Standardisation", "decode", "load", "load_for_training", "mixture_log_prob"]


@dataclasses.dataclass(frozen=True, eq=False)
class Standardisation:
    """The affine map that gives every feature mean 0 and standard deviation 1 on the training part.

    Attributes:
        mean: [d] float64, in the units of the file.
        std: [d] float64, positive, in the units of the file.
    """

    mean: np.ndarray
    std: np.ndarray

    def apply(self, x: np.ndarray) -> np.ndarray:
        """Maps rows [..., d] in the units of the file to standard units, float32. NaN stays NaN."""
        return ((x - self.mean) / self.std).astype(np.float32)

    def invert(self, x: np.ndarray) -> np.ndarray:
        """Maps rows [..., d] in standard units back to the units of the file, float64."""
        return np.asarray(x, np.float64) * self.std + self.mean

    def to_json(self) -> dict[str, list[float]]:
        """Returns plain lists, which survive `json` exactly; `from_json` reads them back."""
        return {"mean": self.mean.tolist(), "std": self.std.tolist()}

    @classmethod
    def from_json(cls, values: dict[str, list[float]]) -> "Standardisation":
        """Reads what `to_json` wrote."""
        return cls(np.asarray(values["mean"], np.float64), np.asarray(values["std"], np.float64))


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """One split, in host memory, as stored; `decode` turns rows of `x` into model input.

    Attributes:
        name: The name or path given to `load`.
        split: The split as the dataset itself calls it.
        x: [N, H, W, C] uint8 or float32 images in [0, `max_value`], or [N, d] float32 features with NaN = missing.
        label: [N] int32 class labels, or None.
        max_value: The pixel value that means 1: 255 for uint8 images, 16 for `digits`; 1 for images already in [0, 1]
            and for features.
        standardisation: How `x` was made from the user's own file; None for every other dataset.
        feature_names: The d column names, where the file has them.
    """

    name: str
    split: str
    x: np.ndarray
    label: np.ndarray | None = None
    max_value: float = 1.0
    standardisation: Standardisation | None = None
    feature_names: tuple[str, ...] | None = None

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one example: (H, W, C) or (d,)."""
        return self.x.shape[1:]

    def __len__(self) -> int:
        return len(self.x)


def load(name: str, split: str, *, standardisation: Standardisation | None = None) -> Dataset:
    """Loads one split of a dataset, downloading and preparing TFDS data on first use.

    Args:
        name: A name of the table above, or the path of a `.npy`, `.npz` or `.csv` file (see `files.read`).
        split: `train`, `validation` or `test`, whatever the dataset calls them: `validation` is its `val` or
            `validation`, or else its `test`. Other strings go to TFDS (`train[:90%]`). `all` is every row of an own
            file, in the order of the file.
        standardisation: For an own file, that of the run to evaluate; by default that of the file's training part.

    Raises:
        UserError: The name, split or file is unknown or malformed, or the data cannot be downloaded.
    """
    if Path(name).suffix.lower() in files.READERS:
        return _load_own(name, split, standardisation)
    if standardisation is not None:
        raise UserError(
            f"dataset '{name}' has its own units, but this run was trained on a standardised file: pass a file"
        )
    if name not in builtin.DATASETS:
        split, x, label = tfds_reader.read(name, split)
        return Dataset(name, split, x, label, max_value=255.0 if x.dtype == np.uint8 else 1.0)
    parts, max_value = builtin.DATASETS[name]()
    split = resolve_split(split, parts)
    if split not in parts:
        raise unknown_split(name, split, parts)
    return Dataset(name, split, *parts[split], max_value=max_value)


def load_for_training(
    config: Mapping[str, Any], standardisation: Standardisation | None = None
) -> tuple[Dataset, Dataset]:
    """Loads the training and the validation part that an experiment's config names.

    Args:
        config: With `dataset`, `train_split` and `validation_split`.
        standardisation: Of an own file, that of the run to build on; by default that of the file's training part.

    Raises:
        UserError: `config.dataset` is not set, or see `load`.
    """
    name = config["dataset"]
    if name is None:
        raise UserError("missing key 'config.dataset': a name (README, \"Data\") or a path to .npy, .npz or .csv")
    train = load(name, config["train_split"], standardisation=standardisation)
    return train, load(name, config["validation_split"], standardisation=train.standardisation)


def _load_own(path: str, split: str, standardisation: Standardisation | None) -> Dataset:
    parts, feature_names = files.read(path)
    split = resolve_split(split, parts)
    if split not in parts:
        raise unknown_split(path, split, parts)
    if standardisation is None:
        standardisation = Standardisation(*files.mean_and_std(path, parts["train"], feature_names))
    x = parts[split]
    if x.shape[1] != len(standardisation.mean):
        raise UserError(f"'{path}' has {x.shape[1]} columns, but the run was trained on {len(standardisation.mean)}")
    if len(x) == 0:
        raise UserError(f"'{path}' has {len(parts['all'])} rows, too few for a '{split}' part: give at least 10")
    return Dataset(path, split, standardisation.apply(x), standardisation=standardisation, feature_names=feature_names)


def decode(x: "jax.Array", max_value: float) -> tuple["jax.Array", "jax.Array"]:
    """Turns stored rows into model input; jit-able.

    Args:
        x: [B, H, W, C] images or [B, d] features, as in `Dataset.x`.
        max_value: `Dataset.max_value`.

    Returns:
        Model input, float32: images [B, H, W, C] in [0, 1], or features [B, d] with 0 where missing; and what is
        available, float32: 1 where the value is known, 0 where it is missing, [B, H, W, 1] or [B, d].
    """
    import jax.numpy as jnp

    x = x.astype(jnp.float32)
    if x.ndim == 4:
        return x / max_value, jnp.ones((*x.shape[:3], 1), jnp.float32)
    missing = jnp.isnan(x)
    return jnp.where(missing, 0.0, x), 1.0 - missing.astype(jnp.float32)
