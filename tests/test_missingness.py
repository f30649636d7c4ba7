"""Missing-data mechanisms: their marginals, and what they depend on."""

import numpy as np
import pytest

from benchmarks.missingness import MECHANISMS, mar, mnar

N, CARDINALITIES = 4000, (0, 3, 0, 0, 4, 0, 0, 0, 2, 0)


def table(seed=0):
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(k, size=N) if k else rng.gamma(2.0, size=N) for k in CARDINALITIES], axis=1)


def always_observed(b):
    return b.all(axis=0)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("name", MECHANISMS)
def test_the_share_of_missing_cells_of_every_column_is_as_asked(name, share):
    b = MECHANISMS[name](table(), share, np.random.default_rng(1), CARDINALITIES)
    assert b.shape == (N, len(CARDINALITIES)) and set(np.unique(b)) == {0.0, 1.0}
    assert always_observed(b).sum() == (3 if name == "MAR" else 0)  # 30% of ten columns
    found = 1 - b[:, ~always_observed(b)].mean(axis=0)
    assert np.abs(found - share).max() < 4.5 * np.sqrt(share * (1 - share) / N)


@pytest.mark.parametrize("name", MECHANISMS)
def test_a_mask_is_a_function_of_the_seed(name):
    masks = [MECHANISMS[name](table(), 0.3, np.random.default_rng(seed), CARDINALITIES) for seed in (1, 1, 2)]
    assert (masks[0] == masks[1]).all() and (masks[0] != masks[2]).any()


def test_at_random_means_a_function_of_what_is_observed():
    x = table()
    b = mar(x, 0.3, np.random.default_rng(1), CARDINALITIES)
    other = np.where(always_observed(b), x, table(seed=1))
    assert (mar(other, 0.3, np.random.default_rng(1), CARDINALITIES) == b).all()
    other = np.where(always_observed(b), table(seed=1), x)
    assert (mar(other, 0.3, np.random.default_rng(1), CARDINALITIES) != b).any()


def test_not_at_random_means_a_function_of_what_may_be_missing():
    x, rng = table(), np.random.default_rng
    b, causes = mnar(x, 0.3, rng(1), CARDINALITIES), always_observed(mar(x, 0.3, rng(1), CARDINALITIES))
    other = np.where(causes, x, table(seed=1))
    assert (mnar(other, 0.3, rng(1), CARDINALITIES) == b).all()
    changed = (mnar(np.where(causes, table(seed=1), x), 0.3, rng(1), CARDINALITIES) != b).any(axis=0)
    assert (changed == ~causes).all()


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_the_probability_of_missing_is_logistic_in_the_deciding_column(share):
    # Two real columns: the first to be drawn decides. Its logit has standard deviation 1 and the slope +1 or -1.
    x = np.random.default_rng(0).normal(size=(200_000, 2))
    b = mar(x, share, np.random.default_rng(1))
    cause = x[:, always_observed(b)][:, 0]
    missing = 1 - b[:, ~always_observed(b)][:, 0]
    edges = np.quantile(cause, np.linspace(0, 1, 11))
    low, high = ((cause >= edges[i]) & (cause < edges[i + 1]) for i in (1, 8))
    rates = [missing[bin].mean() for bin in (low, high)]
    difference = np.diff(np.log(rates) - np.log1p(-np.array(rates)))[0]
    error = np.sqrt(sum(1 / (part.sum() * r * (1 - r)) for part, r in zip((low, high), rates, strict=True)))
    expected = np.abs(cause[high].mean() - cause[low].mean())  # up to the curvature within a bin
    assert abs(abs(difference) - expected) < 4 * error + 0.02


def test_missing_cells_decide_nothing_and_one_column_cannot_decide_about_itself():
    x = table()
    x[::2] = np.nan
    b = mar(x, 0.3, np.random.default_rng(1), CARDINALITIES)
    assert np.isfinite(b).all()
    with pytest.raises(ValueError, match="at least two columns"):
        mar(x[:, :1], 0.3, np.random.default_rng(1))
