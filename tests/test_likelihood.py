"""Observed log-likelihoods against SciPy, the importance-sampled estimate against known weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from numpyro import distributions as dist
from scipy.special import logsumexp, softmax

from helpers.arrays import normal
from posterior_matching.masking import mask_shape
from posterior_matching.models.marginal_likelihood import importance_log_prob, log_prob_of_observed, tempered_weights

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


RANDOM = np.random.default_rng(0).normal(size=(4, 3)) * 2
IMPOSSIBLE = np.array([[-np.inf, -np.inf, 0.0], [1.0, -np.inf, 0.0], [-np.inf, -np.inf, -np.inf]])
WEIGHTS = [(RANDOM, num_samples, 1e-4) for num_samples in (4, 6, 8, 9, 3, 1)]
WEIGHTS += [(np.full((4, 2), level), 7, 1e-2) for level in (-1e4, 1e4)]  # far outside the range of floats
WEIGHTS += [(np.array([[0.0], [50.0], [-3.0]]), 3, 1e-4), (IMPOSSIBLE, 6, 1e-4)]  # one that dominates, and zeros


@pytest.mark.parametrize(("table", "num_samples", "rtol"), WEIGHTS)
def test_log_mean_weight_and_effective_sample_size_of_known_weights(table, num_samples, rtol):
    """`table`: the log weights `[chunk, B]` of every chunk."""
    log_joint = lambda z: jnp.take_along_axis(jnp.float32(table), z[..., 0].astype(jnp.int32), 0)  # noqa: E731
    found = importance_log_prob(log_joint, Counting(table.shape[1]), KEY, num_samples, len(table))
    log_weights = np.stack([table[k % len(table)] for k in range(num_samples)])
    np.testing.assert_allclose(found.log_prob, logsumexp(log_weights, axis=0) - np.log(num_samples), rtol=1e-5)
    weights = np.exp(log_weights - np.maximum(log_weights.max(0), -1e9))
    effective = weights.sum(0) ** 2 / np.maximum(np.square(weights).sum(0), 1e-9)  # 0 where all weights vanish
    np.testing.assert_allclose(found.effective_sample_size, effective, rtol=rtol)
    # The gap in full: leave each sample out, chosen with probability its share.
    log_others = np.stack([logsumexp(np.delete(log_weights, k, 0), axis=0) for k in range(num_samples)])
    with np.errstate(invalid="ignore", divide="ignore"):
        log_share, log_rest = (a - logsumexp(log_weights, axis=0) for a in (log_weights, log_others))
        terms = np.where(np.isneginf(log_share), 0.0, np.exp(log_share) * -log_rest)
        expected = terms.sum(0) + np.log1p(-1 / num_samples)
    expected = np.where(np.isnan(expected), np.inf, expected)  # no weights, or only one sample
    np.testing.assert_array_equal(np.isinf(found.gap), np.isinf(expected))
    # A bound, exact where all weights that count are equal.
    assert (np.asarray(found.gap) >= expected - 1e-3).all() and (np.asarray(found.gap) <= 2.5 * expected + 1e-3).all()


def test_tempered_weights_keep_the_effective_sample_size_and_are_powers_of_the_weights():
    log_w = np.random.default_rng(0).normal(size=(50, 4)) * np.array([0.1, 1.0, 5.0, 50.0]) - 300
    found = np.asarray(tempered_weights(jnp.asarray(log_w, jnp.float32), 0.2), np.float64)
    np.testing.assert_allclose(found.sum(0), 1.0, rtol=1e-5)
    effective = 1 / np.square(found).sum(0)
    untouched = 1 / np.square(softmax(log_w, axis=0)).sum(0) >= 10
    assert untouched.tolist() == [True, True, False, False]
    np.testing.assert_allclose(found[:, :2], softmax(log_w[:, :2], axis=0), rtol=1e-4)
    np.testing.assert_allclose(effective[2:], 10, rtol=1e-3)
    for j in (2, 3):  # log w^t + constant, with t in (0, 1)
        t, constant = np.polyfit(log_w[:, j], np.log(found[:, j]), 1)
        assert 0 < t < 1
        np.testing.assert_allclose(np.log(found[:, j]), t * log_w[:, j] + constant, rtol=1e-3, atol=1e-3)


def test_tempered_weights_of_impossible_draws():
    log_w = jnp.array([[-jnp.inf, 0.0], [-jnp.inf, -jnp.inf], [-jnp.inf, 1.0]])
    found = tempered_weights(log_w)
    np.testing.assert_allclose(found[:, 0], 1 / 3, rtol=1e-6)  # all alike
    np.testing.assert_allclose(found[:, 1], softmax([0.0, -np.inf, 1.0]), rtol=1e-5)
