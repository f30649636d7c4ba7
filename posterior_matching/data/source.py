"""The one door for data: a name, a file or a frame in, a `Source` out.

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

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
from absl import logging

from posterior_matching.config import call, plain
from posterior_matching.data import adult, builtin, tfds
from posterior_matching.data.dataset import Dataset, resolve_split, unknown_split
from posterior_matching.data.images.source import (
    ImageFormat,
    ImageOption,
    ImageOptions,
    Images,
    is_images,
    read_images,
)
from posterior_matching.data.tables.read import Table, TableOption, TableOptions, is_table, read_table
from posterior_matching.data.tables.schema import TableSchema
from posterior_matching.errors import UserError

_TABLES = {"adult": adult.read}  # built in, with named columns of several kinds


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """The keys of a config that choose the data."""

    dataset: str | pd.DataFrame | Table | None  # a name (README, "Data"), a path, or rows in memory; None: the base's
    train_split: str
    validation_split: str
    table: TableOption = dataclasses.field(default_factory=TableOptions)  # how to read a table
    images: ImageOption = dataclasses.field(default_factory=ImageOptions)  # what to make of images

    @classmethod
    def of_run(cls, description: Mapping[str, Any]) -> Self:
        """Returns the options that a run was trained with, from its `config.json`."""
        config = plain(description["config"])
        return call(cls, {f.name: config[f.name] for f in dataclasses.fields(cls) if f.name in config}, "config")

    def check(self) -> None:
        """Raises UserError if no dataset is named, or if options do not apply to it."""
        if self.dataset is None:
            raise UserError("missing key 'config.dataset': a name (README, \"Data\") or the path of your own data")
        if self.images != ImageOptions() and not _holds_images(self.dataset):
            raise UserError(f"config.images is for images of your own, but config.dataset is '{self.dataset}'")
        has_columns = is_table(self.dataset) or self.dataset in _TABLES
        if self.table != TableOptions() and (_holds_images(self.dataset) or not has_columns):
            raise UserError(f"config.table is for tables of your own, but config.dataset is '{self.dataset}'")


class Source(abc.ABC):
    """Data, and what a run keeps of them.

    Attributes:
        name: The name or path.
        schema: The columns of a table, or the format of the user's own images; None for other data.
        fingerprint: SHA-256 of the user's own file, folder or frame; None for other data.
    """

    name: str
    fingerprint: str | None = None

    @property
    def schema(self) -> TableSchema | ImageFormat | None:
        return None

    @property
    @abc.abstractmethod
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one example: `(H, W, C)` or `(d,)`."""

    @abc.abstractmethod
    def split(self, name: str) -> Dataset:
        """Returns `train`, `validation` or `test`, whatever the data call them.

        `validation` is their `val` or `validation`, or else their `test`. `all` is every row of the user's own data, in
        order; other strings are passed to TFDS (`train[:90%]`). One that is missing or empty raises a UserError.
        """

    def to_json(self) -> dict[str, Any]:
        """Returns what a run saves; `open_source(..., saved)` restores it."""
        return {
            "input_shape": list(self.input_shape),
            "columns": self.schema.to_json() if isinstance(self.schema, TableSchema) else None,
            "images": self.schema.to_json() if isinstance(self.schema, ImageFormat) else None,
            "fingerprint": self.fingerprint,
        }


def open_source(options: DataOptions, saved: Mapping[str, Any] | None = None) -> Source:
    """Opens data, downloading and preparing TFDS data on first use.

    If `saved` is the `config.json` of a run, its columns or image format are used instead of being inferred. Data that
    are unknown, malformed, not to be downloaded or not of the run's kind raise a UserError.
    """
    name, schema = options.dataset, saved_schema(saved) if saved else None
    columns = schema if isinstance(schema, TableSchema) else None
    reading = columns.reading(options.table) if columns else options.table
    known_names = columns.names if columns else ()
    if isinstance(name, Table):
        return TableSource(name, columns)
    if not isinstance(name, str):
        return TableSource(read_table(name, reading, known_names), columns)
    if _holds_images(name):
        if columns is not None:
            raise UserError(f"'{name}' holds images, but this run was trained on a table: pass a table")
        return ImageSource(read_images(name, options.images, schema if isinstance(schema, ImageFormat) else None))
    if name in _TABLES:
        table, own_columns = _TABLES[name](reading)
        return TableSource(table, columns or own_columns)
    if is_table(name):
        return TableSource(read_table(name, reading, known_names), columns)
    if Path(name).is_file():
        raise UserError(f"'{name}' is a file of an unsupported format: save the table as .csv, .parquet or .npy")
    if columns is not None:
        raise UserError(f"dataset '{name}' has its own units, but this run was trained on a table: pass a file")
    return ArraySource(name, _read_builtin if name in builtin.DATASETS else _read_tfds)


def load(name: str | pd.DataFrame, split: str, saved: Mapping[str, Any] | None = None) -> Dataset:
    """Loads one split of a dataset, in the units of a run if `saved` is its `config.json`; see `open_source`."""
    options = DataOptions.of_run(saved) if saved else DataOptions(None, "train", "validation")
    return open_source(dataclasses.replace(options, dataset=name), saved).split(split)


def saved_schema(saved: Mapping[str, Any]) -> TableSchema | ImageFormat | None:
    """Returns the columns or the image format of the data that a run was trained on, from its `config.json`."""
    if saved.get("columns"):
        return TableSchema.from_json(saved["columns"])
    if saved.get("images"):
        return ImageFormat.from_json(saved["images"])
    shape = tuple(saved["input_shape"])
    return ImageFormat(shape) if len(shape) == 3 else None


def _holds_images(name: Any) -> bool:
    """Whether `name` is a path to images; a plain name that is also a dataset's is the dataset's."""
    if not is_images(name):
        return False
    plain_name = str(name) == Path(name).name and Path(name).is_dir()
    if not plain_name or not (name in builtin.DATASETS or tfds.is_known(str(name))):
        return True
    logging.warning("'%s' is taken as the dataset of this name, not as the folder: write ./%s for that", name, name)
    return False


# The kinds of sources ------------------------------------------------------------------------------------------------


class ArraySource(Source):
    """Arrays by name: built in, or of TFDS."""

    def __init__(self, name: str, read: Callable[[str, str], Dataset]):
        self.name = name
        self._read = functools.cache(functools.partial(read, name))
        self._shape: tuple[int, ...] | None = None

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self._shape or self.split("train").input_shape

    def split(self, name: str) -> Dataset:
        dataset = self._read(name)
        self._shape = self._shape or dataset.input_shape
        return dataset


def _read_builtin(name: str, split: str) -> Dataset:
    parts, max_value = builtin.DATASETS[name]()
    split = resolve_split(split, parts)
    if split not in parts:
        raise unknown_split(name, split, parts)
    return Dataset(name, split, *parts[split], max_value=max_value)


def _read_tfds(name: str, split: str) -> Dataset:
    split, x, label = tfds.read(name, split)
    return Dataset(name, split, x, label, max_value=255.0 if x.dtype == np.uint8 else 1.0)


class TableSource(Source):
    """A table, 80/10/10 with a fixed seed unless it has parts of its own.

    Without the `schema` of a run, columns are inferred from the table, and standardised on its training part.
    """

    def __init__(self, table: Table, schema: TableSchema | None = None):
        self.name, self.fingerprint, self._table = table.source, table.fingerprint, table
        self._parts = _with_all(table.parts, len(table))
        self._schema = schema

    @functools.cached_property
    def schema(self) -> TableSchema:
        return self._schema or TableSchema.fit(self._table, self._parts["train"])

    @functools.cached_property
    def _x(self) -> np.ndarray:
        return self.schema.encode(self._table)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (len(self.schema),)

    def split(self, name: str) -> Dataset:
        few = f"'{self.name}' has {len(self._table)} rows, too few for a '{name}' part: give at least 10"
        split, rows = _part(self.name, self._parts, name, few)
        return Dataset(self.name, split, self._x[rows])


class ImageSource(Source):
    """Images of the user's own, 80/10/10 by a hash of the file name unless they have parts of their own.

    Images of an array have no names: they are split like the rows of a table.
    """

    def __init__(self, images: Images):
        self.name, self.fingerprint, self._images = images.source, images.fingerprint, images
        self._parts = _with_all(images.parts, len(images))

    @property
    def schema(self) -> ImageFormat:
        return self._images.format

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self._images.x.shape[1:]

    def split(self, name: str) -> Dataset:
        images, count = self._images, len(self._images)
        few = (
            f"'{self.name}' has {count} image{'s'[: count - 1]}, none of them in the '{name}' part: add images, or "
            "sort them into parts train, val and test"
        )
        split, rows = _part(self.name, self._parts, name, few)
        label = None if images.label is None else images.label[rows]
        return Dataset(self.name, split, images.x[rows], label, images.max_value)


def _with_all(parts: Mapping[str, np.ndarray] | None, size: int) -> dict[str, np.ndarray]:
    if parts is None:
        test, val, train = np.split(np.random.default_rng(0).permutation(size), [size // 10, 2 * (size // 10)])
        parts = {"train": train, "val": val, "test": test}
    return {**parts, "all": np.arange(size)}


def _part(source: str, parts: Mapping[str, np.ndarray], name: str, few: str) -> tuple[str, np.ndarray]:
    split = resolve_split(name, parts)
    if split not in parts:
        raise unknown_split(source, name, parts)
    if len(parts[split]) == 0:
        raise UserError(few)
    return split, parts[split]
