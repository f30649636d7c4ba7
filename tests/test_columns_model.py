"""Mixed columns: features against loops, the likelihood head against SciPy, integration and its own samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx
from scipy.special import log_softmax, softmax

from posterior_matching.errors import OptionError
from posterior_matching.masking import partial_input
from posterior_matching.models.columns import (
    MIN_SCALE,
    ColumnsLikelihood,
    column_features,
    column_partial_input,
    column_values,
    features_shape,
)

KEY = jax.random.key(0)
MIXED = (0, 3, 2, 0, 3, 1)  # the same cardinality apart, and a column of one category
REAL = np.array(MIXED) == 0


def rows(n=4, cardinalities=MIXED, seed=0):
    rng = np.random.default_rng(seed)
    columns = [rng.integers(0, k, n) if k else rng.normal(size=n) for k in cardinalities]
    return np.stack(columns, axis=1).astype(np.float32)


def one_hot(row, cardinalities=MIXED):
    return np.concatenate([np.eye(k)[int(v)] if k else [v] for v, k in zip(row, cardinalities, strict=True)])


HEADS = pytest.mark.parametrize(
    "options", [{}, {"num_components": 3}, {"num_components": 3, "shared_scales": True}], ids=str
)


def head(num_components=1, cardinalities=MIXED, seed=0, scale=1.0, **options):
    """A head with random parameters, biases too."""
    options |= {"cardinalities": cardinalities, "rngs": nnx.Rngs(seed)}
    made = ColumnsLikelihood((3,), (len(cardinalities),), num_components, **options)
    rng = np.random.default_rng(seed)
    nnx.update(made, jax.tree.map(lambda a: jnp.float32(scale * rng.normal(size=a.shape)), nnx.state(made)))
    return made


def features(n=4, seed=1):
    return jnp.float32(np.random.default_rng(seed).normal(size=(n, 3)))


# Features.


def test_features_are_the_reals_as_they_are_and_the_categories_one_hot():
    x = rows()
    np.testing.assert_array_equal(column_features(x, MIXED), [np.float32(one_hot(row)) for row in x])
    assert features_shape((6,), MIXED) == column_features(x, MIXED).shape[1:] == (11,)


def test_partial_input_is_the_features_of_what_is_observed_then_the_mask():
    x, b = rows(), np.float32(np.random.default_rng(1).integers(0, 2, (4, 6)))
    spread = np.stack([one_hot(np.zeros(6)) for _ in x])  # of the right width
    for n, row in enumerate(x):
        blocks = [one_hot(row[j : j + 1], (k,)) * b[n, j] for j, k in enumerate(MIXED)]
        spread[n] = np.concatenate(blocks)
    np.testing.assert_array_equal(column_partial_input(x, b, MIXED), np.concatenate([spread, b], axis=1))


@pytest.mark.parametrize("cardinalities", [(), (0, 0, 0)])
def test_real_columns_are_seen_as_they_always_were(cardinalities):
    x, b = rows(5, (0, 0, 0)), np.float32(np.random.default_rng(1).integers(0, 2, (5, 3)))
    assert column_features(x, cardinalities) is x
    assert column_values(x, cardinalities) is x
    assert features_shape((3,), cardinalities) == (3,)
    np.testing.assert_array_equal(column_partial_input(x, b, cardinalities), partial_input(x, b))


def test_rows_come_back_from_their_features_and_the_most_probable_category_from_probabilities():
    x = rows(20)
    np.testing.assert_array_equal(column_values(column_features(x, MIXED), MIXED), x)
    doubtful = jnp.array([[0.3, 0.3, 0.2, 0.5, 0.6, 0.4, -1.0, 0.1, 0.4, 0.5, 1.0]])
    np.testing.assert_allclose(column_values(doubtful, MIXED), [[0.3, 2, 0, -1.0, 2, 0]])


# The head.


def parameters(made, given):
    """By column: its slice of the linear layer's output, without the head's own bookkeeping."""
    output = np.asarray(given @ made.linear.kernel[...] + made.linear.bias[...], np.float64)
    k = made.num_components
    start, actual = 0, {}
    for cardinality in sorted(set(MIXED)):  # one group after the other
        for j in np.flatnonzero(np.array(MIXED) == cardinality):
            size = cardinality or (1 if k == 1 else 2 * k if made.shared_scales else 3 * k)
            actual[int(j)] = output[:, start : start + size]
            start += size
    assert start == output.shape[1]
    return actual


def real_pdf(made, j, actual, n, x):
    """SciPy's density of real column j given example n."""
    if made.num_components == 1:
        scale = np.exp(float(made.log_scale[...][[0, 3].index(j)])) + MIN_SCALE
        return scipy.stats.norm.pdf(x, actual[j][n, 0], scale)
    if made.shared_scales:
        logits, loc = np.split(actual[j][n], 2)
        scale = np.exp(np.asarray(made.log_scale[...])[[0, 3].index(j)]) + MIN_SCALE
    else:
        logits, loc, scale = np.split(actual[j][n], 3)
        scale = np.logaddexp(0, scale) + MIN_SCALE
    return scipy.stats.norm.pdf(np.asarray(x)[..., None], loc, scale) @ softmax(logits)


@HEADS
def test_log_prob_is_scipys_column_by_column(options):
    made, x = head(**options), rows()
    given = features()
    actual = parameters(made, given)
    log_prob = made(given).log_prob(jnp.asarray(x))
    assert log_prob.shape == x.shape
    for n, j in np.ndindex(*x.shape):
        if MIXED[j]:
            expected = log_softmax(actual[j][n])[int(x[n, j])]
        else:
            expected = np.log(real_pdf(made, j, actual, n, x[n, j]))
        np.testing.assert_allclose(log_prob[n, j], expected, rtol=1e-4, atol=1e-5)


@HEADS
def test_samples_follow_the_density(options):
    made, count = head(**options), 20_000
    given = features(2)
    actual = parameters(made, given)
    x = np.asarray(made(given).sample(KEY, (count,)))
    assert x.shape == (count, 2, 6) and x.dtype == np.float32
    for n, j in np.ndindex(2, 6):
        if MIXED[j]:
            counts = np.bincount(x[:, n, j].astype(int), minlength=MIXED[j])
            expected = softmax(actual[j][n]) * count
            assert np.all(np.abs(counts - expected) <= 5 * np.sqrt(expected) + 1e-6)
        else:
            grid = np.linspace(-40, 40, 40_001)
            cdf = np.cumsum(real_pdf(made, j, actual, n, grid)) * (grid[1] - grid[0])
            test = scipy.stats.kstest(x[:, n, j], lambda v, cdf=cdf, grid=grid: np.interp(v, grid, cdf))
            assert test.statistic < 2.3 / np.sqrt(count)  # p = 5e-5


@HEADS
def test_mean_features_are_the_mean_of_the_samples_features(options):
    p, count = head(**options)(features(2)), 20_000
    drawn = np.asarray(column_features(p.sample(KEY, (count,)), MIXED), np.float64)
    error = drawn.std(axis=0) / np.sqrt(count)
    assert np.all(np.abs(drawn.mean(axis=0) - p.mean_features) <= 5 * error + 1e-5)


def test_the_point_estimate_is_the_mean_of_a_real_column_and_the_mode_of_a_category():
    made, given = head(), features()
    actual, point = parameters(made, given), made(given).mean
    for n, j in np.ndindex(4, 6):
        np.testing.assert_allclose(point[n, j], actual[j][n].argmax() if MIXED[j] else actual[j][n, 0], rtol=1e-4)


@HEADS
@pytest.mark.parametrize("scale", [1.0, 100.0])  # logits of hundreds, scales at the floor
def test_log_prob_and_its_gradient_are_finite(options, scale):
    made, x = head(scale=scale, **options), 100 * rows()
    x[:, ~REAL] = rows()[:, ~REAL]
    if hasattr(made, "log_scale"):
        made.log_scale[...] = -jnp.abs(made.log_scale[...])
    graphdef, state = nnx.split(made)

    def total(state):
        return nnx.merge(graphdef, state)(features()).log_prob(jnp.asarray(x)).sum()

    value, gradient = jax.value_and_grad(total)(state)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_every_real_column_has_a_scale_of_its_own_and_a_floor():
    made = head()
    assert made.log_scale.shape == (2,)
    made.log_scale[...] = jnp.array([-100.0, 0.0])
    p = made(features(1))
    at_mean = p.log_prob(p.mean)[0, REAL]
    np.testing.assert_allclose(at_mean, scipy.stats.norm.logpdf(0, scale=[MIN_SCALE, 1 + MIN_SCALE]), rtol=1e-4)


@pytest.mark.parametrize("cardinalities", [(), (0, 0), (4, 2)])
def test_tables_of_one_kind_only(cardinalities):
    made = ColumnsLikelihood((3,), (2,), cardinalities=cardinalities, rngs=nnx.Rngs(0))
    assert all(leaf.size for leaf in jax.tree.leaves(nnx.state(made)))  # checkpoints hold no empty arrays
    p = made(features())
    draw = p.sample(KEY)
    assert draw.shape == p.log_prob(draw).shape == p.mean.shape == (4, 2)


def test_the_head_is_for_tables():
    with pytest.raises(OptionError, match=r"Columns is for tables, but the data have shape \(8, 8, 1\)"):
        ColumnsLikelihood((3,), (8, 8, 1), rngs=nnx.Rngs(0))


def test_components_that_start_spread_out_are_together_nearer_to_a_standard_normal():
    x = np.linspace(-6, 6, 601)
    density, kl = scipy.stats.norm.pdf(x)[:, None], {}
    for spread, shared_scales in [(True, False), (True, True), (False, False)]:
        model = ColumnsLikelihood((5,), (2,), 10, spread=spread, shared_scales=shared_scales, rngs=nnx.Rngs(0))
        model.linear.kernel[...] = jnp.zeros_like(model.linear.kernel[...])
        log_prob = np.asarray(model(jnp.ones((1, 5))).log_prob(np.float32([x, x]).T[:, None]))[:, 0]
        kl[spread, shared_scales] = (density * (np.log(density) - log_prob)).sum(0) * (x[1] - x[0])  # to the mixture
    np.testing.assert_allclose(kl[True, True], kl[True, False], rtol=1e-3)
    for spread in (kl[True, True], kl[True, False]):
        assert (spread > 0).all() and (spread < 0.15).all() and (spread < 0.8 * kl[False, False]).all()
