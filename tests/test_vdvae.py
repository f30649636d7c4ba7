"""The PM-VDVAE: block strings, closed forms, gradients that must not flow, and what it must never look at."""

import dataclasses
import functools
import json
import shutil
import signal
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from flax import nnx

from benchmarks import synthetic
from configs import pm_vdvae_mnist
from helpers.arrays import assert_mean, by_path, normal, randomised
from helpers.configs import FAMILIES, small, untrained
from helpers.scripts import finish, start
from posterior_matching import models
from posterior_matching.errors import UserError
from posterior_matching.evaluation import inpainting
from posterior_matching.models.vdvae import BlockOptions, DecoderBlock, PyramidEncoder, VDVAETerms, upsample
from posterior_matching.models.vdvae_layout import (
    DecoderLayer,
    encoder_resolutions,
    parse_decoder,
    parse_encoder,
    parse_widths,
)

pytestmark = pytest.mark.slow

KEY = jax.random.key(0)
TINY = {"encoder": "4x1,4d3,1x1", "decoder": "1x1,4m1", "latent_dim": 2, "width": 8, "num_components": 2}
TINY |= {"num_levels": 6, "bottleneck": 0.5}


def build(channels=1, **options):
    config = TINY | options
    return nnx.eval_shape(lambda: models.build("pm_vdvae", config, (4, 4, channels), nnx.Rngs(0)))


def example(channels=1, batch=3):
    rng = np.random.default_rng(1)
    x, b = rng.integers(0, 6, (batch, 4, 4, channels)), rng.integers(0, 2, (batch, 4, 4, 1))
    return jnp.float32(x), jnp.float32(b)


# Block strings


def test_block_strings():
    layers = parse_encoder("28x2, 28d2,14x1,14d2,7d2,3x1,3d3", 28)
    assert layers == [(28, 1), (28, 1), (28, 2), (14, 1), (14, 2), (7, 2), (3, 1), (3, 3)]
    assert encoder_resolutions(layers) == [28, 14, 7, 3, 1]
    assert parse_decoder("1x2,3m1,28m3", 28, [28, 14, 7, 3, 1]) == [(1, None), (1, None), (3, 1), (28, 3)]
    assert parse_widths("", 9, [4, 1]) == {4: 9, 1: 9}
    assert parse_widths("1:5", 9, [4, 1]) == {4: 9, 1: 5}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": "4x1,4p2"}, r"model\.encoder: '4p2' is neither RxN .* nor RdK"),
        ({"decoder": "1x1,4d1"}, r"model\.decoder: '4d1' is neither RxN .* nor RmK"),
        ({"encoder": "8x1,8d2"}, r"a block of resolution 8 where the image has 4"),
        ({"encoder": "4d2,4x1"}, r"a block of resolution 4 where the image has 2"),
        ({"encoder": "4d5"}, r"4d5 pools over 5 of 4 pixels; it must be 2\.\.4"),
        ({"decoder": "2x1,4m2"}, r"resolution 2 is none of the encoder's: \[4, 1\]"),
        ({"decoder": "4m1"}, r"4m1 needs an earlier block of a lower resolution 1"),
        ({"decoder": "4x1,1x1"}, r"the last block has resolution 1, the image 4"),
        ({"custom_widths": "2:8"}, r"'2:8' is not resolution:width"),
        ({"compute_dtype": "float16"}, r"must be 'float32' or 'bfloat16', not 'float16'"),
        ({"channels": 2}, r"square images of 1 or 3 channels, but the data have shape \(4, 4, 2\)"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        build(**options)


def test_bits_per_dimension_are_of_the_values_that_the_data_have():
    with pytest.raises(UserError, match=r"num_levels is 256, but the pixels of digits have 17 values"):
        untrained("pm_vdvae", small("pm_vdvae", model__num_levels=256), synthetic.dataset("digits", 4))


# Parts


def test_the_encoder_averages_windows_drops_what_fills_none_and_pads_or_drops_channels():
    """Blocks that add nothing to what the first convolution copies."""
    options = BlockOptions(0.5, jnp.float32, False, nnx.Rngs(params=KEY))
    encoder = PyramidEncoder(3, parse_encoder("7d2,3x1", 7), {7: 3, 3: 4}, options)
    encoder.conv_in.kernel[...] = jnp.zeros((3, 3, 3, 3)).at[1, 1].set(jnp.eye(3))
    for block in encoder.blocks:
        block.convs[-1].kernel[...] *= 0.0
    x = jnp.arange(2 * 7 * 7 * 3, dtype=jnp.float32).reshape(2, 7, 7, 3)
    actual = encoder(x)
    np.testing.assert_array_equal(actual[7], x)
    expected = np.asarray(x)[:, :6, :6].reshape(2, 3, 2, 3, 2, 3).mean((2, 4))
    np.testing.assert_allclose(actual[3], np.pad(expected, ((0, 0),) * 3 + ((0, 1),)), rtol=1e-6)


@pytest.mark.parametrize("size", [6, 7])
def test_upsampling_repeats_the_nearest(size):
    x, index = jnp.asarray(normal(0, 2, 3, 3, 2)), np.arange(size) * 3 // size
    np.testing.assert_array_equal(upsample(x, size), np.asarray(x)[:, index][:, :, index])


def test_initial_weights():
    """The prior starts at N(0, softplus(0)^2) and leaves the state alone; outputs of blocks are scaled by 1/sqrt(N)."""
    options = BlockOptions(0.5, jnp.float32, False, nnx.Rngs(params=KEY))
    block = DecoderBlock(DecoderLayer(1), 16, 4, 25, options)
    head = block.prior_head.convs[-1]
    assert not head.kernel[...].any() and not head.bias[...].any()
    for conv in (block.project, block.resnet.convs[-1]):  # 4 x 16 and 8 x 16 weights
        unit = np.asarray(conv.kernel[...]) * np.sqrt(conv.kernel.shape[2] * 25)
        assert abs(unit.std() - 1) < 5 / np.sqrt(2 * unit.size)


def count(module):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


def test_parameter_count_of_the_mnist_config():
    config = pm_vdvae_mnist.get_config()
    model = nnx.eval_shape(lambda: models.build("pm_vdvae", config.model.to_dict(), (28, 28, 1), nnx.Rngs(0)))

    def block(i, o, kernel, m=48):  # 1x1, two of `kernel`, 1x1
        return i * m + m + 2 * (kernel**2 * m * m + m) + m * o + o

    blocks = {3: 18, 1: 2}  # of encoders and decoder, by kernel size
    parts = {
        "encoder": 9 * 192 + 192 + sum(n * block(192, 192, k) for k, n in blocks.items()),
        "partial_encoder": 9 * 2 * 192 + 192 + sum(n * block(192, 192, k) for k, n in blocks.items()),
        "blocks": sum(
            n * (block(384, 32, k) + block(192, 32 + 192, k) + block(384, 16 + 136, k) + block(192, 192, k) + 17 * 192)
            for k, n in blocks.items()
        ),
        "biases": 192 * (28**2 + 14**2 + 7**2 + 3**2 + 1),
        "conv_out": 193 * 30,
    }
    assert {name: count(getattr(model, name)) for name in parts} == parts
    assert count(model) == sum(parts.values()) + 2 * 192 == 7_266_942


# Terms and their gradients


@functools.cache
def gradients(**options):
    """Gradients of each of the three terms in all parameters, by name, and the terms."""
    model = randomised(build(**options))
    x, b = example()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def run(params):
        terms, pullback = jax.vjp(lambda p: nnx.merge(graphdef, p, rest).terms(x, b, KEY), params)
        ones = jnp.ones(len(x))
        directions = VDVAETerms(*(jnp.eye(3)[:, i, None] * ones for i in range(3)))
        return terms, jax.vmap(pullback)(directions)[0]

    terms, actual = run(params)
    return terms, by_path(actual)


def test_rematerialisation_changes_nothing():
    (terms, actual), (same_terms, same) = gradients(), gradients(rematerialise=True)
    for name, value in terms._asdict().items():
        np.testing.assert_allclose(getattr(same_terms, name), value, rtol=1e-5)
    for name, value in actual.items():
        np.testing.assert_allclose(same[name], value, rtol=1e-4, atol=1e-4 * np.abs(value).max(), err_msg=name)


def test_bfloat16_is_close_and_parameters_and_terms_stay_float32():
    model = randomised(build(compute_dtype="bfloat16"))
    exact, _ = gradients()
    terms = jax.jit(lambda: model.terms(*example(), KEY))()
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))} == {np.dtype("float32")}
    for name, value in exact._asdict().items():
        actual = getattr(terms, name)
        assert actual.dtype == jnp.float32 and (np.asarray(actual) != np.asarray(value)).any()
        np.testing.assert_allclose(actual, value, rtol=0.1, err_msg=name)


# Conditionals


SIZE, LOC, SCALE, BIAS = 2, 0.3, 0.2, -0.1


@functools.cache
def linear_model():
    """One block and one linear layer: the location of a pixel's logistic is Gaussian a priori, variance SPREAD."""
    config = TINY | {"encoder": "2x1", "decoder": "2x1", "num_components": 1}
    model = randomised(nnx.eval_shape(lambda: models.build("pm_vdvae", config, (SIZE, SIZE, 1), nnx.Rngs(0))))
    block = model.blocks[0]
    for conv in (block.resnet.convs[-1], block.prior_head.convs[-1]):
        conv.kernel[...] = 0.0 * conv.kernel[...]
        conv.bias[...] = 0.0 * conv.bias[...]
    for head in (block.posterior_head, block.partial_posterior_head):  # proposals that are wrong, but not too wrong
        head.convs[-1].kernel[...] = 0.3 * head.convs[-1].kernel[...]
        head.convs[-1].bias[...] = 0.3 * head.convs[-1].bias[...]
    weights = np.zeros((1, 1, 8, 3), np.float32)
    weights[..., 1] = 0.25 * np.random.default_rng(0).normal(size=8)
    model.conv_out.kernel[...] = jnp.asarray(weights)
    scale = np.log(np.expm1(SCALE - np.exp(-7)))
    model.conv_out.bias[...] = jnp.array([0.0, LOC, scale], jnp.float32)
    state = model.biases["2"][...] + block.project.bias[...]  # before z is added, [2, 2, 8]
    mean = (state * model.gain[...] + model.bias[...]) @ weights[0, 0, :, 1] + LOC
    direction = block.project.kernel[0, 0] @ (model.gain[...] * weights[0, 0, :, 1])
    spread = np.linalg.norm(direction) * (np.log(2) + 1e-5)
    return model, np.asarray(mean, np.float64), float(spread)


def exact_log_prob(x, mean, spread, levels=6):
    """log of the integral of P(x | m) N(m; mean, spread^2) dm."""
    edges = [-np.inf, *(2 * (np.arange(levels - 1) + 0.5) / (levels - 1) - 1), np.inf]

    def integrand(m):
        cdf = scipy.stats.logistic.cdf([edges[x], edges[x + 1]], m, SCALE)
        return (cdf[1] - cdf[0]) * scipy.stats.norm.pdf(m, mean, spread)

    return np.log(scipy.integrate.quad(integrand, mean - 10 * spread, mean + 10 * spread, epsabs=1e-10)[0])


def test_importance_samples_of_a_linear_model_agree_with_the_closed_form():
    model, mean, spread = linear_model()
    rng, copies = np.random.default_rng(0), 40
    x, b = rng.integers(0, 6, (2, SIZE, SIZE, 1)), np.array([[1, 0, 1, 1], [0, 0, 1, 0]]).reshape(2, SIZE, SIZE, 1)
    pixels = np.array(
        [[[exact_log_prob(x[n, i, j, 0], mean[i, j], spread) for j in (0, 1)] for i in (0, 1)] for n in (0, 1)]
    )
    tile = lambda a: jnp.repeat(jnp.float32(a), copies, axis=0)  # noqa: E731
    result = jax.jit(lambda key: model.is_log_prob(tile(x), tile(b), 300, key=key, chunk_size=64))(KEY)
    for actual, mask in ((result.log_p_x, np.ones_like(b)), (result.log_p_xo, b)):
        exact = (pixels * mask[..., 0]).sum((1, 2))
        ratio = np.exp(np.asarray(actual, np.float64).reshape(2, copies) - exact[:, None])  # expectation 1
        assert (ratio.std(1) > 1e-3).all() and (ratio.std(1) < 0.5).all()
        assert_mean(ratio.T, 1.0)
    draw = jax.jit(lambda key: model.impute_and_weigh(jnp.float32(x), jnp.float32(b), 4000, key=key))
    log_weights = np.asarray(draw(KEY)[1], np.float64)
    assert_mean(np.exp(log_weights - (pixels * b[..., 0]).sum((1, 2))), 1.0)
    np.testing.assert_allclose(result.log_p_xu_given_xo, result.log_p_x - result.log_p_xo, rtol=1e-5, atol=1e-5)
    assert (np.asarray(result.ess_x) >= 1).all() and (np.asarray(result.ess_x) < 300).all()


def test_joint_samples_of_a_linear_model_have_its_probabilities():
    model, mean, spread = linear_model()
    n = 20_000
    x = np.asarray(jax.jit(lambda key: model.sample(n, key=key))(KEY))
    for i, j in np.ndindex(SIZE, SIZE):
        expected = np.exp([exact_log_prob(level, mean[i, j], spread) for level in range(6)])
        np.testing.assert_allclose(expected.sum(), 1.0, rtol=1e-6)
        counts = np.bincount(x[:, i, j, 0].astype(int), minlength=6)
        assert (np.abs(counts - n * expected) < 5 * np.sqrt(n * expected * (1 - expected)) + 1).all()


def test_levels_are_the_inverse_of_images():
    model = build(num_levels=17)
    levels = jnp.arange(17.0)
    np.testing.assert_array_equal(model.to_levels(model.from_levels(levels)), levels)
    np.testing.assert_array_equal(model.to_levels(jnp.arange(17) / 16.0), levels)


# Scripts


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a tiny model on digits, a few steps."""
    family = dataclasses.replace(FAMILIES["pm_vdvae"], pictures=None)  # which take longest to compile
    return Path(family.train(small("pm_vdvae"), str(tmp_path_factory.mktemp("vdvae") / "run")))


def test_the_imputation_evaluation_scores_images_in_the_unit_range(run):
    inpainting.evaluate(run, embedding="pixels", num_instances=30, num_samples=2, num_trials=1, baselines=True)
    actual = json.loads((run / "imputation_results" / "results.json").read_text())["metrics"]
    assert 5 < actual["psnr_db"]["mean"] < 40 and 5 < actual["psnr_mean_db"]["mean"] < 40


@pytest.mark.process
def test_an_interrupted_likelihood_evaluation_goes_on_and_ends_as_if_never_stopped(run, tmp_path):
    options = ["--num_instances=40", "--num_samples=100", "--num_trials=1", "--batch_size=1"]
    copies = [shutil.copytree(run, tmp_path / name) for name in ("whole", "stopped")]
    whole, stopped = (start("eval_pm_vdvae_likelihood", f"--run_dir={copy}", *options) for copy in copies)
    parts = copies[1] / "likelihood_results" / "parts" / "trial_1"
    while stopped.poll() is None and not list(parts.glob("0*.npz")):
        time.sleep(0.05)
    stopped.send_signal(signal.SIGINT)
    message = finish(stopped, status=1)[1].strip().splitlines()[-1]
    assert "run the same command again to resume" in message
    assert not (copies[1] / "likelihood_results" / "results.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in parts.glob("0*.npz")}
    assert kept
    for process in (whole, start("eval_pm_vdvae_likelihood", f"--run_dir={copies[1]}", *options)):
        finish(process)
    assert not parts.exists()
    for name in ("x_lls", "xo_lls", "bpd"):
        arrays = [np.load(copy / "likelihood_results" / f"{name}.npy") for copy in copies]
        np.testing.assert_array_equal(*arrays)
    actual = json.loads((copies[0] / "likelihood_results" / "results.json").read_text())["metrics"]
    difference = actual["log_p_x_nats"]["mean"] - actual["log_p_xo_nats"]["mean"]
    assert actual["ac_ll_nats"]["mean"] == pytest.approx(difference, abs=1e-3)
    assert actual["non_finite_x"]["mean"] == 0 and 1 <= actual["effective_sample_size_x"]["mean"] <= 100
