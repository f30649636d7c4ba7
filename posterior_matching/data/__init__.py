"""Datasets by name, as arrays in host memory (`load`), and the decoding of stored rows to model input (`decode`).

| name | rows | from |
|---|---|---|
| `digits` | [8, 8, 1] images, values 0..16 | scikit-learn's handwritten digits, no download |
| `mixture` | [8] features | samples of a known Gaussian mixture (`mixture_log_prob`), no download |
| `patches` | [63] features | natural image patches of scikit-learn's sample photographs, no download |
| `adult` | 6 real, 8 categorical columns | UCI Adult, `data/adult.py` |
| `gas` `power` `hepmass` `miniboone` `bsds` | [8] [6] [21] [43] [63] features | TFDS builders, `datasets/` |
| `mnist16`, `mnist16_flat` | [16, 16, 1] images, [256] features in [0, 1] | `mnist`, resized |
| `celeb_a` | [64, 64, 3] images | TFDS, cropped and resized |
| any other TFDS name | its `image` (uint8, fixed shape) or `features` | TFDS |
| a path to `.csv`, `.tsv`, `.parquet`, `.npy` ..., a DataFrame | columns, NaN = missing | your own table, `tables` |
| a path to a folder or `.zip` of images, `.npy` of 3 or 4 axes | [H, W, C] images | your own images, `images` |
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from absl import logging

from posterior_matching.config import call
from posterior_matching.data import adult, builtin, tfds
from posterior_matching.data.builtin import mixture_log_prob
from posterior_matching.data.cache import file_fingerprint
from posterior_matching.data.dataset import Dataset, decode, resolve_split, unknown_split
from posterior_matching.data.gaussian import GaussianCheck
from posterior_matching.data.images import source as images
from posterior_matching.data.images.source import ImageFormat, ImageOption, ImageOptions, Images, read_images
from posterior_matching.data.tables import read as tables
from posterior_matching.data.tables.read import Table, TableOption, TableOptions, read_table
from posterior_matching.data.tables.schema import TableSchema
from posterior_matching.data.tfds import gaussian_check
from posterior_matching.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Columns",
    "Dataset",
    "GaussianCheck",
    "ImageFormat",
    "ImageOption",
    "ImageOptions",
    "Images",
    "Table",
    "TableOption",
    "TableOptions",
    "decode",
    "fingerprint",
    "gaussian_check",
    "load",
    "load_for_training",
    "mixture_log_prob",
    "read_images",
    "read_table",
    "split_images",
    "split_table",
]


_TABLES = {"adult": adult.read}  # built in, with named columns of several kinds


def load(
    name: "str | pd.DataFrame",
    split: str,
    *,
    columns: TableSchema | None = None,
    table: TableOptions = TableOptions(),  # noqa: B008
    unknown_categories: Literal["error", "missing"] = "error",
    image_options: ImageOptions = ImageOptions(),  # noqa: B008
    image_format: ImageFormat | None = None,
) -> Dataset:
    """Loads one split of a dataset, downloading and preparing TFDS data on first use.

    Args:
        name: A name from the table above, or the path of a table (see `tables.read_table`) or of images (see
            `images.read_images`), or a DataFrame.
        split: `train`, `validation` or `test`, whatever the dataset calls them: `validation` is its `val` or
            `validation`, or else its `test`. Other strings are passed to TFDS (`train[:90%]`). `all` is every row of
            the user's own table, or all images, in order.
        columns: For the user's own table, the columns of the run to evaluate; by default inferred from the table.
        table: How to read the user's own table.
        unknown_categories: How to treat categories that the run does not know.
        image_options: What to make of the user's own images.
        image_format: For the user's own images, the format of the run to evaluate; by default inferred from them.

    Raises:
        UserError: The name, split or file is unknown or malformed, or the data cannot be downloaded.
    """
    if _is_images(name):
        if columns is not None:
            raise UserError(f"'{name}' holds images, but this run was trained on a table: pass a table")
        return split_images(read_images(str(name), image_options, image_format), (split,))[0]
    if _has_columns(name):
        read, own_columns = _read(name, table, columns)
        return split_table(read, (split,), columns or own_columns, unknown_categories)[0]
    name = str(name)
    if Path(name).is_file():
        raise UserError(f"'{name}' is a file of an unsupported format: save the table as .csv, .parquet or .npy")
    if columns is not None:
        raise UserError(f"dataset '{name}' has its own units, but this run was trained on a table: pass a file")
    if name not in builtin.DATASETS:
        split, x, label = tfds.read(name, split)
        return Dataset(name, split, x, label, max_value=255.0 if x.dtype == np.uint8 else 1.0)
    parts, max_value = builtin.DATASETS[name]()
    split = resolve_split(split, parts)
    if split not in parts:
        raise unknown_split(name, split, parts)
    return Dataset(name, split, *parts[split], max_value=max_value)


def fingerprint(name: str | None) -> str | None:
    """Returns the SHA-256 of a user's own file or folder; None for other datasets, and for missing files."""
    path = Path(name or "")
    if name and path.exists() and _is_images(name):
        return images.fingerprint(path)
    return file_fingerprint(path) if name and tables.is_table(name) and path.is_file() else None


def load_for_training(
    config: Mapping[str, Any], columns: TableSchema | None = None, image_format: ImageFormat | None = None
) -> tuple[Dataset, Dataset]:
    """Loads the training and validation splits that an experiment's config names, reading a file only once.

    Args:
        config: With `dataset`, `train_split`, `validation_split` and optionally `table` (see `TableOptions`) and
            `images` (see `ImageOptions`).
        columns: For the user's own table, the columns of the run to build on; by default inferred from the table.
        image_format: For the user's own images, the format of the run to build on; by default inferred from them.

    Raises:
        UserError: `config.dataset` is not set, or see `load`.
    """
    name, splits = config["dataset"], (config["train_split"], config["validation_split"])
    if name is None:
        raise UserError("missing key 'config.dataset': a name (README, \"Data\") or the path of your own data")
    table_options = call(TableOptions, config.get("table") or {}, "config.table")
    image_options = call(ImageOptions, config.get("images") or {}, "config.images")
    if image_options != ImageOptions() and not _is_images(name):
        raise UserError(f"config.images is for images of your own, but config.dataset is '{name}'")
    if table_options != TableOptions() and not _has_columns(name):
        raise UserError(f"config.table is for tables of your own, but config.dataset is '{name}'")
    if _is_images(name):
        train, validation = split_images(read_images(name, image_options, image_format), splits)
        return train, validation
    if not _has_columns(name):
        train, validation = (load(name, split, columns=columns) for split in splits)
        return train, validation
    table, own_columns = _read(name, table_options, columns)
    train, validation = split_table(table, splits, columns or own_columns)
    return train, validation


def _has_columns(source: "str | pd.DataFrame") -> bool:
    return tables.is_table(source) or source in _TABLES


def _read(
    source: "str | pd.DataFrame", options: TableOptions, columns: TableSchema | None
) -> tuple[Table, TableSchema | None]:
    """Reads a table of the user's own, or one that is built in together with its columns."""
    if columns is not None:
        options = columns.reading(options)
    if isinstance(source, str) and source in _TABLES:
        return _TABLES[source](options)
    return read_table(source, options, known_names=columns.names if columns else ()), None


def split_table(
    table: Table,
    splits: tuple[str, ...],
    columns: TableSchema | None = None,
    unknown_categories: Literal["error", "missing"] = "error",
) -> tuple[Dataset, ...]:
    """Turns a table into datasets, one per split: 80/10/10 with a fixed seed, unless the file has its own parts.

    Args:
        table: The rows.
        splits: Any of `train`, `validation` (`val`), `test` and `all`.
        columns: The columns of a run; None: inferred from the table, and standardised on its training part.
        unknown_categories: See `TableSchema.encode`.

    Raises:
        UserError: A split is unknown or empty; or see `TableSchema`.
    """
    parts = dict(table.parts or _split(len(table))) | {"all": np.arange(len(table))}
    for split in splits:
        if resolve_split(split, parts) not in parts:
            raise unknown_split(table.source, split, parts)
        if len(parts[resolve_split(split, parts)]) == 0:
            raise UserError(f"'{table.source}' has {len(table)} rows, too few for a '{split}' part: give at least 10")
    columns = columns or TableSchema.fit(table, parts["train"])
    x = columns.encode(table, unknown_categories)
    names = (resolve_split(split, parts) for split in splits)
    return tuple(
        Dataset(table.source, name, x[parts[name]], columns=columns, fingerprint=table.fingerprint) for name in names
    )


def split_images(source: Images, splits: tuple[str, ...]) -> tuple[Dataset, ...]:
    """Turns images into datasets, one per split: 80/10/10 by a hash of the file name, unless the source has parts.

    Images of an array have no names: they are split like the rows of a table.

    Raises:
        UserError: A split is unknown or empty.
    """
    parts = dict(source.parts or _split(len(source))) | {"all": np.arange(len(source))}
    datasets = []
    for split in splits:
        name = resolve_split(split, parts)
        if name not in parts:
            raise unknown_split(source.source, split, parts)
        if len(parts[name]) == 0:
            raise UserError(
                f"'{source.source}' has {len(source)} image{'s'[: len(source) - 1]}, none of them in the '{split}' "
                "part: add images, or sort them into parts train, val and test"
            )
        rows = parts[name]
        label = None if source.label is None else source.label[rows]
        datasets.append(
            Dataset(
                source.source,
                name,
                source.x[rows],
                label,
                source.max_value,
                image_format=source.format,
                fingerprint=source.fingerprint,
            )
        )
    return tuple(datasets)


def _is_images(name: Any) -> bool:
    """Whether `name` is a path to images; a plain name that is also a dataset's is the dataset's."""
    if not images.is_images(name):
        return False
    plain = str(name) == Path(name).name and Path(name).is_dir()
    if not plain or not (name in builtin.DATASETS or tfds.is_known(str(name))):
        return True
    logging.warning("'%s' is taken as the dataset of this name, not as the folder: write ./%s for that", name, name)
    return False


def _split(size: int) -> dict[str, np.ndarray]:
    order = np.random.default_rng(0).permutation(size)
    test, val, train = np.split(order, [size // 10, 2 * (size // 10)])
    return {"train": train, "val": val, "test": test}
