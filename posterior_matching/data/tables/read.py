"""Reads users' tables, whole or in chunks.

| format | rows |
|---|---|
| `.csv` `.tsv` `.txt` `.data`, also `.gz` and `.zip` | text; how it is written is detected, see `sniff.text_format` |
| `.parquet` | its columns |
| `.npy` | a 2-D array |
| `.npz` | a 2-D array; or `train`, `test` and optionally `val` |
| a DataFrame or a 2-D array | from Python |
"""

import contextlib
import csv
import dataclasses
import gzip
import hashlib
import io
import itertools
import sys
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet

from posterior_matching.data.cache import file_fingerprint
from posterior_matching.data.tables import spelling
from posterior_matching.data.tables.cells import Cells, Table, TableOption, TableOptions, TextFormat, with_decimal
from posterior_matching.data.tables.sniff import split_cells, text_format
from posterior_matching.errors import UserError, first_line

__all__ = ["Cells", "Table", "TableOption", "TableOptions", "is_table", "iter_chunks", "read_table"]

TEXT = (".csv", ".tsv", ".txt", ".data")
FORMATS = (*TEXT, ".parquet", ".npy", ".npz")
_CHUNK_ROWS = 65_536


def is_table(source: Any) -> bool:
    """Whether `source` is a table for `read_table`: a DataFrame, an array, or the name of a file of a known format."""
    return not isinstance(source, str | Path) or file_format(Path(source)) is not None


def file_format(path: Path) -> str | None:
    """Returns the suffix that gives a file's format, in lower case: `.csv` for `rows.csv.gz`; None if not a table."""
    ending = path.suffix.lower()
    if ending in (".gz", ".zip"):
        inner = Path(path.stem).suffix.lower()
        if ending == ".zip" and not inner and path.is_file() and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                endings = {Path(name).suffix.lower() for name in _members(archive)}
            inner = endings.pop() if len(endings) == 1 else ""
        return inner if inner in TEXT else None
    return ending if ending in FORMATS else None


def read_table(
    source: str | Path | pd.DataFrame | np.ndarray,
    options: TableOptions = TableOptions(),  # noqa: B008
    known_names: Sequence[str] = (),
) -> Table:
    """Reads a whole table.

    Args:
        source: A file, a DataFrame or a 2-D array.
        options: How to read it.
        known_names: The columns of the run that it is for: a first line with half of them is its header.

    Raises:
        UserError: The file is missing, not a table, ambiguous, or changed while it was read.
    """
    if not isinstance(source, str | Path):
        return _of_frame(source, options)
    with _unchanged(source) as path:
        fingerprint = file_fingerprint(path)
        chunks = list(_chunks(path, options, known_names, sys.maxsize))
    table = dataclasses.replace(chunks[0], fingerprint=fingerprint)
    if len(chunks) > 1:
        frame = pd.concat([chunk.frame for chunk in chunks], ignore_index=True)
        lines = np.concatenate([chunk.lines for chunk in chunks]) if table.text else None
        table = dataclasses.replace(table, frame=frame, lines=lines)
    return with_decimal(table)


def iter_chunks(
    source: str | Path,
    options: TableOptions = TableOptions(),  # noqa: B008
    rows: int = _CHUNK_ROWS,
    known_names: Sequence[str] = (),
) -> Iterator[Table]:
    """Reads a file in chunks of `rows` rows, of text at most 65,536, in constant memory (`.npz` is read whole).

    The decimal mark is determined from the first chunk.

    Raises:
        UserError: See `read_table`.
    """
    first_row = 0
    with _unchanged(source) as path:
        for chunk in _chunks(path, options, known_names, rows):
            options = options if first_row else with_decimal(chunk).options
            yield dataclasses.replace(chunk, options=options, first_row=first_row)
            first_row += len(chunk)


@contextlib.contextmanager
def _unchanged(source: str | Path) -> Iterator[Path]:
    path = Path(source)
    if not path.is_file():
        raise UserError(f"no file '{source}'")
    before = path.stat()
    try:
        yield path
        after = path.stat()
    except OSError as error:
        raise UserError(f"cannot read '{source}': {error.strerror or error}") from error
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise UserError(f"'{source}' changed while it was read: try again when it is complete")


def _chunks(path: Path, options: TableOptions, known_names: Sequence[str], rows: int) -> Iterator[Table]:
    kind, empty = file_format(path), True
    try:
        if kind in (".parquet", ".npy", ".npz"):
            tables = (_read_parquet if kind == ".parquet" else _read_numpy)(path, options, rows)
        else:
            tables = _read_text(path, options, rows, known_names)
        for table in tables:
            yield table
            empty = False
    except (EOFError, ValueError, csv.Error, zlib.error, zipfile.BadZipFile, pa.ArrowException) as error:
        raise UserError(f"cannot read '{path}': {first_line(error)}") from error
    if empty:
        raise UserError(f"'{path}' has no rows")


# Arrays and frames ---------------------------------------------------------------------------------------------------


def _of_frame(source: pd.DataFrame | np.ndarray, options: TableOptions, name: str = "the table") -> Table:
    frame = source if isinstance(source, pd.DataFrame) else _array_frame(name, np.asarray(source))
    frame = frame.set_axis([str(column) for column in frame.columns], axis=1)
    if not frame.columns.is_unique:
        twice = frame.columns[frame.columns.duplicated()][0]
        raise UserError(f"'{name}' has more than one column named '{twice}': rename them")
    digest = hashlib.sha256(repr(list(frame.columns)).encode())
    with contextlib.suppress(TypeError):  # cells that cannot be hashed are rejected later
        digest.update(pd.util.hash_pandas_object(frame, index=False).to_numpy().tobytes())
    return Table(frame, name, options, fingerprint=digest.hexdigest())


def _array_frame(source: str, array: np.ndarray, kinds: str = "biufOU", what: str = "the array") -> pd.DataFrame:
    if array.ndim != 2 or array.dtype.kind not in kinds or array.size == 0:
        found = f"shape {list(array.shape)} and type {array.dtype}"
        raise UserError(f"'{source}' must hold a 2-D array of numbers, but {what} has {found}")
    return pd.DataFrame(array, columns=list(spelling.unnamed(array.shape[1])))


def _read_parquet(path: Path, options: TableOptions, rows: int) -> Iterator[Table]:
    for batch in pa.parquet.ParquetFile(path).iter_batches(batch_size=min(rows, 1 << 30)):
        frame = pa.Table.from_batches([batch]).to_pandas(types_mapper=pd.ArrowDtype, ignore_metadata=True)
        yield _of_frame(frame, options, str(path))


def _read_numpy(path: Path, options: TableOptions, rows: int) -> Iterator[Table]:
    parts, suffix = None, path.suffix.lower()
    with path.open("rb") as file:
        kind = {b"\x93N": ".npy", b"PK": ".npz"}.get(file.read(2), suffix)
        if kind != suffix:
            raise UserError(f"cannot read '{path}': it is a {kind} file, rename it")
        file.seek(0)
        arrays = dict(np.load(file)) if kind == ".npz" else {"x": np.lib.format.open_memmap(path, mode="r")}
    if len(arrays) > 1 or "train" in arrays:
        if not {"train", "test"} <= arrays.keys():
            raise UserError(f"'{path}' must hold arrays train, test and val, or one array: it has {', '.join(arrays)}")
        arrays = {name: arrays[name] for name in ("train", "val", "test") if name in arrays}
        ends = np.cumsum([len(array) for array in arrays.values()])
        parts = {name: np.arange(end - len(arrays[name]), end) for name, end in zip(arrays, ends, strict=True)}
    frames = [
        _array_frame(str(path), array, "biuf", f"'{name}'" if kind == ".npz" else "the array")
        for name, array in arrays.items()
    ]
    if len({len(frame.columns) for frame in frames}) > 1:
        widths = ", ".join(f"{name} {array.shape[1]}" for name, array in arrays.items())
        raise UserError(f"the arrays of '{path}' have unequal numbers of columns: {widths}")
    frame = frames[0] if parts is None else pd.concat(frames, ignore_index=True)
    for start in range(0, len(frame), rows):
        yield Table(frame.iloc[start : start + rows].copy(), str(path), options, parts=parts)


# Text ----------------------------------------------------------------------------------------------------------------


def _read_text(path: Path, options: TableOptions, rows: int, known_names: Sequence[str]) -> Iterator[Table]:
    with _open(path) as stream:
        text = text_format(stream, str(path), options, known_names)
    with _open(path) as stream, io.TextIOWrapper(stream, text.encoding, newline="") as lines:
        records = _records(itertools.islice(lines, text.skip, None), str(path), text)
        while batch := list(itertools.islice(records, min(rows, _CHUNK_ROWS))):
            numbers, cells = zip(*batch, strict=True)
            frame = pd.DataFrame(cells, columns=list(text.names), dtype="str")
            yield Table(frame, str(path), options, text, np.array(numbers))


def _records(lines: Iterable[str], source: str, text: TextFormat) -> Iterator[tuple[int, list[str]]]:
    """Yields (number of its last line, cells) of every row.

    A line that holds only separators is a row of which every cell is missing; at the end of a file, where spreadsheets
    append them, it is none. (`pandas.read_csv` fills up short lines and swallows those after an open quote.)
    """
    reader, width, line = split_cells(lines, text.separator, strict=True), len(text.names), text.skip
    empty: list[tuple[int, list[str]]] = []  # rows that are the last so far
    try:
        for cells in reader:
            line = reader.line_num + text.skip
            if len(cells) == 0 or (len(cells) == 1 and cells[0].isspace()):
                continue
            if len(cells) != width:
                raise UserError(
                    f"line {line} of '{source}' has {len(cells)} cells, but most lines have {width}: fix it, or set "
                    "config.table.separator"
                )
            empty.append((line, cells))
            if any(cells):
                yield from empty
                empty.clear()
    except csv.Error as error:
        problem = "opens a quote that is not closed, or has text behind a closed one"
        raise UserError(f"line {line + 1} of '{source}' {problem}: fix it ({error})") from error


def _open(path: Path) -> IO[bytes]:
    """Opens a file, decompressed if its name ends in `.gz` or `.zip`."""
    if path.suffix.lower() == ".gz":
        return cast(IO[bytes], gzip.open(path))
    if path.suffix.lower() == ".zip":
        archive = zipfile.ZipFile(path)
        members = _members(archive)
        if len(members) != 1:
            raise UserError(f"'{path}' holds {len(members)} files: make an archive of a single table")
        return archive.open(members[0])
    return path.open("rb")


def _members(archive: zipfile.ZipFile) -> list[str]:
    """Returns the names of the files in an archive, without folders and macOS metadata."""
    return [name for name in archive.namelist() if not name.endswith("/") and not name.startswith("__MACOSX/")]
