"""The parts of the benchmarks that a result depends on; test_readme.py runs them all in small."""

import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from benchmarks import imputation, scale, timing, train_speed
from benchmarks.chained import ChainedImputer
from benchmarks.missingness import MECHANISMS, mar, mnar
from helpers.configs import TINY
from helpers.runs import refusal
from posterior_matching.evaluation.metrics import crps, interval_coverage

# Cells that go missing ------------------------------------------------------------------------------------------------

N, CARDINALITIES = 4000, (0, 3, 0, 0, 4, 0, 0, 0, 2, 0)


def columns(seed=0):
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(k, size=N) if k else rng.gamma(2.0, size=N) for k in CARDINALITIES], axis=1)


def hide(mechanism, x, share=0.3, seed=1):
    return mechanism(x, share, np.random.default_rng(seed), CARDINALITIES)


@pytest.mark.parametrize("share", [0.1, 0.5])
@pytest.mark.parametrize("name", MECHANISMS)
def test_the_share_of_missing_cells_of_every_column_is_as_asked(name, share):
    b = hide(MECHANISMS[name], columns(), share)
    assert b.shape == (N, len(CARDINALITIES)) and set(np.unique(b)) == {0.0, 1.0}
    always = b.all(axis=0)
    assert always.sum() == (3 if name == "MAR" else 0)  # 30% of ten columns
    missing = 1 - b[:, ~always].mean(axis=0)
    assert np.abs(missing - share).max() < 4.5 * np.sqrt(share * (1 - share) / N)
    assert (hide(MECHANISMS[name], columns(), share) == b).all()
    assert (hide(MECHANISMS[name], columns(), share, seed=2) != b).any()


def test_at_random_means_a_function_of_what_is_observed_and_not_at_random_one_of_what_may_be_missing():
    x, other, always = columns(), columns(seed=1), hide(mar, columns()).all(axis=0)
    assert (hide(mar, np.where(always, x, other)) == hide(mar, x)).all()
    assert (hide(mar, np.where(always, other, x)) != hide(mar, x)).any()
    assert (hide(mnar, np.where(always, x, other)) == hide(mnar, x)).all()
    changed = (hide(mnar, np.where(always, other, x)) != hide(mnar, x)).any(axis=0)
    assert (changed == ~always).all()


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_the_probability_of_missing_is_logistic_in_the_deciding_column(share):
    # Two real columns: the first to be drawn decides. Its logit has standard deviation 1 and the slope +1 or -1.
    x = np.random.default_rng(0).normal(size=(200_000, 2))
    b = mar(x, share, np.random.default_rng(1))
    always = b.all(axis=0)
    cause, missing = x[:, always][:, 0], 1 - b[:, ~always][:, 0]
    edges = np.quantile(cause, np.linspace(0, 1, 11))
    low, high = ((cause >= edges[i]) & (cause < edges[i + 1]) for i in (1, 8))
    rates = [missing[bin].mean() for bin in (low, high)]
    difference = np.diff(np.log(rates) - np.log1p(-np.array(rates)))[0]
    error = np.sqrt(sum(1 / (part.sum() * r * (1 - r)) for part, r in zip((low, high), rates, strict=True)))
    expected = np.abs(cause[high].mean() - cause[low].mean())  # up to the curvature within a bin
    assert abs(abs(difference) - expected) < 4 * error + 0.02


def test_missing_cells_decide_nothing_and_one_column_cannot_decide_about_itself():
    x = columns()
    x[::2] = np.nan
    assert np.isfinite(hide(mar, x)).all()
    with pytest.raises(ValueError, match="at least two columns"):
        hide(mar, x[:, :1])


# Imputers -------------------------------------------------------------------------------------------------------------


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


@pytest.mark.filterwarnings("ignore:.*Early stopping criterion not reached")
def test_chained_regressions_are_those_of_scikit_learn_also_for_new_rows():
    from sklearn.experimental import enable_iterative_imputer  # noqa: F401
    from sklearn.impute import IterativeImputer

    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 3)) @ rng.normal(size=(3, 8)) + 0.1 * rng.normal(size=(300, 8))  # nearly collinear
    x[rng.uniform(size=x.shape) < 0.3] = np.nan
    reference = IterativeImputer(max_iter=10, tol=0).fit(x[:200])
    chained = ChainedImputer((0,) * 8).fit(x[:200])
    np.testing.assert_allclose(chained.complete(x[200:]), reference.transform(x[200:]), rtol=1e-6)


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
    assert "| iterative |" in capsys.readouterr().out
    kept = tmp_path / "things" / "MCAR_0.3_0_knn.json"
    kept.write_text(json.dumps({"in": {"nrmse": 5.0}, "out": {"nrmse": 7.0}}))
    frame = compared(table, tmp_path, ["knn"])
    assert set(frame[frame["seed"] == 0]["nrmse"]) == {5.0, 7.0}


def test_forests_fit_what_lines_cannot():
    rng = np.random.default_rng(0)
    x = np.stack([u := rng.uniform(-2, 2, 200), u**2, u > 0.5], axis=1)
    holes = np.where(rng.uniform(size=x.shape) < 0.2, np.nan, x)
    rows = imputation.Rows("curve", x, types.SimpleNamespace(cardinalities=(0, 0, 2)))
    filled = imputation.forest(rows, holes, 0)(holes).point
    hidden, known = np.isnan(holes), ~np.isnan(holes[:, 0])
    np.testing.assert_array_equal(filled[~hidden], x[~hidden])
    assert np.abs(filled - x)[hidden[:, 1] & known, 1].mean() < 0.1 < 0.4 * x[:, 1].std()
    assert (filled == x)[hidden[:, 2] & known, 2].mean() > 0.9


@pytest.mark.slow
def test_posterior_matching_gets_frames_and_gives_what_is_scored(table, monkeypatch):
    imputer = functools.partial(imputation.PosteriorMatchingImputer, config=TINY, num_samples=2)
    monkeypatch.setattr(imputation, "PosteriorMatchingImputer", imputer)
    monkeypatch.setattr(imputation, "NUM_DRAWS", 2)
    rows = imputation.read(str(table), 2000)
    incomplete = np.where(np.random.default_rng(0).random(rows.x.shape) < 0.3, np.nan, rows.x)
    known = ~np.isnan(incomplete)
    point, draws = imputation.posterior_matching(rows, incomplete, 0)(incomplete)
    for filled in (point, *draws):
        np.testing.assert_allclose(filled[known], incomplete[known], atol=1e-5)
        assert np.isfinite(filled).all()
    assert draws.shape == (2, *rows.x.shape) and (draws[0] != draws[1]).any()


def test_wrong_input_is_refused_in_one_line(table, tmp_path):
    assert "--methods: unknown 'guess'" in refusal(compared, table, tmp_path, ["guess"])
    assert "'MCARR': " in refusal(compared, table, tmp_path, ["mean"], ["MCARR"])
    assert "table.drop must be" in refusal(imputation.read, f"{table}:drop", 10)
    assert "dorp" in refusal(imputation.read, f"{table}:dorp=('kind',)", 10)
    assert "no_such" in refusal(imputation.read, "no_such.csv", 10)


def test_vaeac_s_protocol_hides_the_zeros_of_its_mask_and_scores_them(tmp_path):
    x = np.random.default_rng(1).normal(3.0, 2.0, (400, 3))
    pd.DataFrame(x, columns=["a", "b", "c"]).to_csv(tmp_path / "rows.csv", index=False)
    (result,) = compared(tmp_path / "rows.csv", tmp_path, ["mean"], ["VAEAC"]).query("seed == 0").to_dict("records")
    np.random.seed(239)  # noqa: NPY002, as in the published code
    hidden = np.random.choice(2, size=x.shape, p=[0.5, 0.5]) == 0  # noqa: NPY002
    means = np.nanmean(np.where(hidden, np.nan, x), axis=0)
    errors = np.nanmean(np.where(hidden, np.square(x - means), np.nan), axis=0)
    np.testing.assert_allclose(result["nrmse"], (np.sqrt(errors) / x.std(0)).mean(), rtol=1e-6)


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


# Speed ----------------------------------------------------------------------------------------------------------------


def test_products_are_counted_in_the_programs_that_a_program_calls():
    def program(a, kernel):
        a = jax.lax.scan(lambda carry, _: (jnp.tanh(carry @ a), None), a, None, length=3)[0]
        return jax.lax.conv(jax.jit(lambda a: a @ a)(a)[None, None], kernel, (1, 1), "SAME")

    operands = jnp.ones((8, 8)), jnp.ones((1, 1, 3, 3))
    jaxpr = jax.make_jaxpr(jax.grad(lambda *operands: program(*operands).sum()))(*operands)
    products, seconds = timing.seconds_of_products(jaxpr.jaxpr)
    forward, backward = 3 + 1 + 1, 3 * 2 + 2 + 1  # the kernel has no gradient
    assert products == forward + backward and seconds > 0


def test_two_checkouts_are_measured_with_the_same_arguments(tmp_path, monkeypatch, capsys):
    given = ["--config", "configs/pm_vae_gas.py", "-seconds=1", f"--against={tmp_path}", "--rounds", "1"]
    commands = []

    def measured(checkout, command):
        commands.append(command[1:])
        return 2.0 if checkout == tmp_path else 3.0

    monkeypatch.setattr(train_speed, "steps_per_second", measured)
    refused = refusal(train_speed.compare, tmp_path, 1, None, given)
    assert "is not a checkout" in refused and not commands
    published = tmp_path / "posterior_matching" / "models" / "pixel_cnn.py"
    published.parent.mkdir(parents=True)
    published.touch()
    assert "--published_python" in refusal(train_speed.compare, tmp_path, 1, None, given)
    train_speed.compare(tmp_path, 1, "old_python", given)
    own = ["--config=configs/pm_vae_gas.py", "--seconds=1"]
    assert commands[0][1:] == [f"--checkout={tmp_path}", *own] and commands[1] == ["benchmarks/train_speed.py", *own]
    assert "ratio, ours / theirs: median 1.500" in capsys.readouterr().out


def test_the_exponent_is_that_of_a_power_law_between_the_largest_values():
    values = [10, 20, 80]
    assert scale.exponent(values, [5.0, 3.0 * 20**1.7, 3.0 * 80**1.7]) == pytest.approx(1.7)
    points = {"rows": {n: {"seconds": 1e-6 * n, "start_seconds": 2.0, "gigabytes": 0.5} for n in (1000, 2000)}}
    assert scale.table(points).splitlines()[2:] == [
        "| rows | 1,000 | 0.001 |  | 2.0 | 0.50 |",
        "| rows | 2,000 | 0.002 | 1.00 | 2.0 | 0.50 |",
    ]
