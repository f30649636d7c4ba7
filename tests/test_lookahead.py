"""Lookahead posteriors against closed forms, and what they must never do: look at unobserved values, move the base."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import train_lookahead_posterior
import train_pm_vae
from configs import common, lookahead_mnist16
from posterior_matching import runs
from posterior_matching.errors import UserError
from posterior_matching.models.lookahead import LookaheadPosterior
from test_vae import ENCODER, KINDS, MLP, Exact, each_kind, example, randomised

KEY = jax.random.key(0)

# A linear-Gaussian model whose posteriors are diagonal: every feature tells about one dimension of z.


def axis_aligned():
    exact = Exact(d=6, e=2)
    exact.w = np.array([[0.2, 0], [0.5, 0], [1.5, 0], [0, 0.35], [0, 0.8], [0, 2.5]])
    exact.covariance = exact.w @ exact.w.T + exact.sigma**2 * np.eye(6)
    return exact


EXACT = axis_aligned()
SHAPE_CONFIG = {"name": "ResidualMLP", "residual_blocks": 1, "hidden_units": 64}


def lookahead_on(model, exact, encoder=SHAPE_CONFIG):
    """An untrained lookahead posterior on a model of `Exact`."""
    (d, e), network = exact.w.shape, {"name": "ResidualMLP", "residual_blocks": 0, "hidden_units": 2}
    pm_vae = {"latent_dim": e, "encoder": network, "decoder": network}
    pm_vae |= {"posterior": {"name": "DiagonalGaussian"}, "likelihood": {"name": "IdentityGaussian"}}
    config = {"pm_vae": pm_vae, "lookahead_encoder": encoder}
    lookahead = LookaheadPosterior.from_config(config, (d,), nnx.Rngs(0))
    lookahead.pm_vae = model
    return lookahead


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


def masks_and_data(n=24):
    rng = np.random.default_rng(3)
    b = rng.uniform(size=(n, 6)) < 0.4
    b[:4] = False
    x = rng.normal(size=(n, 2)) @ EXACT.w.T + EXACT.mean + EXACT.sigma * rng.normal(size=(n, 6))
    return jnp.float32(x), jnp.float32(b)


def mutual_information(x, b):
    """I(z; x_i | x_o) in closed form, -inf where observed."""
    _, covariance = EXACT.conditional(np.asarray(x), np.asarray(b))
    gains = 0.5 * np.log(np.diag(covariance) / EXACT.sigma**2, where=np.asarray(b) == 0, out=np.full(6, -np.inf))
    return gains


def test_trained_on_a_linear_gaussian_model_gains_are_the_mutual_information_and_rank_features_by_it():
    x, b = masks_and_data()
    found = np.asarray(trained("conditional").info_gains(x, b, 1, key=KEY))
    for row in range(len(x)):
        expected, free = mutual_information(x[row], b[row]), np.asarray(b[row]) == 0
        np.testing.assert_array_equal(np.isneginf(found[row]), ~free)
        np.testing.assert_allclose(found[row][free], expected[free], atol=0.3)
        above = expected[free][:, None] > expected[free] + 0.4
        assert (found[row][free][:, None] > found[row][free])[above].all()
        assert expected[found[row].argmax()] > expected.max() - 0.15


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
    return randomised(nnx.eval_shape(lambda: LookaheadPosterior.from_config(tiny_config(kind), shape, nnx.Rngs(0))))


@each_kind
def test_one_gaussian_per_mask_entry_and_any_selection_of_them(kind):
    model, (x, b) = tiny(kind), example(kind)
    num_features = b[0].size
    every, some = model(x, b), model(x, b, jnp.array([2, 0]))
    assert every.batch_shape == (len(x), num_features) and every.event_shape == (3,)
    np.testing.assert_array_equal(some.mean, every.mean[:, jnp.array([2, 0])])
    np.testing.assert_array_equal(some.variance, every.variance[:, jnp.array([2, 0])])


@pytest.mark.parametrize("kind", ["tabular", "rgb"])
def test_gains_depend_on_what_is_observed_only_and_are_minus_infinity_where_observed(kind):
    model, (x, b) = tiny(kind), example(kind)
    hidden = np.broadcast_to(np.asarray(b) == 0, x.shape)
    direction = jnp.float32(np.random.default_rng(1).normal(size=b.reshape(len(b), -1).shape))

    @jax.jit
    def run(x):
        gains = model.info_gains(x, b, 4, key=KEY)
        return jnp.where(jnp.isfinite(gains), gains * direction, 0.0).sum(), gains

    gradient, gains = jax.grad(run, has_aux=True)(x)
    np.testing.assert_array_equal(np.isneginf(gains), np.asarray(b).reshape(len(b), -1) == 1)
    assert np.isfinite(np.asarray(gains)[np.asarray(b).reshape(len(b), -1) == 0]).all()
    np.testing.assert_array_equal(np.asarray(gradient)[hidden], 0.0)
    assert (np.asarray(gradient)[~hidden] != 0).any()
    np.testing.assert_array_equal(run(jnp.where(hidden, 7.0, x))[1], run(x)[1])


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
        found = model.log_prob_of_samples(x, b, KEY, available=available, **options)
        return found.sum(), found

    (_, found), gradient = jax.value_and_grad(run, has_aux=True)(params, b, available)
    assert found.shape == (len(x),) and np.isfinite(found).all() and (np.asarray(found) != 0).all()
    moved = {
        jax.tree_util.keystr(p): (np.asarray(g) != 0).any() for p, g in jax.tree_util.tree_leaves_with_path(gradient)
    }
    assert all(value == ("pm_vae" not in name) for name, value in moved.items())
    kernel = np.asarray(gradient["head"]["linear"]["kernel"].get_value()).reshape(-1, num_features, 6)
    np.testing.assert_array_equal((kernel != 0).any((0, 2)), np.arange(num_features) == free)
    # Nothing left to look at: no value, no gradient.
    (_, found), gradient = jax.value_and_grad(run, has_aux=True)(params, b.at[:, free].set(1.0), available)
    np.testing.assert_array_equal(found, 0.0)
    assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(gradient))


def test_the_lookahead_encoder_is_like_the_encoder_by_default_or_of_its_own_kind():
    shape, _ = KINDS["rgb"]
    build = lambda config: nnx.eval_shape(lambda: LookaheadPosterior.from_config(config, shape, nnx.Rngs(0)))  # noqa: E731
    default = build(tiny_config("rgb"))
    assert default.encoder.layers[0].kernel.shape == (3, 3, 4, 4)  # sees three colours and the mask
    assert len(default.encoder.layers) == len(ENCODER["conv_layers"])
    own = build(tiny_config("rgb") | {"lookahead_encoder": MLP})
    assert own.encoder.linear_in.kernel.shape == (8 * 8 * 4, 12)
    with pytest.raises(UserError, match=r"unknown key 'config\.model\.lookahead_encodr': did you mean 'lookahead_enc"):
        build(tiny_config("rgb") | {"lookahead_encodr": MLP})


def test_the_published_experiment_has_the_papers_hyperparameters():
    config = lookahead_mnist16.get_config()
    assert (config.batch_size, config.steps, config.validation_every) == (32, 40_000, 5000)
    assert (config.model_samples, config.lookahead_subsample) == (64, 16)
    assert config.mask_generator.to_dict() == {"name": "UniformMaskGenerator", "bounds": (0.0, 0.2)}
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.decay_rate, optimizer.transition_steps) == (1e-3, 0.9, 5000)


# Training


NETWORK = {"name": "ResidualMLP", "residual_blocks": 0, "hidden_units": 8}
QUICK = {"batch_size": 8, "steps": 4, "validation_every": 2, "log_every": 1}


def base_config(dataset):
    config = common.pm_vae_tabular(latent_dim=2)
    for part in ("encoder", "decoder", "partial_encoder"):
        config.model[part] = NETWORK
    config.model.partial_posterior = {"name": "DiagonalGaussian"}
    config.update(QUICK | {"dataset": dataset})
    return config


def lookahead_config(base, **changes):
    config = common.lookahead()
    config.mask_generator = {"name": "BernoulliMaskGenerator", "p": 0.2}
    config.update(QUICK | {"pm_vae_dir": str(base), "model_samples": 3, "lookahead_subsample": 2})
    for key, value in changes.items():
        config[key] = value
    return config


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A PM-VAE of one's own table with missing values, and the table."""
    folder = tmp_path_factory.mktemp("lookahead")
    values = np.random.default_rng(0).normal(size=(200, 4)) * [1, 10, 100, 1000]
    values[::3, 1] = np.nan
    np.save(folder / "own.npy", values)
    return train_pm_vae.train(base_config(str(folder / "own.npy")), str(folder / "base"))


@pytest.fixture(scope="module")
def run(base):
    """A lookahead run that does not name its data, on a copy of the base that is gone afterwards."""
    shutil.copytree(base, base + "_copy")
    found = train_lookahead_posterior.train(lookahead_config(base + "_copy"), base + "_lookahead")
    shutil.rmtree(base + "_copy")
    return found


def test_training_leaves_the_pm_vae_as_it_was_bit_for_bit(base, run):
    ours, theirs = (runs.flat_weights(nnx.state(runs.load_model(r))) for r in (run, base))
    frozen = {name.removeprefix("pm_vae."): value for name, value in ours.items() if name.startswith("pm_vae.")}
    assert frozen.keys() == theirs.keys() and len(ours) > len(frozen)
    for name, value in theirs.items():
        np.testing.assert_array_equal(frozen[name], value)
    description, base_description = runs.read_description(run), runs.read_description(base)
    assert description["config"]["model"]["pm_vae"] == base_description["config"]["model"]
    assert description["standardisation"] == base_description["standardisation"]
    assert description["config"]["dataset"] == base_description["config"]["dataset"]


def test_a_run_goes_on_without_its_base(base, run):
    config = lookahead_config(base + "_copy", steps=6)
    found = train_lookahead_posterior.train(config, shutil.copytree(run, run + "_longer"))
    assert runs.latest_step(found) == 6
    ours, before = (runs.flat_weights(nnx.state(runs.load_model(r))) for r in (found, run))
    for name, value in before.items():
        assert np.array_equal(ours[name], value) == name.startswith("pm_vae."), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lookahead_subsample": 5}, r"config\.lookahead_subsample must lie in 1\.\.4, not be 5"),
        ({"lookahead_subsample": 0}, r"config\.lookahead_subsample must lie in 1\.\.4, not be 0"),
        ({"model_samples": 0}, r"config\.model_samples must be at least 1"),
        ({"target": "both"}, r"config\.target must be 'conditional' or 'marginal', not 'both'"),
        ({"dataset": "mixture"}, "pass a file"),
        ({"mask_generator": {"name": "UniformMaskGenerator", "bounds": (0.0, 0.1)}}, "widen"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(base, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        train_lookahead_posterior.train(lookahead_config(base, **change), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_base_that_is_no_pm_vae_is_refused(run, tmp_path):
    with pytest.raises(UserError, match="is a run of lookahead, not of pm_vae"):
        train_lookahead_posterior.train(lookahead_config(run), str(tmp_path / "run"))
    config = lookahead_config(run)
    config.pm_vae_dir = None
    with pytest.raises(UserError, match=r"missing key 'config\.pm_vae_dir': the run directory of a pm_vae run"):
        train_lookahead_posterior.train(config, str(tmp_path / "run"))
