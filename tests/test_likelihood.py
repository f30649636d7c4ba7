"""Observed log-likelihoods against loops, the importance-sampled estimate against closed forms and known weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from numpyro import distributions as dist
from scipy.special import logsumexp

from posterior_matching.models.likelihood import importance_log_prob, log_prob_of_observed

pytestmark = pytest.mark.usefixtures("strict_dtypes")

KEY = jax.random.key(0)


def test_log_prob_of_observed_sums_the_observed_features_of_vectors():
    rng = np.random.default_rng(0)
    x, loc, b = rng.normal(size=(3, 5)), rng.normal(size=(3, 5)), rng.integers(0, 2, (3, 5))
    p = dist.Normal(jnp.float32(loc), 0.7)
    expected = [sum(scipy.stats.norm.logpdf(x[n, i], loc[n, i], 0.7) for i in range(5) if b[n, i]) for n in range(3)]
    np.testing.assert_allclose(log_prob_of_observed(p, jnp.float32(x), jnp.float32(b)), expected, rtol=1e-4)


@pytest.mark.parametrize("channels", [1, 3])
def test_log_prob_of_observed_shares_one_mask_channel_among_the_colours_of_images(channels):
    rng = np.random.default_rng(0)
    x, loc = rng.normal(size=(2, 3, 4, channels)), rng.normal(size=(2, 3, 4, channels))
    b = rng.integers(0, 2, (2, 3, 4, 1))
    expected = np.zeros(2)
    for n, i, j, c in np.ndindex(*x.shape):
        if b[n, i, j, 0]:
            expected[n] += scipy.stats.norm.logpdf(x[n, i, j, c], loc[n, i, j, c])
    p = dist.Normal(jnp.float32(loc), 1.0)
    np.testing.assert_allclose(log_prob_of_observed(p, jnp.float32(x), jnp.float32(b)), expected, rtol=1e-4)


def test_log_prob_of_observed_keeps_leading_sample_axes_and_is_zero_where_nothing_is_observed():
    loc = np.random.default_rng(0).normal(size=(4, 2, 5)).astype(np.float32)  # [S, B, d]
    x, b = np.ones((2, 5), np.float32), np.array([[1.0] * 5, [0.0] * 5], np.float32)
    result = log_prob_of_observed(dist.Normal(jnp.asarray(loc), 1.0), jnp.asarray(x), jnp.asarray(b))
    assert result.shape == (4, 2)
    np.testing.assert_allclose(result[:, 0], scipy.stats.norm.logpdf(1.0, loc[:, 0]).sum(-1), rtol=1e-5)
    np.testing.assert_array_equal(result[:, 1], 0.0)


class LinearGaussian:
    """x = W z + noise, z ~ N(0, I), in float64: everything about it is known."""

    def __init__(self, d=4, e=2, sigma=0.6, seed=0):
        rng = np.random.default_rng(seed)
        self.w, self.sigma = rng.normal(size=(d, e)), sigma

    def log_prob(self, x):
        covariance = self.w @ self.w.T + self.sigma**2 * np.eye(len(self.w))
        return scipy.stats.multivariate_normal.logpdf(x, np.zeros(len(self.w)), covariance)

    def posterior(self, x, widen=1.0, shift=0.0):
        covariance = np.linalg.inv(np.eye(self.w.shape[1]) + self.w.T @ self.w / self.sigma**2)
        loc = x @ self.w @ covariance / self.sigma**2 + shift
        return dist.MultivariateNormal(jnp.float32(loc), jnp.float32(widen * covariance))

    def log_joint(self, x):
        w, x = jnp.float32(self.w), jnp.float32(x)
        prior = dist.Normal(0.0, 1.0)
        return lambda z: dist.Normal(z @ w.T, self.sigma).log_prob(x).sum(-1) + prior.log_prob(z).sum(-1)


@pytest.mark.parametrize(("num_samples", "chunk_size"), [(1, 128), (6, 6), (7, 3), (5, 1)])
def test_with_the_exact_posterior_every_sample_count_and_chunking_gives_the_exact_value(num_samples, chunk_size):
    """All weights are p(x): miscounting them, by an overhanging chunk say, would shift the result by log(n / K)."""
    model = LinearGaussian()
    x = np.random.default_rng(1).normal(size=(3, 4))
    estimate = jax.jit(
        lambda key: importance_log_prob(model.log_joint(x), model.posterior(x), key, num_samples, chunk_size)
    )(KEY)
    np.testing.assert_allclose(estimate.log_prob, model.log_prob(x), atol=2e-4)
    np.testing.assert_allclose(estimate.effective_sample_size, num_samples, rtol=1e-3)


def test_with_a_wrong_proposal_the_likelihood_estimate_is_unbiased_and_converges():
    model, rows, widen, shift = LinearGaussian(), 2000, 1.5, 0.3
    x = np.random.default_rng(1).normal(size=4)
    copies, exact = np.tile(x, (rows, 1)), model.log_prob(x)
    spread = []
    for num_samples in (4, 64):
        estimate = jax.jit(
            lambda key, k=num_samples: importance_log_prob(
                model.log_joint(copies), model.posterior(copies, widen, shift), key, k, 24
            )
        )(KEY)
        ratio = np.exp(np.asarray(estimate.log_prob, np.float64) - exact)  # expectation 1, whatever the proposal
        assert abs(ratio.mean() - 1.0) < 5 * ratio.std() / np.sqrt(rows)
        spread.append(ratio.std())
        ess = np.asarray(estimate.effective_sample_size)
        assert ((ess >= 1 - 1e-4) & (ess <= num_samples * (1 + 1e-4))).all() and (ess < 0.99 * num_samples).mean() > 0.5
    assert 3.0 < spread[0] / spread[1] < 5.0  # standard error falls as 1 / sqrt(K): by 4


class Counting:
    """A proposal that always returns z = 0, 1, 2, ... with density 1: the log joint is then a table of log weights."""

    def __init__(self, batch):
        self.batch = batch

    def sample(self, key, sample_shape=()):  # noqa: ARG002
        z = jnp.arange(sample_shape[0], dtype=jnp.float32)
        return jnp.broadcast_to(z[:, None, None], (*sample_shape, self.batch, 1))

    def log_prob(self, z):
        return jnp.zeros(z.shape[:-1])


def estimate_from_table(table, num_samples, chunk_size):
    """`table`: log weights `[chunk, B]`."""
    table = jnp.asarray(table, jnp.float32)
    log_joint = lambda z: jnp.take_along_axis(table, z[..., 0].astype(jnp.int32), 0)  # noqa: E731
    return importance_log_prob(log_joint, Counting(table.shape[1]), KEY, num_samples, chunk_size)


@pytest.mark.parametrize(("num_samples", "chunk_size"), [(4, 4), (6, 4), (8, 4), (9, 4), (3, 4), (1, 4)])
def test_log_mean_weight_and_effective_sample_size_of_known_weights(num_samples, chunk_size):
    table = np.random.default_rng(0).normal(size=(chunk_size, 3)) * 2
    weights = np.stack([table[k % chunk_size] for k in range(num_samples)])
    estimate = estimate_from_table(table, num_samples, chunk_size)
    np.testing.assert_allclose(estimate.log_prob, logsumexp(weights, axis=0) - np.log(num_samples), rtol=1e-4)
    expected = np.exp(weights).sum(0) ** 2 / np.exp(2 * weights).sum(0)
    np.testing.assert_allclose(estimate.effective_sample_size, expected, rtol=1e-4)


@pytest.mark.parametrize("level", [-1e4, 1e4])
def test_weights_far_outside_the_range_of_floats_are_no_trouble(level):
    estimate = estimate_from_table(np.full((4, 2), level), 7, 4)
    np.testing.assert_allclose(estimate.log_prob, level, rtol=1e-6)
    np.testing.assert_allclose(estimate.effective_sample_size, 7, rtol=1e-2)


def test_one_dominant_weight_is_an_effective_sample_size_of_one():
    table = np.array([[0.0], [50.0], [-3.0]])
    estimate = estimate_from_table(table, 3, 3)
    np.testing.assert_allclose(estimate.log_prob, 50.0 - np.log(3), rtol=1e-6)
    np.testing.assert_allclose(estimate.effective_sample_size, 1.0, rtol=1e-4)


def test_impossible_samples_count_as_zero_weight():
    table = np.array([[-np.inf, -np.inf, 0.0], [1.0, -np.inf, 0.0], [-np.inf, -np.inf, -np.inf]])
    estimate = estimate_from_table(table, 6, 3)
    np.testing.assert_allclose(estimate.log_prob, [1.0 - np.log(3), -np.inf, np.log(4 / 6)], rtol=1e-5)
    np.testing.assert_allclose(estimate.effective_sample_size[jnp.array([0, 2])], [2.0, 4.0], rtol=1e-5)


def test_different_keys_and_chunks_draw_different_samples():
    model, x = LinearGaussian(), np.ones((1, 4))
    run = jax.jit(lambda key: importance_log_prob(model.log_joint(x), model.posterior(x, 2.0), key, 2, 1).log_prob[0])
    first, same, other = (float(run(jax.random.key(seed))) for seed in (0, 0, 1))
    assert first == same != other
    single = jax.jit(lambda key: importance_log_prob(model.log_joint(x), model.posterior(x, 2.0), key, 2, 1))(KEY)
    assert float(single.effective_sample_size[0]) < 1.9  # two chunks with one key would weigh the same
