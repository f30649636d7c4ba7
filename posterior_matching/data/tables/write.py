"""Writes users' tables, whole or in chunks, in the formats of `read`."""

import contextlib
import csv
import functools
import gzip
import io
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from posterior_matching import atomic
from posterior_matching.data.tables.cells import Table, TextFormat
from posterior_matching.data.tables.read import FORMATS, TEXT, file_format
from posterior_matching.errors import UserError


@contextlib.contextmanager
def table_writer(path: str | Path) -> Iterator[Callable[[Table], None]]:
    """Yields a function that writes a table to a file chunk by chunk; the file appears only once it is complete.

    The cells of a text table are written as the text that was read, with the separator, header and encoding of their
    file, in quotes where they need them. The suffix of `path` gives the format, as for reading.

    Raises:
        UserError: The file cannot be written, or not in this format.
    """
    path, kind = Path(path), file_format(Path(path))
    if kind is None:
        raise UserError(f"cannot write '{path}': its name must end in {', '.join(FORMATS)} (or .csv.gz, .csv.zip)")
    create = _text_writer if kind in TEXT else _parquet_writer if kind == ".parquet" else _array_writer
    try:
        with atomic.replacing(path) as temporary, contextlib.ExitStack() as stack:
            yield create(stack, temporary, path)
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror or error}") from error


def write_table(path: str | Path, table: Table) -> None:
    """Writes a whole table, see `table_writer`."""
    with table_writer(path) as write:
        write(table)


def _text_writer(stack: contextlib.ExitStack, temporary: Path, path: Path) -> Callable[[Table], None]:
    ending, stream = path.suffix.lower(), None
    if ending == ".zip":
        archive = stack.enter_context(zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED))
        file = stack.enter_context(archive.open(path.stem, "w"))
    else:
        file = stack.enter_context(temporary.open("wb"))
        if ending == ".gz":
            file = cast(IO[bytes], stack.enter_context(gzip.GzipFile(path.stem, "wb", fileobj=file, mtime=0)))

    def write(table: Table) -> None:
        nonlocal stream
        text = table.text or TextFormat(",", "utf-8", table.names, table.names, 0)
        header = text.header if stream is None else None
        stream = stream or stack.enter_context(io.TextIOWrapper(file, text.encoding, newline=""))
        empty = text.separator == " " and ((table.frame == "").any(axis=None) or "" in (header or ()))
        # An empty cell between blanks needs quotes, too.
        style: dict[str, Any] = {"quoting": csv.QUOTE_ALL if empty else csv.QUOTE_MINIMAL, "lineterminator": "\n"}
        to_csv = functools.partial(table.frame.to_csv, sep=text.separator, header=False, index=False)
        rows = to_csv(**style)
        if "\r" in rows:  # in a cell, which csv leaves without quotes
            rows = to_csv(**style | {"quoting": csv.QUOTE_ALL})
        try:
            if header:
                csv.writer(stream, delimiter=text.separator, **style).writerow(header)
            stream.write(rows)
        except UnicodeEncodeError as error:
            letter = error.object[error.start]
            raise UserError(f"'{letter}' does not exist in {text.encoding}: use an input in UTF-8") from error

    return write


def _parquet_writer(stack: contextlib.ExitStack, temporary: Path, path: Path) -> Callable[[Table], None]:
    writer = None

    def write(table: Table) -> None:
        nonlocal writer
        _check_not_text(table, path)
        rows = pa.Table.from_pandas(table.frame, schema=writer and writer.schema, preserve_index=False)
        rows = rows.replace_schema_metadata(None)
        writer = writer or stack.enter_context(pa.parquet.ParquetWriter(temporary, rows.schema))
        writer.write_table(rows)

    return write


def _array_writer(stack: contextlib.ExitStack, temporary: Path, path: Path) -> Callable[[Table], None]:
    tables: list[Table] = []

    def write(table: Table) -> None:
        _check_not_text(table, path)
        tables.append(table)

    def save() -> None:
        array = np.concatenate([table.frame.to_numpy() for table in tables])
        parts = {name: array[rows] for name, rows in (tables[0].parts or {}).items()}
        with temporary.open("wb") as file:
            if path.suffix.lower() == ".npy":
                np.save(file, array, allow_pickle=False)
            else:
                np.savez(file, **(parts or {"x": array}))

    stack.callback(save)
    return write


def _check_not_text(table: Table, path: Path) -> None:
    if table.text is not None:
        raise UserError(f"cannot write the text of '{table.source}' as {path.suffix}: choose one of {', '.join(TEXT)}")
