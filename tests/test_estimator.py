"""The scikit-learn face: scikit-learn's own checks, frames and arrays, likelihoods, and run directories."""

import json
import pickle
import threading

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from sklearn.base import clone
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import make_pipeline
from sklearn.utils import estimator_checks

from helpers import configs
from posterior_matching import runs
from posterior_matching.evaluation import uci
from posterior_matching.impute.defaults import table_config
from posterior_matching.impute.estimator import PosteriorMatchingImputer
from posterior_matching.impute.rows import impute_file

pytestmark = pytest.mark.slow


class Short(dict):
    """A dict that does not fill the names of tests."""

    def __repr__(self):
        return "{...}"


TINY = Short(configs.TINY)
MODEL = TINY["model"]


def tiny(**parameters):
    return PosteriorMatchingImputer(
        **{"config": TINY, "num_samples": 2, "batch_size": 8, "random_state": 0} | parameters
    )


def mixed_frame(num_rows=60, seed=0):
    """Columns of every kind that hang together, a fifth of the cells missing."""
    rng = np.random.default_rng(seed)
    size = rng.normal(size=num_rows)
    frame = pd.DataFrame(
        {
            "weight": np.exp(size + 0.1 * rng.normal(size=num_rows)),
            "count": pd.array(rng.poisson(np.exp(0.5 * size)), "Int64"),
            "level": np.round(10 * size),
            "colour": np.where(size > 0, "red", np.where(rng.uniform(size=num_rows) < 0.5, "green", "blue")),
            "grade": pd.Categorical(np.where(size > 0.5, "high", "low"), ["low", "high"], ordered=True),
            "large": size > 0,
            "whole": rng.integers(3, 9, num_rows),
            "same": 7.0,
            "empty": np.nan,
            "key": [f"id{i}" for i in range(num_rows)],
        },
        index=np.arange(num_rows) * 2 + 5,
    )
    frame["large"] = frame["large"].astype(object)
    for name in ("weight", "count", "level", "colour", "grade", "large", "same", "key"):
        frame.loc[rng.uniform(size=num_rows) < 0.2, name] = None
    return frame


@pytest.fixture(scope="module")
def frame():
    return mixed_frame()


@pytest.fixture(scope="module")
def fitted(frame):
    return tiny(log=["weight"], drop=["key"]).fit(frame)


# scikit-learn --------------------------------------------------------------------------------------------------------


@estimator_checks.parametrize_with_checks([tiny()])
def test_scikit_learn_checks(estimator, check):
    check(estimator)


@pytest.mark.parametrize(
    "check",
    [
        estimator_checks.check_global_output_transform_pandas,
        estimator_checks.check_transformer_get_feature_names_out_pandas,
        estimator_checks.check_dataframe_column_names_consistency,
    ],
)
def test_scikit_learn_checks_of_its_own_transformers(check):
    check("PosteriorMatchingImputer", tiny())


def test_pipeline_clone_and_parameters():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 3))
    y = x.sum(1)
    x[rng.uniform(size=x.shape) < 0.2] = np.nan
    pipeline = make_pipeline(tiny(), LinearRegression()).fit(x, y)
    assert np.isfinite(pipeline.predict(x)).all()
    copy = clone(pipeline).set_params(posteriormatchingimputer__kind="draws")
    assert copy[0].get_params()["kind"] == "draws" and copy[0].config is not pipeline[0].config
    assert not np.array_equal(copy.fit(x, y)[0].transform(x), pipeline[0].transform(x))


def test_random_state_decides_everything(frame, fitted):
    same, other = (tiny(random_state=seed, log=["weight"], drop=["key"]).fit(frame) for seed in (0, None))
    pd.testing.assert_frame_equal(fitted.transform(frame), same.transform(frame))
    assert fitted.transform(frame)["weight"].ne(other.transform(frame)["weight"]).any()
    pd.testing.assert_frame_equal(fitted.sample(frame, 2)[1], same.sample(frame, 3)[1])


# Frames and arrays ---------------------------------------------------------------------------------------------------


def test_frames_keep_types_index_and_cells(frame, fitted):
    for filled in (fitted.transform(frame), *fitted.sample(frame, 2)):
        assert (filled.index == frame.index).all() and filled.dtypes.equals(frame.dtypes)
        observed = frame.notna()
        assert (filled.where(observed).isna() == frame.isna()).all().all()
        for name in frame:
            assert filled.loc[observed[name], name].equals(frame.loc[observed[name], name]), name
        assert not filled.drop(columns=["key", "empty"]).isna().any().any()
        assert filled["empty"].isna().all() and filled["key"].equals(frame["key"])
        assert (filled["same"] == 7.0).all() and (filled["weight"] > 0).all()
        assert filled["level"].between(frame["level"].min(), frame["level"].max()).all()
        assert (filled["level"] % 1 == 0).all() and filled["count"].between(0, frame["count"].max()).all()
        assert set(filled["colour"]) == {"red", "green", "blue"} and set(map(type, filled["large"])) == {bool}
    assert list(fitted.get_feature_names_out()) == list(frame)


def test_copies_differ_and_share_what_was_observed(frame, fitted):
    one, other = fitted.sample(frame, 2)
    holes = frame["weight"].isna()
    assert (one["weight"] != other["weight"])[holes].all() and (one["weight"] == other["weight"])[~holes].all()


def test_the_same_row_gets_the_same_imputation_whatever_rows_are_around_it(frame, fitted):
    whole, copy = fitted.transform(frame), fitted.sample(frame)[0]
    some = frame.iloc[[31, 4, 17]]
    pd.testing.assert_frame_equal(fitted.transform(some), whole.loc[some.index])
    pd.testing.assert_frame_equal(fitted.sample(some)[0], copy.loc[some.index])
    np.testing.assert_array_equal(fitted.score_samples(some), fitted.score_samples(frame)[[31, 4, 17]])


@pytest.mark.parametrize("dtype", ["float32", "float64", object])
def test_arrays_stay_arrays(dtype):
    x = np.random.default_rng(0).normal(size=(30, 3)).astype(dtype)
    x[:, 2] = np.round(x[:, 2].astype(float))
    x[::4, 0] = x[1::4, 2] = np.nan
    filled = tiny().fit_transform(x)
    assert isinstance(filled, np.ndarray) and filled.dtype == x.dtype and filled.shape == x.shape
    observed = ~np.isnan(x.astype(float))
    assert (filled[observed] == x[observed]).all() and np.isfinite(filled.astype(float)).all()
    assert (filled[:, 2].astype(float) % 1 == 0).all()


def test_columns_of_arrays_are_given_by_index():
    x = np.random.default_rng(0).normal(size=(30, 3))
    x[:, 1] = np.arange(30) % 3
    imputer = tiny(categorical=[1], log=[]).fit(x)
    assert imputer.columns_.cardinalities == (0, 3, 0)
    of_category = imputer.log_prob(x, given=[0], of=[1])
    np.testing.assert_array_equal(of_category, imputer.log_prob(x, given=[0], of=[1], units="standardised"))
    with pytest.raises(ValueError, match="no column 7"):
        tiny(categorical=[7]).fit(x)


# Likelihoods ---------------------------------------------------------------------------------------------------------


def test_likelihoods_in_units_of_the_table(frame, fitted):
    difference = fitted.log_prob(frame, ["colour"], ["weight"]) - fitted.log_prob(
        frame, ["colour"], ["weight"], units="standardised"
    )
    weight = next(c for c in fitted.columns_.columns if c.name == "weight")
    expected = -np.log(frame["weight"]) - np.log(weight.std)  # d log(w) / dw, then standardised
    np.testing.assert_allclose(difference, expected.fillna(0.0), atol=1e-5)
    assert (fitted.log_prob(frame, ["colour"], ["weight"])[frame["weight"].isna()] == 0).all()


def gaussian(num_rows, seed):
    """Rows of three strongly correlated columns, and one that says whether their common cause is positive."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(num_rows, 1))
    x = z @ np.array([[1.0, -2.0, 3.0]]) + rng.normal(size=(num_rows, 3)) * [0.5, 1.0, 1.5] + [5, 0, -20]
    return np.concatenate([x, z > 0], axis=1)


COVARIANCE = np.outer([1, -2, 3], [1, -2, 3]) + np.diag([0.5, 1.0, 1.5]) ** 2


@pytest.fixture(scope="module")
def of_gaussian():
    """Trained well enough on rows with a quarter of the cells missing."""
    wide = configs.MLP | {"hidden_units": 32}
    model = MODEL | dict.fromkeys(("encoder", "decoder", "partial_encoder"), wide)
    config = {"steps": 1500, "validation_every": 500, "batch_size": 32, "model": model, "noise_std": 0.0}
    x = gaussian(1500, seed=0)
    x[np.random.default_rng(0).uniform(size=x.shape) < 0.25] = np.nan
    return PosteriorMatchingImputer(config=config, categorical=[3], random_state=0).fit(x)


def test_intervals_of_draws_cover_what_was_hidden(of_gaussian):
    truth = gaussian(400, seed=1)
    holes = np.random.default_rng(1).uniform(size=truth.shape) < 0.4
    copies = np.stack(of_gaussian.sample(np.where(holes, np.nan, truth), 100))
    low, high = np.quantile(copies, [0.1, 0.9], axis=0)
    covered = ((low <= truth) & (truth <= high))[:, :3][holes[:, :3]]
    assert 0.7 < covered.mean() < 0.9  # of 80 percent


def test_point_estimates_and_densities_near_the_closed_form(of_gaussian):
    truth, mean = gaussian(300, seed=2), np.array([5.0, 0.0, -20.0])
    point = of_gaussian.transform(np.where([False, True, True, False], truth, np.nan))[:, 0]
    gain = np.linalg.solve(COVARIANCE[1:, 1:], COVARIANCE[1:, 0])
    conditional_std = np.sqrt(COVARIANCE[0, 0] - COVARIANCE[0, 1:] @ gain)
    exact = mean[0] + (truth[:, :3] - mean)[:, 1:] @ gain
    assert np.sqrt(((point - exact) ** 2).mean()) < 0.5 * conditional_std
    log_prob = of_gaussian.log_prob(truth, given=[1, 2], of=[0])  # per unit of the column
    assert abs(log_prob.mean() - scipy.stats.norm.logpdf(truth[:, 0], exact, conditional_std).mean()) < 0.15


def test_likelihoods_follow_the_rules_of_probability(of_gaussian):
    rows, many = gaussian(50, seed=3), {"num_samples": 2000}

    def with_category(value):
        return np.column_stack([rows[:, :3], np.full(len(rows), value)])

    of_category = [of_gaussian.log_prob(with_category(value), given=[0, 1], of=[3], **many) for value in (0, 1)]
    np.testing.assert_allclose(np.exp(of_category).sum(0), 1.0, atol=0.05)
    both = of_gaussian.log_prob(rows, given=[1], of=[0, 3], **many)
    first = of_gaussian.log_prob(rows, given=[1], of=[3], **many)
    second = of_gaussian.log_prob(rows, given=[1, 3], of=[0], **many)
    assert np.abs(first + second - both).mean() < 0.05
    assert of_gaussian.score(rows) == of_gaussian.score_samples(rows).mean()
    np.testing.assert_array_equal(of_gaussian.score_samples(rows, units="table"), of_gaussian.log_prob(rows))


def test_information_gains_are_of_holes(frame, fitted):
    gains = fitted.info_gains(frame, num_samples=4)
    assert (gains.index == frame.index).all() and list(gains) == [c.name for c in fitted.columns_.columns]
    assert (gains.notna() == frame[list(gains)].isna()).all().all() and np.isfinite(gains.stack().dropna()).all()


def test_information_gains_know_what_is_redundant(of_gaussian):
    """Given the second column, the third says less of the common cause than given nothing."""
    row = np.array([[np.nan] * 4, [np.nan, 3.0, np.nan, np.nan]])
    gains = of_gaussian.info_gains(row, num_samples=256)
    assert gains.iloc[1, 2] < gains.iloc[0, 2]


# Run directories -----------------------------------------------------------------------------------------------------


def test_saved_loaded_and_pickled_imputers_are_equal(frame, fitted, tmp_path):
    fitted.save(tmp_path / "run")
    loaded = PosteriorMatchingImputer.load(tmp_path / "run", num_samples=2, batch_size=8)
    for other in (loaded, pickle.loads(pickle.dumps(fitted)), pickle.loads(pickle.dumps(loaded))):
        pd.testing.assert_frame_equal(other.transform(frame), fitted.transform(frame))
        pd.testing.assert_frame_equal(other.sample(frame, 2)[1], fitted.sample(frame, 2)[1])
        np.testing.assert_array_equal(other.log_prob(frame, ["colour"]), fitted.log_prob(frame, ["colour"]))
        assert list(other.get_feature_names_out()) == list(frame) and other.n_iter_ == fitted.n_iter_
    assert loaded.log == ("weight",) and loaded.drop == ("key",)
    with pytest.raises(ValueError, match="exists: save in another directory"):
        fitted.save(tmp_path / "run")


def test_saved_imputers_are_runs(frame, fitted, tmp_path):
    run_dir, file = str(tmp_path / "run"), tmp_path / "rows.parquet"
    fitted.save(run_dir)
    frame.to_parquet(file, index=False)
    impute_file(run_dir, str(file), str(tmp_path / "filled.parquet"), batch_size=8, num_samples=2)
    filled = pd.read_parquet(tmp_path / "filled.parquet")
    np.testing.assert_array_equal(filled["weight"], fitted.transform(frame)["weight"])
    results = uci.evaluate(run_dir, dataset=str(file), split="all", num_samples=2, num_trials=1)
    assert np.isfinite(results.trials("nrmse")).all()
    with pytest.raises(Exception, match="trained on a table in memory: pass --dataset"):
        uci.evaluate(run_dir, num_samples=2)


def test_a_run_directory_is_resumed_and_belongs_to_one_table(tmp_path):
    x, run_dir = np.random.default_rng(0).normal(size=(30, 3)), tmp_path / "run"
    short, long = tiny(run_dir=run_dir), tiny(run_dir=run_dir, config=TINY | {"steps": 6})
    assert short.fit(x).n_iter_ == runs.latest_step(run_dir) == 2
    assert long.fit(x).n_iter_ >= 2 and runs.latest_step(run_dir) == 6
    whole = tiny(config=TINY | {"steps": 6}).fit(x)
    np.testing.assert_array_equal(long.transform(x), whole.transform(x))
    with pytest.raises(ValueError, match=r"has changed since .* was begun"):
        short.fit(x + 1)


def test_training_is_quiet_unless_asked_and_works_in_a_thread(capfd):
    x = np.random.default_rng(0).normal(size=(20, 2))
    thread = threading.Thread(target=tiny().fit, args=(x,))
    thread.start()
    thread.join()
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    tiny(verbose=True).fit(x)
    captured = capfd.readouterr()
    assert "training from step 0 to 2" in captured.out and "validation" in captured.err


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "change", "message"),
    [
        ({"kind": "mean"}, {}, "kind must be 'point' or 'draws'"),
        ({"num_samples": 0}, {}, "num_samples must be at least 1"),
        ({"drop": "colour"}, {}, r"columns are given as a list, not as 'colour': \['colour'\]"),
        ({"categorical": ["color"]}, {}, "no column 'color'"),
        ({"config": {"stepz": 3}}, {}, "unknown key 'config.stepz': did you mean 'steps'"),
        ({"config": {"batch_size": 10_000}}, {}, "a batch of 10000"),
        ({}, {"date": "2020-01-01"}, r"'date' holds dates or times .* Leave them out with drop=\('date',\)"),
        ({}, {"weight": np.inf}, "has an infinite value"),
    ],
)
def test_bad_input_is_a_value_error_of_one_line(parameters, change, message, frame):
    with pytest.raises(ValueError, match=message) as error:
        tiny(**{"drop": ["key"]} | parameters).fit(frame.assign(**change))
    assert "\n" not in str(error.value)


def test_unknown_categories_and_columns(frame, fitted):
    changed = frame.assign(colour="mauve")
    with pytest.raises(ValueError, match=r"'mauve' .* or pass unknown_categories='missing'"):
        fitted.transform(changed)
    lenient = pickle.loads(pickle.dumps(fitted)).set_params(unknown_categories="missing")
    assert (lenient.transform(changed)["colour"] == "mauve").all()  # observed cells leave as they came
    with pytest.raises(ValueError, match="no column 'size'"):
        fitted.log_prob(frame, given=["size"])
    with pytest.raises(ValueError, match="units must be 'table' or 'standardised'"):
        fitted.log_prob(frame, units="metres")
    with pytest.raises(ValueError, match="n must be a number of copies"):
        fitted.sample(frame, 0)


def test_the_default_config_fits_every_size():
    for num_rows, num_columns in ((9, 1), (16, 3), (1000, 10), (1_000_000, 300)):
        config = table_config(num_rows, num_columns)
        assert 1 <= config.batch_size <= num_rows and config.steps % config.validation_every == 0
        json.dumps(config.to_dict())
        assert config.model.likelihood.shared_scales == (num_columns == 300)
