"""Infers the kind of each column: real, integer or categorical; or a one-line error says why it is none of them."""

import itertools
import re
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from absl import logging

from posterior_matching.data.tables import spelling
from posterior_matching.data.tables.cells import Cells, Table
from posterior_matching.errors import UserError, nearest

ColumnType = Literal["real", "integer", "categorical", "empty", "index"]

MAX_CATEGORIES = 1000  # of a column declared as categorical: the model has an input and an output for each
_MAX_UNDECLARED = 100  # more are unlikely to be categories
_IDENTIFIER = re.compile(
    r"(?i:id|no|nr|number|index|idx|key|uuid|guid|row_?(id|number|names?))|.*([_\W](?i:id)|[a-z]I[dD])"
)
_TIME = r"\d{1,2}:\d{2}(:\d{2}(\.\d+)?)?( ?[AaPp][Mm])?"
_DATE = re.compile(rf"\d{{1,4}}[-/.]\d{{1,2}}[-/.]\d{{1,4}}([T ]{_TIME}.*)?|{_TIME}")


def infer(table: Table) -> dict[str, ColumnType]:
    """Returns the kind of every column that is not dropped.

    An `empty` column has no values; an `index` numbers the rows and has no name.

    Raises:
        UserError: Options name unknown columns, or columns have none of these kinds: dates, identifiers, free text, or
            numbers mixed with text. All of them are named in one line.
    """
    options = table.options
    for key in ("drop", "categorical", "real", "log", "quantile"):
        for name in getattr(options, key):
            if name not in table.names:
                hint = nearest(name, table.names)
                raise UserError(f"config.table.{key}: '{table.source}' has no column '{name}': {hint}")
    for one, other in itertools.combinations(("drop", "categorical", "log", "quantile"), 2):
        if both := set(getattr(options, one)) & set(getattr(options, other)):
            raise UserError(f"config.table.{one} and config.table.{other} both name column '{min(both)}'")
    kinds: dict[str, ColumnType] = {}
    useless: dict[str, str] = {}
    for name in table.names:
        if name not in options.drop:
            try:
                kinds[name] = _kind(table, name)
            except _UselessError as reason:
                useless[name] = str(reason)
    if useless:
        listed = "; ".join(f"'{name}' {reason}" for name, reason in useless.items())
        raise UserError(
            f"'{table.source}' has columns that are neither quantities nor categories: {listed}. Leave them out with "
            f"config.table.drop={_tuple(useless)}, or declare them in config.table.categorical or config.table.real"
        )
    _warn_about_sentinels(table, [name for name, kind in kinds.items() if kind in ("real", "integer")])
    _warn_about_words(table, [name for name, kind in kinds.items() if kind == "categorical"])
    return kinds


class _UselessError(Exception):
    """Says what a column holds that is neither a quantity nor a category."""


def _kind(table: Table, name: str) -> ColumnType:
    options = table.options
    quantity = name in (*options.real, *options.log, *options.quantile)
    cells = table.cells(name, "number" if quantity else None)
    present = len(table) - int(cells.missing.sum())
    if present == 0:
        return "empty"
    if name in options.categorical or cells.is_category:
        distinct = len(pc.unique(pc.drop_null(cells.array)))
        if distinct > MAX_CATEGORIES:
            raise _UselessError(f"has {distinct:,} categories, more than the maximum of {MAX_CATEGORIES:,}")
        return "categorical"
    if cells.numbers is None:
        if quantity:
            raise UserError(f"{table.where(name)} is declared a quantity, but holds {table.first_word(cells)}")
        return _kind_of_words(table, name, cells, present)
    values = cells.numbers[~cells.missing]
    whole = bool((values == np.rint(values)).all())
    if whole and not quantity:
        in_order = len(values) == len(table) and values[0] in (0, 1) and bool((np.diff(values) == 1).all())
        if in_order and _is_unnamed(table, name):
            return "index"
        if not spelling.is_unnamed([name]) and len(values) >= 10:
            if in_order:
                raise _UselessError(f"numbers the rows from {values[0]:.0f}")
            if _IDENTIFIER.fullmatch(name) and len(np.unique(values)) > len(values) / 2:
                raise _UselessError("is an identifier, judging by its name and many values")
    return "integer" if whole else "real"


def _is_unnamed(table: Table, name: str) -> bool:
    has_header = table.text is not None and table.text.header is not None
    return spelling.is_unnamed([name]) if has_header else name == "__index_level_0__"  # of pandas, in .parquet


def _kind_of_words(table: Table, name: str, cells: Cells, present: int) -> ColumnType:
    if pa.types.is_temporal(cells.array.type):
        raise _UselessError("holds dates or times")
    words = [str(word) for word in pc.unique(pc.drop_null(cells.array)).to_pylist()]
    if all(map(_DATE.fullmatch, words)):
        raise _UselessError(f"holds dates or times ('{words[0]}')")
    if any(spelling.is_number(word, ".,") for word in words) and not all(word.lstrip("+-").isdigit() for word in words):
        raise UserError(
            f"{table.where(name)} holds both numbers and {table.first_word(cells)}: fix it, or declare it as "
            f"missing with config.table.missing_values, set the number format with config.table.decimal or "
            f"config.table.thousands, or make all of them categories with config.table.categorical=('{name}',)"
        )
    if len(words) > _MAX_UNDECLARED or len(words) > max(10, present / 2) or len(words) == present > 2:
        raise _UselessError(f"holds {len(words):,} texts in {present:,} cells ('{spelling.shortened(words[0])}', ...)")
    return "categorical"


def _warn_about_sentinels(table: Table, names: Sequence[str]) -> None:
    """Warns of repeated values far outside the others, which may be codes for missing."""
    found: dict[float, list[str]] = {}
    for name in names:
        numbers = table.cells(name, "number").numbers
        if numbers is None or np.isnan(numbers).all():
            continue
        for value in (np.nanmin(numbers), np.nanmax(numbers)):
            if np.count_nonzero(numbers == value) < 3 or not _is_round(value):
                continue
            others = np.sort(numbers[(numbers != value) & ~np.isnan(numbers)])
            if np.count_nonzero(np.diff(others)) < 9:  # fewer than 10 different values are levels
                continue
            with np.errstate(over="ignore"):
                spread, gap = others.std(), np.abs(others[[0, -1]] - value).min()
            if gap > 2 * spread and abs(value - others.mean()) > 4 * spread:
                found.setdefault(float(value), []).append(name)
    for value, columns in found.items():
        logging.warning(
            "%g repeats in %s of '%s', far outside the other values: if it means missing, set "
            "config.table.missing_values=(%g,)",
            value, ", ".join(f"'{name}'" for name in columns), table.source, value,
        )  # fmt: skip


def _is_round(value: float) -> bool:
    return value == round(value) or set(f"{abs(value):g}") == {"9", "."}  # 999.9


def _warn_about_words(table: Table, names: Sequence[str]) -> None:
    for name in names:
        array = table.cells(name).array
        if array.type in ("string", "large_string"):
            words = sorted(spelling.MISSING_NUMBER & set(pc.unique(pc.drop_null(array)).to_pylist()))
            if words:
                logging.warning(
                    "'%s' is a category in %s: if it means missing, set config.table.missing_values=%s",
                    "', '".join(words), table.where(name), _tuple(words),
                )  # fmt: skip


def _tuple(names: Sequence[str] | dict[str, str]) -> str:
    return "(" + ",".join(f"'{name}'" for name in names) + ",)"
