"""The comparison of imputers: its metrics against closed forms, and the whole of it on a small table."""

import json
import sys
import types

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from benchmarks import imputation, vaeac_protocol
from helpers.runs import refusal
from posterior_matching.evaluation.metrics import crps, interval_coverage


def test_crps_of_normal_draws_is_the_closed_form():
    # Gneiting and Raftery 2007, equation 21, for N(0, 1).
    x, rng = np.array([-1.5, 0.0, 0.3, 2.0]), np.random.default_rng(0)
    exact = x * (2 * stats.norm.cdf(x) - 1) + 2 * stats.norm.pdf(x) - 1 / np.sqrt(np.pi)
    estimates = np.array([crps(x, rng.normal(size=(10, 4))) for _ in range(4000)])
    assert np.abs(estimates.mean(0) - exact).max() < 4.5 * (estimates.std(0) / np.sqrt(4000)).max()
    np.testing.assert_array_equal(crps(x, np.zeros((1, 4))), np.abs(x))


def test_the_interval_covers_a_new_draw_with_its_probability():
    rng = np.random.default_rng(0)
    values = rng.gamma(2.0, size=(100, 20_000))
    covered = interval_coverage(values[0], values[1:]).mean()
    assert abs(covered - 0.9) < 4.5 * np.sqrt(0.9 * 0.1 / 20_000)
    with pytest.raises(ValueError, match="98 draws"):
        interval_coverage(values[0], values[2:])


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    rng = np.random.default_rng(0)
    size = rng.normal(size=200)
    frame = pd.DataFrame({"width": size, "height": 2 * size + 0.1 * rng.normal(size=200)})
    frame["kind"] = np.where(size > 0, "large", "small")
    frame.loc[::9, "height"] = np.nan
    path = tmp_path_factory.mktemp("benchmark") / "things.csv"
    frame.to_csv(path, index=False)
    return path


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr(imputation, "NUM_DRAWS", 19)  # between the smallest and the largest: 90%


def compared(table, folder, methods, mechanisms=("MCAR",)):
    return imputation.main([str(table)], mechanisms, [0.3], 2, methods, 2000, folder)


def test_methods_are_scored_on_hidden_cells_and_kept_results_are_not_computed_again(table, tmp_path, capsys):
    frame = compared(table, tmp_path, ["mean", "knn", "iterative"], ["MCAR", "MAR"])
    assert len(frame) == 2 * 2 * 3 * 2  # seeds, mechanisms, methods, in and out of the sample
    means = frame.groupby("method")[["nrmse", "accuracy", "crps", "coverage"]].mean()
    assert 0.9 < means.nrmse["mean"] < 1.3 and means.nrmse["knn"] < 0.8 > means.nrmse["iterative"]
    assert means.accuracy["mean"] < 0.7 < means.accuracy["iterative"]
    assert 0.8 < means.coverage["iterative"] < 0.97 and np.isnan(means.coverage["knn"])
    assert means.crps["iterative"] < means.crps["mean"]
    assert (tmp_path / "imputation.png").stat().st_size > 1000
    assert "| iterative |" in capsys.readouterr().out
    kept = tmp_path / "things" / "MCAR_0.3_0_knn.json"
    kept.write_text(json.dumps({"in": {"nrmse": 5.0}, "out": {"nrmse": 7.0}}))
    frame = compared(table, tmp_path, ["knn"])
    assert set(frame[frame["seed"] == 0]["nrmse"]) == {5.0, 7.0}


@pytest.mark.slow
def test_posterior_matching_is_compared_as_users_have_it(table, monkeypatch):
    small = imputation.PosteriorMatchingImputer
    config = {"steps": 150, "validation_every": 50, "log_every": 50}
    monkeypatch.setattr(imputation, "PosteriorMatchingImputer", lambda **given: small(**given, config=config))
    rows = imputation.read(str(table), 2000)
    found = imputation.compare(rows, "MCAR", 0.3, 0, "posterior_matching")
    for scores in found.values():
        assert scores["nrmse"] < 1 and scores["accuracy"] > 0.6 and 0.7 < scores["coverage"] <= 1


def test_hyperimpute_sees_new_rows_with_the_training_rows(table, monkeypatch):
    """With a stand-in for the package, which the requirements do not install."""
    seen = []

    class Mean:
        def __init__(self, random_state):
            assert random_state == 3

        def fit_transform(self, frame):
            seen.append(frame.to_numpy())
            return frame.fillna(frame.mean())

    module = types.ModuleType("hyperimpute.plugins.imputers")
    module.Imputers = lambda: types.SimpleNamespace(get=lambda name, **given: {"hyperimpute": Mean}[name](**given))
    for name in ("hyperimpute", "hyperimpute.plugins", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    rows = imputation.read(str(table), 2000)
    train, new = np.split(np.where(np.random.default_rng(0).random(rows.x.shape) < 0.3, np.nan, rows.x), [140])
    impute = imputation.METHODS["hyperimpute"](rows, train, 3)
    np.testing.assert_array_equal(impute(train, 0).point[:, 0], np.where(np.isnan(t := train[:, 0]), np.nanmean(t), t))
    kinds = impute(new, 0).point[:, np.array(rows.columns.cardinalities) > 0]
    assert set(np.unique(kinds)) <= {0.0, 1.0}
    assert [len(x) for x in seen] == [140, 200]
    np.testing.assert_array_equal(seen[1], np.concatenate([train, new]))


@pytest.mark.parametrize(
    "pandas, sklearn, works", [("2.3.3", "1.7.2", True), ("3.1.1", "1.7.2", False), ("2.3.3", "1.8.0", False)]
)
def test_hyperimpute_is_offered_beside_versions_with_which_it_works(pandas, sklearn, works, monkeypatch):
    versions = {"pandas": pandas, "scikit-learn": sklearn}
    monkeypatch.setattr(
        imputation.importlib.util, "find_spec", lambda name: object() if name == "hyperimpute" else None
    )
    monkeypatch.setattr(imputation.importlib.metadata, "version", versions.__getitem__)
    assert imputation._hyperimpute_works() == works


def test_wrong_input_is_refused_in_one_line(table, tmp_path, monkeypatch):
    assert "'guess'" in refusal(compared, table, tmp_path, ["guess"])
    monkeypatch.setattr(imputation, "AVAILABLE", ["mean"])
    assert "pip install hyperimpute 'pandas<3' 'scikit-learn<1.8'" in refusal(
        compared, table, tmp_path, ["hyperimpute"]
    )
    assert "'MCARR': " in refusal(compared, table, tmp_path, ["mean"], ["MCARR"])
    assert "table.drop must be" in refusal(imputation.read, f"{table}:drop", 10)
    assert "dorp" in refusal(imputation.read, f"{table}:dorp=('kind',)", 10)
    assert "no_such" in refusal(imputation.read, "no_such.csv", 10)


def test_vaeac_s_protocol_hides_the_zeros_of_its_mask_and_scores_them(tmp_path):
    x = np.random.default_rng(1).normal(3.0, 2.0, (400, 3))
    pd.DataFrame(x, columns=["a", "b", "c"]).to_csv(tmp_path / "rows.csv", index=False)
    results = vaeac_protocol.main(str(tmp_path / "rows.csv"), ["mean"])
    np.random.seed(239)  # noqa: NPY002, as in the published code
    hidden = np.random.choice(2, size=x.shape, p=[0.5, 0.5]) == 0  # noqa: NPY002
    means = np.nanmean(np.where(hidden, np.nan, x), axis=0)
    errors = np.nanmean(np.where(hidden, np.square(x - means), np.nan), axis=0)
    np.testing.assert_allclose(results["mean"]["nrmse"], (np.sqrt(errors) / x.std(0)).mean(), rtol=1e-6)
    assert "unknown 'meen'" in refusal(lambda: vaeac_protocol.main("rows.csv", ["meen"]))


def test_the_report_gives_means_over_tables_errors_over_seeds_and_mean_ranks():
    # Errors, NRMSE + 1 - accuracy: of `good` 0.6 and 0.9 (tables), of `bad` 0.8 and 1.0.
    scores = [("good", "one", 0.4, 0.8), ("good", "two", 0.6, 0.7), ("bad", "one", 0.5, 0.7), ("bad", "two", 0.7, 0.7)]
    frame = pd.DataFrame(
        {"table": table, "mechanism": "MAR", "share": 0.1, "seed": seed, "method": method, "rows": "out"}
        | {"nrmse": nrmse + 0.02 * seed, "accuracy": accuracy}
        for method, table, nrmse, accuracy in scores
        for seed in (0, 1)
    )
    lines = imputation.report(frame).splitlines()
    assert lines[-2] == "| 10%, MAR | good | 0.510 ± 0.01 | 0.750 ± 0 | 1.00 |"
    assert lines[-1] == "| 10%, MAR | bad | 0.610 ± 0.01 | 0.700 ± 0 | 2.00 |"
