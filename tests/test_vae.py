"""The PM-VAE against closed forms (a linear-Gaussian model), and what it must never do: look at unobserved values."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx
from numpyro import distributions as dist

from benchmarks import synthetic
from helpers.arrays import assert_mean, assert_moments, by_path, filled
from helpers.configs import load
from helpers.pm_vae import KINDS, MLP, Exact, each_kind, example
from posterior_matching.config import plain
from posterior_matching.models import build
from posterior_matching.models.vae import LossTerms

KEY = jax.random.key(0)


EXACT = Exact()
X = np.random.default_rng(1).normal(size=(5, 4))
B = np.array([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0], [1, 1, 1, 0]], np.float32)
EXACT_X = np.array([EXACT.log_prob(x, np.ones(4)) for x in X])
EXACT_XO = np.array([EXACT.log_prob(x, b) for x, b in zip(X, B, strict=True)])


@pytest.mark.parametrize(("num_samples", "chunk_size"), [(1, 128), (6, 6), (7, 3), (5, 1)])
def test_is_log_prob_with_exact_posteriors_is_exact_for_every_number_of_samples(num_samples, chunk_size):
    """All weights are equal: miscounting them, in a partial chunk say, would shift the result by log(n / K)."""
    model, x, b = EXACT.model(), jnp.float32(X), jnp.asarray(B)
    result = jax.jit(lambda key: model.is_log_prob(x, b, num_samples, key=key, chunk_size=chunk_size))(KEY)
    np.testing.assert_allclose(result.log_p_x, EXACT_X, atol=1e-3)
    np.testing.assert_allclose(result.log_p_xu_given_xo, EXACT_X - EXACT_XO, atol=1e-3)
    np.testing.assert_allclose(result.ess_x, num_samples, rtol=1e-2)
    np.testing.assert_allclose(result.ess_xo, num_samples, rtol=1e-2)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_point_estimate_and_likelihoods_from_the_same_draws_are_those_of_the_linear_gaussian_model(weighted):
    copies, samples = 300, 40
    x, b = (jnp.repeat(jnp.float32(a), copies, axis=0) for a in (X, B))
    model = EXACT.model(widen=1.3)
    actual, scores = jax.jit(lambda key: model.point_and_log_prob(x, b, samples, key=key, weighted=weighted))(KEY)
    np.testing.assert_array_equal(actual[b == 1], x[b == 1])
    for i in range(len(X)):
        unobserved = B[i] == 0
        exact = EXACT.conditional(X[i], B[i])[0][unobserved]
        assert_mean(actual.reshape(len(X), copies, -1)[i][:, unobserved], exact)
    for log_prob, exact in ((scores.log_p_x, EXACT_X), (scores.log_p_xo, EXACT_XO)):
        ratio = np.exp(np.asarray(log_prob, np.float64).reshape(len(X), copies) - exact[:, None])
        assert_mean(ratio.T, 1.0)
    np.testing.assert_allclose(scores.log_p_xu_given_xo, scores.log_p_x - scores.log_p_xo, rtol=1e-5)


def test_is_log_prob_with_other_posteriors_is_unbiased_and_converges():
    model, copies, spread = EXACT.model(widen=1.7), 400, []
    x, b = (jnp.repeat(jnp.float32(a), copies, axis=0) for a in (X, B))
    for num_samples in (4, 64):
        estimate = jax.jit(lambda key, k=num_samples: model.is_log_prob(x, b, k, key=key, chunk_size=24))
        result = estimate(KEY)
        full = np.asarray(result.log_p_x, np.float64).reshape(len(X), copies)
        observed = full - np.asarray(result.log_p_xu_given_xo).reshape(full.shape)
        for log_prob, exact in ((full, EXACT_X), (observed, EXACT_XO)):
            ratio = np.exp(log_prob - exact[:, None])
            assert_mean(ratio.T, 1.0)
            spread.append(ratio.std(1))
        ess = np.stack([result.ess_x, result.ess_xo])
        assert (ess > 1 - 1e-4).all() and (ess < num_samples).all() and len(np.unique(ess)) > copies
        assert (estimate(jax.random.key(1)).log_p_x != result.log_p_x).all()
    # Standard errors fall as 1 / sqrt(K): by 4. Chunks that draw the same samples would not help.
    few, many = np.linalg.norm(spread[:2]), np.linalg.norm(spread[2:])
    assert 3.0 < few / many < 5.0


def test_is_log_prob_never_scores_what_is_not_available():
    """Proposals that do not know better than the prior: then log p(x) is of the available features alone."""
    model, available = EXACT.model(), np.array([[1, 1, 0, 1]] * 5, np.float32)
    x, b = X * available, B * available
    prior = lambda x, *_: dist.MultivariateNormal(jnp.zeros((len(x), 2)), jnp.eye(2))  # noqa: E731
    model.vae.posterior_head = prior
    result = jax.jit(
        lambda key: model.is_log_prob(jnp.float32(x), jnp.asarray(b), 20_000, key=key, available=jnp.asarray(available))
    )(KEY)
    exact = np.array([EXACT.log_prob(row, a) for row, a in zip(x, available, strict=True)])
    exact_xo = np.array([EXACT.log_prob(row, o) for row, o in zip(x, b, strict=True)])
    error = 5 / np.sqrt(np.asarray(result.ess_x))
    assert (np.abs(np.asarray(result.log_p_x) - exact) < error).all()
    assert (error < 0.5).all()
    assert (np.abs(np.asarray(result.log_p_xu_given_xo) - (exact - exact_xo)) < error).all()


def test_expected_info_gain_is_the_mutual_information_and_minus_infinity_where_observed():
    model = EXACT.model()
    gains = jax.jit(lambda x, b, key: model.expected_info_gains(x, b, 3, key=key))
    for x, b in zip(X, B, strict=True):
        result = np.asarray(gains(jnp.float32(x), jnp.asarray(b), KEY))
        # I(z; x_i | x_o) = H[x_i | x_o] - H[x_i | z]; the model's own way is through the entropies of z.
        _, covariance = EXACT.conditional(x, b)
        expected = 0.5 * np.log(np.diag(covariance) / EXACT.sigma**2, where=b == 0, out=np.full(4, -np.inf))
        np.testing.assert_array_equal(np.isneginf(result), b == 1)
        np.testing.assert_allclose(result[b == 0], expected[b == 0], atol=1e-3)


def test_imputations_average_to_the_conditional_mean_and_copy_what_is_observed():
    model, n = EXACT.model(), 20_000
    imputations = np.asarray(jax.jit(lambda key: model.impute(jnp.float32(X), jnp.asarray(B), n, key=key))(KEY))
    assert imputations.shape == (n, 5, 4)
    for row, (x, b) in enumerate(zip(X, B, strict=True)):
        np.testing.assert_array_equal(imputations[:, row, b == 1], np.broadcast_to(np.float32(x), (n, 4))[:, b == 1])
        mean, covariance = EXACT.conditional(x, b)
        # Imputations are decoder means, so their covariance lacks the noise.
        u = b == 0
        spread = covariance[np.ix_(u, u)] - EXACT.sigma**2 * np.eye(u.sum())
        assert_moments(imputations[:, row, u], mean[u], spread)


@pytest.mark.parametrize("mean", [False, True])
def test_joint_samples_have_the_moments_of_the_model(mean):
    model, n = EXACT.model(), 50_000
    x = np.asarray(jax.jit(lambda key: model.sample(n, key=key, mean=mean))(KEY), np.float64)
    assert x.shape == (n, 4)
    covariance = EXACT.w @ EXACT.w.T if mean else EXACT.covariance
    assert_moments(x, EXACT.mean, covariance)


def test_terms_average_to_an_elbo_that_is_tight_and_to_the_matching_closed_form():
    """With the exact posterior the ELBO is log p(x); with all observed, E log q(z | x_o) is minus the entropy."""
    model, n = EXACT.model(), 20_000
    x, b = jnp.repeat(jnp.float32(X[:1]), n, axis=0), jnp.ones((n, 4))
    terms = jax.jit(lambda key: model.terms(x, b, key))(KEY)
    assert_mean(terms.elbo(), EXACT_X[0])
    covariance = np.linalg.inv(np.eye(2) + EXACT.w.T @ EXACT.w / EXACT.sigma**2)
    assert_mean(terms.matching_ll, -scipy.stats.multivariate_normal(np.zeros(2), covariance).entropy())


@pytest.mark.parametrize("num_samples", [2, 16])
def test_the_importance_weighted_elbo_lies_between_the_elbo_and_log_p(num_samples):
    """Its exponential is unbiased for p(x), whatever the posterior; with the exact one it is log p(x)."""
    n = 20_000
    x, b = jnp.repeat(jnp.float32(X[:1]), n, axis=0), jnp.ones((n, 4))
    terms = {w: jax.jit(EXACT.model(widen=w).terms, static_argnames="num_samples") for w in (1.0, 1.7)}
    actual = {w: run(x, b, KEY, num_samples=num_samples) for w, run in terms.items()}
    np.testing.assert_allclose(actual[1.0].iw_elbo, EXACT_X[0], atol=1e-3)
    wide = actual[1.7]
    assert_mean(np.exp(np.asarray(wide.iw_elbo, np.float64) - EXACT_X[0]), 1.0)
    assert np.mean(wide.elbo()) + 0.1 < np.mean(wide.iw_elbo) < EXACT_X[0] - 1e-3
    # The partial posterior learns from a z in proportion to its weight, so from z nearer to p(z | x) than q(z | x).
    one = EXACT.model(widen=1.7).terms(x, b, KEY)
    assert np.mean(wide.matching_ll) > np.mean(one.matching_ll) + 0.1


# Small models of every kind


@functools.cache
def tiny(kind):
    shape, options = KINDS[kind]
    return filled(lambda: build("pm_vae", {"latent_dim": 3} | options, shape, nnx.Rngs(0)), scale=1.2, bias=0.5)


@each_kind
def test_one_more_feature_changes_the_partial_posterior_as_if_it_were_observed(kind):
    """Where it is observed already, it keeps its value."""
    model, (x, b) = tiny(kind), example(kind)
    channels = x.size // b.size
    value = jnp.float32(np.random.default_rng(3).uniform(size=(len(x), channels)))
    z = jnp.float32(np.random.default_rng(4).normal(size=(len(x), 3)))

    @jax.jit
    def run(i):
        known = b.reshape(len(b), -1)[:, i, None]
        features = x.reshape(len(x), -1, channels)
        revealed = features.at[:, i].set(jnp.where(known == 1, features[:, i], value)).reshape(x.shape)
        expected = model.partial_posterior(revealed, b.reshape(len(b), -1).at[:, i].set(1.0).reshape(b.shape))
        actual = model.partial_posterior.with_feature(x, b, i)(value)
        one_for_all = model.partial_posterior.with_feature(x[:1], b[:1], i)(value)  # an example, several values
        same_z = jnp.broadcast_to(z[:1], z.shape)
        return expected.log_prob(z), actual.log_prob(z), one_for_all.log_prob(same_z), known[:, 0]

    before = np.asarray(jax.jit(lambda: model.partial_posterior(x, b).log_prob(z))())
    known, changed = [], []
    for i in (0, 2, b[0].size - 1):
        expected, actual, one_for_all, observed = map(np.asarray, run(i))
        np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=2e-4)
        np.testing.assert_allclose(one_for_all[0], expected[0], rtol=2e-4, atol=2e-4)
        assert len(np.unique(one_for_all)) == (1 if observed[0] else len(x)), i
        known.append(observed == 1)
        changed.append(np.abs(actual - before) > 1e-3)
    assert np.any(known) and not np.all(known)
    np.testing.assert_array_equal(np.array(changed), ~np.array(known))


@functools.cache
def term_gradients(kind, stop_gradients):
    """A function of (mask, weights of the terms) that returns the gradient of the weighted terms by parameter."""
    model, (x, _) = tiny(kind), example(kind)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def run(b, weights):
        def weighted(params):
            terms = nnx.merge(graphdef, params, rest).terms(x, b, KEY, stop_gradients=stop_gradients)
            return sum(w * term.mean() for w, term in zip(weights, jax.tree.leaves(terms), strict=True))

        return jax.grad(weighted)(params)

    return lambda b, reconstruction_ll=0.0, kl=0.0, matching_ll=0.0: by_path(
        run(b, jnp.array([reconstruction_ll, kl, matching_ll]))
    )


def nonzero(gradients):
    return {name for name, g in gradients.items() if (g != 0).any()}


@each_kind
def test_stop_gradients_keep_the_matching_term_from_the_encoder_and_change_nothing_else(kind):
    b = example(kind)[1]
    gradients = term_gradients(kind, False)(b, matching_ll=1.0)
    inference = {name for name in gradients if name.startswith(("vae.encoder", "vae.posterior_head"))}
    partial = {name for name in gradients if name.startswith("partial_posterior")}
    assert inference and nonzero(gradients) == partial | inference  # the decoder takes no part in it
    with_stop, without = (term_gradients(kind, stop)(b, reconstruction_ll=1.0, kl=-1.0) for stop in (True, False))
    for name, gradient in with_stop.items():
        np.testing.assert_allclose(gradient, without[name], rtol=1e-3, atol=1e-4)


@each_kind
@pytest.mark.parametrize("observed", [0.0, 1.0])
def test_gradients_are_finite_with_everything_and_with_nothing_observed(kind, observed):
    b = jnp.full_like(example(kind)[1], observed)
    gradients = term_gradients(kind, False)(b, reconstruction_ll=-1.0, kl=0.7, matching_ll=-1.0)
    assert all(np.isfinite(g).all() for g in gradients.values())
    assert not observed or nonzero(gradients) == set(gradients)


def test_loss_is_the_negative_elbo_plus_the_matching_loss():
    terms = LossTerms(*(jnp.asarray(a) for a in ([-10.0, -4.0], [2.0, 3.0], [-5.0, 1.0])))
    np.testing.assert_allclose(terms.elbo(), [-12.0, -7.0])
    np.testing.assert_allclose(terms.loss(1.0, 1.0), [12.0 + 5.0, 7.0 - 1.0])
    np.testing.assert_allclose(terms.loss(0.5, 3.0), [10.0 + 1.0 + 15.0, 4.0 + 1.5 - 3.0])
    by_samples = terms._replace(iw_elbo=terms.elbo())  # as if one z were drawn: the same loss at every beta
    for beta in (0.0, 0.3, 1.0):
        np.testing.assert_allclose(by_samples.loss(beta, 3.0), terms.loss(beta, 3.0))
    tighter = terms._replace(iw_elbo=terms.elbo() + 1.0)
    np.testing.assert_allclose(tighter.loss(1.0, 1.0), terms.loss(1.0, 1.0) - 1.0)


@each_kind
def test_terms_are_of_one_reparameterised_sample_of_the_posterior(kind):
    model, (x, b) = tiny(kind), example(kind)

    @jax.jit
    def run(key):
        q = model.vae.posterior(x)
        z = q.sample(key)
        log_p = model.vae.decode(z).log_prob(x)
        log_q = model.partial_posterior(x, b).log_prob(z)
        return model.terms(x, b, key), log_p.reshape(len(x), -1).sum(-1), log_q

    terms, reconstruction_ll, matching_ll = run(KEY)
    np.testing.assert_allclose(terms.reconstruction_ll, reconstruction_ll, rtol=1e-4)
    np.testing.assert_allclose(terms.matching_ll, matching_ll, rtol=1e-4, atol=1e-4)
    assert terms.kl.shape == (len(x),) and (np.asarray(terms.kl) > 0).all()


def test_missing_values_are_not_scored_and_have_no_influence_on_the_terms():
    model, (x, b) = tiny("tabular"), example("tabular")
    available = jnp.asarray(np.random.default_rng(9).integers(0, 2, x.shape), jnp.float32).at[:, 3].set(0.0)
    b, x = b * available, x * available

    def terms(bias):
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        m = nnx.merge(graphdef, jax.tree.map(lambda a: a, params), rest)
        m.vae.likelihood_head.linear.bias = nnx.Param(bias)
        return m.terms(x, b, KEY, available=available)

    bias = model.vae.likelihood_head.linear.bias[...]
    jacobian = jax.jit(jax.jacobian(terms))(bias)
    # The decoder's mean of a feature matters to the reconstruction of a row just where the feature is available.
    np.testing.assert_array_equal(np.asarray(jacobian.reconstruction_ll) != 0, np.asarray(available) == 1)

    # And the sum is over those features.
    @jax.jit
    def run():
        p = model.vae.decode(model.vae.posterior(x).sample(KEY))
        return p.mean, p.variance, terms(bias).reconstruction_ll

    mean, variance, reconstruction_ll = run()
    expected = scipy.stats.norm.logpdf(x, mean, np.sqrt(variance)) * np.asarray(available)
    np.testing.assert_allclose(reconstruction_ll, expected.sum(-1), rtol=1e-3)


def test_dropout_is_on_only_with_rngs():
    shape, options = KINDS["tabular"]
    options = options | {"encoder": MLP | {"dropout": 0.5}, "partial_encoder": MLP}
    model = filled(lambda: build("pm_vae", {"latent_dim": 3} | options, shape, nnx.Rngs(0)))
    x, b = example("tabular")
    kl = jax.jit(lambda seed: model.terms(x, b, KEY, rngs=nnx.Rngs(dropout=jax.random.key(seed))).kl)
    off = jax.jit(lambda: model.terms(x, b, KEY).kl)()
    first, same, other = (np.asarray(kl(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, same)
    assert (first != other).any() and (first != np.asarray(off)).any()


# Configs


def abstract_model(name):
    config = load(name)
    shape = synthetic.SHAPES[config.dataset]
    return nnx.eval_shape(lambda: build("pm_vae", plain(config.model), shape, nnx.Rngs(0)))


def dense(*sizes):
    return sum(a * b + b for a, b in itertools.pairwise(sizes))


def convolutions(channels, *layers):
    return sum(a * k * k * b + b for a, (b, k) in zip([channels] + [f for f, _ in layers[:-1]], layers, strict=True))


# Counted by hand from the paper's tables.
PARAMETER_COUNTS = {
    "pm_vae_gas": {
        "encoder": dense(8, *[256] * 5),
        "posterior_head": dense(256, 16 + 16 * 17 // 2),
        "decoder": dense(16, *[256] * 5),
        "likelihood_head": dense(256, 8) + 1,
        "partial encoder": dense(16, *[256] * 5),
        "partial head": dense(16 + 16 + 256, *[256] * 7, 3 * 10 * 16),
        "total": 1_433_729,
    },
    "pm_vae_mnist": {
        "encoder": convolutions(1, (32, 5), (32, 5), (64, 5), (64, 5), (128, 7)),
        "posterior_head": dense(128, 32 + 32 * 33 // 2),
        "decoder": convolutions(32, (64, 7), (64, 5), (32, 5), (32, 5), (32, 5), (1, 5)),
        "likelihood_head": 0,
        "partial encoder": convolutions(2, (32, 5), (32, 5), (64, 5), (64, 5), (128, 7)),
        "partial head": dense(32 + 32 + 128, *[256] * 5, 3 * 10 * 32),
        "total": 2_101_969,
    },
}


@pytest.mark.parametrize("name", sorted(PARAMETER_COUNTS))
def test_parameter_counts(name):
    model = abstract_model(name)
    parts = {part: getattr(model.vae, part) for part in ("encoder", "posterior_head", "decoder", "likelihood_head")}
    parts |= {"partial encoder": model.partial_posterior.encoder, "partial head": model.partial_posterior.head}
    parts |= {"total": model}
    counts = {
        part: sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param))) for part, module in parts.items()
    }
    assert counts == PARAMETER_COUNTS[name]
    assert counts.pop("total") == sum(counts.values())
