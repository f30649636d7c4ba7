"""Observed log-likelihoods against SciPy, the importance-sampled estimate against known weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from numpyro import distributions as dist
from scipy.special import logsumexp

from helpers.arrays import normal
from posterior_matching.masking import mask_shape
from posterior_matching.models.likelihood import importance_log_prob, log_prob_of_observed

pytestmark = pytest.mark.usefixtures("strict_dtypes")

KEY = jax.random.key(0)


@pytest.mark.parametrize("shape", [(5,), (3, 4, 1), (3, 4, 3)])
def test_log_prob_of_observed_sums_what_is_observed_for_every_sample_and_example(shape):
    """The colours of an image share one mask channel."""
    loc, x = normal(0, 4, 2, *shape), normal(1, 2, *shape)  # [S, B, *shape]
    b = np.random.default_rng(2).integers(0, 2, (2, *mask_shape(shape)))
    b[1] = 0
    expected = np.where(b, scipy.stats.norm.logpdf(x, loc, 0.7), 0.0).reshape(4, 2, -1).sum(-1)
    x = np.where(b, x, np.nan)
    found = log_prob_of_observed(dist.Normal(jnp.asarray(loc), 0.7), jnp.asarray(x), jnp.float32(b))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


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
