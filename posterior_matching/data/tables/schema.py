"""The columns of a table as a model sees them: names, kinds, units and categories, fixed when it is trained.

The model's rows `x: [N, d]` have one entry per column: quantities are scaled to mean 0 and standard deviation 1 on the
training rows, categories are given by their index, and missing values are NaN. A run stores its columns in
`config.json`, and later tables are matched to them by name.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any, Literal, Self

import numpy as np
import pandas as pd
import pyarrow.compute as pc
from absl import logging

from posterior_matching import config
from posterior_matching.data.tables import kinds, spelling
from posterior_matching.data.tables.cells import Cells, CellType, Table, TableOptions
from posterior_matching.errors import UserError, nearest

Value = str | bool | int | float
_NUM_KNOTS = 101


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of the model."""

    name: str  # as in the table
    kind: Literal["real", "integer", "categorical"]  # integers are modelled as real, and decoded between `low`, `high`
    dtype: str = "float64"  # type of the original cells, for `TableSchema.decode`
    mean: float = 0.0  # mean of the transformed training values
    std: float = 1.0  # standard deviation of the transformed training values; positive
    transform: Literal["none", "log", "quantile"] = "none"  # quantile: linear between knots
    knots: tuple[float, ...] = ()  # increasing values in the table's units
    scores: tuple[float, ...] = ()  # the normal scores of the knots' ranks
    low: float | None = None  # smallest training value of an integer column
    high: float | None = None  # largest training value of an integer column
    values: tuple[Value, ...] = ()  # the categories, by index

    def transformed(self, values: np.ndarray) -> np.ndarray:
        """Maps values [N] in the table's units to the scale that is standardised."""
        if self.transform == "log":
            return np.log(values)
        return np.interp(values, self.knots, self.scores) if self.transform == "quantile" else values

    def inverse(self, z: np.ndarray) -> np.ndarray:
        """Maps standardised values [N] back to the table's units, float64."""
        values = z.astype(np.float64) * self.std + self.mean
        if self.transform == "log":
            values = np.exp(values)
        elif self.transform == "quantile":
            values = np.interp(values, self.scores, self.knots)
        return values if self.kind == "real" else np.clip(np.rint(values), self.low, self.high)

    def log_slope(self, z: np.ndarray) -> np.ndarray:
        """Returns log |d standardised / d table units| at standardised values [N]; 0 where they are NaN."""
        scale, slope = z.astype(np.float64) * self.std + self.mean, np.zeros(len(z))
        if self.transform == "log":
            slope = -scale
        elif self.transform == "quantile":
            segment = np.clip(np.searchsorted(self.scores, scale, "right") - 1, 0, len(self.scores) - 2)
            slope = np.log(np.diff(self.scores) / np.diff(self.knots))[segment]
        return np.where(np.isnan(z), 0.0, slope - np.log(self.std))

    @functools.cached_property
    def index(self) -> dict[str, int]:
        """Index of every category by its `_key`."""
        return {_key(value): index for index, value in enumerate(self.values)}

    @property
    def cell_type(self) -> CellType:
        """How to interpret the column's cells."""
        if self.kind != "categorical":
            return "number"
        return "code" if all(spelling.is_number(_key(value)) for value in self.values) else "word"


@dataclasses.dataclass(frozen=True)
class TableSchema:
    """All columns of a table."""

    columns: tuple[Column, ...]  # the d columns of the model
    names: tuple[str, ...] = ()  # all columns of the training file; (): columns go by their position
    # Constant columns with their value, which fills their missing cells, and empty columns with None.
    set_aside: Mapping[str, Value | None] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()  # dropped columns and unnamed row numbers, passed through unchanged
    missing_values: tuple[str | float, ...] = ()  # `config.table.missing_values` of the training
    usual_missing: bool = True  # `config.table.usual_missing` of the training

    def __len__(self) -> int:
        return len(self.columns)

    @property
    def cardinalities(self) -> tuple[int, ...]:
        """The number of categories of each column, 0 for real ones."""
        return tuple(len(column.values) for column in self.columns)

    def to_json(self) -> dict[str, Any]:
        """Returns plain values that survive `json` exactly; `from_json` reads them."""
        plain = {field.name: field.default for field in dataclasses.fields(Column)}
        columns = [{k: v for k, v in dataclasses.asdict(c).items() if v != plain[k]} for c in self.columns]
        return config.plain(dataclasses.asdict(self) | {"columns": columns})

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Self:
        """Reads what `to_json` wrote."""
        saved = config.plain(saved)  # lists as tuples
        return cls(**saved | {"columns": tuple(Column(**column) for column in saved["columns"])})

    @classmethod
    def from_standardisation(cls, mean: Sequence[float], std: Sequence[float]) -> Self:
        """Returns real columns without names."""
        pairs = enumerate(zip(mean, std, strict=True), 1)
        return cls(tuple(Column(f"column_{i}", "real", mean=float(m), std=float(s)) for i, (m, s) in pairs))

    @classmethod
    def fit(cls, table: Table, rows: np.ndarray | None = None) -> Self:
        """Determines the columns of a table from `table.options` and its cells.

        Args:
            table: The training file.
            rows: Indices of the rows to standardise on; None: all. Kinds and categories are inferred from all rows.

        Raises:
            UserError: See `kinds.infer`; or no column varies, or values cannot be transformed or scaled.
        """
        options = table.options
        rows = np.arange(len(table)) if rows is None else rows
        columns: list[Column] = []
        set_aside: dict[str, Value | None] = {}
        ignored = list(options.drop)
        for name, kind in kinds.infer(table).items():
            if kind == "index":
                logging.warning("%s has no name and numbers the rows: left out", table.where(name))
                ignored.append(name)
                continue
            column = None
            if kind != "empty":
                column = _categorical(table, name) if kind == "categorical" else _real(table, name, kind, rows)
            if isinstance(column, Column):
                columns.append(column)
            else:
                set_aside[name] = column
        if set_aside:
            listed = ", ".join(f"'{name}' ({'empty' if v is None else f'always {v}'})" for name, v in set_aside.items())
            logging.warning("set aside, not modelled, of '%s': %s", table.source, listed)
        if not columns:
            raise UserError(f"no column of '{table.source}' varies: there is nothing to learn")
        return cls(
            _standardised(table, columns, rows),
            names=table.names,
            set_aside=set_aside,
            ignored=tuple(name for name in table.names if name in ignored),
            missing_values=options.missing_values,
            usual_missing=options.usual_missing,
        )

    def reading(self, options: TableOptions) -> TableOptions:
        """Returns `options` with this run's missing values."""
        return dataclasses.replace(options, missing_values=self.missing_values, usual_missing=self.usual_missing)

    def encode(self, table: Table, unknown_categories: Literal["error", "missing"] = "error") -> np.ndarray:
        """Turns a table into rows of the model.

        Args:
            table: With these columns, in any order; one row is enough, and columns may be empty.
            unknown_categories: How to treat a category that the training file did not have.

        Returns:
            [N, d] float32; NaN where missing.

        Raises:
            UserError: A column is missing, unknown or of another kind, or a category is unknown.
        """
        table = self._adopt(table)
        x = np.empty((len(table), len(self)), np.float32)
        for j, (column, name) in enumerate(self._match(table).items()):
            cells = table.cells(name, column.cell_type)
            if column.kind == "categorical":
                x[:, j] = _encode_categories(column, table, name, cells, unknown_categories)
            else:
                if cells.numbers is None:
                    problem = "but the run was trained on numbers: fix it or set config.table.decimal"
                    raise UserError(f"{table.where(name)} holds {table.first_word(cells)}, {problem}")
                if column.transform == "log":
                    _check(table, name, cells.numbers <= 0, "has no logarithm, which the run models of this column")
                with np.errstate(over="ignore"):
                    x[:, j] = (column.transformed(cells.numbers) - column.mean) / column.std
                _check(table, name, np.isinf(x[:, j]), "is out of all proportion to the training values")
        return x

    def decode(self, x: np.ndarray) -> pd.DataFrame:
        """Turns rows [N, d] of the model, without NaN, into a frame in the table's units, categories and types."""
        x = np.asarray(x)
        frame = {}
        for j, column in enumerate(self.columns):
            if column.kind == "categorical":
                values = pd.Series(np.array(column.values, object)[x[:, j].astype(np.int64)])
                frame[column.name] = values.astype(_dtype(column.dtype))
            else:
                frame[column.name] = pd.Series(column.inverse(x[:, j])).astype(_dtype(column.dtype))
        return pd.DataFrame(frame)

    def log_det_jacobian(self, x: np.ndarray) -> np.ndarray:
        """Returns [N, d] float64, to be added to the log-densities of each column to convert them to the table's units.

        0 for categorical columns, whose log-probabilities have no units, and where x is NaN.
        """
        x = np.asarray(x)
        zero = np.zeros(len(x))
        return np.stack([zero if c.values else c.log_slope(x[:, j]) for j, c in enumerate(self.columns)], axis=1)

    def fill(self, table: Table, x: np.ndarray) -> Table:
        """Returns the table with missing cells filled from rows [N, d] of the model, or from set-aside columns' values.

        All other cells and the types of the columns are unchanged.
        """
        table, decoded, filled = self._adopt(table), self.decode(x), {}
        for column, name in self._match(table).items():
            missing = table.cells(name, column.cell_type).missing
            if missing.any():
                values = decoded[column.name][missing]
                integer = column.dtype.lower().startswith(("int", "uint"))
                filled[name] = _put(table, name, missing, values, integer)
        for name, value in self.set_aside.items():
            if value is not None and name in table.names and (missing := table.cells(name).missing).any():
                filled[name] = _put(table, name, missing, pd.Series([value] * int(missing.sum())), integer=False)
        return table.replace(filled)

    def _adopt(self, table: Table) -> Table:
        options = self.reading(table.options)
        return table if options == table.options else dataclasses.replace(table, options=options)

    def _match(self, table: Table) -> dict[Column, str]:
        """Returns the name of every column in `table`: its own, or the one at its position if training had no names."""
        known = self.names or tuple(column.name for column in self.columns)
        if spelling.is_unnamed(known):
            if len(table.names) != len(known):
                raise UserError(
                    f"'{table.source}' has {len(table.names)} columns, but the run was trained on {len(known)}"
                )
            return {column: table.names[known.index(column.name)] for column in self.columns}
        if spelling.is_unnamed(table.names):
            raise UserError(
                f"'{table.source}' has no column names, but the run was trained on named columns: add them "
                f"({', '.join(known)})"
            )
        for column in self.columns:
            if column.name not in table.names:
                raise UserError(
                    f"'{table.source}' has no column '{column.name}', which the run was trained on: add it, empty if "
                    f"its values are not known ({nearest(column.name, table.names)})"
                )
        if unknown := set(table.names) - set(known) - set(table.options.drop):
            listed = ", ".join(f"'{name}'" for name in table.names if name in unknown)
            raise UserError(f"'{table.source}' has columns that the run was not trained on: {listed}: remove them")
        return {column: column.name for column in self.columns}


# One column ----------------------------------------------------------------------------------------------------------


def _key(value: Value) -> str:
    """Returns the same key for all spellings of a category: `1`, `1.0`; `true`, `TRUE`."""
    text = str(value)
    if text.lower() in ("true", "false"):
        return text.lower()
    if spelling.is_number(text) and not spelling.CODE.fullmatch(text):
        return f"{float(text):.17g}"
    return text


def _numbers(table: Table, name: str) -> np.ndarray:
    numbers = table.cells(name, "number").numbers
    assert numbers is not None, name
    return numbers


def _categorical(table: Table, name: str) -> Column | Value:
    """Returns the column, or its only category."""
    counts = pc.value_counts(pc.drop_null(table.cells(name).array)).to_pylist()
    values: dict[str, Value] = {}
    for entry in sorted(counts, key=lambda entry: -entry["counts"]):  # a category is spelled as most often
        values.setdefault(_key(entry["values"]), entry["values"])
    if len(values) == 1:
        return next(iter(values.values()))
    keys = sorted(values, key=float if all(map(spelling.is_number, values)) else str)
    dtype = "str" if table.text else str(table.frame[name].dtype)
    return Column(name, "categorical", dtype, values=tuple(values[key] for key in keys))


def _real(table: Table, name: str, kind: Literal["real", "integer"], rows: np.ndarray) -> Column | Value | None:
    """Returns the column, not yet standardised; or its only value in these rows, None without one."""
    numbers, array = _numbers(table, name), table.cells(name, "number").array
    values = numbers[rows]
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return None
    if values.min() == values.max():
        return pc.drop_null(array)[0].as_py()
    dtype = str(table.frame[name].dtype)
    if table.text is not None:
        digits = f"^[-+0-9{re.escape(table.options.thousands)}]*$"
        is_int = pc.all(pc.match_substring_regex(array, digits)).as_py() and np.abs(values).max() < 2**63
        dtype = "int64" if is_int else "float64"
    low, high = (None, None) if kind == "real" else (float(values.min()), float(values.max()))
    column = Column(name, kind, dtype, low=low, high=high)
    if name in table.options.log:
        _check(table, name, numbers <= 0, "has no logarithm: use config.table.quantile instead of log")
        return dataclasses.replace(column, transform="log")
    if name in table.options.quantile:
        ranks = np.linspace(0, 1, _NUM_KNOTS)
        knots, where = np.unique(np.quantile(values, ranks, method="inverted_cdf"), return_inverse=True)
        ranks = np.bincount(where, ranks) / np.bincount(where)  # ties get their mean rank
        scores = [NormalDist().inv_cdf(rank) for rank in np.clip(ranks, 0.5 / len(values), 1 - 0.5 / len(values))]
        return dataclasses.replace(column, transform="quantile", knots=tuple(knots.tolist()), scores=tuple(scores))
    return column


def _standardised(table: Table, columns: list[Column], rows: np.ndarray) -> tuple[Column, ...]:
    real = [column for column in columns if not column.values]
    if not real:
        return tuple(columns)
    with np.errstate(over="ignore", invalid="ignore"):
        part = np.stack([column.transformed(_numbers(table, column.name)) for column in real], axis=1)[rows]
        mean, std = np.nanmean(part, axis=0), np.nanstd(part, axis=0)
    scaled = {}
    for column, m, s in zip(real, mean.tolist(), std.tolist(), strict=True):
        if not 1e-100 < s < 1e100:
            raise UserError(
                f"the values of {table.where(column.name)} are too large or too close to be scaled: give them in other "
                f"units, or leave them out with config.table.drop=('{column.name}',)"
            )
        scaled[column.name] = dataclasses.replace(column, mean=m, std=s)
    return tuple(scaled.get(column.name, column) for column in columns)


def _encode_categories(
    column: Column, table: Table, name: str, cells: Cells, unknown: Literal["error", "missing"]
) -> np.ndarray:
    coded = cells.array.dictionary_encode()
    values = coded.dictionary.to_pylist()
    index = np.array([column.index.get(_key(value), np.nan) for value in values] + [np.nan], np.float32)
    codes = np.asarray(coded.indices.fill_null(len(values)))
    x = index[codes]
    if unknown == "error":
        known = ", ".join(map(str, column.values[:10])) + (", ..." if len(column.values) > 10 else "")
        problem = f"is not one of the run's categories ({known}): fix it, or pass --unknown_categories=missing"
        _check(table, name, np.isnan(x) & (codes < len(values)), problem)
    return x


def _check(table: Table, name: str, bad: np.ndarray, problem: str) -> None:
    if bad.any():
        row = int(np.argmax(bad))
        raise UserError(
            f"'{str(table.frame[name].iloc[row]).strip()}' in {table.where(name)} ({table.row(row)}) {problem}"
        )


def _put(table: Table, name: str, missing: np.ndarray, values: pd.Series, integer: bool) -> pd.Series:
    """Returns the column with its missing cells replaced, in the type and spelling of the others."""
    series = table.frame[name].copy()
    is_text = pd.api.types.is_string_dtype(series.dtype)
    if series.dtype == object:  # texts, or booleans or numbers mixed with None
        is_text = pd.api.types.infer_dtype(series, skipna=True) == "string"
    if is_text:
        decimal = table.options.decimal or "."
        series[missing] = [
            v if isinstance(v, str) else spelling.number_text(v, integer, decimal) for v in values.tolist()
        ]
    else:
        series[missing] = values.to_numpy()
    return series


def _dtype(name: str) -> Any:
    try:
        return pd.api.types.pandas_dtype(name)
    except (TypeError, NotImplementedError):  # pandas writes the names of some Arrow types that it cannot read
        return np.dtype(object)
