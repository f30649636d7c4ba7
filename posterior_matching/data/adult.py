"""UCI Adult (Becker and Kohavi 1996), prepared as for the published results of ACE and DEformer."""

import dataclasses
import os
import zipfile
from pathlib import Path
from typing import IO

import numpy as np
import pandas as pd

from posterior_matching.data.cache import fetch
from posterior_matching.data.tables.read import Table, TableOptions, read_table
from posterior_matching.data.tables.schema import TableSchema
from posterior_matching.errors import UserError, first_line

URL = "https://archive.ics.uci.edu/static/public/2/adult.zip"
FILES = ("adult.data", "adult.test")

NAMES = ["age", "workclass", "fnlwgt", "education", "education-num", "marital-status", "occupation", "relationship"]
NAMES += ["race", "sex", "capital-gain", "capital-loss", "hours-per-week", "native-country", "income"]
_REAL = ("age", "fnlwgt", "education-num", "capital-gain", "capital-loss", "hours-per-week")


def read(options: TableOptions = TableOptions()) -> tuple[Table, TableSchema]:  # noqa: B008
    """Six real and eight categorical columns of people in the United States.

    Rows with missing values are dropped, real columns are standardised by all remaining rows of `adult.data`, then the
    rows of other countries are dropped, and `native-country` with them: `income` takes its place (Strauss and Oliva
    2021; github.com/lupalab/ace). A fifth of the training rows, drawn with a fixed seed, is the validation part.
    `options` change how columns are treated. Files that cannot be downloaded or are not those of the archive raise a
    UserError.
    """
    frames = _frames()
    frame = pd.concat(frames, ignore_index=True)
    american = (frame.pop("native-country") == "United-States").to_numpy()
    published = np.arange(len(frame)) < len(frames[0])  # in adult.data
    train = np.random.default_rng(0).permutation(np.flatnonzero(american & published))
    val, train = np.split(train, [len(train) // 5])
    real = tuple(name for name in _REAL if name not in (*options.categorical, *options.drop))
    table = read_table(frame, dataclasses.replace(options, real=(*real, *options.real)))
    columns = TableSchema.fit(table, np.flatnonzero(published))
    parts = {"train": train, "val": val, "test": np.flatnonzero(american & ~published)}
    return Table(table.frame, "adult", table.options, parts=parts), columns


def _frames() -> list[pd.DataFrame]:
    """Reads both files, from the manual folder or from the archive, which is downloaded there."""
    home = Path(os.environ.get("TFDS_DATA_DIR") or Path.home() / "tensorflow_datasets").expanduser()
    folder = home / "downloads" / "manual" / "adult"
    try:
        if all((folder / name).exists() for name in FILES):
            return [_read(folder / name, str(folder / name)) for name in FILES]
        archive = folder / "adult.zip"
        fetch(URL, archive)
        with zipfile.ZipFile(archive) as opened:
            return [_read(opened.open(name), f"{archive}/{name}") for name in FILES]
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        remedy = f"put {' and '.join(FILES)} of {URL} into {folder}"
        raise UserError(f"cannot read 'adult' ({first_line(error)}): {remedy}") from error


def _read(file: Path | IO[bytes], source: str) -> pd.DataFrame:
    """The rows without missing values. The test file has a comment line, and a dot after each label."""
    try:
        frame = pd.read_csv(file, header=None, names=NAMES, na_values="?", skipinitialspace=True, comment="|")
    except ValueError as error:  # of pandas, for text in another encoding or with more columns
        raise UserError(f"'{source}' is not the file of UCI Adult: download it from {URL}") from error
    if frame["age"].dtype.kind not in "iu" or frame["income"].isna().any():
        raise UserError(f"'{source}' is not the file of UCI Adult: download it from {URL}")
    return frame.dropna().assign(income=lambda rows: rows["income"].str.removesuffix("."))
