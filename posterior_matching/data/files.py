"""The user's own table: a `.npy`, `.npz` or `.csv` file of numbers, NaN = missing."""

import csv
from pathlib import Path

import numpy as np

from posterior_matching.errors import UserError

_MISSING = {"", "na", "nan", "?"}


def read(path: str) -> tuple[dict[str, np.ndarray], tuple[str, ...] | None]:
    """Reads a table and splits it 80/10/10 (fixed seed), unless the file has its own parts.

    - `.npy`: one 2-D array of numbers.
    - `.npz`: 2-D arrays `train`, `test` and optionally `val`, used as they are; otherwise exactly one 2-D array.
    - `.csv`: separated by comma, semicolon, tab or spaces, with or without a header line. Empty cells, `NA`, `NaN` and
      `?` are missing.

    Returns:
        Part -> [n, d] float64 rows with NaN = missing, for `train`, `val`, `test` and `all`; and the column names of a
        header line.

    Raises:
        UserError: The file is missing or is not such a table, or has an infinite value.
    """
    if not Path(path).is_file():
        raise UserError(f"no file '{path}'")
    parts, names = READERS[Path(path).suffix.lower()](path)
    for rows in parts.values():
        if np.isinf(rows).any():
            row, column = np.argwhere(np.isinf(rows))[0]
            raise UserError(
                f"'{path}' has an infinite value at row {row + 1}, column {column + 1}: remove it or use NaN"
            )
    return (parts if "train" in parts else _split(parts["all"])), names


def mean_and_std(path: str, train: np.ndarray, names: tuple[str, ...] | None) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean [d] and standard deviation [d] of the training rows [n, d], ignoring missing values.

    Raises:
        UserError: A column is constant or all missing, so it has no scale.
    """
    for column, values in enumerate(train.T):
        values = values[~np.isnan(values)]
        if len(values) == 0 or values.min() == values.max():
            label = f"column {column + 1}" + (f" ('{names[column]}')" if names else "")
            state = "constant" if len(values) else "all missing"
            raise UserError(f"{label} of '{path}' is {state} in the training part: remove that column")
    return np.nanmean(train, axis=0), np.nanstd(train, axis=0)


def _split(rows: np.ndarray) -> dict[str, np.ndarray]:
    order = np.random.default_rng(0).permutation(len(rows))
    tenth = len(rows) // 10
    test, val, train = np.split(order, [tenth, 2 * tenth])
    return {"train": rows[train], "val": rows[val], "test": rows[test], "all": rows}


def _table(path: str, array: np.ndarray, what: str = "") -> np.ndarray:
    if array.ndim != 2 or array.dtype.kind not in "biuf" or array.size == 0:
        found = f"shape {list(array.shape)} and type {array.dtype}"
        raise UserError(f"'{path}' must hold a 2-D array of numbers, but {what or 'the array'} has {found}")
    return array.astype(np.float64)


def _read_npy(path: str) -> tuple[dict[str, np.ndarray], None]:
    try:
        array = np.load(path, allow_pickle=False)
    except Exception as error:
        raise UserError(f"cannot read '{path}' as an array of numbers: {error}") from error
    if not isinstance(array, np.ndarray):  # np.load looks at the content, not at the name
        raise UserError(f"'{path}' is a zip archive of arrays: rename it to end in .npz")
    return {"all": _table(path, array)}, None


def _read_npz(path: str) -> tuple[dict[str, np.ndarray], None]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except Exception as error:  # of NumPy, zipfile or zlib
        raise UserError(f"cannot read '{path}' as arrays of numbers: {error}") from error
    if len(arrays) == 1 and "train" not in arrays:
        return {"all": _table(path, *arrays.values())}, None
    if not {"train", "test"} <= arrays.keys():
        raise UserError(f"'{path}' must hold arrays train, test and val, or one array: it has {', '.join(arrays)}")
    parts = {name: _table(path, arrays[name], f"'{name}'") for name in ("train", "val", "test") if name in arrays}
    if len({rows.shape[1] for rows in parts.values()}) > 1:
        widths = ", ".join(f"{name} {rows.shape[1]}" for name, rows in parts.items())
        raise UserError(f"the arrays of '{path}' have unequal numbers of columns: {widths}")
    return {**parts, "all": np.concatenate(list(parts.values()))}, None


def _read_csv(path: str) -> tuple[dict[str, np.ndarray], tuple[str, ...] | None]:
    lines = _csv_lines(path)
    # A header line has no number in it; a line of both numbers and words is a broken data line.
    names = None
    if lines and not any(_is_number(cell) or _is_missing(cell) for cell in lines[0][1]):
        names = tuple(lines.pop(0)[1])
    if not lines:
        raise UserError(f"'{path}' has no rows of numbers")
    width = len(names or lines[0][1])
    rows = np.empty((len(lines), width))
    for row, (number, cells) in zip(rows, lines, strict=True):
        if len(cells) != width:
            raise UserError(f"line {number} of '{path}' has {len(cells)} cells, but the lines before have {width}")
        for column, cell in enumerate(cells):
            if not (_is_missing(cell) or _is_number(cell)):
                raise UserError(f"line {number}, column {column + 1} of '{path}' is not a number: '{cell}'")
            row[column] = np.nan if _is_missing(cell) else float(cell)
    return {"all": rows}, names


def _csv_lines(path: str) -> list[tuple[int, list[str]]]:
    """Returns (line number, cells) of the lines that are not blank."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # "-sig": spreadsheets write a byte order mark
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read '{path}' as text: {error}") from error
    lines = [(number, line.strip(" ")) for number, line in enumerate(text.split("\n"), 1) if line.strip(" ")]
    # The second line holds data, which has no separator within a cell, as a header might ("fixed acidity").
    # Semicolon before comma: some locales write 0,5;1,5.
    data = lines[:2][-1][1] if lines else ""
    delimiter = next((mark for mark in ";\t, " if mark in data), ",")
    rows = (next(csv.reader([line], delimiter=delimiter, skipinitialspace=True)) for _, line in lines)
    return [(number, [cell.strip() for cell in row]) for (number, _), row in zip(lines, rows, strict=True)]


def _is_missing(cell: str) -> bool:
    return cell.lower() in _MISSING


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return not _is_missing(cell)


READERS = {".npy": _read_npy, ".npz": _read_npz, ".csv": _read_csv}
