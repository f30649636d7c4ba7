"""The discretised mixture of logistics: sums over all pixel values, SciPy, and samples against probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from helpers.arrays import Z_LIMIT, normal, softplus
from posterior_matching.models.logistic_mixture import DiscretisedLogisticMixture, logistic_mixture_parameters

pytestmark = pytest.mark.usefixtures("strict_dtypes")

KEY = jax.random.key(0)


def grids(levels, channels):
    return np.stack(np.meshgrid(*[np.arange(levels)] * channels, indexing="ij"), -1).reshape(-1, channels)


@pytest.mark.parametrize(("levels", "channels", "scale"), [(256, 1, 1.0), (17, 1, 30.0), (2, 1, 1.0), (5, 3, 2.0)])
def test_probabilities_of_all_pixel_values_sum_to_one(levels, channels, scale):
    parameters = scale * normal(0, 6, 1, logistic_mixture_parameters(channels, 4))
    x = grids(levels, channels)
    p = DiscretisedLogisticMixture(jnp.asarray(parameters), channels, levels)
    log_prob = np.asarray(jax.jit(p.log_prob)(jnp.float32(x)), np.float64)
    assert log_prob.shape == (6, len(x), 1)
    np.testing.assert_allclose(np.exp(log_prob).sum(1), 1.0, atol=2e-5)


def test_grey_pixels_equal_scipys_logistic():
    levels, k = 17, 3
    parameters = normal(0, 4, 1, 3 * k)
    x = np.arange(levels)
    actual = DiscretisedLogisticMixture(jnp.asarray(parameters), 1, levels).log_prob(jnp.float32(x)[:, None])
    weight, loc, scale = np.moveaxis(parameters.astype(np.float64).reshape(4, 1, k, 3), -1, 0)
    scale = softplus(scale) + np.exp(-7)
    edges = np.concatenate([[-np.inf], 2 * (x[:-1] + 0.5) / (levels - 1) - 1, [np.inf]])[:, None]
    mass = np.diff(scipy.stats.logistic.cdf(edges, loc, scale), axis=1)  # [4, levels, k]
    weight = np.exp(weight) / np.exp(weight).sum(-1, keepdims=True)
    np.testing.assert_allclose(np.asarray(actual)[..., 0], np.log((weight * mass).sum(-1)), rtol=1e-4)


@pytest.mark.parametrize(("levels", "channels"), [(9, 1), (3, 3)])
def test_pixel_samples_follow_their_probabilities(levels, channels):
    n, x = 40_000, grids(levels, channels)
    p = DiscretisedLogisticMixture(
        jnp.asarray(normal(3, 1, logistic_mixture_parameters(channels, 2))), channels, levels
    )
    expected = np.exp(np.asarray(p.log_prob(jnp.float32(x)), np.float64))[:, 0]
    draws = np.asarray(jax.jit(jax.vmap(p.sample))(jax.random.split(KEY, n)), int)[:, 0]
    counts = np.bincount(draws @ levels ** np.arange(channels)[::-1], minlength=len(x))
    assert (np.abs(counts - n * expected) < Z_LIMIT * np.sqrt(n * expected) + 1).all()


def test_the_mean_of_colours_is_that_of_samples_where_nothing_is_clipped():
    """E[green] = sum_k pi_k (m_k + c_k E[red | k]); with the averages of c and of red it would be up to 8 off."""
    n, parameters = 20_000, normal(4, 16, 4, 10)
    parameters[..., 1:4] = np.clip(0.3 * parameters[..., 1:4], -0.5, 0.5)  # locations, below
    parameters[..., 4:7] = -4.0  # narrow
    parameters[..., 7:] = np.clip(0.3 * parameters[..., 7:], -0.4, 0.4)  # |blue| < 0.5 + 0.4 (0.5 + 0.7) < 1
    p = DiscretisedLogisticMixture(jnp.asarray(parameters.reshape(16, -1)), 3, 256)
    draws = np.asarray(jax.jit(jax.vmap(p.sample))(jax.random.split(KEY, n)))
    error = np.abs(np.asarray(p.mean) - draws.mean(0))
    assert (error < Z_LIMIT * draws.std(0) / np.sqrt(n) + 0.5).all()  # 0.5: the mean is rounded


@pytest.mark.parametrize("channels", [1, 3])
def test_narrow_components_have_their_locations_as_mean_and_clip_them(channels):
    """One component, scale near its minimum, locations chosen on and beyond the values; shifts included."""
    shift = [0.5, -0.25, 0.25][: channels * (channels - 1) // 2]
    parameters = jnp.array([0.0, *[-1.0, 1.0, 0.0][:channels], *[-20.0] * channels, *shift])
    p = DiscretisedLogisticMixture(parameters, channels, 17)
    # red -1; green 1 - 0.5; blue 0 + 0.25 + 0.25 * 0.5
    np.testing.assert_array_equal(p.mean, [0.0, 12.0, 11.0][:channels])
    np.testing.assert_array_equal(p.sample(KEY), p.mean)
    beyond = DiscretisedLogisticMixture(parameters.at[1].set(7.0), channels, 17)
    assert float(beyond.mean[0]) == 16.0


@pytest.mark.parametrize("channels", [1, 3])
def test_gradients_of_pixels_are_finite_far_out_and_at_the_edges(channels):
    values = jnp.asarray(normal(0, 8, logistic_mixture_parameters(channels, 3)) * 100)
    x = jnp.asarray(np.random.default_rng(0).choice([0.0, 1.0, 254.0, 255.0], (8, channels)), jnp.float32)
    value, gradient = jax.jit(
        jax.value_and_grad(lambda v: DiscretisedLogisticMixture(v, channels, 256).log_prob(x).sum())
    )(values)
    assert np.isfinite(value) and np.isfinite(gradient).all() and (np.asarray(gradient) != 0).any()
