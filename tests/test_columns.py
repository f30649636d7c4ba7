"""The schema of a table: there and back, in any units, order and kind; densities; matching by name; JSON."""

import json

import numpy as np
import pandas as pd
import pytest

from posterior_matching.data.tables.read import TableOptions, read_table
from posterior_matching.data.tables.schema import TableSchema
from posterior_matching.errors import UserError


def read(source, **options):
    return read_table(source, TableOptions(**options))


def fit(frame, **options):
    return TableSchema.fit(read(frame, **options))


def restored(columns):
    return TableSchema.from_json(json.loads(json.dumps(columns.to_json(), allow_nan=False)))


def fails(columns, source, **options):
    """Returns the one-line message with which later data are refused."""
    with pytest.raises(UserError) as error:
        columns.encode(read(source, **options))
    assert "\n" not in str(error.value)
    return str(error.value)


def mixed(rows=200, seed=0):
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "real": rng.normal(50, 20, rows),
            "amount": rng.lognormal(3, 2, rows),
            "share": rng.beta(0.5, 0.5, rows),
            "count": rng.poisson(4, rows),
            "colour": rng.choice(["red", "green", "blue"], rows),
            "flag": rng.choice([True, False], rows),
            "code": rng.choice([10, 20, 35], rows),
        }
    )
    return frame


MIXED = {"categorical": ("code",), "log": ("amount",), "quantile": ("share",)}


# There and back ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_round_trip_of_random_frames(seed, tmp_path):
    rng = np.random.default_rng(seed)
    frame = mixed(int(rng.integers(20, 300)), seed)
    holes = rng.uniform(size=frame.shape) < 0.2
    holes[:20] = False
    table = read(frame.astype({"flag": "boolean", "count": "Int64", "code": "Int64"}).mask(holes), **MIXED)
    columns = TableSchema.fit(table)
    assert restored(columns) == columns
    x = restored(columns).encode(table)
    assert x.shape == frame.shape and x.dtype == np.float32
    np.testing.assert_array_equal(np.isnan(x), holes)
    assert columns.cardinalities == (0, 0, 0, 0, 3, 2, 3)
    for j in range(4):
        np.testing.assert_allclose([np.nanmean(x[:, j]), np.nanstd(x[:, j])], [0, 1], atol=1e-5)
    back = columns.decode(np.nan_to_num(x))
    for name, dtype in table.frame.dtypes.items():
        assert back[name].dtype == dtype
        observed = ~holes[:, frame.columns.get_loc(name)]
        if name in ("real", "amount", "share"):
            np.testing.assert_allclose(back[name][observed], frame[name][observed], rtol=1e-4, atol=1e-4)
        else:
            assert back[name][observed].tolist() == frame[name][observed].tolist()

    # The same from a text file, whose observed cells leave as the very text.
    table.frame.to_csv(tmp_path / "t.csv", index=False)
    text = read(tmp_path / "t.csv", **MIXED)
    np.testing.assert_array_equal(TableSchema.fit(text).encode(text), x)
    filled = columns.fill(text, np.nan_to_num(x)).frame
    assert filled.mask(holes).equals(text.frame.mask(holes)) and not (filled == "").any(axis=None)


def test_rows_are_standardised_by_the_training_rows_alone():
    frame = mixed()
    rows = np.arange(150)
    columns = TableSchema.fit(read(frame), rows)
    np.testing.assert_allclose(columns.columns[0].mean, frame["real"][:150].mean())
    np.testing.assert_allclose(columns.columns[0].std, frame["real"][:150].std(ddof=0))
    late = pd.DataFrame({"word": ["x"] * 15 + ["y"] * 4 + ["z"], "b": range(5, 25)})  # all categories of the file
    assert TableSchema.fit(read(late), np.arange(10)).cardinalities == (3, 0)


@pytest.mark.parametrize(
    ("transform", "low", "high"), [("none", -np.inf, np.inf), ("log", 0, np.inf), ("quantile", 0.5, 60)]
)
def test_imputations_stay_in_range(transform, low, high):
    values = np.clip(np.random.default_rng(0).lognormal(1, 1, 500), 0.5, 60)
    options = {} if transform == "none" else {transform: ("a",)}
    columns = fit(pd.DataFrame({"a": values}), **options)
    assert columns.columns[0].transform == transform
    z = np.linspace(-6, 6, 1001, dtype=np.float32)[:, None]
    back = columns.decode(z)["a"].to_numpy()
    assert np.isfinite(back).all() and back.min() >= low and back.max() <= high
    assert (np.diff(back) >= 0).all() and np.ptp(back) > 50
    if transform == "log":
        assert back.min() > 0


def test_integers_come_back_as_integers_seen_in_training():
    columns = fit(pd.DataFrame({"a": [2, 3, 5, 9], "b": [1.0, None, 4.0, 2.0]}))
    back = columns.decode(np.random.default_rng(0).normal(size=(500, 2)) * 3)
    assert back["a"].dtype == np.int64 and set(back["a"]) == set(range(2, 10))
    assert back["b"].dtype == np.float64 and set(back["b"]) == {1.0, 2.0, 3.0, 4.0}


def test_the_quantile_map_of_ties():
    values = np.array([0.0] * 300 + list(np.random.default_rng(0).uniform(1, 9, 200)))
    columns = fit(pd.DataFrame({"a": values}), quantile=("a",))
    x = columns.encode(read(pd.DataFrame({"a": values})))
    np.testing.assert_allclose(columns.decode(x)["a"], values, atol=1e-5)
    knots, scores = columns.columns[0].knots, columns.columns[0].scores
    assert (np.diff(knots) > 0).all() and (np.diff(scores) > 0).all()
    beyond = columns.decode(columns.encode(read(pd.DataFrame({"a": [-5.0, 100.0]}))))["a"]
    np.testing.assert_allclose(beyond, [0, values.max()], atol=1e-5)


def test_values_that_cannot_be_transformed():
    with pytest.raises(UserError, match=r"'0.0' in column 1 \('a'\).*row 2.*quantile"):
        fit(pd.DataFrame({"a": [1.5, 0, 2]}), log=("a",))
    columns = fit(pd.DataFrame({"a": [1.5, 3, 2]}), log=("a",))
    assert "'-1.0' in column 1" in fails(columns, pd.DataFrame({"a": [2.0, -1.0]}))
    columns = fit(pd.DataFrame({"a": [1.5, 3, 2]}))
    assert "out of all proportion" in fails(columns, pd.DataFrame({"a": [1e60]}))


# Densities -----------------------------------------------------------------------------------------------------------


def test_log_det_jacobian_is_the_slope():
    columns = fit(mixed(), **MIXED)
    frame = mixed(40, seed=1).assign(share=lambda f: f["share"].clip(0.02, 0.98))
    x = columns.encode(read(frame))
    jacobian = columns.log_det_jacobian(x)
    assert jacobian.shape == x.shape and jacobian.dtype == np.float64
    for j, name in enumerate(["real", "amount", "share"]):
        column, values = columns.columns[j], frame[name].to_numpy()
        step = 1e-6 * values
        slope = (column.transformed(values + step) - column.transformed(values - step)) / column.std / (2 * step)
        smooth = np.full(40, True)  # not at a knot
        if column.knots:
            smooth = np.abs(np.interp(values, column.knots, np.arange(len(column.knots))) % 1 - 0.5) < 0.49
        np.testing.assert_allclose(jacobian[:, j][smooth], np.log(slope)[smooth], rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(jacobian[:, 3], -np.log(columns.columns[3].std))
    np.testing.assert_array_equal(jacobian[:, 4:], 0)
    np.testing.assert_array_equal(columns.log_det_jacobian(np.full((2, 7), np.nan)), 0)


@pytest.mark.parametrize("options", [{}, {"log": ("a",)}, {"quantile": ("a",)}])
def test_a_density_in_the_units_of_the_file_integrates_to_one(options):
    values = np.random.default_rng(0).lognormal(0, 0.7, 2000)
    columns = fit(pd.DataFrame({"a": values}), **options)
    grid = np.geomspace(values.min(), values.max(), 200_001)
    z = columns.encode(read(pd.DataFrame({"a": grid})))
    density = np.exp(-0.5 * z[:, 0].astype(float) ** 2 + columns.log_det_jacobian(z)[:, 0]) / np.sqrt(2 * np.pi)
    ends = z[[0, -1], 0].astype(float)
    from scipy.stats import norm

    expected = norm.cdf(ends[1]) - norm.cdf(ends[0])
    assert np.trapezoid(density, grid) == pytest.approx(expected, abs=2e-3)


def test_case_of_units(cases):
    folder = cases / "f20_log_prob_units"
    columns = [TableSchema.fit(read(folder / name)) for name in ("A.csv", "A_scaled.csv")]
    x = [c.encode(read(folder / name)) for c, name in zip(columns, ("A.csv", "A_scaled.csv"), strict=True)]
    np.testing.assert_allclose(x[0], x[1], atol=0.01)
    units = [c.log_det_jacobian(x).sum(1) for c, x in zip(columns, x, strict=True)]
    np.testing.assert_allclose(units[0] - units[1], np.log(10 * 100 * 1000), rtol=1e-4)


# Later data ----------------------------------------------------------------------------------------------------------


def test_cases_of_later_files(cases):
    folder = cases / "f01_new_file_wanted_column_empty"
    columns = TableSchema.fit(read(folder / "A.csv"))
    for name, rows in (("new.csv", 3), ("new_one_row.csv", 1)):
        table = read(folder / name)
        x = columns.encode(table)
        assert x.shape == (rows, 4) and np.isnan(x).sum() == rows
        np.testing.assert_allclose(columns.decode(np.nan_to_num(x))["a"], table.cells("a").numbers, rtol=1e-6)
        filled = columns.fill(table, np.nan_to_num(x)).frame
        np.testing.assert_allclose(filled["d"].astype(float), columns.columns[3].mean, rtol=1e-6)
    folder = cases / "f03_columns_permuted_evaluation"
    columns = TableSchema.fit(read(folder / "train.csv"))
    encoded = [columns.encode(read(folder / name)) for name in ("train.csv", "same_rows_reordered.csv")]
    np.testing.assert_array_equal(*encoded)


def test_matching_by_name():
    frame = mixed()
    columns = fit(frame.assign(constant=5, id=[f"x{i}" for i in range(len(frame))]), drop=("id",), **MIXED)
    x = columns.encode(read(frame))  # neither the dropped nor the constant column is needed
    shuffled = frame[list(reversed(frame.columns))]
    np.testing.assert_array_equal(columns.encode(read(shuffled)), x)
    np.testing.assert_array_equal(columns.encode(read(frame.assign(id=0, constant=[None] * len(frame)))), x)
    message = fails(columns, frame.rename(columns={"colour": "color"}))
    assert "no column 'colour'" in message and "did you mean 'color'?" in message
    assert "not trained on: 'x', 'y'" in fails(columns, frame.assign(x=1, y=2))
    np.testing.assert_array_equal(columns.encode(read(frame.assign(x=1), drop=("x",))), x)
    assert "has no column names, but" in (message := fails(columns, frame.to_numpy())) and "(real, amount" in message


def test_without_names_by_position():
    frame = mixed()[["real", "amount", "share"]]
    columns = fit(frame.to_numpy())
    np.testing.assert_array_equal(columns.encode(read(frame)), columns.encode(read(frame.to_numpy())))
    assert "2 columns, but the run was trained on 3" in fails(columns, frame.to_numpy()[:, :2])


def test_later_kinds_and_categories():
    frame = mixed()
    columns = fit(frame, **MIXED)
    few = frame[:3].astype({"count": object})
    assert "'many' (row 2), but the run was trained on numbers" in fails(columns, few.assign(count=["1", "many", "2"]))
    message = fails(columns, few.assign(colour=["red", "blue", "pink"]))
    assert "'pink' in column 5 ('colour')" in message and "(blue, green, red)" in message
    assert "--unknown_categories=missing" in message
    x = columns.encode(read(few.assign(colour=["red", "blue", "pink"])), unknown_categories="missing")
    assert x[:2, 4].tolist() == [2, 0] and np.isnan(x[2, 4])
    assert "'11' in column 7 ('code')" in fails(columns, few.assign(code=11))
    # What is unknown is kept as it came: it is not a hole.
    table = read(few.assign(colour=["red", None, "pink"]))
    filled = columns.fill(table, np.nan_to_num(columns.encode(table, unknown_categories="missing")))
    assert filled.frame["colour"].tolist() == ["red", "blue", "pink"]


def test_spellings_of_a_category_are_one():
    columns = fit(
        pd.DataFrame({"flag": ["TRUE", "false", "TRUE"] * 4, "code": ["1", "1.0", "02"] * 4}), categorical=("code",)
    )
    assert [column.values for column in columns.columns] == [("false", "TRUE"), ("1", "02")]
    later = pd.DataFrame({"flag": [True, False], "code": [1, 1.0]})
    np.testing.assert_array_equal(columns.encode(read(later)), [[1, 0], [0, 0]])


def test_what_cells_mean_is_that_of_the_training(tmp_path):
    (tmp_path / "train.csv").write_text("a,b\n-200,x\n1,None\n2,y\n4,x\n")
    (tmp_path / "new.csv").write_text("a,b\n-200.0,None\n")
    columns = restored(fit(tmp_path / "train.csv", missing_values=(-200, "None")))
    assert np.isnan(columns.encode(read(tmp_path / "new.csv"))).all()
    # A category is one whatever else its chunk holds.
    (tmp_path / "train.csv").write_text("a,b\n1,-\n1,x\n2,-\n4,x\n")
    (tmp_path / "new.csv").write_text("a,b\n1,-\n")
    assert fit(tmp_path / "train.csv").encode(read(tmp_path / "new.csv"))[0, 1] == 0
    # A declared quantity is one without the option.
    (tmp_path / "train.csv").write_text("day,b\n001,1\n002,2\n010,4\n")
    columns = fit(tmp_path / "train.csv", real=("day",))
    assert columns.columns[0].kind == "integer" and np.isfinite(columns.encode(read(tmp_path / "train.csv"))).all()


def test_runs_without_names():
    columns = TableSchema.from_standardisation([1, 2], [0.5, 4])
    assert columns.cardinalities == (0, 0) and restored(columns) == columns
    rows = pd.DataFrame({"x": [1.5, np.nan], "y": [2, 10]})
    np.testing.assert_array_equal(columns.encode(read(rows)), np.array([[1, 0], [np.nan, 2]], np.float32))
    assert columns.decode(np.zeros((1, 2))).to_numpy().tolist() == [[1, 2]]


# Filling -------------------------------------------------------------------------------------------------------------


def test_holes_are_filled_in_the_spelling_of_their_column(tmp_path):
    (tmp_path / "t.csv").write_text("k;i;f;r;c;e\n5;1;2,0;0,123;x;\n;4;4,0;1,5;y;\n5;;;;;\n5;7;6,0;3,25;x;\n")
    table = read(tmp_path / "t.csv")
    columns = fit(tmp_path / "t.csv")
    filled = columns.fill(table, np.nan_to_num(columns.encode(table)))
    assert filled.frame.iloc[2].tolist() == ["5", "4", "4,0", "1,624333", "x", ""]
    assert filled.frame.iloc[1].tolist() == ["5", "4", "4,0", "1,5", "y", ""]
    assert dict(columns.set_aside) == {"k": "5", "e": None}


def test_frames_keep_their_types():
    frame = pd.DataFrame(
        {
            "f": np.array([1.5, np.nan, 2.5, 3.5], np.float32),
            "i": pd.array([1, None, 3, 4], "Int16"),
            "b": pd.array([True, None, False, True], "boolean"),
            "c": pd.Categorical(["low", None, "high", "low"], ["low", "high"], ordered=True),
            "s": pd.array(["x", None, "y", "x"], "string"),
            "o": np.array(["x", None, "y", "x"], object),
            "a": pd.array([1, None, 3, 4], "int64[pyarrow]"),
            "n": [1, 2, 3, 5],
            "k": [7, 7, 7, 7],
        }
    )
    before = frame.copy()
    table = read(frame)
    columns = TableSchema.fit(table)
    filled = columns.fill(table, np.nan_to_num(columns.encode(table))).frame
    assert not filled.isna().any(axis=None) and filled.dtypes.equals(frame.dtypes)
    observed = frame.notna()
    assert filled.where(observed).equals(frame.where(observed)) and frame.equals(before)
    back = columns.decode(np.zeros((2, len(columns))))
    assert back.dtypes.astype(str).equals(frame.dtypes.drop("k").astype(str))


def test_set_aside_columns(caplog):
    frame = mixed()[["real", "colour"]].assign(k=5, empty=np.nan, word="only")
    with caplog.at_level("WARNING", logger="absl"):
        columns = fit(frame)
    assert "'k' (always 5), 'empty' (empty), 'word' (always only)" in caplog.text and len(caplog.records) == 1
    holed = frame[:3].assign(k=[5, None, 6], word=[None, "only", "other"])
    table = read(holed)
    filled = columns.fill(table, np.nan_to_num(columns.encode(table))).frame
    assert filled["k"].tolist() == [5, 5, 6] and filled["word"].tolist() == ["only", "only", "other"]
    assert filled["empty"].isna().all()
