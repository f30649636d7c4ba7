"""Detects how a text table is written. Where it is ambiguous, a one-line error names the key that resolves it."""

import codecs
import csv
import io
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import IO, Any

from absl import logging

from posterior_matching.data.tables import spelling
from posterior_matching.data.tables.cells import TableOptions, TextFormat
from posterior_matching.errors import UserError

_SEPARATORS = ("\t", ";", "|", ",", " ")  # in order of preference
_SAMPLE_ROWS = 1000
_SAMPLE_BYTES = 1 << 20


def text_format(stream: IO[bytes], source: str, options: TableOptions, known_names: Sequence[str]) -> TextFormat:
    """Detects how a text table is written from its bytes, decompressed, where options do not say it.

    A first line with half of `known_names`, the columns of the run that the file is for, is a header.

    Raises:
        UserError: The file is empty, binary or ambiguous.
    """
    sample = stream.read(_SAMPLE_BYTES)
    if not sample.strip():
        raise UserError(f"'{source}' is empty")
    encoding = options.encoding or _encoding(sample, stream, source)
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(sample)
    except LookupError:
        raise UserError(f"config.table.encoding='{encoding}' is unknown: 'utf-8', 'utf-16', 'latin-1', ...") from None
    except UnicodeError as error:
        raise UserError(f"cannot read '{source}' as {encoding} ({error}): set config.table.encoding") from None
    lines = list(itertools.islice(io.StringIO(text, newline=""), _SAMPLE_ROWS))
    if len(sample) == _SAMPLE_BYTES and len(lines) > 1:
        lines.pop()  # it may be cut off
    separator = options.separator or max(_SEPARATORS, key=lambda separator: _fit(lines, separator))
    sampled = _rows(lines, separator)
    if not sampled:
        raise UserError(f"'{source}' has no rows")
    (end, first), *rest = sampled
    width = _width([row for _, row in rest] or [first])[0]
    rows = [row for _, row in rest if len(row) == width]
    written = tuple(first)
    if len(first) == width + 1 and not first[-1]:  # only the header ends in a separator
        first = first[:-1]
    elif len(first) == width - 1 and rows and not any(row[-1] for row in rows):  # only the rows do
        first = [*first, ""]
    elif len(first) == width - 1 and rows and separator in " \t":  # R leaves out the header of the row names
        first = ["", *first]
    header = options.header
    if known_names and header is None:
        known = len(set(first) & set(known_names)) >= len(known_names) / 2
        header = True if known else False if spelling.is_unnamed(known_names) else None
    if header is None:
        header, shown = _is_header(first, rows), spelling.shortened(", ".join(first), 60)
        if header is None:
            problem = "may be a header or a row: set config.table.header to True or False"
            raise UserError(f"line 1 of '{source}' ({shown}) {problem}")
        if header and any(map(spelling.is_number, first)):
            logging.warning("line 1 of '%s' (%s) is taken as a header: see config.table.header", source, shown)
    if not header:
        return TextFormat(separator, encoding, spelling.unnamed(width), None, skip=0)
    if len(first) != width:
        raise UserError(
            f"line {end} of '{source}' has {len(first)} cells, but most lines have {width}: fix it, or set "
            "config.table.separator or config.table.header"
        )
    names = tuple(name or other for name, other in zip(first, spelling.unnamed(width), strict=True))
    if len(set(names)) < width:
        twice = Counter(names).most_common(1)[0][0]
        raise UserError(f"'{source}' has more than one column named '{twice}': rename them")
    return TextFormat(separator, encoding, names, written, skip=end)


def split_cells(lines: Iterable[str], separator: str, **options: Any) -> Any:
    """Returns a `csv.reader` of lines; a blank as separator stands for any run of blanks and tabs."""
    if separator == " ":
        lines, options = (line.replace("\t", " ").strip() for line in lines), options | {"skipinitialspace": True}
    return csv.reader(lines, delimiter=separator, **options)


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


def _rows(lines: Sequence[str], separator: str) -> list[tuple[int, list[str]]]:
    """Returns (number of its last line, cells without blanks around them) of the first rows."""
    reader = split_cells(lines, separator, skipinitialspace=True)
    rows = ((reader.line_num, [cell.strip() for cell in row]) for row in reader)
    return [(line, row) for line, row in rows if any(row)]


def _width(rows: Sequence[list[str]]) -> tuple[int, int]:
    """Returns the most common number of cells, and of how many rows."""
    return Counter(map(len, rows)).most_common(1)[0]


def _fit(lines: Sequence[str], separator: str) -> tuple[bool, bool, float]:
    """Whether a separator splits most rows, nearly all, into equally many cells; and the share of numbers in them."""
    rows = [row for _, row in _rows(lines, separator)]
    rows = rows[1:] or rows
    width, count = _width(rows) if rows else (1, 0)
    if width == 1 or count <= len(rows) / 2:
        return separator == ",", False, 0.0  # one column
    cells = [cell for row in rows if len(row) == width for cell in row]
    return True, count >= 0.9 * len(rows), sum(not spelling.is_word(cell) for cell in cells) / len(cells)


def _is_header(first: Sequence[str], rows: Sequence[Sequence[str]]) -> bool | None:
    """Whether the first line holds names: above numbers, or unlike the cells below; None if that is not clear.

    Whole numbers are names if they increase, like years or 0, 1, 2, above columns of something else.
    """
    numbers = [cell for cell in first if spelling.is_number(cell, ".,")]
    if not rows or len(first) != len(rows[0]):
        return not numbers
    columns = list(zip(*rows, strict=True))
    words = [(cell, column) for cell, column in zip(first, columns, strict=True) if spelling.is_word(cell)]
    names_numbers = any(any(column) and not any(map(spelling.is_word, column)) for _, column in words)
    repeats = any(cell in column for cell, column in words)
    if not numbers:
        return bool(words) and (names_numbers or not repeats)
    if not all(map(_is_integer, numbers)):  # 63.5 is no name, but a row has no words in columns of numbers
        return None if names_numbers and not repeats else False
    steps = {int(after) - int(before) for before, after in itertools.pairwise(numbers)}
    counts_rows = first[0] == "" and columns[0][:3] == ("0", "1", "2")[: len(rows)]  # pandas' index
    if names_numbers or (counts_rows and int(numbers[0]) == 0 and steps <= {1}):
        return True
    if not steps or min(steps) <= 0 or (words and repeats):
        return False
    below = [column for cell, column in zip(first, columns, strict=True) if cell in numbers]
    if not any(all(_is_integer(cell) or cell in spelling.MISSING_ANYWHERE for cell in column) for column in below):
        return True
    return None if len(steps) == 1 and len(numbers) > 2 else False


def _is_integer(cell: str) -> bool:
    return re.fullmatch(r"[+-]?\d+", cell) is not None
