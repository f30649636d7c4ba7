"""Distribution heads against SciPy, numerical integration and a naive evaluation, and samplers against densities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx
from numpyro import distributions as dist
from scipy.special import expit, log_expit, logsumexp

from helpers.arrays import Z_LIMIT, assert_mean, assert_moments, filled, normal, softplus
from posterior_matching.errors import UserError
from posterior_matching.models.distributions import (
    LATENT_HEADS,
    Bernoulli,
    IdentityGaussian,
    SharedScaleGaussian,
    diagonal_gaussian,
    diagonal_gaussian_sample,
    entropy,
    kl_divergence,
    kl_to_standard_normal,
    sample_and_log_prob,
    standard_normal,
    tril_gaussian,
    tril_gaussian_parameters,
)

KEY = jax.random.key(0)


def latent_head(name, features_shape, event_size, seed=0, scale=1.0, **options):
    if name == "AutoregressiveGMM":
        options = {"num_components": 3, "residual_blocks": 1, "hidden_units": 8} | options
    make = LATENT_HEADS[name]
    return filled(lambda: make(features_shape, event_size, **options, rngs=nnx.Rngs(0)), seed, scale)


def random_gmm(event_size, num_components=3, context_size=2, seed=0, blocks=1, hidden=12):
    """A head whose conditionals are several-peaked, depend on what they are conditioned on, and are not too narrow."""
    head = latent_head(
        "AutoregressiveGMM",
        (context_size,),
        event_size,
        seed,
        num_components=num_components,
        residual_blocks=blocks,
        hidden_units=hidden,
    )
    factor = np.array([1.0, 1.0, 0.2], np.float32)[:, None]  # logits, means, scales
    kernel = np.asarray(head.linear.kernel[...]).reshape(hidden, event_size, 3, num_components) * factor
    head.linear.kernel[...] = jnp.asarray(kernel.reshape(hidden, -1))
    head.linear.bias[...] = 1.3 * head.linear.bias[...]
    return head


def with_bias(head, bias):
    """The head with another output bias, which may be traced."""
    graphdef, state = nnx.split(head)
    head = nnx.merge(graphdef, jax.tree.map(lambda a: a, state))
    head.linear.bias = nnx.Param(bias)
    return head


def gaussian(kind, seed, rows=4):
    """Gaussians over three dimensions, `[rows]` of them."""
    if kind == "standard":
        return standard_normal(3).expand((rows,))
    if kind == "diagonal":
        return diagonal_gaussian(jnp.asarray(normal(seed, rows, 6)))
    return tril_gaussian(jnp.asarray(normal(seed, rows, tril_gaussian_parameters(3))), 3)


def covariances(q):
    """The covariance matrices `[B, e, e]` of Gaussians, float64."""
    matrices = getattr(q, "covariance_matrix", None)
    return np.asarray(jax.vmap(jnp.diag)(q.variance) if matrices is None else matrices, np.float64)


def correlation_z(a, b):
    """Correlation of two columns in standard errors."""
    return np.corrcoef(a, b)[0, 1] * np.sqrt(len(a))


# Gaussian heads


def test_diagonal_gaussian_is_mean_and_softplus_scale_of_one_linear_layer():
    head = latent_head("DiagonalGaussian", (2, 3), 4)
    features, z = normal(5, 3, 2, 3), normal(6, 3, 4)
    out = features.reshape(3, 6) @ np.asarray(head.linear.kernel[...]) + np.asarray(head.linear.bias[...])
    mean, scale = out[:, :4], softplus(out[:, 4:]) + 1e-5
    q = head(jnp.asarray(features))
    assert (q.batch_shape, q.event_shape) == ((3,), (4,))
    np.testing.assert_allclose(q.mean, mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(q.variance, scale**2, rtol=1e-4)
    expected = scipy.stats.norm.logpdf(z, mean, scale).sum(-1)
    np.testing.assert_allclose(q.log_prob(jnp.asarray(z)), expected, rtol=1e-4)
    drawn = diagonal_gaussian_sample(jnp.asarray(out), jnp.asarray(z.ravel()))
    np.testing.assert_allclose(drawn, mean + scale * z, rtol=1e-4, atol=1e-5)


def test_tril_gaussian_log_prob_equals_scipy_and_its_cholesky_factor_is_one():
    e = 4
    head = latent_head("TriLGaussian", (2, 3), e)
    q = head(jnp.asarray(normal(5, 3, 2, 3)))
    assert (q.batch_shape, q.event_shape) == ((3,), (e,))
    scale_tril = np.asarray(q.scale_tril, np.float64)
    np.testing.assert_array_equal(scale_tril, np.tril(scale_tril))
    assert (np.diagonal(scale_tril, axis1=1, axis2=2) > 0).all()
    z = normal(6, 3, e)
    for mean, factor, value, log_prob in zip(q.mean, scale_tril, z, q.log_prob(jnp.asarray(z)), strict=True):
        expected = scipy.stats.multivariate_normal.logpdf(value, mean, factor @ factor.T)
        np.testing.assert_allclose(log_prob, expected, rtol=1e-3, atol=1e-3)


def test_tril_gaussian_uses_every_output_once_with_softplus_on_the_diagonal():
    e = 4
    head = latent_head("TriLGaussian", (1,), e)
    outputs = e + e * (e + 1) // 2
    assert head.linear.bias.shape == (outputs,)

    def parameters(bias):
        q = with_bias(head, bias)(jnp.zeros((1, 1)))
        return jnp.concatenate([q.mean[0], q.scale_tril[0][jnp.tril_indices(e)]])

    bias = jnp.asarray(normal(0, outputs))
    values, jacobian = np.asarray(parameters(bias)), np.asarray(jax.jit(jax.jacobian(parameters))(bias))
    used = jacobian != 0
    np.testing.assert_array_equal(used.sum(0), 1)
    np.testing.assert_array_equal(used.sum(1), 1)
    raw = np.asarray(bias)[used.argmax(1)]
    np.testing.assert_array_equal(used[:e].argmax(1), np.arange(e))  # the mean comes first
    rows, columns = np.tril_indices(e)
    on_diagonal = np.concatenate([np.zeros(e, bool), rows == columns])
    np.testing.assert_allclose(values, np.where(on_diagonal, softplus(raw) + 1e-5, raw), rtol=1e-5)


@pytest.mark.parametrize("name", ["DiagonalGaussian", "TriLGaussian"])
def test_gaussian_samples_match_their_density_and_are_independent_across_examples(name):
    n, e = 20_000, 3
    head = latent_head(name, (2,), e)
    q = head(jnp.asarray(np.repeat(normal(5, 1, 2), 2, axis=0)))  # the same context twice
    z = np.asarray(q.sample(jax.random.key(0), (n,)), np.float64)
    assert z.shape == (n, 2, e)
    factor = np.linalg.cholesky(covariances(q))
    white = np.linalg.solve(factor[None], (z - np.asarray(q.mean))[..., None])[..., 0]  # N(0, I) if all is well
    assert_moments(white, np.zeros(e), np.eye(e))
    assert max(abs(correlation_z(z[:, 0, i], z[:, 1, j])) for i in range(e) for j in range(e)) < Z_LIMIT


# KL and entropy


@pytest.mark.parametrize(
    ("q", "p"), [("diagonal", "standard"), ("tril", "standard"), ("diagonal", "diagonal"), ("diagonal", "tril")]
)
def test_kl_equals_the_matrix_formula_and_monte_carlo(q, p):
    kl = kl_to_standard_normal if p == "standard" else lambda q: kl_divergence(q, p)
    q, p = gaussian(q, 1), gaussian(p, 2)
    actual, s, t = np.asarray(kl(q)), covariances(q), covariances(p)
    d = np.asarray(p.mean, np.float64) - np.asarray(q.mean)
    distance = np.einsum("bi,bij,bj->b", d, np.linalg.inv(t), d)
    trace = np.trace(np.linalg.inv(t) @ s, axis1=1, axis2=2)
    exact = (trace + distance - 3 + np.linalg.slogdet(t)[1] - np.linalg.slogdet(s)[1]) / 2
    np.testing.assert_allclose(actual, exact, rtol=1e-3)
    z = q.sample(KEY, (20_000,))
    assert_mean(q.log_prob(z) - p.log_prob(z), actual)


def test_kl_to_standard_normal_needs_a_gaussian():
    for q in (random_gmm(2)(jnp.zeros((1, 2))), dist.Independent(dist.Laplace(jnp.zeros(3)), 1)):
        with pytest.raises(UserError, match=r"DiagonalGaussian or TriLGaussian: .* closed form"):
            kl_to_standard_normal(q)


@pytest.mark.parametrize("kind", ["diagonal", "tril"])
def test_entropy_of_gaussians_is_exact(kind):
    q = gaussian(kind, 5)
    expected = [scipy.stats.multivariate_normal(np.zeros(3), c).entropy() for c in covariances(q)]
    np.testing.assert_allclose(entropy(q, KEY, 1), expected, rtol=1e-3)


# AutoregressiveGMM: density


def naive_conditionals(head, context, z):
    """The parameters of every conditional `[B, e, 3K]`, by one run of the network per dimension."""
    e, rows = z.shape[-1], []
    run = jax.jit(lambda inputs: head.linear(head.network(inputs)))
    for i in range(e):
        mask = np.tile((np.arange(e) < i).astype(np.float32), (len(z), 1))
        output = run(jnp.concatenate([z * mask, mask, context], axis=-1))
        rows.append(np.asarray(output).reshape(len(z), e, -1)[:, i])
    return np.stack(rows, axis=1)


def naive_log_prob(head, context, z):
    logits, mean, scale = np.split(naive_conditionals(head, context, z).astype(np.float64), 3, axis=-1)
    weights = logits - logsumexp(logits, axis=-1, keepdims=True)
    components = scipy.stats.norm.logpdf(z[..., None], mean, softplus(scale) + 1e-5)
    return logsumexp(weights + components, axis=-1).sum(-1)


@pytest.mark.parametrize(("e", "components", "blocks"), [(1, 2, 0), (5, 3, 2)])
def test_autoregressive_log_prob_equals_one_network_run_per_dimension(e, components, blocks):
    head = random_gmm(e, components, context_size=6, blocks=blocks)
    features, z = normal(7, 4, 2, 3), 2 * normal(8, 4, e)
    log_prob = jax.jit(lambda z: head(jnp.asarray(features)).log_prob(z))
    expected = naive_log_prob(head, jnp.asarray(features.reshape(4, 6)), z)
    np.testing.assert_allclose(log_prob(jnp.asarray(z)), expected, rtol=1e-4, atol=1e-4)
    # Leading sample axes.
    many = normal(9, 2, 3, 4, e)
    expected = [[naive_log_prob(head, features.reshape(4, 6), z) for z in row] for row in many]
    np.testing.assert_allclose(log_prob(jnp.asarray(many)), expected, rtol=1e-4, atol=1e-4)


def density_on_grid(head, context, limit=16.0, step=0.05):
    """Density of a two-dimensional head at the centres of a grid's cells, checked to integrate to 1; the centres."""
    centres = np.arange(-limit + step / 2, limit, step)
    grid = np.stack(np.meshgrid(centres, centres, indexing="ij"), axis=-1).reshape(-1, 2)
    log_prob = jax.jit(lambda z: head(context[None]).log_prob(z[:, None])[:, 0])
    density = np.exp(np.asarray(log_prob(jnp.float32(grid)), np.float64)).reshape(len(centres), -1)
    np.testing.assert_allclose(density.sum() * step**2, 1.0, atol=1e-3)
    return density, centres, step


def test_autoregressive_entropy_equals_numerical_integration():
    head, context = random_gmm(2), jnp.asarray(normal(0, 2))
    density, _, step = density_on_grid(head, context)
    exact = -(density * np.log(np.maximum(density, 1e-300))).sum() * step**2
    n = 20_000
    spread = np.sqrt((density * (np.log(np.maximum(density, 1e-300)) + exact) ** 2).sum()) * step
    estimate = np.asarray(jax.jit(lambda key: entropy(head(context[None]), key, n))(jax.random.key(2)))
    assert estimate.shape == (1,)
    assert abs(estimate[0] - exact) < Z_LIMIT * spread / np.sqrt(n)


# AutoregressiveGMM: samples


def chi_square_z(counts, expected):
    """Pearson's statistic in standard deviations, cells with small expectation merged."""
    counts, expected = counts.ravel(), expected.ravel()
    small = expected < 20
    counts = np.append(counts[~small], counts[small].sum())
    expected = np.append(expected[~small], max(expected[small].sum(), 1e-9))
    statistic = np.square(counts - expected)[expected > 1].__truediv__(expected[expected > 1]).sum()
    df = (expected > 1).sum() - 1
    return (statistic - df) / np.sqrt(2 * df)


def test_autoregressive_samples_match_the_density():
    head, contexts, n = random_gmm(2), jnp.asarray(2 * normal(20, 2, 2)), 50_000
    z = np.asarray(jax.jit(lambda key: head(contexts).sample(key, (n,)))(KEY))
    assert z.shape == (n, 2, 2)
    edges = np.concatenate([[-16.0], np.arange(-4, 4.01, 0.5), [16.0]])
    for row, context in enumerate(contexts):
        density, centres, step = density_on_grid(head, context)
        cell = np.searchsorted(edges, centres) - 1
        indicator = np.eye(len(edges) - 1)[cell]  # [centre, bin]
        expected = n * step**2 * indicator.T @ density @ indicator
        counts = np.histogram2d(z[:, row, 0], z[:, row, 1], [edges, edges])[0]
        assert counts.sum() == n
        assert abs(chi_square_z(counts, expected)) < Z_LIMIT
        assert abs(chi_square_z(counts.sum(0), expected.sum(0))) < Z_LIMIT
        assert abs(chi_square_z(counts.sum(1), expected.sum(1))) < Z_LIMIT
        other = np.histogram2d(z[:, 1 - row, 0], z[:, 1 - row, 1], [edges, edges])[0]
        assert chi_square_z(other, expected) > 2 * Z_LIMIT  # the contexts make a difference that this test sees


def test_every_draw_has_randomness_of_its_own():
    """Examples with one context, and dimensions that the network makes independent, are uncorrelated."""
    e, rows, n = 4, 3, 20_000
    head = random_gmm(e)
    head.linear.kernel[...] = jnp.zeros_like(head.linear.kernel[...])  # conditionals that depend on nothing
    head.linear.bias[...] = jnp.tile(jnp.asarray(normal(0, 9)), e)  # and are all the same
    sample = jax.jit(lambda key: head(jnp.zeros((rows, 2))).sample(key, (n,)))
    z = np.asarray(sample(jax.random.key(0)), np.float64).reshape(n, -1)
    correlation = np.corrcoef(z, rowvar=False) * np.sqrt(n)
    assert np.abs(correlation[~np.eye(e * rows, dtype=bool)]).max() < Z_LIMIT
    # Not even the choice of a component is shared.
    correlation = np.corrcoef(np.abs(z - z.mean(0)), rowvar=False) * np.sqrt(n)
    assert np.abs(correlation[~np.eye(e * rows, dtype=bool)]).max() < Z_LIMIT
    # Nor do successive draws repeat.
    assert max(abs(correlation_z(z[:-1, i], z[1:, i])) for i in range(e * rows)) < Z_LIMIT


@pytest.mark.parametrize(
    ("name", "sample_shape"), [("AutoregressiveGMM", (2, 3)), ("TriLGaussian", (5,)), ("DiagonalGaussian", ())]
)
def test_sample_and_log_prob_returns_the_log_prob_of_its_samples(name, sample_shape):
    head, features = latent_head(name, (2,), 3), jnp.asarray(normal(0, 4, 2))

    @jax.jit
    def run(key):
        q = head(features)
        z, log_prob = sample_and_log_prob(q, key, sample_shape)
        return z, log_prob, q.log_prob(z), q.sample(key, sample_shape)

    z, log_prob, log_prob_again, z_again = run(jax.random.key(0))
    assert z.shape == (*sample_shape, 4, 3) and log_prob.shape == (*sample_shape, 4)
    np.testing.assert_allclose(log_prob, log_prob_again, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(z, z_again, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", sorted(LATENT_HEADS))
def test_latent_log_prob_and_gradients_stay_finite_at_extreme_inputs(name):
    graphdef, state = nnx.split(latent_head(name, (4,), 3))

    @jax.jit
    def run(state, features, z):
        return jax.value_and_grad(lambda *a: nnx.merge(graphdef, a[0])(a[1]).log_prob(a[2]).sum(), (0, 1, 2))(
            state, features, z
        )

    for z_size, feature_size in [(0.0, 0.0), (1e4, 1.0), (1.0, 1e3), (1e4, 1e3)]:
        for leaf in jax.tree.leaves(run(state, feature_size * normal(0, 5, 4), z_size * normal(1, 5, 3))):
            assert np.isfinite(leaf).all(), (z_size, feature_size)


# Likelihood heads


def test_identity_gaussian_is_a_linear_mean_with_one_learned_scale():
    head = filled(lambda: IdentityGaussian((4,), (2, 2, 3), rngs=nnx.Rngs(0)))
    assert head.log_scale.shape == ()
    features, x = normal(5, 6, 4), normal(6, 6, 2, 2, 3)
    mean = (features @ np.asarray(head.linear.kernel[...]) + np.asarray(head.linear.bias[...])).reshape(x.shape)
    p = head(jnp.asarray(features))
    assert p.batch_shape == (6, 2, 2, 3) and p.event_shape == ()
    expected = scipy.stats.norm.logpdf(x, mean, np.exp(float(head.log_scale[...])))
    np.testing.assert_allclose(p.log_prob(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(p.mean, mean, rtol=1e-4, atol=1e-5)


def test_bernoulli_takes_features_as_logits_and_scores_grey_values_by_cross_entropy():
    """Exactly, and with exact gradients, even for saturated logits."""
    logits = np.append([-200.0, -17.0, 1e-3, 17.0, 200.0], 3 * normal(0, 7))
    logits, x = (a.reshape(3, 4, 3, 1) for a in np.meshgrid(logits, [0.0, 0.3, 1.0]))
    head = Bernoulli(x.shape[1:], x.shape[1:])
    p = head(jnp.float32(logits))
    assert p.batch_shape == x.shape
    expected = x * log_expit(logits) + (1 - x) * log_expit(-logits)
    np.testing.assert_allclose(p.log_prob(jnp.float32(x)), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(p.mean, expit(logits), rtol=1e-5, atol=1e-30)
    gradient = jax.grad(lambda features: head(features).log_prob(jnp.float32(x)).sum())(jnp.float32(logits))
    np.testing.assert_allclose(gradient, x - expit(logits), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("head", "role"), [(Bernoulli, "logits"), (SharedScaleGaussian, "means")])
def test_heads_that_take_the_networks_output_refuse_another_shape_than_the_datas(head, role):
    message = rf"output as {role}: its shape \(16, 16, 1\) differs from the data's, \(8, 8, 1\): .*decoder"
    with pytest.raises(UserError, match=message):
        head((16, 16, 1), (8, 8, 1))


def test_shared_scale_gaussian_takes_the_features_for_means():
    head = SharedScaleGaussian((2, 2, 1), (2, 2, 1))
    head.log_scale[...] = -0.5
    x, means = (jax.random.normal(jax.random.key(i), (3, 2, 2, 1)) for i in range(2))
    expected = scipy.stats.norm(np.asarray(means), np.exp(-0.5) + 1e-5).logpdf(np.asarray(x))
    np.testing.assert_allclose(head(means).log_prob(x), expected, rtol=1e-5, atol=1e-5)
