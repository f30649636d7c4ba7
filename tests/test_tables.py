"""Reading and writing users' tables: formats, dialects, missing values, and the one line where a file is unclear."""

import csv
import datetime
import gzip
import math
import os
import zipfile
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from helpers.configs import SHARED, needs_shared
from posterior_matching.data.tables import read as tables
from posterior_matching.data.tables.read import TableOptions, iter_chunks, read_table
from posterior_matching.data.tables.schema import TableSchema
from posterior_matching.data.tables.write import table_writer, write_table
from posterior_matching.errors import UserError


@pytest.fixture
def write(tmp_path):
    """Writes a text file and returns its path."""

    def write(text, name="t.csv", encoding="utf-8"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
        return path

    return write


def read(path, **options):
    return read_table(path, TableOptions(**options))


def values(table):
    """Returns numbers with NaN, or texts with None, by column."""
    cells = {name: table.cells(name) for name in table.names}
    return {n: c.array.to_pylist() if c.numbers is None else c.numbers.tolist() for n, c in cells.items()}


def fails(path, **options):
    """Returns the one-line message with which a table is refused, read or understood."""
    with pytest.raises(UserError) as error:
        TableSchema.fit(read(path, **options))
    assert "\n" not in str(error.value)
    return str(error.value)


# The cases -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "rows", "names"),
    [
        ("f04_header_all_numeric/header_numeric.csv", 60, "0123"),
        ("f04_header_empty_first_name/pandas_index.csv", 60, "abcd"),
        ("f05_missing_NULL/null.csv", 60, "abcd"),
        ("f05_missing_NULL/na_slash.csv", 60, "abcd"),
        ("f05_missing_NULL/dot.csv", 60, "abcd"),
        ("f09_decimal_comma/eu.csv", 60, "abcd"),
        ("f10_three_useless_columns/constant3.csv", 60, "abcd"),
        ("f12_tsv_and_gz/plain.tsv", 60, "abcd"),
        ("f12_tsv_and_gz/plain.csv.gz", 60, "abcd"),
        ("f21_trailing_delimiter/trailing.csv", 60, "abcd"),
        ("f22_latin1/latin1.csv", 60, ["Größe", *"bcd"]),
    ],
)
def test_cases_are_the_same_table(cases, case, rows, names):
    # All of these hold the numbers of this one, written in another way.
    plain = read(cases / "f11_small_file_default_config" / "plain.csv")
    table = read(cases / case)
    columns = TableSchema.fit(table)
    assert len(table) == rows and [column.name for column in columns.columns] == list(names)
    np.testing.assert_array_equal(columns.encode(table), TableSchema.fit(plain).encode(plain))
    assert np.isnan(columns.encode(table)).sum() == 19


def test_case_of_a_sentinel(cases, caplog):
    path = cases / "f06_sentinel_minus200" / "air.csv"
    with caplog.at_level("WARNING", logger="absl"):
        TableSchema.fit(read(path))
    assert "-200 repeats in 'no2', 'nox', 'co', 'o3'" in caplog.text
    assert "config.table.missing_values=(-200,)" in caplog.text
    caplog.clear()
    table = read(path, missing_values=(-200,))
    assert np.isnan(TableSchema.fit(table).encode(table)).sum() == 50 and "repeats" not in caplog.text


def test_other_cases(cases, tmp_path):
    table = read(cases / "f07_observed_cells_changed_skewed" / "money.csv")
    columns = TableSchema.fit(table)
    write_table(tmp_path / "out.csv", columns.fill(table, columns.encode(table)))
    assert (tmp_path / "out.csv").read_text() == Path(table.source).read_text()
    columns = TableSchema.fit(read(cases / "f13_booleans" / "bools.csv"))
    assert columns.columns[0].values == ("False", "True") and columns.cardinalities == (2, 0, 0, 0, 0)
    message = fails(cases / "f08_values_1e200" / "huge.csv")
    assert "column 1 ('h')" in message and "too large" in message
    assert "'code' holds 35 texts" in fails(cases / "f14_underscore_number" / "underscore.csv")


# Public tables -------------------------------------------------------------------------------------------------------

TABLES = {  # file: keys, rows, (real, integer, categorical), missing cells in them
    "AirQualityUCI.csv": ({"drop": ("Date", "Time"), "missing_values": (-200,)}, 9357, (5, 8, 0), 16701),
    "adult.data": ({}, 32561, (0, 6, 9), 4262),
    "adult.test": ({}, 16281, (0, 6, 9), 2203),
    "auto_imports.csv": ({}, 201, (7, 9, 10), 51),
    "breast-cancer-wisconsin.data": ({"drop": ("id",)}, 699, (0, 10, 0), 16),
    "climate.csv": ({}, 540, (18, 3, 0), 0),
    "glass.csv": ({}, 214, (9, 1, 0), 0),
    "horse-colic.csv": ({"drop": ("column_3",)}, 300, (5, 19, 3), 1605),
    "housing.data": ({}, 506, (11, 3, 0), 0),
    "pollution.csv": ({"drop": ("No",)}, 43824, (3, 8, 1), 2067),
    "processed.cleveland.data": ({"categorical": ("CPT", "RER", "Thal")}, 303, (1, 10, 3), 6),
    "titanic.csv": ({}, 891, (2, 4, 9), 869),
}


@needs_shared
@pytest.mark.parametrize("name", TABLES)
def test_public_tables_from_file_to_filled_file(tmp_path, name):
    keys, rows, kinds, missing = TABLES[name]
    table = read(SHARED / "tables" / name, **keys)
    columns = TableSchema.fit(table)
    found = tuple(sum(c.kind == kind for c in columns.columns) for kind in ("real", "integer", "categorical"))
    x = columns.encode(table)
    assert (len(table), found, int(np.isnan(x).sum())) == (rows, kinds, missing)

    # Chunks, filled with the mean or the first category and written, make the file with its holes filled.
    output = tmp_path / f"filled{Path(name).suffix.replace('.test', '.data')}"
    with table_writer(output) as append:
        for chunk in iter_chunks(SHARED / "tables" / name, columns.reading(TableOptions()), 1000, columns.names):
            append(columns.fill(chunk, np.nan_to_num(columns.encode(chunk))))
    again = read_table(output, columns.reading(TableOptions()), columns.names)
    holes = np.stack([table.cells(name).missing for name in table.names], axis=1)
    kept = columns.ignored + tuple(name for name, value in columns.set_aside.items() if value is None)
    pd.testing.assert_frame_equal(again.frame.mask(holes), table.frame.mask(holes))
    assert not np.isnan(columns.encode(again)).any()
    for column in kept:
        pd.testing.assert_series_equal(again.frame[column], table.frame[column])


@needs_shared
def test_published_split_of_adult():
    columns = TableSchema.fit(read(SHARED / "tables" / "adult.data"))
    table = read_table(SHARED / "tables" / "adult.test", known_names=columns.names)
    with pytest.raises(UserError, match=r"'<=50K\.' in column 15 .*line 1\).*--unknown_categories=missing"):
        columns.encode(table)
    x = columns.encode(table, unknown_categories="missing")
    assert np.isnan(x[:, 14]).all() and np.isnan(x[:, :14]).sum() == 2203


# How text is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("separator", [",", ";", "\t", "|", " ", ", ", "   "])
@pytest.mark.parametrize("header", [None, ("a", "b"), ('"a b"', '"b, c; d"')])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_how_text_is_written(write, separator, header, end):
    rows = [("1.5", "-2"), ("3e2", "NA"), ("nan", "4"), ("?", ".5"), ("+7", "8.")]
    path = write(end.join(separator.join(row) for row in ([header] if header else []) + rows) + end)
    table = read(path)
    expected = [[1.5, 300, math.nan, math.nan, 7], [-2, math.nan, 4, 0.5, 8]]
    np.testing.assert_array_equal(list(values(table).values()), expected)
    assert table.names == (tuple(name.strip('"') for name in header) if header else ("column_1", "column_2"))
    write_table(path.with_name("out.csv"), table)
    again = read(path.with_name("out.csv"))
    assert again.frame.equals(table.frame) and again.text == table.text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "latin-1", "cp1252"])
def test_encodings(write, encoding):
    path = write("Größe,b\nähm,1\nüb,2\nähm,3\n", encoding=encoding)
    assert values(read(path)) == {"Größe": ["ähm", "üb", "ähm"], "b": [1, 2, 3]}
    write_table(path.with_name("out.csv"), read(path))
    assert path.with_name("out.csv").read_bytes() == path.read_bytes()


def test_an_encoding_can_be_told(write, caplog):
    path = write("ъ,b\nдж,1\nлж,2\nдж,3\n", encoding="cp1251")
    with caplog.at_level("WARNING", logger="absl"):
        read(path)
    assert "config.table.encoding" in caplog.text
    assert values(read(path, encoding="cp1251"))["ъ"] == ["дж", "лж", "дж"]
    assert "config.table.encoding='nonsense'" in fails(path, encoding="nonsense")
    assert "config.table.encoding" in fails(path, encoding="utf-8")
    late = write("a,b\n" + "1,2\n" * 300_000 + "ö,1\n", encoding="latin-1")  # beyond the sample
    assert read(late).frame["a"].iloc[-1] == "ö"


@pytest.mark.parametrize(
    ("lines", "names"),
    [
        ("0,1,2,3|10.2,9.5,1.1,8|7.8,8.3,9.8,7.5|1.5,2,3.5,4.5", "0123"),  # DataFrame(array).to_csv(index=False)
        (",0,1,2|0,5,6,7|1,8,9,9|2,3,4,4", ["column_1", *"012"]),  # and with its index, of integers
        ("1990,1995,2003|1.5,2.5,3.5|2.5,3.5,1.5", ["1990", "1995", "2003"]),
        ("country,1990,1991|Norway,1.5,2.5|Chile,3.5,4.5", ["country", "1990", "1991"]),
        ("RI,Na,Mg|1.5,2,3|2.5,3,4", ["RI", "Na", "Mg"]),
        ("Na|1|2|3", ["Na"]),
        ("1,b|1,2|3,4", "1b"),
        ("name,kind|x,u|y,v|x,u", ["name", "kind"]),
        ("a,b|1,2", "ab"),
        ("a,b,|1,2|3,4", "ab"),  # only the header ends in a separator
        ("a,b|1,2,|3,4,", ["a", "b", "column_3"]),  # only the rows do
        ("x,u|y,v|x,w", None),
        ("39, State-gov, 77516|50, Private, 83311|38, State-gov, 215646", None),
        ("1.5,2.5,3.5|2.5,3.5,1.5", None),
        ("5,3,2|1,2,3|2,2,2", None),
        ("?,1,2|1,2,2|2,?,1", None),
    ],
)
def test_headers(write, lines, names):
    table = read(write(lines.replace("|", "\n") + "\n"))
    count = lines.count("|") + (names is None)
    assert (table.text.header is not None, len(table)) == (names is not None, count)
    assert names is None or table.names == tuple(names)


def test_a_line_that_may_be_a_header(write):
    for lines in ("63.5,x,1.5|1.5,2.5,3.5|2.5,3.5,4.5", "1,2,3|2,2,1|3,1,2"):
        path = write(lines.replace("|", "\n") + "\n")
        assert "line 1 of" in (message := fails(path)) and "config.table.header" in message
        assert (len(read(path, header=True)), len(read(path, header=False))) == (2, 3)
    assert read_table(path, known_names=("3", "1", "2")).names == ("1", "2", "3")
    assert len(read_table(path, known_names=("column_1", "column_2", "column_3"))) == 3


def test_row_names_of_r(write):
    table = read(write('"a" "b"\n"x 1" 1 2.5\n"x 2" 3 4.5\n', "t.txt"))
    assert table.names == ("column_1", "a", "b") and values(table)["column_1"] == ["x 1", "x 2"]
    write_table(table.source, table)
    assert read(table.source).frame.equals(table.frame) and Path(table.source).read_text().startswith("a b\n")


@pytest.mark.parametrize("text", ["a,b\n1,2,\n3,4,\n", "a,b,\n1,2\n3,4\n", 'a,b\n1,"x\ry"\n2,"z, t"\n'])
def test_odd_headers_and_cells_are_written_as_they_were(write, text):
    table = read(write(text))
    write_table(Path(table.source).with_name("out.csv"), table)
    again = read(Path(table.source).with_name("out.csv"))
    assert again.frame.equals(table.frame) and again.text == table.text


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("a;b\n0,5;1\n2;1,25\n", {}, {"a": [0.5, 2], "b": [1, 1.25]}),
        ("a\tb\n0,5\t1\n2\t1,25\n", {}, {"a": [0.5, 2], "b": [1, 1.25]}),
        ('a,b\n"0,5",1\n"2,25",2\n', {}, {"a": [0.5, 2.25], "b": [1, 2]}),
        ("1,5 2\n2,5 3\n", {}, {"column_1": [1.5, 2.5], "column_2": [2, 3]}),
        ("a;b\n1,234;1\n2,345;2\n", {"decimal": ","}, {"a": [1.234, 2.345], "b": [1, 2]}),
        ('a,b\n"1,234",1\n"12,345,678.5",2\n', {"thousands": ","}, {"a": [1234, 12345678.5], "b": [1, 2]}),
        ("a;b\n1.234,5;1\n2.345.678;2\n", {"thousands": "."}, {"a": [1234.5, 2345678], "b": [1, 2]}),
        ("a;b\n1.5;x\n2.5;y\n", {}, {"a": [1.5, 2.5], "b": ["x", "y"]}),
        ("a;b\nx,y;1\nz,y;2\n", {}, {"a": ["x,y", "z,y"], "b": [1, 2]}),
        ("a;b\n1,234;1\n2,345;2\n", {}, None),
        ('a,b\n"1,234",1\n"2,345",2\n', {}, None),
        ("a;b\n1,5;1.5\n2,5;2.5\n", {}, None),
    ],
)
def test_decimal_marks(write, text, options, expected):
    if expected:
        assert values(read(write(text), **options)) == expected
    else:
        assert "config.table.decimal" in fails(write(text))


def test_grouped_digits(write):
    path = write("a,b\n23'722,1\n25'582,2\n,3\n4,1\n")
    table = read(path, thousands="'")
    filled = TableSchema.fit(table).fill(table, np.zeros((4, 2)))
    assert filled.frame["a"].tolist() == ["23'722", "25'582", "16436", "4"]
    assert "'1,23'" in fails(write('a,b\n"1,234",1\n"1,23",2\n'), thousands=",")


def test_lines_without_cells(write):
    """A line of separators is a row, but not at the end of a file."""
    table = read(write("a,b\n\n1,\n,\n,2\n   \n\n3,4\n,\n,\n"))
    nan = math.nan
    np.testing.assert_array_equal(list(values(table).values()), [[1, nan, nan, 3], [nan, nan, 2, 4]])
    assert [table.row(i) for i in range(4)] == ["line 3", "line 4", "line 5", "line 8"]


# Missing values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spelling",
    ["", "?", "NA", " NA ", "N/A", "n/a", "#N/A", "<NA>", "NaN", "nan", "-nan", "NULL", "null", "None", ".", "-"],
)
def test_usual_spellings_between_numbers(write, spelling):
    table = read(write(f"a,b\n1.5,1\n{spelling},2\n3,3\n"))
    np.testing.assert_array_equal(values(table)["a"], [1.5, math.nan, 3])
    if spelling.strip():
        assert "both numbers and" in fails(write(f"a,b\n1.5,1\n{spelling},2\n3,3\n"), usual_missing=False)


def test_words_that_may_mean_missing(write, caplog):
    path = write("a,b\nNone,1\nbrick,2\nNA,3\nbrick,4\nNone,5\n")
    with caplog.at_level("WARNING", logger="absl"):
        columns = TableSchema.fit(read(path))
    assert columns.columns[0].values == ("None", "brick")
    assert "'None' is a category in column 1 ('a')" in caplog.text
    assert values(read(path, missing_values=("None",)))["a"] == [None, "brick", None, "brick", None]
    assert values(read(path, usual_missing=False))["a"][2] == "NA"  # Namibia


def test_declared_missing_values(write):
    path = write("a,b,c\n-200,x,-200.0\n1,-9,2\n-2e2,unknown,3\n4,y,4\n")
    table = read(path, missing_values=(-200, "unknown", -9))
    np.testing.assert_array_equal(values(table)["a"], [math.nan, 1, math.nan, 4])
    np.testing.assert_array_equal(values(table)["c"], [math.nan, 2, 3, 4])
    assert values(table)["b"] == ["x", None, None, "y"]


RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("code", "numbers"),
    [
        *((code, RNG.normal(50, 5, 60).round(2)) for code in (-200, 999.9, -99, 0)),
        (None, RNG.poisson(0.3, 200)),  # mostly zeros
        (None, RNG.integers(0, 2, 200)),
        (None, RNG.normal(size=200).round(1)),
        (None, [*RNG.normal(size=50).round(3), 40.0]),  # once only
        (None, RNG.lognormal(0, 2, 200).round()),
    ],
)
def test_only_a_repeated_value_far_outside_is_reported(write, caplog, code, numbers):
    if code is not None:
        numbers[::12] = code
    with caplog.at_level("WARNING", logger="absl"):
        TableSchema.fit(read(write("a\n" + "\n".join(map(str, numbers)))))
    assert f"{code} repeats in 'a'" in caplog.text if code is not None else "repeats" not in caplog.text


# One line ------------------------------------------------------------------------------------------------------------

NUMBERS = "\n".join(f"{i},{i * i % 17}" for i in range(5, 30))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["is empty"]),
        ("\n \n", ["is empty"]),
        ("a,b\n", ["has no rows"]),
        ("a,b\n1,2\n\n1,2,3\n4,5\n", ["line 4 of", "3 cells", "have 2", "config.table.separator"]),
        ("a,b\n1,2\n3\n4,5\n", ["line 3 of", "1 cells"]),
        ("a,b,c\n1,2\n3,4\n", ["line 1 of", "3 cells"]),
        ("a,a\n1,2\n3,4\n", ["more than one column named 'a'"]),
        ("a,b\n1,2\n3,x\n5,6\n", ["column 2 ('b')", "both numbers and 'x' (line 3)", "config.table.missing_values"]),
        ("a,b\n1,2\n\n0x1F,4\n2,6\n", ["column 1 ('a')", "'0x1F' (line 4)"]),
        ("a,b\n1,2\n1_000,4\n2,6\n", ["'1_000' (line 3)"]),
        ("a,b\n1,2\n3,inf\n2,6\n", ["infinite", "line 3"]),
        ("a,b\n1,2\n3,1e400\n2,6\n", ["infinite", "line 3"]),
        ("a,b\n1e200,2\n3e200,4\n2e200,6\n", ["column 1 ('a')", "too large or too close"]),
        ("a,b\n1e-200,2\n3e-200,4\n2e-200,6\n", ["column 1 ('a')", "too large or too close"]),
        ("a,b\nNA,\n,NA\n", ["no column of", "varies"]),
        ("a,b\n1,2\n1,2\n", ["no column of", "varies"]),
        ('a,b\n1,"x\n2,y\n3,z\n', ["line 2 of", "opens a quote that is not closed"]),
        ('a,b\n1,"x\n2,y\n3,"z\n4,z\n', ["quote"]),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" * 9, ["binary"]),
        (b"\x80\x04\x95 pickle?", ["binary"]),
        ("a,b\n1," + "x" * 200_000 + "\n2,y\n3,y\n", ["field larger than"]),
        ("# a title\na,b\n1,2\n3,4\n", ["line 1 of", "1 cells", "most lines have 2"]),
        ("id,b\n" + NUMBERS, ["'id' is an identifier", "config.table.drop=('id',)"]),
        ("PassengerId,b\n" + NUMBERS, ["'PassengerId' is an identifier"]),
        ("t,b\n" + "\n".join(f"{i},{i * i % 17}" for i in range(1, 30)), ["'t' numbers the rows"]),
        ("a,when\n" + "\n".join(f"{i % 7},2004-03-{i}" for i in range(1, 30)), ["'when' holds dates or times"]),
        ("a,when\n" + "\n".join(f"{i % 7},{i % 12}:30" for i in range(1, 30)), ["'when' holds dates or times"]),
        ("a,b\n" + "\n".join(f"{i % 7},word {i}" for i in range(1, 30)), ["'b' holds 29 texts in 29 cells"]),
        (
            "id,b,when,d\n" + "\n".join(f"x{i},{i % 7},{i}/3/04,{i % 7}" for i in range(1, 30)),
            ["'id' holds 29 texts", "'when' holds dates", "drop=('id','when',)"],
        ),
    ],
)  # fmt: skip
def test_refused(write, text, parts):
    message = fails(write(text))
    assert all(part in message for part in parts), message


def test_many_categories(write):
    path = write("a,b\n" + "\n".join(f"{i % 7},word {i}" for i in range(10_000)))
    assert "'b' holds 10,000 texts" in fails(path)
    assert "10,000 categories, more than the maximum of 1,000" in fails(path, categorical=("b",))
    path = write("a,b\n" + "\n".join(f"{i % 7},word {i % 400}" for i in range(1000)))
    assert "'b' holds 400 texts" in fails(path)
    assert TableSchema.fit(read(path, categorical=("b",))).cardinalities == (0, 400)


def test_options_that_do_not_fit(write):
    path = write("age,b\n1,2\n3,4\n5,1\n")
    assert "config.table.drop" in (message := fails(path, drop=("agee",))) and "did you mean 'age'" in message
    assert "both name column 'b'" in fails(path, drop=("b",), log=("b",))
    assert "declared a quantity" in fails(write("a,b\nx,2\ny,4\n"), real=("a",))
    for options in ({"separator": ",,"}, {"decimal": "x"}, {"thousands": "12"}, {"thousands": ",", "decimal": ","}):
        with pytest.raises(UserError, match=next(iter(options))):
            TableOptions(**options)


def test_codes_keep_their_zeros(write):
    path = write("zip,b\n02139,1\n10001,2\n02139,3\n")
    assert values(read(path))["zip"] == ["02139", "10001", "02139"]
    assert values(read(path, real=("zip",)))["zip"] == [2139, 10001, 2139]


def test_missing_and_odd_files(tmp_path, write):
    (tmp_path / "folder.csv").mkdir()
    assert "no file" in fails(tmp_path / "t.csv") and "no file" in fails(tmp_path / "folder.csv")
    for content, name in (
        (b"not gzip", "t.csv.gz"),
        (gzip.compress(b"a,b\n1,2\n" * 99)[:-9], "t.csv.gz"),
        (b"not zip", "t.csv.zip"),
        (b"PAR1 no", "t.parquet"),
    ):
        assert "cannot read" in fails(write(content, name))
    with zipfile.ZipFile(tmp_path / "two.csv.zip", "w") as archive:
        archive.writestr("a.csv", "a\n1\n")
        archive.writestr("b.csv", "a\n1\n")
    assert "holds 2 files" in fails(tmp_path / "two.csv.zip")


def test_a_file_that_changes_meanwhile(write, monkeypatch):
    path = write("a,b\n1,2\n3,4\n")
    chunks = iter_chunks(path, rows=1)
    next(chunks)
    with path.open("a") as file:
        file.write("5,6\n")
    with pytest.raises(UserError, match="changed while it was read"):
        list(chunks)
    sniff = tables.text_format

    def slow(stream, *args):
        os.utime(path, ns=(0, 0))
        return sniff(stream, *args)

    monkeypatch.setattr(tables, "text_format", slow)
    assert "changed while it was read" in fails(path)


# Formats -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def frame():
    return pd.DataFrame(
        {
            "real": [0.5, None, 2.5, 3.5],
            "whole": pd.array([1, None, 3, 7], "Int64"),
            "flag": [True, False, True, True],
            "word": ["x", "y", None, "x"],
            "level": pd.Categorical(["low", None, "high", "low"], ["low", "high"], ordered=True),
            "day": [datetime.date(2024, 1, 1)] * 4,
        }
    )


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".txt", ".data", ".csv.gz", ".csv.zip", ".parquet"])
def test_formats_hold_the_same(tmp_path, frame, ending):
    path = tmp_path / f"t{ending}"
    if ending == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False, sep="\t" if ending == ".tsv" else ",")
    columns = TableSchema.fit(read(path, drop=("day",)))
    np.testing.assert_array_equal(
        columns.encode(read(path)), TableSchema.fit(read(frame, drop=("day",))).encode(read(frame))
    )
    assert columns.cardinalities == (0, 0, 2, 2, 2)
    # Written again, with its holes filled.
    table = read_table(path, columns.reading(TableOptions()))
    output = tmp_path / f"out{ending}"
    write_table(output, columns.fill(table, np.nan_to_num(columns.encode(table))))
    filled = read(output)
    assert not np.isnan(columns.encode(filled)).any()
    if ending == ".parquet":
        assert pq.read_schema(output).types == pq.read_schema(path).types
    else:
        assert filled.frame["day"].tolist() == ["2024-01-01"] * 4


def test_a_zip_without_a_telling_name(tmp_path):
    with zipfile.ZipFile(tmp_path / "t.zip", "w") as archive:
        archive.writestr("folder/rows.csv", "a,b\n1,2\n3,4\n")
        archive.writestr("__MACOSX/folder/._rows.csv", "x")
    assert tables.is_table(tmp_path / "t.zip") and len(read(tmp_path / "t.zip")) == 2
    with zipfile.ZipFile(tmp_path / "i.zip", "w") as archive:
        archive.writestr("1.png", "x")
    assert not tables.is_table(tmp_path / "i.zip") and not tables.is_table("digits")


def test_arrays(tmp_path):
    x = np.array([[1, 2.5], [np.nan, 4], [5, 6]])
    np.save(tmp_path / "t.npy", x)
    np.savez(tmp_path / "t.npz", x=x)
    np.savez(tmp_path / "parts.npz", train=x[:2], test=x[2:])
    for name in ("t.npy", "t.npz", "parts.npz"):
        table = read(tmp_path / name)
        np.testing.assert_array_equal(table.frame.to_numpy(), x)
        write_table(tmp_path / f"out_{name}", table.replace({"column_1": pd.Series([1.0, 0.0, 5.0])}))
        again = read(tmp_path / f"out_{name}")
        np.testing.assert_array_equal(again.frame.to_numpy(), np.nan_to_num(x))
        assert (again.parts is None) == (table.parts is None)
    assert {name: rows.tolist() for name, rows in table.parts.items()} == {"train": [0, 1], "test": [2]}
    table = read(np.array([["a", "b"], ["c", "d"]]))
    assert values(table) == {"column_1": ["a", "c"], "column_2": ["b", "d"]}


def test_frames():
    assert "column named '1'" in fails(pd.DataFrame([[1, 2]], columns=["1", 1]))
    assert "neither numbers nor text" in fails(pd.DataFrame({"a": [[1], [2]]}))
    frame = pd.DataFrame({"a": [1, "x", None], "b": [1, 2, 4]})
    assert "both numbers and 'x' (row 2)" in fails(frame)
    table = read(pd.DataFrame({2020: [1, 2, 4], 2021: [1.5, None, 2]}))
    assert table.names == ("2020", "2021")


def test_decimals_and_large_integers(tmp_path, write):
    frame = pd.DataFrame({"price": [Decimal("1.50"), None, Decimal("3.25")], "b": [1, 2, 4]})
    frame.to_parquet(tmp_path / "t.parquet")
    table = read(tmp_path / "t.parquet")
    columns = TableSchema.fit(table)
    write_table(tmp_path / "out.parquet", columns.fill(table, np.nan_to_num(columns.encode(table))))
    filled = pq.read_table(tmp_path / "out.parquet")
    assert filled["price"].to_pylist() == [Decimal("1.50"), Decimal("2.38"), Decimal("3.25")]
    table = read(write("a,b\n12345678901234567890,1\n,2\n5,4\n"))
    columns = TableSchema.fit(table)
    filled = columns.fill(table, np.nan_to_num(columns.encode(table))).frame["a"]
    assert filled[0] == "12345678901234567890" and float(filled[1]) == pytest.approx(columns.columns[0].mean)


def test_fingerprint(write, frame):
    prints = [read(write(text)).fingerprint for text in ("a,b\n1,2\n", "a,b\n1,3\n", "a,b\n1,2\n")]
    frames = frame, frame.assign(real=0.0), frame.rename(columns={"real": "x"}), frame.copy()
    prints = [*prints, *(read(frame).fingerprint for frame in frames)]
    assert prints[0] == prints[2] and prints[3] == prints[6] and len(set(prints)) == 5


# Round trips ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_any_cells_survive(tmp_path, seed):
    rng = np.random.default_rng(seed)
    letters = [*"abc 1.\"',;|\t\nö€", '""', "\r\n", " a "]
    rows, width = int(rng.integers(3, 40)), int(rng.integers(2, 6))
    cells = [["".join(rng.choice(letters, rng.integers(0, 5))) for _ in range(width)] for _ in range(rows)]
    cells = [row if any(cell.strip() for cell in row) else ["x"] * width for row in cells]
    separator, end = str(rng.choice([",", ";", "\t", "|"])), str(rng.choice(["\n", "\r\n"]))
    path, options = tmp_path / "t.csv", TableOptions(separator=separator, header=True, decimal=".")
    with path.open("w", newline="", encoding="utf-8") as file:
        quoting = int(rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
        writer = csv.writer(file, delimiter=separator, lineterminator=end, quoting=quoting)
        writer.writerows([[f"name {i}" for i in range(width)], *cells])
    table, chunks = read_table(path, options), list(iter_chunks(path, options, rows=7))
    assert table.frame.to_numpy().tolist() == cells
    assert [len(chunk) for chunk in chunks[:-1]] == [7] * (len(chunks) - 1)
    with table_writer(tmp_path / "out.csv") as append:
        for chunk in chunks:
            append(chunk)
    assert read_table(tmp_path / "out.csv", options).frame.equals(table.frame)


@pytest.mark.parametrize("ending", [".csv", ".npy", ".npz", ".parquet"])
def test_chunks_are_the_whole(tmp_path, ending):
    frame = pd.DataFrame({f"column_{i + 1}": np.random.default_rng(i).normal(size=1000) for i in range(3)})
    path, output = tmp_path / f"t{ending}", tmp_path / f"out{ending}"
    write_table(path, read(frame))
    chunks = list(iter_chunks(path, rows=300))
    assert [(chunk.first_row, len(chunk)) for chunk in chunks] == [(0, 300), (300, 300), (600, 300), (900, 100)]
    with table_writer(output) as append:
        for chunk in chunks:
            append(chunk)
    for source in (path, output):
        np.testing.assert_array_equal(read(source).frame.astype(float), frame)


def test_the_decimal_mark_of_later_chunks(write):
    path = write("a;b\n" + "1;2\n" * 5 + "1,5;2\n")
    chunks = list(iter_chunks(path, rows=5))
    columns = TableSchema.fit(read(write("a;b\n1;2\n2;3\n", "train.csv")))
    with pytest.raises(UserError, match=r"'1,5' \(line 7\).*config.table.decimal"):
        [columns.encode(chunk) for chunk in chunks]


def test_nothing_is_half_written(tmp_path, write):
    table = read(write("a,b\n1,2\n3,4\n"))
    (tmp_path / "out.csv").write_text("before")
    with pytest.raises(RuntimeError), table_writer(tmp_path / "out.csv") as append:
        append(table)
        raise RuntimeError
    assert (tmp_path / "out.csv").read_text() == "before"
    for name, problem in (("no/out.csv", "No such file"), ("out.xlsx", "must end in"), ("out.parquet", "text of")):
        with pytest.raises(UserError, match=problem):
            write_table(tmp_path / name, table)
    umlaut = table.replace({"a": pd.Series(["ö", "€"], dtype=table.frame["a"].dtype)})
    latin = read(write("ä,b\n1,2\n3,4\n", encoding="latin-1"), encoding="latin-1")
    with pytest.raises(UserError, match="'€' does not exist in latin-1"):
        write_table(tmp_path / "out.csv", latin.replace({"ä": umlaut.frame["a"]}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.csv", "t.csv"]
