"""Refined importance sampling against closed forms: two Gaussian modes, and the linear-Gaussian model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from scipy.special import logsumexp

from helpers.arrays import Z_LIMIT, assert_mean, assert_moments, normal, standard_errors
from helpers.pm_vae import Exact
from posterior_matching.models.distributions import diagonal_gaussian
from posterior_matching.models.marginal_likelihood import importance_log_prob
from posterior_matching.models.proposals import DefensiveMixture, GaussianMixture

KEY = jax.random.key(0)
COPIES, SAMPLES = 60, 32
METHODS = {"plain": {}, "refined": {"refine_steps": 400}}

MIXTURE = GaussianMixture(
    jnp.log(jnp.array([[0.3, 0.7], [0.9, 0.1]])),
    jnp.float32([[[-3, 0], [3, 1]], [[0, 2], [1, -3]]]),
    jnp.float32([[[[0.5, 0], [0.4, 0.3]], [[0.7, 0], [-0.2, 0.6]]], [[[0.3, 0], [0, 0.5]], [[0.4, 0], [0.3, 0.4]]]]),
)
LOG_NORMALISER = 1.7


def gaussian(batch, scale):
    return diagonal_gaussian(jnp.concatenate([jnp.zeros((batch, 2)), jnp.full((batch, 2), scale)], axis=-1))


def test_a_gaussian_mixture_has_the_density_and_the_moments_of_its_components():
    z = normal(0, 5, 2, 2)
    for row in range(2):
        weight, loc, tril = (np.asarray(a[row], np.float64) for a in (jnp.exp(MIXTURE.logits), *MIXTURE[1:]))
        covariance = tril @ tril.swapaxes(1, 2)
        parts = [scipy.stats.multivariate_normal(m, s).logpdf(z[:, row]) for m, s in zip(loc, covariance, strict=True)]
        expected = logsumexp(np.stack(parts, axis=1) + np.log(weight), axis=1)
        np.testing.assert_allclose(MIXTURE.log_prob(jnp.asarray(z))[:, row], expected, rtol=1e-4)
        mean = weight @ loc
        between = np.einsum("c,ci,cj->ij", weight, loc - mean, loc - mean)
        samples = np.asarray(MIXTURE.sample(KEY, (20_000,)))[:, row]
        assert_moments(samples, mean, np.einsum("c,cij->ij", weight, covariance) + between)


def test_a_defensive_mixture_samples_its_density_and_bounds_the_weights_of_the_safe_one():
    safe = gaussian(2, 3.0)
    both = DefensiveMixture(safe, MIXTURE)
    z = both.sample(KEY, (20_000,))
    for other in (safe, MIXTURE):
        assert_mean(jnp.exp(other.log_prob(z) - both.log_prob(z)), 1.0)
    far = jnp.full((1, 2, 2), 20.0)
    assert (both.log_prob(far) >= safe.log_prob(far) + np.log(0.1) - 1e-4).all()


def repeated(mixture):
    return jax.tree.map(lambda a: jnp.repeat(a, COPIES, axis=0), mixture)


@pytest.fixture(scope="module", params=METHODS)
def two_modes(request):
    """Estimates of the normaliser of `MIXTURE` by one method from a wide proposal, `COPIES` for each row."""
    target = repeated(MIXTURE)

    @jax.jit
    def estimate(key, posterior_draw):
        log_joint = lambda z: target.log_prob(z) + LOG_NORMALISER  # noqa: E731
        method = METHODS[request.param] | {"posterior_draw": posterior_draw}
        return importance_log_prob(log_joint, gaussian(2 * COPIES, 4.0), key, SAMPLES, 24, **method)

    return request.param, estimate(KEY, target.sample(jax.random.key(1)))


def test_the_normaliser_is_unbiased_and_lies_between_the_bounds(two_modes):
    _, found = two_modes
    assert_mean(np.exp(np.asarray(found.log_prob).reshape(2, COPIES).T - LOG_NORMALISER), 1.0)
    assert (standard_errors(np.asarray(found.log_prob), LOG_NORMALISER) < Z_LIMIT).all()
    assert (standard_errors(np.asarray(found.upper_bound), LOG_NORMALISER) > -Z_LIMIT).all()


def test_the_estimated_gap_covers_the_true_one_and_is_of_its_size(two_modes):
    name, found = two_modes
    lacking = LOG_NORMALISER - np.asarray(found.log_prob, np.float64)
    error = Z_LIMIT * lacking.std() / np.sqrt(lacking.size)
    assert lacking.mean() - error < np.mean(found.gap) < 6 * (max(lacking.mean(), 0.0) + error), name
    both_sides = np.mean(np.asarray(found.upper_bound) - np.asarray(found.log_prob))
    assert both_sides > lacking.mean() - error


def test_refining_raises_the_effective_sample_size(two_modes):
    name, found = two_modes
    share = np.mean(found.effective_sample_size) / SAMPLES
    low, high = {"plain": (0.0, 0.1), "refined": (0.4, 0.7)}[name]
    assert low < share < high


EXACT = Exact()
X = np.random.default_rng(1).normal(size=4)
B = np.array([1, 0, 1, 0], np.float32)


def test_a_model_of_known_likelihood():
    model = EXACT.model(widen=6.0)
    x, b = (jnp.repeat(jnp.float32(a)[None], COPIES, axis=0) for a in (X, B))
    found = jax.jit(lambda key: model.is_log_prob(x, b, SAMPLES, key=key, chunk_size=24, refine_steps=100))(KEY)
    plain = jax.jit(lambda key: model.is_log_prob(x, b, SAMPLES, key=key))(KEY)
    for log_prob, mask in ((found.log_p_x, np.ones(4)), (found.log_p_xo, B)):
        assert_mean(np.exp(np.asarray(log_prob) - EXACT.log_prob(X, mask)), 1.0)
    for ours, theirs in ((found.ess_x, plain.ess_x), (found.ess_xo, plain.ess_xo)):
        assert np.mean(ours) > 1.2 * np.mean(theirs)
    gaps = jax.jit(lambda key: model.simulated_gaps(b, SAMPLES, key=key, chunk_size=24))(KEY)
    for gap, effective in zip(gaps, (plain.ess_x, plain.ess_xo), strict=True):
        # For a Gaussian posterior the weights have the same distribution whatever x is.
        expected = np.mean(1 / np.asarray(effective) - 1 / SAMPLES)
        assert expected / 2 < np.mean(gap) < 2 * expected
