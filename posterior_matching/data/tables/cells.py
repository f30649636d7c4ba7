"""A table in memory: its cells as they were read, and their interpretation."""

import dataclasses
import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import PlainValidator

from posterior_matching.config import call
from posterior_matching.data.tables.dialect import Dialect, records
from posterior_matching.errors import OptionError, UserError

# Spellings of missing: in every column; and those in columns of numbers, which in columns of words may be categories.
_MISSING = ("", "?", "NA", "N/A", "n/a", "#N/A", "#NA", "<NA>", "NaN", "nan", "NAN", "-nan", "NULL", "Null", "null")
_MISSING_NUMBER = (*_MISSING, "None", "none", "na", ".", "-", "--")
Names = tuple[str | int, ...]
CellType = Literal["number", "code", "word"]  # codes are categories spelled as numbers
UNCERTAIN = sorted(set(_MISSING_NUMBER) - set(_MISSING))


@dataclasses.dataclass(frozen=True)
class TableOptions:
    """The keys of `config.table`: what cannot be told from a file itself. Every key has a default.

    Attributes:
        separator: The character between cells, `" "` for any run of blanks; None: detected.
        header: Whether the first line holds the column names; None: detected.
        encoding: A Python codec; None: detected.
        decimal: `"."` or `","`; None: detected.
        thousands: The thousands separator, a comma in 1,234.5; empty: none.
        missing_values: Values that mean missing, besides the usual spellings: `(-200, "?")`.
        usual_missing: False: of the usual spellings, only empty cells mean missing.
        drop: Columns to leave out.
        categorical: Columns to treat as categories although they hold numeric codes or many different texts.
        real: Columns to treat as quantities although they look like codes or row numbers.
        log: Positive real columns to model on a logarithmic scale; imputations are positive.
        quantile: Real columns to model by their ranks; imputations stay between the smallest and the largest value.
    """

    separator: str | None = None
    header: bool | None = None
    encoding: str | None = None
    decimal: str | None = None
    thousands: str = ""
    missing_values: tuple[str | int | float, ...] = ()
    usual_missing: bool = True
    drop: Names = ()
    categorical: Names = ()
    real: Names = ()
    log: Names = ()
    quantile: Names = ()

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


@dataclasses.dataclass(frozen=True, eq=False)
class Cells:
    """The interpretation of one column.

    Attributes:
        array: [N] text without surrounding blanks, numbers or booleans; null where missing.
        numbers: [N] float64, NaN where missing; None if some cell is not a number.
        is_category: Whether the column's type is categorical: booleans, pandas categories.
        is_date: Whether the column's type is a date or time.
    """

    array: pa.Array
    numbers: np.ndarray | None
    is_category: bool = False
    is_date: bool = False

    @property
    def missing(self) -> np.ndarray:
        """[N] bool."""
        return np.asarray(self.array.is_null())


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """Rows as they were read.

    Attributes:
        frame: [N, d] cells: the exact text of a text file, or values of their original types. Names are strings.
        source: Where it is from, for messages.
        options: How it is read.
        dialect: The dialect of a text file; None for other formats.
        parts: Rows of `train`, `test` and optionally `val`, if the file defines them.
        fingerprint: SHA-256 of the file, or of the frame's values.
        first_row: For a chunk, the number of rows before its first.
    """

    frame: pd.DataFrame
    source: str
    options: TableOptions = TableOptions()
    dialect: Dialect | None = None
    parts: Mapping[str, np.ndarray] | None = None
    fingerprint: str | None = None
    first_row: int = 0
    _cells: dict[tuple[str, CellType | None], Cells] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.frame)

    @property
    def names(self) -> tuple[str, ...]:
        """The d names."""
        return tuple(self.frame.columns)

    @property
    def number(self) -> str:
        """The regular expression of a number in the text of this table."""
        point, group = re.escape(self.options.decimal or "."), re.escape(self.options.thousands)
        whole = rf"\d{{1,3}}({group}\d{{3}})+|\d+" if group else r"\d+"
        return rf"[+-]?(({whole})({point}\d*)?|{point}\d+)([eE][+-]?\d+)?"

    def where(self, name: str) -> str:
        """Names a column in a message."""
        return f"column {self.names.index(name) + 1} ('{name}') of '{self.source}'"

    def row(self, index: int) -> str:
        """Names a row in a message, by its line in a text file, which is read again to find it."""
        line = None
        if self.dialect is not None and Path(self.source).is_file():
            lines = (line for line, _ in records(Path(self.source), self.dialect))
            line = next(itertools.islice(lines, self.first_row + index, None), None)
        return f"row {self.first_row + index + 1}" if line is None else f"line {line}"

    def first_word(self, cells: Cells) -> str:
        """Shows the first cell of a column that is not a number, and where it is."""
        text = cells.array.cast(pa.large_string())
        is_word = pc.fill_null(pc.invert(pc.match_substring_regex(text, f"^({self.number})$")), False)
        index = pc.index(is_word, True).as_py()
        index = pc.index(pc.is_valid(text), True).as_py() if index < 0 else index  # codes such as 0123
        return f"'{shortened(text[index].as_py())}' ({self.row(index)})"

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
        array = to_arrow(self.frame[name])
        is_category = pa.types.is_dictionary(array.type)
        array = array.dictionary_decode() if is_category else array
        if pa.types.is_boolean(array.type):
            return Cells(array, None, is_category=True)
        if pa.types.is_temporal(array.type):
            return Cells(array, None, is_date=True)
        if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
            return dataclasses.replace(self._understand_text(name, array, kind), is_category=is_category)
        is_type = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_null)
        if not any(check(array.type) for check in is_type):
            raise UserError(f"{self.where(name)} holds neither numbers nor text, but {array.type}: leave it out")
        numbers = np.array(array.cast(pa.float64(), safe=False).fill_null(np.nan), np.float64)
        numbers[np.isin(numbers, self._missing_numbers())] = np.nan
        self._check_finite(name, numbers)
        return Cells(pc.if_else(pa.array(np.isnan(numbers)), None, array), numbers, is_category)

    def _understand_text(self, name: str, text: pa.Array, kind: CellType | None) -> Cells:
        text = pc.utf8_trim_whitespace(text)
        declared = [str(value) for value in self.options.missing_values]

        def present(usual: Sequence[str]) -> pa.Array:
            missing = [*(usual if self.options.usual_missing else [""]), *declared]
            return pc.if_else(pc.is_in(text, value_set=pa.array(missing, text.type)), None, text)

        if kind == "word":
            return Cells(present(_MISSING), None)
        array = present(_MISSING_NUMBER)
        numbers = self._numbers(array, codes=kind != "number" and name not in self.options.real)
        if numbers is None:
            return Cells(present(_MISSING) if kind is None else array, None)
        numbers[np.isin(numbers, self._missing_numbers())] = np.nan
        self._check_finite(name, numbers)
        return Cells(pc.if_else(pa.array(np.isnan(numbers)), None, array), numbers)

    def _missing_numbers(self) -> list[float]:
        return [float(v) for v in self.options.missing_values if _is_number(v)]

    def _numbers(self, text: pa.Array, codes: bool) -> np.ndarray | None:
        """Returns [N] float64, NaN where null, or None if some text is not a number, such as 1_000 or 0x1F.

        With `codes`, digits with a leading zero are not a number, such as the ZIP code 02139.
        """
        options, decimal = self.options, self.options.decimal or "."
        if codes and pc.any(pc.match_substring_regex(text, r"^[+-]?0\d+$")).as_py():
            return None
        if options.thousands:
            if not pc.all(pc.match_substring_regex(text, f"^({self.number})$")).as_py():
                return None
            text = pc.replace_substring(text, options.thousands, "")
        if decimal == ",":
            if pc.any(pc.match_substring(text, ".")).as_py():
                return None
            text = pc.replace_substring(text, ",", ".")
        try:
            array = text.cast(pa.float64())
        except pa.ArrowInvalid:
            return None
        numbers = np.array(array.fill_null(np.nan), np.float64)
        return numbers if np.isnan(numbers).sum() == array.null_count else None

    def _check_finite(self, name: str, numbers: np.ndarray) -> None:
        infinite = np.flatnonzero(np.isinf(numbers))
        if len(infinite):
            cell = self.frame[name].iloc[infinite[0]]
            raise UserError(
                f"{self.where(name)} has an infinite value ({self.row(infinite[0])}): fix it, or declare it "
                f"as missing with config.table.missing_values=('{cell}',)"
            )

    def replace(self, filled: Mapping[str, pd.Series]) -> "Table":
        """Returns the table with these columns, by name, in place of its own."""
        return dataclasses.replace(self, frame=self.frame.assign(**filled))


def to_arrow(series: pd.Series) -> pa.Array:
    """Returns the cells of a column; columns of mixed types become text."""
    try:
        array = pa.array(series, from_pandas=True)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
        array = pa.array([None if empty else str(cell) for cell, empty in zip(series, series.isna(), strict=True)])
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array


def _is_number(value: object) -> bool:
    try:
        float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    return True


def with_decimal(table: Table) -> Table:
    """Determines the decimal mark of a text table: a comma if some column is numeric only with decimal commas.

    Raises:
        UserError: Columns differ in it, or all commas could also be thousands separators.
    """
    options = table.options
    if table.dialect is None or options.decimal is not None:
        return table
    decimal = "," if options.thousands == "." else "."
    if not options.thousands and (commas := _columns_of_numbers(table, ",")):
        points = _columns_of_numbers(table, ".")
        cells = [pc.filter(text, pc.match_substring(text, ",")) for text in commas.values()]
        grouped = all(pc.all(pc.match_substring_regex(c, r"^[+-]?[1-9]\d{0,2}(,\d{3})+$")).as_py() for c in cells)
        if points or grouped:
            example = f"'{cells[0][0]}' in {table.where(next(iter(commas)))}"
            other = f"and {table.where(next(iter(points)))} differ in the decimal mark" if points else ""
            problem = other or "may group thousands"
            raise UserError(f"{example} {problem}: set config.table.decimal=',' or config.table.thousands=','")
        decimal = ","
    return dataclasses.replace(table, options=dataclasses.replace(options, decimal=decimal))


def _columns_of_numbers(table: Table, mark: str) -> dict[str, pa.Array]:
    """Returns the columns of a text table that are numeric with this decimal mark and contain it."""
    found = {}
    for name in table.names:
        text = pc.utf8_trim_whitespace(to_arrow(table.frame[name]))
        if pc.any(pc.match_substring(text, mark)).as_py():
            text = pc.filter(text, pc.invert(pc.is_in(text, value_set=pa.array(_MISSING_NUMBER, text.type))))
            number = rf"^[+-]?(\d+([{mark}]\d*)*|[{mark}]\d+)([eE][+-]?\d+)?$"
            if len(text) and pc.all(pc.match_substring_regex(text, number)).as_py():
                found[name] = text
    return found


def number_text(value: float, integer: bool, decimal: str) -> str:
    """Formats a number like its column: `63`, `63.0`, or seven significant digits."""
    if integer:
        return f"{value:.0f}"
    whole = value == round(value) and abs(value) < 1e15
    return (f"{value:.1f}" if whole else repr(float(f"{value:.7g}"))).replace(".", decimal)


def shortened(text: str) -> str:
    """Truncates a long cell for a message."""
    return text if len(text) <= 40 else text[:37] + "..."


def is_usual_missing(text: pa.Array) -> pa.Array:
    """Whether the cells of a text column are usual spellings of missing."""
    return pc.is_in(text, value_set=pa.array(_MISSING, text.type))
