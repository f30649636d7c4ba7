"""The VQ-VAE and Posterior Matching on it: the quantiser by its definition, what is frozen, what may not matter."""

import itertools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx
from scipy.special import logsumexp

import train_pm_vqvae
import train_vqvae
from benchmarks import synthetic
from helpers.arrays import assert_mean, by_path
from helpers.configs import small, untrained
from helpers.runs import refusal, weights
from posterior_matching import runs
from posterior_matching.errors import UserError
from posterior_matching.evaluation import inpainting
from posterior_matching.models import build
from posterior_matching.models.vqvae import VectorQuantizer
from posterior_matching.training.step import CompiledPhase

pytestmark = pytest.mark.slow

OPTIONS = {"hidden_units": 8, "residual_units": 4, "residual_blocks": 1, "codebook_size": 6, "embedding_dim": 3}


def vqvae(input_shape=(8, 8, 1), **options):
    return build("vqvae", OPTIONS | options, input_shape, nnx.Rngs(0))


def pm_vqvae():
    pixel_cnn = {"num_resnet": 1, "num_filters": 4, "dropout": 0.1}
    config = {"vqvae": OPTIONS, "conditional_dim": 5, "pixel_cnn": pixel_cnn}
    return build("pm_vqvae", config, (8, 8, 1), nnx.Rngs(0))


# Quantiser -----------------------------------------------------------------------------------------------------------


def test_the_nearest_vector_is_chosen():
    quantizer = VectorQuantizer(7, 3, rngs=nnx.Rngs(0))
    z = jax.random.normal(jax.random.key(0), (2, 4, 5, 3))
    distances = np.linalg.norm(np.asarray(z)[..., None, :] - np.asarray(quantizer.codebook[...]), axis=-1)
    quantized = quantizer(z)
    np.testing.assert_array_equal(quantized.indices, distances.argmin(-1))
    np.testing.assert_allclose(quantized.z, quantizer.codebook[...][quantized.indices], rtol=1e-6)
    expected = 0.25 * (distances.min(-1) ** 2 / 3).mean((1, 2))
    np.testing.assert_allclose(quantized.loss, expected, rtol=1e-5)


@pytest.mark.parametrize("use_ema", [True, False])
def test_gradients_go_straight_through_to_the_encoder_and_by_the_loss_to_the_codebook(use_ema):
    quantizer = VectorQuantizer(7, 3, commitment_cost=0.5, use_ema=use_ema, rngs=nnx.Rngs(0))
    z = jax.random.normal(jax.random.key(0), (1, 2, 2, 3))
    weights = jax.random.normal(jax.random.key(1), z.shape)
    np.testing.assert_array_equal(jax.grad(lambda z: (weights * quantizer(z).z).sum())(z), weights)

    codes = quantizer(z)
    difference = (z - codes.z) / z[0].size  # of the mean over 12 entries
    np.testing.assert_allclose(jax.grad(lambda z: quantizer(z).loss.sum())(z), 2 * 0.5 * difference, atol=1e-6)
    gradients = jax.tree.leaves(nnx.grad(lambda quantizer: quantizer(z).loss.sum())(quantizer))
    if use_ema:
        assert not gradients  # the codebook is no parameter
    else:
        expected = np.zeros((7, 3))
        np.add.at(expected, np.asarray(codes.indices).ravel(), -2 * np.asarray(difference).reshape(-1, 3))
        np.testing.assert_allclose(gradients[0], expected, atol=1e-6)


def test_the_codebook_follows_debiased_averages_and_codes_never_chosen_stay():
    quantizer = VectorQuantizer(5, 2, decay=0.9, rngs=nnx.Rngs(0))
    initial = np.asarray(quantizer.codebook[...])
    rng = np.random.default_rng(0)
    counts, sums = np.zeros(5), np.zeros((5, 2))
    for step in range(1, 4):
        z, indices = rng.standard_normal((2, 3, 2, 2)).astype(np.float32), rng.integers(0, 4, (2, 3, 2))
        chosen = np.eye(5)[indices.ravel()]
        counts = 0.9 * counts + 0.1 * chosen.sum(0)
        sums = 0.9 * sums + 0.1 * chosen.T @ z.reshape(-1, 2)
        quantizer.update(jnp.asarray(z), jnp.asarray(indices))
        sizes = counts / (1 - 0.9**step)
        smoothed = (sizes + 1e-5) / (sizes.sum() + 5e-5) * sizes.sum()
        expected = np.where(counts[:, None] > 0, sums / (1 - 0.9**step) / smoothed[:, None], initial)
        np.testing.assert_allclose(quantizer.codebook[...], expected, rtol=1e-4)
    np.testing.assert_array_equal(quantizer.codebook[...][4], initial[4])


# VQ-VAE --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("strides", "grid"), [((2, 2), (2, 2)), ((2, 1), (4, 4)), ((1, 1), (8, 8))])
def test_shapes_and_likelihood(strides, grid):
    model, x = vqvae(strides=strides), jax.random.uniform(jax.random.key(0), (3, 8, 8, 1))
    model.likelihood_head.log_scale[...] = 0.3
    assert model.grid == grid and model.indices(x).shape == (3, *grid)
    p = model.decode(model.indices(x))
    scale = np.exp(0.3) + 1e-5
    expected = -0.5 * (np.square((x - p.mean) / scale) + np.log(2 * np.pi * scale**2)).sum((1, 2, 3))
    terms = model.terms(x)
    np.testing.assert_allclose(terms.reconstruction_ll, expected, rtol=1e-5)
    np.testing.assert_allclose(terms.loss(), -expected + np.asarray(terms.quantizer_loss), rtol=1e-5)
    assert model.reconstruct(x).min() >= 0 and model.reconstruct(x).max() <= 1


def test_the_scale_of_initial_kernels_is_that_of_no_other_weights():
    before, after = weights(vqvae()), weights(vqvae(kernel_scale=0.5))
    assert sum(name.endswith(".kernel") for name in before) == 11
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], (0.5 if name.endswith(".kernel") else 1.0) * array)


@pytest.mark.parametrize(
    ("shape", "options", "named"),
    [
        ((9, 8, 1), {}, "images of 9x8 do not fit a code grid 4 times smaller: set config.images.size=8"),
        ((64,), {}, "a VQ-VAE needs images"),
        ((8, 8, 1), {"strides": (2,)}, "strides has a wrong number of entries"),
        ((8, 8, 1), {"decay": 1.0}, "decay must be less than 1"),
    ],
)
def test_what_does_not_fit_is_named(shape, options, named):
    with pytest.raises(UserError, match=named.replace("(", r"\(")):
        vqvae(shape, **options)


def one_step(dataset, num_devices):
    """The state after one training step, and its metrics, on the first devices, one batch in all."""
    chosen = untrained("vqvae", small("vqvae", noise_std=0.0), dataset)
    phase = CompiledPhase(chosen, chosen.phases[0], 0, 1)
    state = jax.tree.map(lambda a: jnp.stack([a] * num_devices), phase.initial_state())
    arrays = {"x": dataset.x.reshape(num_devices, -1, 8, 8, 1)}
    indices = np.broadcast_to(np.arange(16 // num_devices), (num_devices, 1, 16 // num_devices))
    state, metrics = phase.train(*state, arrays, indices)
    return jax.tree.map(np.asarray, (state.trainable, state.mutable)), jax.tree.map(np.asarray, metrics)


def test_four_devices_equal_one():
    dataset = synthetic.dataset("digits", 16)
    (one, one_metrics), (four, four_metrics) = one_step(dataset, 1), one_step(dataset, 4)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(four), strict=True):
        np.testing.assert_array_equal(b, np.broadcast_to(b[:1], b.shape))  # devices agree among themselves
        np.testing.assert_allclose(a[0], b[0], rtol=1e-4, atol=1e-5)
    for name in ("loss", "perplexity"):
        np.testing.assert_allclose(one_metrics[name][0], four_metrics[name][0], rtol=1e-4)
    before = untrained("vqvae", small("vqvae"), dataset).phases[0].model.quantizer.codebook[...]
    assert np.abs(by_path(one[1])["quantizer.codebook.value"][0] - before).max() > 1e-3


def test_validation_counts_the_codes_used_over_all_examples():
    usage = np.array([0.5, 0.25, 0.25, 0.0])
    actual = train_vqvae.summarise({"loss": 1.0, "code_usage": usage}, 1)
    assert actual.keys() == {"loss", "perplexity", "codes_used"} and actual["codes_used"] == 3
    assert actual["perplexity"] == pytest.approx(2**1.5)


# PM-VQVAE ------------------------------------------------------------------------------------------------------------


def test_matching_ll_is_the_log_probability_of_the_codes_of_x():
    model = pm_vqvae()
    x, b = jax.random.uniform(jax.random.key(0), (2, 8, 8, 1)), jnp.ones((2, 8, 8, 1)).at[:, :4].set(0.0)
    logits = model.pixel_cnn.logits(model.vqvae.indices(x), model.conditional_input(x, b))
    probabilities = np.asarray(jax.nn.softmax(logits))
    codes = np.asarray(model.vqvae.indices(x))
    expected = [sum(np.log(probabilities[(n, *at, codes[(n, *at)])]) for at in np.ndindex(2, 2)) for n in range(2)]
    np.testing.assert_allclose(model.matching_ll(x, b), expected, rtol=1e-5)


def test_the_weights_of_draws_are_those_of_the_sum_over_all_codes():
    """E[p(x_o, z) / q(z | x_o)] under q is p(x_o), here over the 6^4 codes of a 2x2 grid."""
    model, num_samples = pm_vqvae(), 4000
    x, b = jax.random.uniform(jax.random.key(0), (2, 8, 8, 1)), np.ones((2, 8, 8, 1))
    b[:, :4], b[1, :, 3:] = 0.0, 0.0
    codes = jnp.asarray(list(itertools.product(range(6), repeat=4))).reshape(-1, 2, 2)
    log_prior = model.pixel_cnn.log_prob(codes, jnp.tile(model.conditional_input(x[:1], 0.0 * b[:1]), (len(codes), 1)))
    p = model.vqvae.decode(codes)
    imputations, log_weights = jax.jit(lambda x, b: model.impute_and_weigh(x, b, num_samples, key=jax.random.key(1)))(
        x, jnp.float32(b)
    )
    np.testing.assert_array_equal(imputations * b, np.broadcast_to(x * b, imputations.shape))
    for n in range(2):
        log_p_xo = np.where(b[n] == 1, scipy.stats.norm.logpdf(x[n], p.mean, p.scale), 0.0).sum((1, 2, 3))
        exact = logsumexp(np.asarray(log_prior) + log_p_xo)
        assert_mean(np.exp(np.asarray(log_weights[:, n], np.float64) - exact), 1.0)


def test_a_linear_layer_takes_the_features_of_the_partial_encoder_as_they_are():
    """The published one has no 1x1 convolution in between."""
    shapes = {name: array.shape for name, array in weights(pm_vqvae()).items()}
    of = {part: {name for name in shapes if name.startswith(part)} for part in ("vqvae.encoder.", "partial_encoder.")}
    kept = {name.replace("vqvae.encoder.", "partial_encoder.") for name in of["vqvae.encoder."] if ".out." not in name}
    assert of["partial_encoder."] == kept
    assert shapes["condition.kernel"] == (2 * 2 * OPTIONS["hidden_units"], 5)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A PM-VQVAE on a VQ-VAE, a few steps each."""
    folder = tmp_path_factory.mktemp("vqvae")
    train_vqvae.train(small("vqvae"), str(folder / "base"))
    return Path(train_pm_vqvae.train(small("pm_vqvae", vqvae_dir=str(folder / "base")), str(folder / "pm")))


def test_a_checkpoint_with_another_codebook_is_refused(run_dir, tmp_path):
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    description = json.loads((copy / "config.json").read_text())
    description["config"]["model"]["vqvae"]["codebook_size"] = 33
    (copy / "config.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match=r"does not fit its config.json: .*codebook: \(33, 3\) -> \(16, 3\)"):
        runs.load_model(copy)


# Evaluation ----------------------------------------------------------------------------------------------------------


def test_the_evaluation_writes_what_it_says(run_dir):
    options = {"embedding": "pixels", "num_instances": 30, "num_samples": 2, "num_trials": 2, "baselines": True}
    inpainting.evaluate(run_dir, **options)
    results = run_dir / "imputation_results"
    actual = json.loads((results / "results.json").read_text())
    assert actual["metrics"].keys() == {"psnr_db", "psnr_mean_db", "psnr_knn_db", "precision", "recall", "f_1_8", "f_8"}
    assert actual["num_examples"] == 30 and actual["flags"]["embedding"] == "pixels"
    shapes = {path.stem: np.load(path).shape for path in results.glob("*.npy")}
    assert shapes == {"psnrs": (2,), "prd_data": (2, 2, 1001), "f_scores": (2, 2)}
    np.testing.assert_array_equal(np.load(results / "psnrs.npy"), actual["metrics"]["psnr_db"]["trials"])
    for column, names in enumerate((("precision", "f_1_8"), ("recall", "f_8"))):
        for name in names:
            np.testing.assert_array_equal(
                np.load(results / "f_scores.npy")[:, column], actual["metrics"][name]["trials"]
            )
    assert 5 < actual["metrics"]["psnr_mean_db"]["mean"] < actual["metrics"]["psnr_knn_db"]["mean"] < 40
    assert (results / "imputations.png").exists()
    weighted = inpainting.evaluate(run_dir, **options, weighted=True)  # the same draws
    np.testing.assert_array_equal(weighted.trials("f_8"), actual["metrics"]["f_8"]["trials"])
    assert (weighted.trials("psnr_db") != actual["metrics"]["psnr_db"]["trials"]).all()
    few = {"embedding": "none", "num_instances": 12, "num_samples": 2, "num_trials": 1}  # too few for clusters
    assert inpainting.evaluate(run_dir, **few).metrics.keys() == {"psnr_db"}
    assert {path.stem for path in results.glob("*.npy")} == {"psnrs"}


def test_without_network_the_default_embedding_fails_in_one_line(run_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("POSTERIOR_MATCHING_CACHE", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://localhost:9")  # nothing listens there
    message = refusal(inpainting.evaluate, run_dir, num_instances=30)
    assert message.startswith("cannot download the Inception weights") and message.endswith("embedding=pixels or none")
