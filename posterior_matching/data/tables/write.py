"""Writes users' tables, whole or in chunks, in the formats of `read`."""

import contextlib
import csv
import gzip
import io
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, cast

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
    file; cells are quoted where they need it. The suffix of `path` gives the format, as for reading.

    Raises:
        UserError: The file cannot be written, or not in this format.
    """
    path, kind = Path(path), file_format(Path(path))
    if kind is None:
        raise UserError(f"cannot write '{path}': its name must end in {', '.join(FORMATS)} (or .csv.gz, .csv.zip)")
    create = {".parquet": _parquet_writer, ".npy": _array_writer, ".npz": _array_writer}.get(kind, _text_writer)
    try:
        with atomic.replacing(path) as temporary, contextlib.ExitStack() as stack:
            add = create(temporary, path, stack)

            def write(table: Table) -> None:
                if table.text is not None and kind not in TEXT:
                    raise UserError(
                        f"cannot write the text of '{table.source}' as {kind}: choose one of {', '.join(TEXT)}"
                    )
                add(table)

            yield write
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror or error}") from error


def write_table(path: str | Path, table: Table) -> None:
    """Writes a whole table, see `table_writer`."""
    with table_writer(path) as write:
        write(table)


def _text_writer(temporary: Path, path: Path, stack: contextlib.ExitStack) -> Callable[[Table], None]:
    stream: io.TextIOWrapper | None = None

    def write(table: Table) -> None:
        nonlocal stream
        text = table.text or TextFormat(",", "utf-8", table.names, table.names, 0)
        header = list(text.header) if text.header and stream is None else False
        stream = stream or stack.enter_context(
            io.TextIOWrapper(stack.enter_context(_create(temporary, path)), text.encoding, newline="")
        )
        cells = table.frame.set_axis(text.header or text.names, axis=1)
        # An empty cell between blanks needs quotes.
        needs_quotes = text.separator == " " and bool((cells == "").any(axis=None) or "" in cells.columns)
        quoting = csv.QUOTE_ALL if needs_quotes else csv.QUOTE_MINIMAL
        try:
            cells.to_csv(stream, sep=text.separator, header=header, index=False, lineterminator="\n", quoting=quoting)
        except UnicodeEncodeError as error:
            letter = error.object[error.start]
            raise UserError(f"'{letter}' does not exist in {text.encoding}: use an input in UTF-8") from error

    return write


@contextlib.contextmanager
def _create(temporary: Path, path: Path) -> Iterator[IO[bytes]]:
    with contextlib.ExitStack() as stack:
        ending = path.suffix.lower()
        if ending == ".zip":
            archive = stack.enter_context(zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED))
            yield stack.enter_context(archive.open(path.stem, "w"))
        elif ending == ".gz":
            raw = stack.enter_context(temporary.open("wb"))
            yield cast(IO[bytes], stack.enter_context(gzip.GzipFile(path.stem, "wb", fileobj=raw, mtime=0)))
        else:
            yield stack.enter_context(temporary.open("wb"))


def _parquet_writer(temporary: Path, path: Path, stack: contextlib.ExitStack) -> Callable[[Table], None]:  # noqa: ARG001
    writer = None

    def write(table: Table) -> None:
        nonlocal writer
        rows = pa.Table.from_pandas(table.frame, schema=writer and writer.schema, preserve_index=False)
        rows = rows.replace_schema_metadata(None)
        writer = writer or stack.enter_context(pa.parquet.ParquetWriter(temporary, rows.schema))
        writer.write_table(rows)

    return write


def _array_writer(temporary: Path, path: Path, stack: contextlib.ExitStack) -> Callable[[Table], None]:
    arrays: list[np.ndarray] = []
    parts: dict[str, np.ndarray] = {}

    def write(table: Table) -> None:
        arrays.append(table.frame.to_numpy())
        parts.update(table.parts or {})

    def save() -> None:
        array = np.concatenate(arrays)
        with temporary.open("wb") as file:
            if path.suffix.lower() == ".npy":
                np.save(file, array, allow_pickle=False)
            else:
                np.savez(file, **({name: array[rows] for name, rows in parts.items()} or {"x": array}))

    stack.callback(save)
    return write
