"""A table in memory: its cells as they were read, and their interpretation."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import PlainValidator

from posterior_matching.config import call
from posterior_matching.data.tables import spelling
from posterior_matching.errors import OptionError, UserError

Names = tuple[str | int, ...]
CellType = Literal["number", "code", "word"]  # codes are categories spelled as numbers


@dataclasses.dataclass(frozen=True)
class TableOptions:
    """The keys of `config.table`: what cannot be told from a file itself. Every key has a default."""

    separator: str | None = None  # the character between cells, `" "` for any run of blanks; None: detected
    header: bool | None = None  # whether the first line holds the column names; None: detected
    encoding: str | None = None  # a Python codec; None: detected
    decimal: str | None = None  # `"."` or `","`; None: detected
    thousands: str = ""  # the thousands separator, a comma in 1,234.5; empty: none
    missing_values: tuple[str | int | float, ...] = ()  # besides the usual spellings: `(-200, "?")`
    usual_missing: bool = True  # False: of the usual spellings, only empty cells mean missing
    drop: Names = ()  # columns to leave out
    categorical: Names = ()  # columns to treat as categories although they hold numeric codes or many different texts
    real: Names = ()  # columns to treat as quantities although they look like codes or row numbers
    log: Names = ()  # positive real columns to model on a logarithmic scale; imputations are positive
    quantile: Names = ()  # real columns to model by their ranks; imputations stay between the extremes

    def __post_init__(self) -> None:
        for key in ("drop", "categorical", "real", "log", "quantile"):  # names may be numbers, such as years
            object.__setattr__(self, key, tuple(map(str, getattr(self, key))))
        if self.separator is not None and len(self.separator) != 1:
            raise OptionError("separator", f"must be one character, not {self.separator!r}")
        if self.decimal not in (None, ".", ","):
            raise OptionError("decimal", f"must be '.' or ',', not {self.decimal!r}")
        if len(self.thousands) > 1 or (self.thousands and self.thousands == self.decimal):
            raise OptionError("thousands", f"must be one character, not the decimal mark: {self.thousands!r}")


TableOption = Annotated[TableOptions, PlainValidator(functools.partial(call, TableOptions))]


@dataclasses.dataclass(frozen=True)
class TextFormat:
    """How a text table is written."""

    separator: str  # one character; a blank stands for any run of blanks and tabs
    encoding: str  # a Python codec
    names: tuple[str, ...]  # the name of every column, `column_1` and so on if the file has none
    header: tuple[str, ...] | None  # the cells of the header line, maybe one more or fewer; None without one
    skip: int  # the number of lines before the first row


@dataclasses.dataclass(frozen=True, eq=False)
class Cells:
    """The interpretation of one column."""

    array: pa.Array  # [N] text without surrounding blanks, numbers or booleans; null where missing
    numbers: np.ndarray | None  # [N] float64, NaN where missing; None if some cell is not a number
    is_category: bool = False  # whether the column's type is categorical: booleans, pandas categories

    @property
    def missing(self) -> np.ndarray:
        """[N] bool."""
        return np.asarray(self.array.is_null())


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """Rows as they were read."""

    frame: pd.DataFrame  # [N, d]: the exact text of a text file, or values of their original types
    source: str  # where it is from, for messages
    options: TableOptions = TableOptions()  # how it is read
    text: TextFormat | None = None  # the format of a text file; None for other formats
    lines: np.ndarray | None = None  # [N] line numbers of a text file
    parts: Mapping[str, np.ndarray] | None = None  # rows of `train`, `test`, maybe `val`, if the file has them
    fingerprint: str | None = None  # SHA-256 of the file, or of the frame's values
    first_row: int = 0  # for a chunk, the number of rows before its first
    _cells: dict[tuple[str, CellType | None], Cells] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.frame)

    @property
    def names(self) -> tuple[str, ...]:
        """The d names."""
        return tuple(self.frame.columns)

    @property
    def _number(self) -> str:
        """The regular expression of a number in the text of this table."""
        number = spelling.number(self.options.decimal or ".", self.options.thousands)
        return rf"^(?:{number}|[+-]?(?i:inf(?:inity)?))$"

    def where(self, name: str) -> str:
        """Names a column in a message."""
        return f"column {self.names.index(name) + 1} ('{name}') of '{self.source}'"

    def row(self, index: int) -> str:
        """Names a row in a message, by its line in a text file."""
        return f"row {self.first_row + index + 1}" if self.lines is None else f"line {self.lines[index]}"

    def first_word(self, cells: Cells) -> str:
        """Shows the first cell of a column that is not a number, and where it is."""
        text = cells.array.cast(pa.large_string())
        index = pc.index(pc.match_substring_regex(text, self._number), False).as_py()
        index = pc.index(pc.is_valid(text), True).as_py() if index < 0 else index  # codes such as 0123
        return f"'{spelling.shortened(text[index].as_py())}' ({self.row(index)})"

    def cells(self, name: str, kind: CellType | None = None) -> Cells:
        """Interprets a column.

        Args:
            name: The column.
            kind: What it is known to hold; None: numbers if all cells are numbers, else words.

        Raises:
            UserError: A number is infinite.
        """
        if (name, kind) not in self._cells:
            cells = self._understand(name, kind)
            self._cells[name, kind] = cells
            if kind is None and cells.numbers is not None:
                self._cells[name, "number"] = cells
        return self._cells[name, kind]

    def _understand(self, name: str, kind: CellType | None) -> Cells:
        array, words, numbers = to_arrow(self.frame[name]), None, None
        is_category = pa.types.is_dictionary(array.type)
        array = array.dictionary_decode() if is_category else array
        if pa.types.is_boolean(array.type) or pa.types.is_temporal(array.type):
            return Cells(array, None, is_category=pa.types.is_boolean(array.type))
        if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
            text = pc.utf8_trim_whitespace(array)
            words, array = self._present(text, spelling.MISSING), self._present(text, spelling.MISSING_ANYWHERE)
            if kind != "word":
                numbers = self._numbers(array, codes=kind != "number" and name not in self.options.real)
            if numbers is None:
                return Cells(array if kind in ("number", "code") else words, None, is_category)
        else:
            if pa.types.is_nested(array.type) or pa.types.is_binary(array.type):
                raise UserError(f"{self.where(name)} holds neither numbers nor text, but {array.type}: leave it out")
            numbers = np.array(array.cast(pa.float64(), safe=False).fill_null(np.nan), np.float64)
        numbers[np.isin(numbers, pd.to_numeric(list(self.options.missing_values), errors="coerce"))] = np.nan
        if np.isinf(numbers).any():
            row = int(np.argmax(np.isinf(numbers)))
            raise UserError(
                f"{self.where(name)} has an infinite value ({self.row(row)}): fix it, or declare it as missing with "
                f"config.table.missing_values=('{self.frame[name].iloc[row]}',)"
            )
        return Cells(pc.if_else(pa.array(np.isnan(numbers)), None, array), numbers, is_category)

    def _present(self, text: pa.Array, usual: frozenset[str]) -> pa.Array:
        """Returns the text with null for these usual and for the declared spellings of missing."""
        missing = [*(usual if self.options.usual_missing else [""]), *map(str, self.options.missing_values)]
        return pc.if_else(pc.is_in(text, value_set=pa.array(missing, text.type)), None, text)

    def _numbers(self, text: pa.Array, codes: bool) -> np.ndarray | None:
        """Returns [N] float64, NaN where null, or None if some text is not a number, such as 1_000 or 0x1F.

        With `codes`, digits with a leading zero are not a number, such as the ZIP code 02139.
        """
        if not pc.all(pc.match_substring_regex(text, self._number)).as_py() and text.null_count < len(text):
            return None
        if codes and pc.any(pc.match_substring_regex(text, f"^{spelling.CODE.pattern}$")).as_py():
            return None
        if self.options.thousands:
            text = pc.replace_substring(text, self.options.thousands, "")
        text = pc.replace_substring(text, self.options.decimal or ".", ".")
        return np.array(text.cast(pa.float64()).fill_null(np.nan), np.float64)

    def replace(self, filled: Mapping[str, pd.Series]) -> "Table":
        """Returns the table with these columns, by name, instead of its own."""
        return dataclasses.replace(self, frame=self.frame.assign(**filled))


def to_arrow(series: pd.Series) -> pa.Array:
    """Returns the cells of a column; columns of mixed types become text."""
    try:
        array = pa.array(series, from_pandas=True)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
        array = pa.array([None if empty else str(cell) for cell, empty in zip(series, series.isna(), strict=True)])
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array


def with_decimal(table: Table) -> Table:
    """Determines the decimal mark of a text table: a comma if some column is numeric only with decimal commas.

    Raises:
        UserError: Columns differ in it, or all commas could also be thousands separators.
    """
    options = table.options
    if table.text is None or options.decimal is not None:
        return table
    decimal = "," if options.thousands == "." else "."
    if not options.thousands and (commas := _columns_of_numbers(table, ",")):
        points, decimal = _columns_of_numbers(table, "."), ","
        cells = pa.chunked_array(commas.values())
        grouped = pc.all(pc.match_substring_regex(cells, r"^[+-]?[1-9]\d{0,2}(,\d{3})+$")).as_py()
        if points or grouped:
            example = f"'{cells[0]}' in {table.where(next(iter(commas)))}"
            other = f"and {table.where(next(iter(points)))} differ in the decimal mark" if points else ""
            problem = other or "may group thousands"
            raise UserError(f"{example} {problem}: set config.table.decimal=',' or config.table.thousands=','")
    return dataclasses.replace(table, options=dataclasses.replace(options, decimal=decimal))


def _columns_of_numbers(table: Table, mark: str) -> dict[str, pa.Array]:
    """Returns the cells with this mark of each column of numbers in which it is decimal or groups digits."""
    numeric = rf"^(?:{spelling.number(mark)}|{spelling.number(thousands=mark)})$"
    columns = {}
    for name in table.names:
        text = pc.utf8_trim_whitespace(to_arrow(table.frame[name]))
        text = pc.filter(text, pc.invert(pc.is_in(text, value_set=pa.array(spelling.MISSING_ANYWHERE, text.type))))
        marked = pc.filter(text, pc.match_substring(text, mark))
        if len(marked) and pc.all(pc.match_substring_regex(text, numeric)).as_py():
            columns[name] = marked
    return columns
