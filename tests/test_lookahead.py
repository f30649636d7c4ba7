"""Lookahead posteriors against closed forms, and what they must never do: look at unobserved values, move the base."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import train_lookahead_posterior
import train_pm_vae
from helpers.arrays import by_path, filled
from helpers.configs import small
from helpers.pm_vae import ALIGNED as EXACT
from helpers.pm_vae import KINDS, each_kind, example, lookahead_on, masks_and_data, mutual_information
from posterior_matching import runs
from posterior_matching.errors import UserError
from posterior_matching.models import build, distributions, greedy

pytestmark = pytest.mark.slow

KEY = jax.random.key(0)


@functools.cache
def trained(target):
    """Lookahead posteriors trained on data of the model, with about a third of the features observed."""
    model, n = lookahead_on(EXACT.model(), EXACT), 128
    trainable = nnx.All(nnx.Param, nnx.Not(nnx.PathContains("pm_vae")))
    graphdef, params, rest = nnx.split(model, trainable, ...)
    optimizer = optax.adam(optax.exponential_decay(5e-3, 200, 0.5))
    w, mean = jnp.float32(EXACT.w), jnp.float32(EXACT.mean)

    def step(carry, key):
        params, state = carry
        key_z, key_x, key_b, key_p, key = jax.random.split(key, 5)
        x = jax.random.normal(key_z, (n, 2)) @ w.T + mean + EXACT.sigma * jax.random.normal(key_x, (n, 6))
        p = jax.random.choice(key_p, jnp.array([0.0, 0.5]), (n, 1))
        b = jnp.float32(jax.random.uniform(key_b, (n, 6)) < p)

        def loss(params):
            lookahead = nnx.merge(graphdef, params, rest)
            return -lookahead.log_prob_of_samples(x, b, key, num_samples=4, num_features=6, target=target).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(
        lambda params: jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(KEY, 1000))[0][0]
    )
    return nnx.merge(graphdef, run(params), rest)


def test_trained_on_a_linear_gaussian_model_gains_are_the_mutual_information_and_rank_features_by_it():
    x, b = masks_and_data()
    actual = np.asarray(trained("conditional").info_gains(x, b, 1, key=KEY))
    for row in range(len(x)):
        expected, free = mutual_information(x[row], b[row]), np.asarray(b[row]) == 0
        np.testing.assert_array_equal(np.isneginf(actual[row]), ~free)
        np.testing.assert_allclose(actual[row][free], expected[free], atol=0.3)
        above = expected[free][:, None] > expected[free] + 0.4
        assert (actual[row][free][:, None] > actual[row][free])[above].all()
        assert expected[actual[row].argmax()] > expected.max() - 0.15


def test_the_published_objective_takes_what_a_feature_will_tell_for_what_remains_unknown():
    """With nothing observed and imputations w z, the marginal variance is v + (1 - v)^2, v the conditional one."""
    x, b = masks_and_data()
    v = 1 / (1 + np.square(EXACT.w).sum(1) / EXACT.sigma**2)
    marginal = np.asarray(trained("marginal").info_gains(x, b, 1, key=KEY))[:4].mean(0)
    conditional = np.asarray(trained("conditional").info_gains(x, b, 1, key=KEY))[:4].mean(0)
    np.testing.assert_allclose(marginal, -0.5 * np.log(v + (1 - v) ** 2), atol=0.08)
    np.testing.assert_allclose(conditional, -0.5 * np.log(v), atol=0.08)
    # So it prefers a feature of medium value to the most informative one.
    assert conditional.argmax() == 5 and marginal.argmax() != 5


# Small models of every kind


def tiny_config(kind):
    return {"pm_vae": {"latent_dim": 3} | KINDS[kind][1]}


@functools.cache
def tiny(kind):
    shape, _ = KINDS[kind]
    return filled(lambda: build("lookahead", tiny_config(kind), shape, nnx.Rngs(0)), scale=1.2, bias=0.5)


@each_kind
def test_one_gaussian_per_mask_entry_and_any_selection_of_them(kind):
    model, (x, b) = tiny(kind), example(kind)
    num_features = b[0].size
    every, some = model(x, b), model(x, b, jnp.array([2, 0]))
    assert every.batch_shape == (len(x), num_features) and every.event_shape == (3,)
    np.testing.assert_array_equal(some.mean, every.mean[:, jnp.array([2, 0])])
    np.testing.assert_array_equal(some.variance, every.variance[:, jnp.array([2, 0])])
    gains, observed = jax.jit(lambda: model.info_gains(x, b, 4, key=KEY))(), np.asarray(b).reshape(len(b), -1) == 1
    np.testing.assert_array_equal(np.isneginf(gains), observed)
    assert np.isfinite(np.asarray(gains)[~observed]).all()
    # The policy leaves out what is the same for all features.
    policy = np.stack([greedy.lookahead_policy(model, *row, 4, KEY) for row in zip(x, b, strict=True)])
    np.testing.assert_array_equal(np.isneginf(policy), observed)
    entropy = np.asarray(distributions.entropy(model.pm_vae.partial_posterior(x, b), KEY, 4))
    for row, free in enumerate(~observed):
        np.testing.assert_allclose(np.asarray(gains)[row][free] - policy[row][free], entropy[row], rtol=1e-4)


@pytest.mark.parametrize(("kind", "target"), [("tabular", "conditional"), ("rgb", "marginal")])
def test_only_unobserved_available_features_of_the_lookahead_posterior_train(kind, target):
    model, (x, _) = tiny(kind), example(kind)
    num_features = model.num_features
    free, missing = 2, 3
    b = jnp.ones((len(x), num_features)).at[:, jnp.array([free, missing])].set(0.0)
    available = jnp.ones_like(b).at[:, missing].set(0.0)
    shape = example(kind)[1].shape
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def run(params, b, available):
        options = {"num_samples": 2, "num_features": num_features, "target": target}
        b, available = b.reshape(shape), available.reshape(shape)
        model = nnx.merge(graphdef, params, rest)
        actual = model.log_prob_of_samples(x, b, KEY, available=available, **options)
        return actual.sum(), actual

    (_, actual), gradient = jax.value_and_grad(run, has_aux=True)(params, b, available)
    assert actual.shape == (len(x),) and np.isfinite(actual).all() and (np.asarray(actual) != 0).all()
    assert all((g != 0).any() == ("pm_vae" not in name) for name, g in by_path(gradient).items())
    kernel = np.asarray(gradient["head"]["linear"]["kernel"].get_value()).reshape(-1, num_features, 6)
    np.testing.assert_array_equal((kernel != 0).any((0, 2)), np.arange(num_features) == free)
    # Nothing left to look at: no value, no gradient.
    (_, actual), gradient = jax.value_and_grad(run, has_aux=True)(params, b.at[:, free].set(1.0), available)
    np.testing.assert_array_equal(actual, 0.0)
    assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(gradient))


# Training


def config(base, **changes):
    masks = {"name": "BernoulliMaskGenerator", "p": 0.2}
    changes = {"pm_vae_dir": base, "dataset": None, "mask_generator": masks} | changes
    return small("lookahead", train_split="train", **changes)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A PM-VAE of one's own table with missing values."""
    folder = tmp_path_factory.mktemp("lookahead")
    values = np.random.default_rng(0).normal(size=(200, 4)) * [1, 10, 100, 1000]
    values[::3, 1] = np.nan
    np.save(folder / "own.npy", values)
    own = small("pm_vae_mixture", dataset=str(folder / "own.npy"), train_split="train")
    return train_pm_vae.train(own, str(folder / "base"))


def test_data_and_columns_are_those_of_the_base(base, tmp_path):
    run = train_lookahead_posterior.train(config(base), str(tmp_path / "run"))
    ours, theirs = (runs.read_description(path) for path in (run, base))
    assert ours["columns"] == theirs["columns"] is not None
    assert ours["config"]["dataset"] == theirs["config"]["dataset"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lookahead_subsample": 5}, r"config\.lookahead_subsample must be at most 4, the number of features"),
        ({"lookahead_subsample": 0}, r"config\.lookahead_subsample must be at least 1, not 0"),
        ({"target": "both"}, r"config\.target must be .* not 'both'"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(base, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        train_lookahead_posterior.train(config(base, **change), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
