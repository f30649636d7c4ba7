"""Models of tables with real and categorical columns, against numerical integration over z and brute force."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpyro import distributions as dist
from scipy.special import logsumexp, softmax

import train_lookahead_posterior
import train_pm_vade
import train_pm_vae
import train_vade
from configs import common
from helpers.runs import refusal
from posterior_matching import data, runs
from posterior_matching.errors import OptionError, UserError
from posterior_matching.evaluation import baselines, metrics, uci
from posterior_matching.mask_generators import BernoulliMaskGenerator
from posterior_matching.models import build, distributions, greedy
from posterior_matching.models.marginal_likelihood import tempered_weights, weighted_mean
from posterior_matching.training.corruption import add_noise

pytestmark = pytest.mark.slow

KEY = jax.random.key(0)
CARDINALITIES = (0, 3, 2, 0)
REAL = np.array(CARDINALITIES) == 0
MLP = {"name": "ResidualMLP", "residual_blocks": 1, "hidden_units": 8}
OPTIONS = {
    "latent_dim": 1,
    "encoder": MLP,
    "posterior": {"name": "DiagonalGaussian"},
    "decoder": MLP,
    "likelihood": {"name": "Columns"},
    "cardinalities": CARDINALITIES,
    "availability": True,
}
PARTIAL = {"partial_posterior": {"name": "DiagonalGaussian"}}
GRID = np.linspace(-8, 8, 4001)


def make(name="pm_vae", seed=0, **changes):
    """A model with random weights, biases too."""
    config = OPTIONS | PARTIAL | changes
    if name == "pm_vade":
        vade = OPTIONS | {"num_clusters": 3} | changes
        config = {"vade": vade} | PARTIAL
    elif name == "lookahead":
        config = {"pm_vae": config}
    model = nnx.eval_shape(lambda: build(name, config, (4,), nnx.Rngs(0)))
    rng = np.random.default_rng(seed)

    def draw(leaf):
        scale = 1.5 / np.sqrt(leaf.shape[0]) if leaf.ndim > 1 else 0.5
        return jnp.float32(scale * rng.normal(size=leaf.shape))

    nnx.update(model, jax.tree.map(draw, nnx.state(model, nnx.Param)))
    rest = nnx.state(model, nnx.Not(nnx.Param))
    nnx.update(model, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), rest))
    return model


model_of = functools.cache(make)


def rows(n=4, seed=0):
    rng = np.random.default_rng(seed)
    columns = [rng.integers(0, k, n) if k else rng.normal(size=n) for k in CARDINALITIES]
    return np.stack(columns, axis=1).astype(np.float32)


X = rows()
B = np.array([[1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 0, 0]], np.float32)
ALL_VALUES = np.array(list(itertools.product([0], range(3), range(2), [0])), np.float32)


def by_z(model):
    """Log p(x_j | z) on the grid: a function of rows `[n, 4]` to `[grid, n, 4]`; and the means of features there."""
    p = model.decoding.decode(jnp.float32(GRID)[:, None])
    log_prob = lambda x: np.asarray(p.log_prob(jnp.float32(x)[:, None, :]), np.float64).transpose(1, 0, 2)  # noqa: E731
    return log_prob, np.asarray(p.mean_features, np.float64)


def exact_log_prob(model, x, b):
    """Log p(x_o), `[n]`, by integration over z."""
    log_joint = (by_z(model)[0](x) * b).sum(-1) - 0.5 * GRID[:, None] ** 2 - 0.5 * np.log(2 * np.pi)
    return logsumexp(log_joint, axis=0) + np.log(GRID[1] - GRID[0])


def exact_mean_features(model, x, b):
    """E[features] over z ~ q(z | x_o), `[n, 7]`, by integration."""
    q = model.partial_posterior(jnp.asarray(x), jnp.asarray(b))
    density = np.exp(np.asarray(q.log_prob(jnp.float32(GRID)[:, None, None]), np.float64))
    assert np.allclose(density.sum(0) * (GRID[1] - GRID[0]), 1, atol=1e-3)
    return np.einsum("gn,gf->nf", density, by_z(model)[1]) * (GRID[1] - GRID[0])


def with_wide_proposals(model):
    """Importance sampling converges whatever the model, if no proposal is narrow."""
    wide = lambda x, *_, **__: dist.Independent(dist.Normal(jnp.zeros((len(x), 1)), 1.3), 1)  # noqa: E731
    model.vae.posterior_head, model.partial_posterior = wide, wide
    return model


# Likelihoods.


def test_importance_sampling_agrees_with_integration():
    model = with_wide_proposals(make())
    found = jax.jit(lambda key: model.is_log_prob(X, B, 20_000, key=key))(KEY)
    full, observed = exact_log_prob(make(), X, np.ones_like(B)), exact_log_prob(make(), X, B)
    error = 5 / np.sqrt(np.minimum(found.ess_x, found.ess_xo))
    assert error.max() < 0.3
    assert (np.abs(found.log_p_x - full) < error).all()
    assert (np.abs(found.log_p_xu_given_xo - (full - observed)) < 2 * error).all()


TARGETS = np.array([[0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1], [1, 1, 1, 1]], np.float32)  # the last overlaps


def test_log_prob_of_any_columns_given_any_others_agrees_with_integration():
    model = with_wide_proposals(make())
    found = jax.jit(lambda key: model.log_prob_of(X, TARGETS, B, 20_000, key=key))(KEY)
    expected = exact_log_prob(make(), X, np.maximum(TARGETS, B)) - exact_log_prob(make(), X, B)
    np.testing.assert_allclose(found, expected, atol=0.15)


def test_probabilities_of_all_categories_given_any_columns_sum_to_one():
    model = with_wide_proposals(make())
    x = np.repeat(X[:1], len(ALL_VALUES), axis=0)
    x[:, ~REAL] = ALL_VALUES[:, ~REAL]
    given = np.tile(np.float32(REAL), (len(x), 1))
    log_prob = jax.jit(lambda key: model.log_prob_of(x, 1 - given, given, 20_000, key=key))(KEY)
    np.testing.assert_allclose(np.exp(log_prob).sum(), 1.0, atol=0.03)


def test_of_nothing_given_nothing_the_log_probability_is_exactly_zero():
    zeros = np.zeros_like(B)
    np.testing.assert_array_equal(model_of().log_prob_of(X, zeros, zeros, 3, key=KEY), 0.0)
    both = model_of().log_prob_of(X, B, zeros, 5, key=KEY)  # log p(x_t) is one estimate, the other is known
    only = model_of().log_prob_of(X, np.ones_like(B), B, 5, key=KEY)
    assert np.isfinite(both).all() and np.isfinite(only).all()
    assert both[2] == 0.0 and (np.delete(both, 2) != 0).all()


# Imputation.


@pytest.mark.parametrize("name", ["pm_vae", "pm_vade"])
def test_point_estimates_are_means_of_reals_and_the_category_of_greatest_mean_probability(name):
    model = model_of(name)
    mean = exact_mean_features(model, X, B)
    expected = np.stack([mean[:, 0], mean[:, 1:4].argmax(1), mean[:, 4:6].argmax(1), mean[:, 6]], axis=1)
    point = np.asarray(jax.jit(lambda key: model.point(X, B, 20_000, key=key))(KEY))
    np.testing.assert_array_equal(point[B == 1], X[B == 1])
    np.testing.assert_allclose(point[B == 0], expected[B == 0], atol=0.05)


def test_weighted_point_estimates_are_those_of_the_model_whatever_the_proposal():
    model = with_wide_proposals(make())
    log_joint = (by_z(model)[0](X) * B).sum(-1) - 0.5 * GRID[:, None] ** 2
    mean = np.einsum("gn,gf->nf", softmax(log_joint, axis=0), by_z(model)[1])
    expected = np.stack([mean[:, 0], mean[:, 1:4].argmax(1), mean[:, 4:6].argmax(1), mean[:, 6]], axis=1)
    estimate = jax.jit(lambda key, weighted: model.point(X, B, 20_000, key=key, weighted=weighted), static_argnums=1)
    weighted, unweighted = (np.asarray(estimate(KEY, w)) for w in (True, False))
    np.testing.assert_array_equal(weighted[B == 1], X[B == 1])
    np.testing.assert_allclose(weighted[B == 0], expected[B == 0], atol=0.05)
    assert np.abs(unweighted - expected)[B == 0].max() > 0.2
    imputations, log_weights = jax.jit(lambda key: model.impute_and_weigh(X, B, 20_000, key=key))(KEY)
    means = np.asarray(weighted_mean(imputations, tempered_weights(log_weights)))
    np.testing.assert_allclose(means[:, REAL], weighted[:, REAL], rtol=1e-4)
    draws = jax.jit(lambda key: model.draw(X, B, 20_000, key=key, candidates=20_000))(KEY)
    real = (B == 0) & REAL
    np.testing.assert_allclose(np.asarray(draws).mean(0)[real], expected[real], atol=0.07)


@pytest.mark.parametrize("name", ["pm_vae", "pm_vade"])
@pytest.mark.parametrize("how", ["impute", "draw"])
def test_draws_have_the_probabilities_and_the_means_of_the_model(name, how):
    model, n = model_of(name), 20_000
    draws = np.asarray(jax.jit(lambda key: getattr(model, how)(X, B, n, key=key))(KEY), np.float64)
    assert draws.shape == (n, 4, 4)
    mean, u = exact_mean_features(model, X, B), B == 0
    np.testing.assert_array_equal(draws[:, ~u], np.broadcast_to(X, draws.shape)[:, ~u])
    for j, at in ((1, 1), (2, 4)):
        shares = (draws[:, :, j, None] == np.arange(CARDINALITIES[j])).mean(0)
        probabilities = mean[:, at : at + CARDINALITIES[j]]
        error = 5 * np.sqrt(probabilities * (1 - probabilities) / n) + 1e-4
        assert (np.abs(shares - probabilities) < error)[u[:, j]].all()
    for j, at in ((0, 0), (3, 6)):
        error = 5 * draws[:, :, j].std(0) / np.sqrt(n) + 1e-4
        assert (np.abs(draws[:, :, j].mean(0) - mean[:, at]) < error)[u[:, j]].all()
    # Draws have the decoder's noise, imputations decoder means: the same z, more variance by the scale's square.
    if how == "draw":
        means = np.asarray(jax.jit(lambda key: model.impute(X, B, n, key=key))(KEY), np.float64)
        scale = np.exp(np.asarray(model.decoding.likelihood_head.log_scale[...], np.float64)) + 1e-3
        for j, s in zip(np.flatnonzero(REAL), scale, strict=True):
            more = (draws[:, :, j].var(0) - means[:, :, j].var(0))[u[:, j]]
            np.testing.assert_allclose(more, s**2, rtol=0.1)


# Revealing a feature.


@pytest.mark.parametrize("i", range(4))
def test_a_revealed_feature_is_the_one_hot_recomputed(i):
    model, value, z = model_of(), rows(4, seed=3)[:, i, None], np.float32([[0.3]] * 4)
    revealed, b = X.copy(), B.copy()
    revealed[B[:, i] == 0, i], b[:, i] = value[B[:, i] == 0, 0], 1
    expected = model.partial_posterior(revealed, b).log_prob(z)
    found = jax.jit(lambda i: model.partial_posterior.with_feature(X, B, i)(value).log_prob(z))(i)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    one_for_all = model.partial_posterior.with_feature(X[:1], B[:1], i)(value).log_prob(z)  # one example, four values
    alone = [model.partial_posterior.with_feature(X[:1], B[:1], i)(v[None]).log_prob(z[:1])[0] for v in value]
    np.testing.assert_allclose(one_for_all, alone, rtol=1e-4, atol=1e-5)


def test_the_gain_of_a_category_is_the_mean_over_its_values_by_their_probabilities():
    model, row = model_of(), 0  # column 1 unobserved
    x, b = X[row], B[row]
    entropy = lambda x, b: distributions.entropy(model.partial_posterior(x, b), KEY, 1)  # noqa: E731
    revealed, more = np.repeat(x[None], 3, axis=0), np.repeat(b[None], 3, axis=0)
    revealed[:, 1], more[:, 1] = [0, 1, 2], 1
    probabilities = exact_mean_features(model, x[None], b[None])[0, 1:4]
    expected = entropy(x[None], b[None])[0] - probabilities @ np.asarray(entropy(revealed, more))
    n = 20_000
    gains = jax.jit(lambda key: model.expected_info_gains(x, b, n, key=key))(KEY)
    np.testing.assert_array_equal(np.isneginf(gains), b == 1)
    spread = np.asarray(entropy(revealed, more)).std() + 1e-6
    assert abs(gains[1] - expected) < 5 * 1.5 * spread / np.sqrt(n) + 1e-5
    assert spread > 1e-3  # the value matters


def test_greedy_acquisition_scores_categories_by_whether_they_are_right():
    model, available = model_of("lookahead"), np.array([1, 1, 1, 0], np.float32)
    x = X[1] * available
    run = jax.jit(
        lambda key, policy: greedy.acquire(policy, model, key, x, jnp.asarray(available), num_steps=4, num_samples=7),
        static_argnums=1,
    )
    for policy in (greedy.sampling_policy, greedy.lookahead_policy):
        found = jax.tree.map(np.asarray, run(KEY, policy))
        assert sorted(found.action[:3]) == [0, 1, 2] and found.action[3] == -1
        for t, key in enumerate(jax.random.split(KEY, 4)):
            point = np.asarray(model.pm_vae.point(x[None], found.mask[t][None], 7, key=jax.random.split(key)[0]))[0]
            np.testing.assert_allclose(found.imputation[t], point, rtol=1e-4, atol=1e-5)
            error = np.where(REAL, x - point, x != point) * available
            np.testing.assert_allclose(found.rmse[t], np.sqrt(np.square(error).sum() / 3), rtol=1e-4, atol=1e-5)


def test_lookahead_posteriors_train_on_mixed_columns():
    model = model_of("lookahead")
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def gradient(params, x):
        merged = nnx.merge(graphdef, params, rest)
        options = {"num_samples": 3, "num_features": 4, "target": "conditional"}
        return jax.grad(lambda m: m.log_prob_of_samples(x, B, KEY, **options).mean())(merged)

    found = gradient(params, X)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    hidden = np.where(B == 1, X, rows(4, seed=9))  # other values where nothing is observed
    jax.tree.map(np.testing.assert_array_equal, gradient(params, jnp.asarray(hidden)), found)


# What does not exist, and what is wrong.


def everything(model, x, b):
    """All results that condition on x_o."""
    if hasattr(model, "vade"):
        return [model.impute(x, b, 2, key=KEY), model.partial_cluster_probs(x, b, 3, key=KEY)]
    return [
        model.impute(x, b, 2, key=KEY),
        model.draw(x, b, 2, key=KEY),
        model.point(x, b, 3, key=KEY),
        model.is_log_prob(x, b, 3, key=KEY).log_p_xo,
        model.log_prob_of(x, b * TARGETS, b, 3, key=KEY),
        model.expected_info_gains(x[0], b[0], 3, key=KEY),
    ]


@pytest.mark.parametrize("name", ["pm_vae", "pm_vade"])
@pytest.mark.parametrize("changes", [{}, {"cardinalities": (), "availability": False}])
def test_nan_where_nothing_is_observed_reaches_no_result_and_no_gradient(name, changes):
    model = make(name, **changes)
    holes = np.where(B == 1, X, np.nan).astype(np.float32)
    run = jax.jit(lambda x: everything(model, x, B))
    for found, expected in zip(run(holes), run(np.where(B == 1, X, 1)), strict=True):
        if found.shape == B.shape[:1]:  # log p(x_o), of proposals that differ only where x does not exist
            np.testing.assert_allclose(found, expected, rtol=1e-5)
        else:
            np.testing.assert_array_equal(found, expected)
        assert not np.isnan(found).any()

    graphdef, state = nnx.split(model)

    def total(state, x):
        return sum(jnp.where(jnp.isfinite(a), a, 0).sum() for a in everything(nnx.merge(graphdef, state), x, B))

    by_weight, by_x = jax.jit(jax.grad(total, argnums=(0, 1)))(state, jnp.asarray(holes))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(by_weight))
    np.testing.assert_array_equal(np.asarray(by_x)[B == 0], 0.0)


def test_values_that_are_nan_are_never_scored():
    model = with_wide_proposals(make())
    exists = np.array([[1, 1, 1, 0]] * 4, np.float32)
    x = np.where(exists == 1, X, np.nan).astype(np.float32)
    found = model.is_log_prob(x, B * exists, 20_000, key=KEY)
    np.testing.assert_allclose(found.log_p_x, exact_log_prob(make(), X, exists), atol=0.15)


def test_numpy_and_bool_masks_give_what_jax_masks_give():
    """Without compilation, as users call a model."""
    model, x, b = model_of(), X[:1], B[:1] == 1
    calls = [
        lambda x, b: model.impute(x, b, 2, key=KEY),
        lambda x, b: model.expected_info_gains(x[0], b[0], 2, key=KEY),
        lambda x, b: model.log_prob_of(x, b, b, 2, key=KEY),
    ]
    for call in calls:
        np.testing.assert_array_equal(call(x, b), call(jnp.asarray(x), jnp.float32(b)))


@pytest.mark.parametrize(
    ("x", "b", "problem"),
    [
        (X, B[:, :3], r"b has shape \(4, 3\), but the model takes \[B, 4\]"),
        (X, B[:1], r"b has shape \(1, 4\)"),
        (X, B[0], r"b has shape \(4,\)"),
        (X[:, :3], B[:, :3], r"x has shape \(4, 3\)"),
        (X, 0.5 * B, "b is a mask: every value must be 1 .observed. or 0"),
        (X, B - 1, "b is a mask"),
        (np.full_like(X, np.nan), B, "x is NaN where b is 1"),
    ],
)
def test_a_wrong_mask_is_one_clear_error(x, b, problem):
    for call in (model_of().impute, model_of().draw, model_of().point, model_of().is_log_prob):
        with pytest.raises(UserError, match=problem) as error:
            call(x, b, 2, key=KEY)
        assert "\n" not in str(error.value)


def test_only_with_availability_does_the_posterior_tell_missing_values_from_zeros():
    x, exists = X * B, jnp.asarray(B)
    sees, blind = make(), make(availability=False)
    assert (np.abs(sees.vae.posterior(x, available=exists).mean - sees.vae.posterior(x).mean)[:3] > 1e-4).all()
    np.testing.assert_array_equal(blind.vae.posterior(x, available=exists).mean, blind.vae.posterior(x).mean)
    # What does not exist has no influence, not even NaN.
    holes = np.where(B == 1, X, np.nan).astype(np.float32)
    found = sees.terms(holes, B, KEY, available=exists)
    expected = sees.terms(x, B, KEY, available=exists)
    jax.tree.map(np.testing.assert_array_equal, tuple(found), tuple(expected))
    vade = make("pm_vade").vade
    np.testing.assert_array_equal(
        vade.cluster_probs(holes, 3, key=KEY), vade.cluster_probs(x, 3, key=KEY, available=exists)
    )


def test_training_noise_spares_categories_and_what_is_missing():
    noisy = np.asarray(add_noise(jnp.asarray(X), jnp.asarray(B), KEY, 0.3, CARDINALITIES))
    np.testing.assert_array_equal(noisy != X, (B == 1) & REAL)


def test_options_that_do_not_fit_the_columns():
    with pytest.raises(OptionError, match=r"model.cardinalities has 3 entries, but the data have shape \(4,\)"):
        make(cardinalities=(0, 2, 0))
    with pytest.raises(OptionError, match=r"model.likelihood.name must be Columns: the data have categorical columns"):
        make(likelihood={"name": "IdentityGaussian"})
    with pytest.raises(OptionError, match=r"model.likelihood.spread is for several Gaussians per column"):
        make(likelihood={"name": "Columns", "spread": True})


# Runs.


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A file of 60 rows with a category that follows a number, and holes in both."""
    rng = np.random.default_rng(0)
    size = rng.normal(size=60)
    colour = np.where(size > 0.5, "red", np.where(size < -0.5, "blue", "green"))
    lines = [
        f"{'' if hole == 1 else f'{s:.3f}'},{'' if hole == 2 else c},{f}"
        for s, c, f, hole in zip(size, colour, rng.integers(0, 2, 60) > 0, rng.integers(0, 5, 60), strict=True)
    ]
    path = tmp_path_factory.mktemp("mixed") / "table.csv"
    path.write_text("size,colour,fragile\n" + "\n".join(lines) + "\n")
    return path


def small(config, path, **model):
    config.update(steps=4, validation_every=2, log_every=1, batch_size=8, dataset=str(path), noise_std=0.1)
    config.model = {"latent_dim": 2, "encoder": MLP, "decoder": MLP, "likelihood": {"name": "Columns"}} | model
    return config


@pytest.mark.parametrize("steps", [4, 8])
def test_a_run_whose_table_has_changed_is_refused_and_keeps_its_units(steps, table, tmp_path):
    path = tmp_path / "table.csv"
    path.write_text(table.read_text())
    config = small(common.pm_vae(), path, posterior={"name": "DiagonalGaussian"})
    train_pm_vae.train(config, str(tmp_path / "run"))
    description = (tmp_path / "run" / "config.json").read_bytes()
    path.write_text(table.read_text().replace("red", "blue"))
    config.steps = steps  # finished, or to go on
    assert f"'{path}' has changed since" in refusal(train_pm_vae.train, config, str(tmp_path / "run"))
    assert (tmp_path / "run" / "config.json").read_bytes() == description


def test_every_family_of_tables_trains_on_mixed_columns_and_loads(table, tmp_path):
    """The kinds of the columns, and whether values miss, are filled in from the data and saved."""
    diagonal = {"name": "DiagonalGaussian"}
    expected = {"cardinalities": [0, 3, 2], "availability": True}
    own = small(common.pm_vae(), table, posterior=diagonal, availability=None)
    own.table.separator = ","
    base = train_pm_vae.train(own, str(tmp_path / "pm_vae"))
    model = runs.read_description(base)["config"]["model"]
    assert {key: model[key] for key in expected} == expected
    own.steps = 6
    train_pm_vae.train(own, base)  # resumes: what is resolved again is the same
    assert runs.latest_step(base) == 6

    frozen = small(common.pm_vae(), table, posterior=diagonal, availability=False)
    frozen.pretrained_dir = base
    again = train_pm_vae.train(frozen, str(tmp_path / "frozen"))
    assert runs.load_model(again).vae.availability  # its own VAE's

    lookahead = common.lookahead()
    lookahead.update(steps=4, validation_every=2, log_every=1, batch_size=8, pm_vae_dir=base)
    lookahead.update(model_samples=2, lookahead_subsample=3)
    lookahead.mask_generator = {"name": "BernoulliMaskGenerator", "p": 0.3}
    run = train_lookahead_posterior.train(lookahead, str(tmp_path / "lookahead"))
    assert runs.read_description(run)["config"]["table"]["separator"] == ","  # the base's data are read as it read them
    x, b = np.float32([[0.1, 2, 0]]), np.float32([[1, 1, 0]])
    assert np.isfinite(runs.load_model(run).info_gains(x, b, 3, key=KEY)[0, 2])

    vade = small(common.vade(), table, posterior=diagonal, num_clusters=2, availability=None)
    vade.pretraining.update(steps=2, mixture_inits=1)
    base = train_vade.train(vade, str(tmp_path / "vade"))
    model = runs.read_description(base)["config"]["model"]
    assert {key: model[key] for key in expected} == expected
    partial = common.pm_vade()
    partial.update(steps=4, validation_every=2, log_every=1, batch_size=8, vade_dir=base, noise_std=0.1)
    partial.model = {"partial_encoder": None, "partial_posterior": diagonal}
    trained = runs.load_model(train_pm_vade.train(partial, str(tmp_path / "pm_vade")))
    assert trained.vade.cardinalities == trained.partial_posterior.cardinalities == (0, 3, 2)
    assert set(np.unique(trained.draw(x, b, 20, key=KEY)[:, 0, 2])) <= {0.0, 1.0}


def test_a_table_with_categories_needs_a_likelihood_that_knows_them(table, tmp_path):
    config = small(common.pm_vae(), table, posterior={"name": "DiagonalGaussian"})
    config.model.likelihood = {"name": "IdentityGaussian"}
    with pytest.raises(UserError, match=r"model.likelihood.name must be Columns"):
        train_pm_vae.train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# Evaluation ----------------------------------------------------------------------------------------------------------


def test_an_evaluation_scores_both_kinds_and_gives_likelihoods_per_unit_of_the_table(table, tmp_path):
    run = train_pm_vae.train(
        small(common.pm_vae(), table, posterior={"name": "DiagonalGaussian"}, availability=True), str(tmp_path / "run")
    )
    half = BernoulliMaskGenerator(0.0)  # nothing observed: every value that exists is scored
    found = uci.evaluate(run, split="all", mask_generator=half, num_samples=4, num_trials=1, baselines=True)
    value = {name: metric["mean"] for name, metric in found.metrics.items()}
    x = data.load(str(table), "all", runs.read_description(run)).x
    std = runs.read_description(run)["columns"]["columns"][0]["std"]
    slope = -np.log(std) * np.mean(~np.isnan(x[:, 0]))  # of `size`, the only real column, where it exists
    np.testing.assert_allclose(value["ac_ll_table_nats"] - value["ac_ll_nats"], slope, rtol=1e-4)
    np.testing.assert_allclose(value["log_p_x_table_nats"] - value["log_p_x_nats"], slope, rtol=1e-4)
    train = data.load(str(table), "train", runs.read_description(run)).x
    modes = [np.bincount(train[~np.isnan(train[:, j]), j].astype(int)).argmax() for j in (1, 2)]
    shares = [np.mean(x[~np.isnan(x[:, j]), j] == mode) for j, mode in zip((1, 2), modes, strict=True)]
    np.testing.assert_allclose(value["accuracy_mean"], np.mean(shares), rtol=1e-6)  # mean imputation is the mode
    assert {"nrmse", "nrmse_knn", "accuracy_knn"} <= value.keys()


def test_accuracy_of_categories_is_a_mean_over_columns():
    x = np.array([[0, 1], [1, np.nan], [2, 0], [0, 1.0]])
    imputation = np.array([[0, 1], [0, 0], [2, 1], [1, 1.0]])
    scored = np.array([[1, 1], [1, 1], [1, 0], [0, 1.0]])
    assert metrics.category_accuracy(x, imputation, scored) == (2 / 3 + 2 / 2) / 2
    assert np.isnan(metrics.category_accuracy(x, imputation, 0 * scored))


def test_nearest_neighbours_see_categories_one_hot():
    """A neighbour with another category is as far as any other, whatever the index of its category."""
    train = np.array([[0, 0.0], [1, 5.0], [2, 9.0]] * 5)
    (imputer,) = baselines.fit(train, ["knn"], cardinalities=(3, 0)).values()
    np.testing.assert_allclose(imputer(np.array([[2, np.nan], [np.nan, 5.0]])), [[2, 9.0], [1, 5.0]])
