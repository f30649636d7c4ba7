"""How cells are spelled, for all that read them: missing values, numbers, the names of columns without one."""

import re
from collections.abc import Iterable

MISSING = frozenset(
    ("", "?", "NA", "N/A", "n/a", "#N/A", "#NA", "<NA>", "NaN", "nan", "NAN", "-nan", "NULL", "Null", "null")
)
MISSING_NUMBER = frozenset(("None", "none", "na", ".", "-", "--"))  # only in columns of numbers: they may be categories
MISSING_ANYWHERE = MISSING | MISSING_NUMBER
CODE = re.compile(r"[+-]?0\d+")  # digits that are a category unless declared otherwise, such as the ZIP code 02139


def number(decimal: str = ".", thousands: str = "") -> str:
    """Returns the regular expression of a finite number; `decimal` may list several marks."""
    point, group = f"[{re.escape(decimal)}]", re.escape(thousands)
    whole = rf"\d{{1,3}}(?:{group}\d{{3}})+|\d+" if group else r"\d+"
    return rf"[+-]?(?:(?:{whole})(?:{point}\d*)?|{point}\d+)(?:[eE][+-]?\d+)?"


_NUMBER = {marks: re.compile(number(marks)) for marks in (".", ".,")}
_UNNAMED = re.compile(r"column_\d+")


def is_number(cell: str, decimal: str = ".") -> bool:
    """Whether the cell is a number with one of these decimal marks, "." or ".,"."""
    return bool(_NUMBER[decimal].fullmatch(cell))


def is_word(cell: str) -> bool:
    """Whether the cell is neither a number nor a usual spelling of missing."""
    return cell not in MISSING_ANYWHERE and not is_number(cell, ".,")


def number_text(value: float, integer: bool, decimal: str) -> str:
    """Formats a number like its column: `63`, `63.0`, or seven significant digits."""
    if integer:
        return f"{value:.0f}"
    whole = value == round(value) and abs(value) < 1e15
    return (f"{value:.1f}" if whole else repr(float(f"{value:.7g}"))).replace(".", decimal)


def unnamed(count: int) -> tuple[str, ...]:
    """Returns the names of columns without names."""
    return tuple(f"column_{i + 1}" for i in range(count))


def is_unnamed(names: Iterable[str]) -> bool:
    """Whether all columns are without names."""
    return all(map(_UNNAMED.fullmatch, names))


def shortened(text: str, length: int = 40) -> str:
    """Truncates a text for a message."""
    return text if len(text) <= length else text[: length - 3] + "..."
