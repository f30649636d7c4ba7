"""VaDE and PM-VaDE: against numerical integration in one latent dimension, and their training scripts on digits."""

import dataclasses
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx
from nbclient.exceptions import CellExecutionError
from numpyro import distributions as dist
from scipy.special import logsumexp
from sklearn.mixture import GaussianMixture

import train_pm_vade
import train_vade
from helpers.arrays import assert_mean, assert_same, normal
from helpers.configs import GMM, LEAST, MLP, small
from helpers.runs import rows
from helpers.scripts import execute
from posterior_matching import data, runs
from posterior_matching.errors import UserError
from posterior_matching.models import build
from posterior_matching.training import vade_initialisation
from posterior_matching.training.vade_initialisation import Restarts

pytestmark = pytest.mark.slow

KEY = jax.random.key(0)
VADE_CONFIG = LEAST | {"num_clusters": 3}


# One latent dimension: everything can be integrated on a grid. -------------------------------------------------------

WEIGHTS, MEANS, SCALES = np.array([0.5, 0.3, 0.2]), np.array([-1.0, 0.5, 2.0]), np.array([0.3, 0.8, 0.5])
Q_MEAN, Q_SCALE = np.array([-0.8, 0.2, 2.3]), np.array([0.4, 0.6, 0.3])
SIGMA = 0.7
X = np.array([[-0.5, -1.2], [0.1, 0.3], [1.9, 4.5]], np.float32)
GRID = np.linspace(-12, 12, 24_001)


def decoder_mean(z):
    """Not linear, so that nothing here has a closed form."""
    return z[..., None] * np.array([1.0, 1.3]) + np.array([0.0, 0.4]) * (z**2)[..., None]


@pytest.fixture(scope="module")
def line():
    """A VaDE with that decoder and posterior, over X."""
    model = nnx.eval_shape(lambda: build("vade", VADE_CONFIG | {"latent_dim": 1}, (2,), nnx.Rngs(0)))
    model.logits = nnx.Param(jnp.float32(np.log(WEIGHTS) + 3.0))  # logits need not be normalised
    model.means = nnx.Param(jnp.float32(MEANS)[:, None])
    model.log_scales = nnx.Param(jnp.float32(np.log(SCALES))[:, None])
    model.encoder = lambda x, rngs=None: x  # noqa: ARG005
    model.decoder = lambda z, rngs=None: z  # noqa: ARG005

    def posterior(x):  # the copies of each example lie together
        repeat = len(x) // len(X)
        loc, scale = (jnp.repeat(jnp.float32(a), repeat)[:, None] for a in (Q_MEAN, Q_SCALE))
        return dist.Independent(dist.Normal(loc, scale), 1)

    model.posterior_head = posterior
    model.likelihood_head = lambda z: dist.Normal(
        z * jnp.array([1.0, 1.3]) + jnp.array([0.0, 0.4]) * jnp.square(z), SIGMA
    )
    return model


def log_joints(z):
    """log pi_c + log p(z | c), `[..., K]`."""
    return np.log(WEIGHTS) + scipy.stats.norm.logpdf(np.asarray(z)[..., None], MEANS, SCALES)


def gammas(z):
    joint = log_joints(z)
    return np.exp(joint - logsumexp(joint, axis=-1, keepdims=True))


def test_gamma_is_bayes_rule(line):
    z = np.random.default_rng(0).normal(scale=2.0, size=(4, 7))
    actual = np.asarray(line.responsibilities(jnp.float32(z)[..., None]))
    np.testing.assert_allclose(actual, gammas(z), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(actual.sum(-1), 1.0, rtol=1e-5)


def test_the_elbo_is_vade_s_integrated_over_the_posterior(line):
    q = scipy.stats.norm.pdf(GRID[:, None], Q_MEAN, Q_SCALE)  # [grid, B]
    gamma, joint = gammas(GRID), log_joints(GRID)
    with np.errstate(divide="ignore", invalid="ignore"):
        clusters = np.where(gamma > 0, gamma * (joint - np.log(gamma)), 0.0).sum(-1)  # paper's form, [grid]
    log_lik = scipy.stats.norm.logpdf(X, decoder_mean(GRID)[:, None], SIGMA).sum(-1)  # [grid, B]
    integrand = q * (log_lik + clusters[:, None] - scipy.stats.norm.logpdf(GRID[:, None], Q_MEAN, Q_SCALE))
    expected = np.trapezoid(integrand, GRID, axis=0)

    n = 20_000
    terms = jax.jit(lambda key: line.terms(jnp.repeat(jnp.asarray(X), n, axis=0), key))(KEY)
    elbo, kl = (np.asarray(a).reshape(len(X), n).T for a in (terms.elbo(), terms.kl))
    assert_mean(elbo, expected)
    log_q_over_p = scipy.stats.norm.logpdf(GRID[:, None], Q_MEAN, Q_SCALE) - logsumexp(joint, axis=-1)[:, None]
    assert_mean(kl, np.trapezoid(q * log_q_over_p, GRID, axis=0))
    # And it is a lower bound on log p(x).
    log_p_x = np.log(np.trapezoid(np.exp(log_lik + logsumexp(joint, axis=-1)[:, None]), GRID, axis=0))
    assert (expected < log_p_x).all()


def test_cluster_probabilities_are_gamma_averaged_over_the_posterior(line):
    q = scipy.stats.norm.pdf(GRID[:, None], Q_MEAN, Q_SCALE)
    expected = np.trapezoid(q[:, :, None] * gammas(GRID)[:, None], GRID, axis=0)  # [B, K]
    n = 20_000
    actual = np.asarray(jax.jit(lambda key: line.cluster_probs(jnp.asarray(X), n, key=key))(KEY))
    assert np.abs(actual - expected).max() < 5 * 0.5 / np.sqrt(n)
    cluster = line.predict_cluster(jnp.asarray(X), 200, key=KEY)
    np.testing.assert_array_equal(cluster, expected.argmax(-1))
    assert len(set(cluster.tolist())) == 3
    one_sample = jax.vmap(lambda key: line.predict_cluster(jnp.asarray(X), 1, key=key))(jax.random.split(KEY, 20))
    assert len(np.unique(one_sample, axis=0)) > 1  # one sample can mislead where many do not


# Initialisation ------------------------------------------------------------------------------------------------------


def vade(**changes):
    return build("vade", VADE_CONFIG | changes, (5,), nnx.Rngs(0))


def test_the_prior_becomes_the_fitted_mixture():
    """Density for density, so weights, means and standard deviations (not variances) are all in their places."""
    rng = np.random.default_rng(0)
    z = np.concatenate([rng.normal(m, s, (60, 2)) for m, s in ((-3.0, 0.2), (0.0, 1.0), (4.0, 2.0))])
    mixture = GaussianMixture(3, covariance_type="diag", random_state=0).fit(z)
    model = vade()
    model.initialise_prior(mixture.weights_, mixture.means_, mixture.covariances_)
    np.testing.assert_allclose(model.prior().log_prob(jnp.float32(z)), mixture.score_samples(z), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(model.responsibilities(jnp.float32(z)), mixture.predict_proba(z), atol=1e-3)


def test_the_posterior_scale_is_set_for_every_input_and_its_mean_left_alone():
    model, x = vade(), jnp.float32(np.random.default_rng(0).normal(size=(4, 5)))
    before = model.posterior(x).mean
    model.posterior_head.set_scale(jnp.array([0.03, 2.0]))
    q = model.posterior(x)
    np.testing.assert_allclose(jnp.sqrt(q.variance), np.tile([0.03, 2.0], (4, 1)), rtol=1e-4)
    np.testing.assert_array_equal(q.mean, before)


def test_the_encoder_sees_the_corrupted_data_and_the_likelihood_scores_the_clean_available_ones():
    model = vade()
    x, other = (jnp.float32(np.random.default_rng(i).normal(size=(4, 5))) for i in range(2))
    available = jnp.ones((4, 5)).at[:, 2].set(0.0)
    z = model.posterior(other).mean
    p = model.decode(z)
    expected = np.delete(scipy.stats.norm.logpdf(x, p.mean, jnp.sqrt(p.variance)), 2, axis=1).sum(1)
    actual = model.autoencoder_ll(x, corrupted_x=other, available=available)
    np.testing.assert_allclose(actual, expected, rtol=1e-4)
    # The same in the ELBO, where the posterior is narrow.
    model.posterior_head.set_scale(jnp.full(2, 1.1e-5))
    actual = model.terms(x, KEY, corrupted_x=other, available=available).reconstruction_ll
    np.testing.assert_allclose(actual, expected, rtol=1e-3)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_clusters": 0}, "model.num_clusters must be at least 1, not 0"),
        ({"latent_dim": 0}, "model.latent_dim"),
        ({"posterior": {"name": "TriLGaussian"}}, "model.posterior must be a DiagonalGaussian"),
    ],
)
def test_bad_model_options(changes, message):
    with pytest.raises(UserError, match=message):
        nnx.eval_shape(lambda: vade(**changes))


# PM-VaDE -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def matched():
    """A PM-VaDE with a mixture that tells z apart; examples and masks."""
    model = build("pm_vade", {"vade": VADE_CONFIG, "partial_posterior": GMM}, (5,), nnx.Rngs(0))
    model.vade.means[...] = jnp.array([[-0.5, 0.0], [0.5, 0.0], [0.0, 0.7]])
    model.vade.log_scales[...] = jnp.full((3, 2), -1.0)
    return model, jnp.asarray(normal(0, 4, 5)), jnp.float32(normal(1, 4, 5) > 0)


def test_partial_cluster_probabilities_are_gamma_averaged_over_the_partial_posterior(matched):
    model, x, b = matched
    z = np.asarray(model.partial_posterior(x, b).sample(jax.random.key(7), (5000,)), np.float64)
    joint = scipy.stats.norm.logpdf(z[:, :, None], model.vade.means[...], np.exp(-1.0)).sum(-1)  # equal weights
    gamma = np.exp(joint - logsumexp(joint, axis=-1, keepdims=True))
    actual = jax.jit(lambda key: model.partial_cluster_probs(x, b, 5000, key=key))(KEY)
    np.testing.assert_allclose(actual.sum(-1), 1.0, rtol=1e-5)
    cluster = model.partial_predict_cluster(x, b, 3, key=KEY)
    np.testing.assert_array_equal(cluster, model.partial_cluster_probs(x, b, 3, key=KEY).argmax(-1))
    error = 5 * np.sqrt(2) * gamma.std(0) / np.sqrt(5000)
    assert (np.abs(actual - gamma.mean(0)) < error).all()


def test_the_matching_objective_is_the_partial_posterior_s_likelihood(matched):
    model, x, b = matched
    z = model.vade.posterior(x).sample(KEY)
    np.testing.assert_allclose(model.matching_ll(x, b, KEY), model.partial_posterior(x, b).log_prob(z), rtol=1e-5)


# Training scripts ----------------------------------------------------------------------------------------------------


def vade_config(**changes):
    return small("vade", **{"steps": 14, "validation_every": 4, "restarts": 2, "pretraining__steps": 6} | changes)


def assert_same_weights(actual, expected):
    assert_same(nnx.state(actual, nnx.Param), nnx.state(expected, nnx.Param))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A VaDE and a PM-VaDE on it, both on digits."""
    folder = tmp_path_factory.mktemp("vade")
    train_vade.train(vade_config(), folder / "vade")
    train_pm_vade.train(small("pm_vade", vade_dir=str(folder / "vade")), folder / "pm_vade")
    return SimpleNamespace(folder=folder, vade=folder / "vade", pm_vade=folder / "pm_vade")


def test_a_run_has_a_row_of_the_initialised_vade_and_scores_clusters_ever_after(trained):
    actual = rows(trained.vade)
    assert [row["step"] for row in actual] == [4, 6, 8, 12, 14]
    assert "val_clustering_accuracy" not in actual[0]
    scores = {"val_clustering_accuracy", "val_nmi", "val_ari"}
    start = {"val_restart_0_elbo_nats", "val_restart_1_elbo_nats", "val_restart", "val_mixture_accuracy"}
    assert (scores | start) < actual[1].keys() and not any(key.startswith("train_") for key in actual[1])
    assert all(scores < row.keys() and "train_elbo_nats" in row for row in actual[2:])
    assert all(0.1 < row["val_clustering_accuracy"] <= 1 for row in actual[1:])
    assert all("val_clustering_accuracy" in row for row in rows(trained.pm_vade))


def test_the_restart_with_the_best_elbo_goes_on(trained):
    row = rows(trained.vade)[1]
    elbos = [row["val_restart_0_elbo_nats"], row["val_restart_1_elbo_nats"]]
    assert row["val_restart"] == np.argmax(elbos) and elbos[0] != elbos[1]
    # It is the ELBO of the whole VaDE, of the validation data like that of the training data.
    assert row["val_elbo_nats"] == pytest.approx(max(elbos), rel=0.1)


def test_restarts_side_by_side_on_an_accelerator_are_those_one_by_one(monkeypatch):
    restarts = Restarts([vade(encoder=MLP | {"residual_blocks": 1, "dropout": 0.5}) for _ in range(3)])
    for i, model in enumerate(restarts.models):
        model.posterior_head.linear.bias[...] += i
    x = jnp.float32(np.random.default_rng(0).normal(size=(4, 5)))
    one_by_one = np.asarray(restarts.autoencoder_ll(x, dropout_key=KEY))
    monkeypatch.setattr(vade_initialisation, "on_cpu", lambda: False)
    np.testing.assert_allclose(restarts.autoencoder_ll(x, dropout_key=KEY), one_by_one, rtol=1e-4)
    assert one_by_one.shape == (3, 4) and len(np.unique(one_by_one)) == 12


def test_labels_change_nothing_but_the_scores_and_are_not_needed(trained, monkeypatch):
    split = data.ArraySource.split
    unlabelled = lambda *args: dataclasses.replace(split(*args), label=None)  # noqa: E731
    monkeypatch.setattr(data.ArraySource, "split", unlabelled)
    train_vade.train(vade_config(), trained.folder / "unlabelled")
    assert_same_weights(*(runs.load_model(trained.folder / name) for name in ("unlabelled", "vade")))
    actual = rows(trained.folder / "unlabelled")
    assert not any("accuracy" in key or "nmi" in key for row in actual for key in row)
    for row, other in zip(actual, rows(trained.vade), strict=True):
        assert row.items() <= other.items()
    config = small("pm_vade", vade_dir=str(trained.folder / "unlabelled"))
    train_pm_vade.train(config, trained.folder / "pm_unlabelled")
    assert "val_matching_ll_nats" in rows(trained.folder / "pm_unlabelled")[-1]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dataset": "mixture"}, r"config\.distortion_std is for images, but the data have shape \(8,\)"),
        ({"steps": 6}, r"config\.steps must exceed the 6 steps of the phases before the last"),
        ({"model__num_clusters": 361}, r"config\.model\.num_clusters is 361, .* 360 training examples"),
    ],
)
def test_bad_training_options(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train_vade.train(vade_config(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Notebook ------------------------------------------------------------------------------------------------------------


@pytest.mark.process
def test_the_notebook_runs_from_start_to_end(trained):
    text, pictures = execute("clustering_plots", RUN_DIR=str(trained.pm_vade), NUM_IMAGES="40")
    assert "40 test images of digits, 10 clusters" in text and pictures == 2
    assert re.search(r"PM-VaDE: 0\.\d+ with all pixels, 0\.\d+ with half, 0\.\d+ with none", text)


@pytest.mark.process
def test_the_notebook_says_what_is_wrong_with_a_run(trained):
    with pytest.raises(CellExecutionError, match="is a run of vade, not of pm_vade"):
        execute("clustering_plots", RUN_DIR=str(trained.vade))
