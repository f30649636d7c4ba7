"""How a text table is written: encoding, separator, header line. They are detected from the file; where it is
ambiguous, a one-line error names the key of `config.table` that resolves it."""

import codecs
import csv
import dataclasses
import gzip
import io
import itertools
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, cast

from absl import logging

from posterior_matching.errors import UserError

SEPARATORS = ("\t", ";", "|", ",")  # in order of preference
BLANKS = " "  # as a separator: any run of blanks and tabs
_SAMPLE_ROWS = 1000
_SAMPLE_BYTES = 1 << 20
_NUMBER = re.compile(r"[+-]?(\d+[.,]?\d*|[.,]\d+)([eE][+-]?\d+)?")
UNNAMED = re.compile(r"column_\d+")  # the names of columns without one
_INTEGER = re.compile(r"[+-]?\d+")
_NO_WORD = {"", "NA", "N/A", "n/a", "na", "NaN", "nan", "NULL", "null", "None", "?", ".", "-"}


@dataclasses.dataclass(frozen=True)
class Dialect:
    """How a text table is written.

    Attributes:
        separator: One character; a blank stands for any run of blanks and tabs.
        encoding: A Python codec.
        newline: The line ending.
        names: The name of every column, `column_1` and so on if the file has none.
        header: The cells of the header line; None without one.
        head: The lines before the first row, verbatim.
        quoted: For every column, whether all its cells are quoted.
    """

    separator: str
    encoding: str
    newline: str
    names: tuple[str, ...]
    header: tuple[str, ...] | None
    head: str
    quoted: tuple[bool, ...]

    @property
    def skip(self) -> int:
        """Number of lines before the first row."""
        return len(split_lines(self.head))


def sniff(
    stream: IO[bytes],
    source: str,
    separator: str | None = None,
    header: bool | None = None,
    encoding: str | None = None,
    known_names: Sequence[str] = (),
) -> Dialect:
    """Detects how a text table is written.

    Args:
        stream: The file's bytes, decompressed. Read to its end.
        source: The file's name, for messages.
        separator: `config.table.separator`; None: the one of tab, `;`, `|`, comma and blanks that splits all lines into
            equally many cells, preferably numbers.
        header: `config.table.header`, whether there is a header line; None: if the first line looks like names.
        encoding: `config.table.encoding`; None: by the byte order mark, else UTF-8, else Windows Latin-1.
        known_names: The columns of the run that the file is for: a first line with half of them is a header.

    Raises:
        UserError: The file is empty, binary or ambiguous.
    """
    sample = stream.read(_SAMPLE_BYTES)
    if not sample.strip():
        raise UserError(f"'{source}' is empty")
    encoding = encoding or _encoding(sample, stream, source)
    text = _decode(sample, encoding, source)
    if len(sample) == _SAMPLE_BYTES:
        text = text[: text.rfind("\n") + 1] or text  # the last line may be cut off
    newline = "\r\n" if "\r\n" in text else "\n" if "\n" in text else "\r" if "\r" in text else "\n"
    separator = separator or _separator(text)
    all_lines = split_lines(text)
    sampled = list(itertools.islice(read_records(all_lines, separator), _SAMPLE_ROWS))
    if not sampled:
        raise UserError(f"'{source}' has no rows")
    lines, rows = zip(*sampled, strict=True)
    width = Counter(len(row) for row in rows[1:] or rows).most_common(1)[0][0]
    first = _fit_header([cell.strip() for cell in rows[0]], rows[1:], width, separator)
    if header is None:
        header = _is_header(first, [row for row in rows[1:] if len(row) == width], source, known_names)
    names = tuple((header and name) or f"column_{i}" for i, name in enumerate(first if header else [""] * width, 1))
    if header:
        _check_names(names, width, lines[0], source)
    skip = lines[0] if header else 0
    return Dialect(
        separator=separator,
        encoding=encoding,
        newline=newline,
        names=names,
        header=tuple(first) if header else None,
        head="".join(all_lines[:skip]),
        quoted=_quoted(all_lines[skip : skip + 20], separator, width),
    )


def split_lines(text: str) -> list[str]:
    """Splits at line feeds and carriage returns only, unlike `str.splitlines`, and keeps them."""
    return list(io.StringIO(text, newline=""))


def read_records(
    lines: Iterable[str], separator: str, *, separators_only: bool = False
) -> Iterator[tuple[int, list[str]]]:
    """Yields (number of its last line, cells) of every record with a cell, or also of those of separators only.

    This is the slow and exact reader, for samples and for the line numbers of error messages.
    """
    if separator == BLANKS:
        reader = csv.reader((line.replace("\t", " ").strip() for line in lines), delimiter=" ", skipinitialspace=True)
    else:
        reader = csv.reader(lines, delimiter=separator, skipinitialspace=True)
    for row in reader:
        if any(cell.strip() for cell in row) or (separators_only and len(row) > 1):
            yield reader.line_num, row


def _encoding(sample: bytes, rest: IO[bytes], source: str) -> str:
    if sample.startswith(codecs.BOM_UTF8):
        return "utf-8-sig"
    if sample.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    for offset, encoding in ((1, "utf-16-le"), (0, "utf-16-be")):  # without a mark: every other byte of ASCII is 0
        if sample[offset::2].count(0) > 0.8 * len(sample) / 2:
            return encoding
    if re.search(rb"[\0-\x08\x0e-\x1a]", sample):
        raise UserError(f"cannot read '{source}' as text (it is binary): save the table as .csv, in UTF-8")
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for block in itertools.chain([sample], iter(lambda: rest.read(_SAMPLE_BYTES), b"")):
            decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        encoding = "latin-1" if re.search(rb"[\x81\x8d\x8f\x90\x9d]", sample) else "cp1252"
        logging.warning("'%s' is not UTF-8: read as %s, unless config.table.encoding says otherwise", source, encoding)
        return encoding
    return "utf-8"


def _decode(sample: bytes, encoding: str, source: str) -> str:
    try:
        return codecs.getincrementaldecoder(encoding)().decode(sample)
    except LookupError:
        raise UserError(f"config.table.encoding='{encoding}' is unknown: 'utf-8', 'utf-16', 'latin-1', ...") from None
    except UnicodeError as error:
        raise UserError(f"cannot read '{source}' as {encoding} ({error}): set config.table.encoding") from None


def _separator(text: str) -> str:
    lines = split_lines(text)[:_SAMPLE_ROWS]
    best, score = ",", (False, 0.0)  # one column
    for separator in (*SEPARATORS, BLANKS):
        rows = [row for _, row in read_records(lines, separator)]
        if not rows:
            continue
        width, count = Counter(len(row) for row in rows[1:] or rows).most_common(1)[0]
        cells = [cell.strip() for row in rows[1:] if len(row) == width for cell in row]
        numbers = sum(cell in _NO_WORD or bool(_NUMBER.fullmatch(cell)) for cell in cells) / max(len(cells), 1)
        found = (count >= 0.9 * len(rows[1:] or rows), numbers)
        if width > 1 and count > 0.5 * len(rows[1:] or rows) and found > score:
            best, score = separator, found
    return best


def _fit_header(first: list[str], rows: Sequence[list[str]], width: int, separator: str) -> list[str]:
    """Adds or removes the cell by which the header line differs from the rows, where it is clear which one."""
    if len(first) == width + 1 and not first[-1]:
        return first[:-1]
    if len(first) == width - 1 and rows:
        if all(not row[-1].strip() for row in rows if len(row) == width):  # only the rows end in a separator
            return [*first, ""]
        if separator in (BLANKS, "\t"):  # R's write.table leaves out the header of the row names
            return ["", *first]
    return first


def _is_header(first: list[str], rows: Sequence[list[str]], source: str, known_names: Sequence[str]) -> bool:
    """Decides whether the first line is a header; see `sniff`."""
    if known_names and len(set(first) & set(known_names)) >= len(known_names) / 2:
        return True
    if known_names and all(map(UNNAMED.fullmatch, known_names)):
        return False
    columns = [[cell.strip() for cell in column] for column in zip(*rows, strict=True)] or [[] for _ in first]
    if not rows or len(columns) != len(first):
        return not any(_NUMBER.fullmatch(cell) for cell in first)
    word = [_is_word(cell) for cell in first]
    numeric = [any(map(_NUMBER.fullmatch, column)) and not any(map(_is_word, column)) for column in columns]
    numbers = [cell for cell in first if _NUMBER.fullmatch(cell)]
    names_numbers = any(w and n for w, n in zip(word, numeric, strict=True))
    repeats = any(w and cell in column for w, cell, column in zip(word, first, columns, strict=True))
    whole = all(_INTEGER.fullmatch(cell) for cell in numbers)
    ambiguous = UserError(
        f"line 1 of '{source}' ({_show(first)}) may be a header or a row: set config.table.header to True or False"
    )
    if not numbers:
        return any(word) and (names_numbers or not repeats)
    if not whole:  # 63.5 is not a name, but a row has no words in columns of numbers
        if names_numbers and not repeats:
            raise ambiguous
        return False
    # Increasing numbers, such as years or 0, 1, 2, are a header if the columns below hold something else.
    values = [int(cell) for cell in numbers]
    steps = {after - before for before, after in itertools.pairwise(values)}
    index_of_pandas = first[0] == "" and values[0] == 0 and columns[0][:3] == ["0", "1", "2"][: len(rows)]
    if names_numbers or (index_of_pandas and steps <= {1}):
        is_header = True
    elif len(values) < 2 or min(steps) <= 0 or (any(word) and repeats):
        return False
    else:
        below = [c for cell, c in zip(first, columns, strict=True) if _INTEGER.fullmatch(cell)]
        is_header = all(any(x not in _NO_WORD and not _INTEGER.fullmatch(x) for x in column) for column in below)
        if not is_header and len(steps) == 1 and len(values) > 2:
            raise ambiguous
    if is_header:
        logging.warning("line 1 of '%s' (%s) is taken as a header: see config.table.header", source, _show(first))
    return is_header


def _is_word(cell: str) -> bool:
    return cell not in _NO_WORD and not _NUMBER.fullmatch(cell)


def _check_names(names: tuple[str, ...], width: int, line: int, source: str) -> None:
    if len(names) != width:
        raise UserError(
            f"line {line} of '{source}' has {len(names)} cells, but most lines have {width}: fix it, or set "
            "config.table.separator or config.table.header"
        )
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"'{source}' has more than one column named '{twice[0]}': rename them")


def _quoted(lines: list[str], separator: str, width: int) -> tuple[bool, ...]:
    if not any('"' in line for line in lines):
        return (False,) * width
    between = r"\s+" if separator == BLANKS else re.escape(separator)
    cell = re.compile(rf'\s*("(?:[^"]|"")*"|.*?)\s*(?:{between}|$)')
    rows = [[match[1] for match in cell.finditer(line.rstrip("\r\n"))][:width] for line in lines]
    columns = zip(*(row for row in rows if len(row) == width), strict=True)
    quoted = tuple(all(c.startswith('"') for c in column if c not in _NO_WORD) and any(column) for column in columns)
    return quoted or (False,) * width


def _show(cells: Sequence[str]) -> str:
    text = ", ".join(cells)
    return text if len(text) <= 60 else text[:57] + "..."


def open_bytes(path: Path) -> IO[bytes]:
    """Opens a file, decompressed if its name ends in `.gz` or `.zip`.

    Raises:
        UserError: The archive does not hold exactly one file.
    """
    if path.suffix.lower() == ".gz":
        return cast(IO[bytes], gzip.open(path))
    if path.suffix.lower() == ".zip":
        archive = zipfile.ZipFile(path)
        members = zip_members(archive)
        if len(members) != 1:
            raise UserError(f"'{path}' holds {len(members)} files: make an archive of a single table")
        return archive.open(members[0])
    return path.open("rb")


def zip_members(archive: zipfile.ZipFile) -> list[str]:
    """Returns the names of the files in an archive, without folders and macOS metadata."""
    return [name for name in archive.namelist() if not name.endswith("/") and not name.startswith("__MACOSX/")]


def records(path: Path, dialect: Dialect) -> Iterator[tuple[int, list[str]]]:
    """Yields (line number, cells) of every row of a text table; slow, see `read_records`."""
    with open_bytes(path) as stream:
        lines = io.TextIOWrapper(stream, dialect.encoding, newline="")
        lines_of_rows = itertools.islice(lines, dialect.skip, None)
        for line, cells in read_records(lines_of_rows, dialect.separator, separators_only=True):
            yield line + dialect.skip, cells
