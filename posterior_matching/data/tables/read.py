"""Reads and writes users' tables, whole or in chunks; cells that are not filled are written back unchanged.

| format | rows |
|---|---|
| `.csv` `.tsv` `.txt` `.data`, also `.gz` and `.zip` | text; how it is written is detected, see `dialect.sniff` |
| `.parquet` | its columns |
| `.npy` | a 2-D array |
| `.npz` | a 2-D array; or `train`, `test` and optionally `val` |
| a DataFrame or a 2-D array | from Python |
"""

import codecs
import contextlib
import csv
import dataclasses
import gzip
import hashlib
import io
import itertools
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal, cast

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from posterior_matching import atomic
from posterior_matching.data.cache import file_fingerprint
from posterior_matching.data.tables.cells import (
    Cells,
    Table,
    TableOption,
    TableOptions,
    is_usual_missing,
    to_arrow,
    with_decimal,
)
from posterior_matching.data.tables.dialect import BLANKS, Dialect, open_bytes, records, sniff, zip_members
from posterior_matching.errors import UserError, first_line

__all__ = [
    "Cells",
    "Table",
    "TableOption",
    "TableOptions",
    "is_table",
    "iter_chunks",
    "read_table",
    "table_writer",
    "write_table",
]

TEXT = (".csv", ".tsv", ".txt", ".data")
FORMATS = (*TEXT, ".parquet", ".npy", ".npz")
_BLOCK_BYTES = 1 << 23
_STRING = pa.large_string()
_STR = pd.StringDtype("pyarrow", na_value=np.nan)


def is_table(source: Any) -> bool:
    """Whether `source` is a table for `read_table`: a DataFrame, an array, or the name of a file of a known format."""
    return not isinstance(source, str | Path) or _format(Path(source)) is not None


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
        chunks = list(_chunks(path, options, known_names, rows=None))
    if not chunks:
        raise UserError(f"'{source}' has no rows")
    frame = chunks[0].frame if len(chunks) == 1 else pd.concat([chunk.frame for chunk in chunks], ignore_index=True)
    return with_decimal(dataclasses.replace(chunks[0], frame=frame, fingerprint=fingerprint))


def iter_chunks(
    source: str | Path,
    options: TableOptions = TableOptions(),  # noqa: B008
    rows: int = 65_536,
    known_names: Sequence[str] = (),
) -> Iterator[Table]:
    """Reads a file in chunks of `rows` rows, in constant memory; the last may be shorter (`.npz` is read whole).

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
    if not first_row:
        raise UserError(f"'{source}' has no rows")


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


def _format(path: Path) -> str | None:
    """Returns the suffix that gives a file's format, in lower case: `.csv` for `rows.csv.gz`; None if not a table."""
    ending = path.suffix.lower()
    if ending in (".gz", ".zip"):
        inner = Path(path.stem).suffix.lower()
        if ending == ".zip" and not inner and path.is_file() and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                endings = {Path(name).suffix.lower() for name in zip_members(archive)}
            inner = endings.pop() if len(endings) == 1 else ""
        return inner if inner in TEXT else None
    return ending if ending in FORMATS else None


def _chunks(path: Path, options: TableOptions, known_names: Sequence[str], rows: int | None) -> Iterator[Table]:
    kind = _format(path)
    try:
        if kind == ".parquet":
            for batch in pa.parquet.ParquetFile(path).iter_batches(batch_size=rows or 1 << 30):
                frame = pa.Table.from_batches([batch]).to_pandas(types_mapper=pd.ArrowDtype, ignore_metadata=True)
                yield _of_frame(frame, options, str(path))
        elif kind in (".npy", ".npz"):
            yield from _read_numpy(path, options, rows)
        else:
            yield from _read_text(path, options, known_names, rows)
    except (EOFError, ValueError, csv.Error, zlib.error, zipfile.BadZipFile, pa.ArrowException) as error:
        raise UserError(f"cannot read '{path}': {first_line(error)}") from error


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


def _array_frame(source: str, array: np.ndarray, what: str = "the array", kinds: str = "biufOU") -> pd.DataFrame:
    if array.ndim != 2 or array.dtype.kind not in kinds or array.size == 0:
        found = f"shape {list(array.shape)} and type {array.dtype}"
        raise UserError(f"'{source}' must hold a 2-D array of numbers, but {what} has {found}")
    return pd.DataFrame(array, columns=[f"column_{i + 1}" for i in range(array.shape[1])])


def _read_numpy(path: Path, options: TableOptions, rows: int | None) -> Iterator[Table]:
    suffix, parts = path.suffix.lower(), None
    with path.open("rb") as file:
        kind = {b"\x93N": ".npy", b"PK": ".npz"}.get(file.read(2), suffix)
        if kind != suffix:  # np.load looks at the content, not at the name
            raise UserError(f"cannot read '{path}': it is a {kind} file, rename it")
        file.seek(0)
        if kind == ".npy":
            lazily: Literal["r"] | None = "r" if rows else None
            array = np.load(path if lazily else file, allow_pickle=False, mmap_mode=lazily)
            frame = _array_frame(str(path), array, kinds="biuf")
        else:
            with np.load(file, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
            parts = _parts(path, arrays)
            frames = [_array_frame(str(path), array, f"'{name}'", "biuf") for name, array in arrays.items()]
            frame = pd.concat(frames, ignore_index=True)
    for start in range(0, len(frame), rows or len(frame)):
        yield Table(frame.iloc[start : start + (rows or len(frame))], str(path), options, parts=parts)


def _parts(path: Path, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray] | None:
    """Returns the rows of each part once they are concatenated; keeps only these parts in `arrays`, in order."""
    if len(arrays) == 1 and "train" not in arrays:
        return None
    if not {"train", "test"} <= arrays.keys():
        raise UserError(f"'{path}' must hold arrays train, test and val, or one array: it has {', '.join(arrays)}")
    kept: dict[str, np.ndarray] = {name: arrays[name] for name in ("train", "val", "test") if name in arrays}
    arrays.clear()
    arrays.update(kept)
    if len({array.shape[1:] for array in kept.values() if array.ndim == 2}) > 1:
        widths = ", ".join(f"{name} {array.shape[1]}" for name, array in kept.items())
        raise UserError(f"the arrays of '{path}' have unequal numbers of columns: {widths}")
    ends = np.cumsum([len(array) for array in kept.values()])
    return {name: np.arange(end - len(kept[name]), end) for name, end in zip(kept, ends, strict=True)}


# Text ----------------------------------------------------------------------------------------------------------------


def _read_text(path: Path, options: TableOptions, known_names: Sequence[str], rows: int | None) -> Iterator[Table]:
    with open_bytes(path) as stream:
        dialect = sniff(stream, str(path), options.separator, options.header, options.encoding, known_names)
    positions = [str(i) for i in range(len(dialect.names))]
    with open_bytes(path) as stream:
        by_blanks = dialect.separator == BLANKS
        try:
            reader = pa.csv.open_csv(
                io.BufferedReader(_Tabbed(io.TextIOWrapper(stream, dialect.encoding))) if by_blanks else stream,
                pa.csv.ReadOptions(
                    column_names=positions,
                    skip_rows=dialect.skip,
                    block_size=_BLOCK_BYTES,
                    encoding="utf-8" if by_blanks else dialect.encoding.removesuffix("-sig"),
                ),
                pa.csv.ParseOptions(
                    delimiter="\t" if by_blanks else dialect.separator,
                    newlines_in_values=True,
                    invalid_row_handler=lambda row: "error" if row.text.strip() else "skip",
                ),
                pa.csv.ConvertOptions(column_types=dict.fromkeys(positions, _STRING)),
            )
            yield from _rebatched(_without_empty_end(reader), path, options, dialect, rows)
        except pa.ArrowInvalid as error:
            for line, cells in records(path, dialect):
                if len(cells) != len(positions):
                    raise UserError(
                        f"line {line} of '{path}' has {len(cells)} cells, but most lines have {len(positions)}: "
                        "fix it, or set config.table.separator"
                    ) from error
            raise


def _rebatched(
    batches: Iterator[pa.RecordBatch], path: Path, options: TableOptions, dialect: Dialect, rows: int | None
) -> Iterator[Table]:
    def table(batches: list[pa.RecordBatch]) -> Table:
        columns = pa.Table.from_batches(batches)
        if any(pc.any(pc.match_substring(column, "\n")).as_py() for column in columns.columns):
            _check_quotes(path, dialect)
        frame = columns.rename_columns(dialect.names).to_pandas(types_mapper={_STRING: _STR}.get)
        return Table(frame, str(path), options, dialect)

    held: list[pa.RecordBatch] = []
    for batch in batches:
        held.append(batch)
        while rows is not None and sum(batch.num_rows for batch in held) >= rows:
            whole = pa.Table.from_batches(held)
            yield table(whole.slice(0, rows).to_batches())
            held = whole.slice(rows).to_batches()
    if sum(batch.num_rows for batch in held):
        yield table(held)


def _without_empty_end(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Drops the lines at the end of a file that hold only separators, which spreadsheets append.

    Elsewhere such a line is a row of which every cell is missing.
    """
    held: list[pa.RecordBatch] = []  # empty rows that are the last so far
    for batch in batches:
        size = batch.num_rows  # without the empty rows at its end
        while size and not any(column[size - 1].as_py() for column in batch.columns):
            size -= 1
        if size:
            yield from held
            held = []
            yield batch.slice(0, size)
        if size < batch.num_rows:
            held.append(batch.slice(size))


def _check_quotes(path: Path, dialect: Dialect) -> None:
    """Rejects unclosed quotes, which would swallow lines."""
    with open_bytes(path) as stream:
        lines = io.TextIOWrapper(stream, dialect.encoding, newline="")
        reader = csv.reader(itertools.islice(lines, dialect.skip, None), delimiter=dialect.separator, strict=True)
        line = 0
        try:
            for _ in reader:
                line = reader.line_num
        except csv.Error as error:
            start = line + dialect.skip + 1
            raise UserError(f"line {start} of '{path}' opens a quote that is not closed: fix it ({error})") from error


class _Tabbed(io.RawIOBase):
    """Converts text with cells separated by blanks to UTF-8 bytes with cells separated by single tabs."""

    def __init__(self, lines: io.TextIOWrapper):
        self._lines, self._rest = lines, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._rest:
            self._rest = "".join(map(self._tabbed, itertools.islice(self._lines, 4096))).encode()
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size

    @staticmethod
    def _tabbed(line: str) -> str:
        if '"' not in line:
            return "\t".join(line.split()) + "\n"
        cells = next(csv.reader([line.replace("\t", " ").strip()], delimiter=" ", skipinitialspace=True))
        return "\t".join('"' + cell.replace('"', '""') + '"' for cell in cells) + "\n"


# Writing -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def table_writer(path: str | Path) -> Iterator[Callable[[Table], None]]:
    """Yields a function that writes a table to a file chunk by chunk; the file appears only once it is complete.

    A text table is written as it was read: separator, encoding, header line, line endings, and quotes in columns that
    were quoted throughout or around cells that need them. The suffix of `path` gives the format, as for reading.

    Raises:
        UserError: The file cannot be written, or not in this format.
    """
    path, kind = Path(path), _format(Path(path))
    if kind is None:
        raise UserError(f"cannot write '{path}': its name must end in {', '.join(FORMATS)} (or .csv.gz, .csv.zip)")
    try:
        with atomic.replacing(path) as temporary, contextlib.ExitStack() as stack:
            if kind == ".parquet":
                yield _parquet_writer(temporary, stack)
            elif kind in TEXT:
                yield _text_writer(stack.enter_context(_create_bytes(temporary, path)))
            else:
                yield _array_writer(temporary, kind, stack)
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror or error}") from error


def write_table(path: str | Path, table: Table) -> None:
    """Writes a whole table, see `table_writer`."""
    with table_writer(path) as write:
        write(table)


@contextlib.contextmanager
def _create_bytes(temporary: Path, path: Path) -> Iterator[IO[bytes]]:
    ending = path.suffix.lower()
    if ending == ".zip":
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive, archive.open(path.stem, "w") as file:
            yield file
    elif ending == ".gz":
        with temporary.open("wb") as raw, gzip.GzipFile(path.stem, "wb", fileobj=raw, mtime=0) as file:
            yield cast(IO[bytes], file)
    else:
        with temporary.open("wb") as file:
            yield file


def _text_writer(file: IO[bytes]) -> Callable[[Table], None]:
    encoder = None

    def write(table: Table) -> None:
        nonlocal encoder
        dialect = table.dialect
        begin, encoding = encoder is None, dialect.encoding if dialect else "utf-8"
        encoder = encoder or codecs.getincrementalencoder(encoding)()  # writes a byte order mark only once
        if dialect is None:
            text = table.frame.to_csv(index=False, header=begin, lineterminator="\n")
        else:
            text = (dialect.head if begin else "") + _lines(table.frame, dialect)
        try:
            file.write(encoder.encode(text))
        except UnicodeEncodeError as error:
            letter = error.object[error.start]
            raise UserError(f"'{letter}' does not exist in {encoding}: use an input in UTF-8") from error

    return write


def _lines(frame: pd.DataFrame, dialect: Dialect) -> str:
    columns = []
    special = rf'["\r\n{re.escape(dialect.separator)}]'
    for name, quoted in zip(frame.columns, dialect.quoted, strict=True):
        text = to_arrow(frame[name]).cast(_STRING)
        needed = pc.match_substring_regex(text, special)
        if quoted:
            needed = pc.or_(needed, pc.invert(is_usual_missing(text)))
        if pc.any(needed).as_py():
            text = pc.if_else(needed, _joined(['"', pc.replace_substring(text, '"', '""'), '"'], ""), text)
        columns.append(text)
    return dialect.newline.join([*_joined(columns, dialect.separator).to_pylist(), ""])


def _joined(columns: Sequence[pa.Array | str], separator: str) -> pa.Array:
    parts = [pa.scalar(part, _STRING) if isinstance(part, str) else part for part in (*columns, separator)]
    return pc.binary_join_element_wise(*parts)


def _parquet_writer(temporary: Path, stack: contextlib.ExitStack) -> Callable[[Table], None]:
    writer = None

    def write(table: Table) -> None:
        nonlocal writer
        _check_not_text(table, ".parquet")
        rows = pa.Table.from_pandas(table.frame, schema=writer and writer.schema, preserve_index=False)
        rows = rows.replace_schema_metadata(None)
        writer = writer or stack.enter_context(pa.parquet.ParquetWriter(temporary, rows.schema))
        writer.write_table(rows)

    return write


def _array_writer(temporary: Path, kind: str, stack: contextlib.ExitStack) -> Callable[[Table], None]:
    arrays: list[np.ndarray] = []
    parts: dict[str, np.ndarray] = {}

    def write(table: Table) -> None:
        _check_not_text(table, kind)
        arrays.append(table.frame.to_numpy())
        parts.update(table.parts or {})

    def save() -> None:
        array = np.concatenate(arrays)
        with temporary.open("wb") as file:
            if kind == ".npy":
                np.save(file, array, allow_pickle=False)
            else:
                np.savez(file, **({name: array[rows] for name, rows in parts.items()} or {"x": array}))

    stack.callback(save)
    return write


def _check_not_text(table: Table, kind: str) -> None:
    if table.dialect is not None:
        raise UserError(f"cannot write the text of '{table.source}' as {kind}: choose one of {', '.join(TEXT)}")
