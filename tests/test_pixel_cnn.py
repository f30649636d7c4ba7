"""The PixelCNN: causal, a distribution, and sampled from what it says it is."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from helpers.arrays import Z_LIMIT
from posterior_matching.config import call
from posterior_matching.errors import UserError
from posterior_matching.models.pixel_cnn import PixelCNN, Region, UpsamplingLinear

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def build(grid, codebook_size=3, num_hierarchies=1, seed=0, **options):
    options = {"num_resnet": 2 if num_hierarchies == 1 else 1, "num_filters": 4} | options
    return PixelCNN(
        grid=grid,
        codebook_size=codebook_size,
        conditional_dim=2,
        num_hierarchies=num_hierarchies,
        rngs=nnx.Rngs(seed, dropout=1),
        **options,
    )


def sharpen(model, factor=4.0):
    """Makes the untrained model far from uniform."""
    model.out.kernel[...] = factor * model.out.kernel[...]
    return model


GRIDS = [((4, 3), 1), ((4, 5), 2), ((5, 5), 3)]


@pytest.mark.parametrize(("grid", "num_hierarchies"), GRIDS)
def test_logits_depend_on_all_earlier_codes_in_raster_order_and_on_no_other(grid, num_hierarchies):
    positions, condition = grid[0] * grid[1], jnp.ones((1, 2))
    model = build(grid, codebook_size=positions, num_hierarchies=num_hierarchies)
    codes = jnp.arange(positions).reshape(1, *grid)  # every position has an embedding of its own

    graphdef, embedding, rest = nnx.split(model, nnx.PathContains("embedding"), ...)

    @jax.jit
    @jax.jacobian
    def jacobian(embedding):  # of [H W, K]
        return nnx.merge(graphdef, embedding, rest).logits(codes, condition).reshape(positions, -1)

    (by_embedding,) = jax.tree.leaves(jacobian(embedding))  # [H W, K, H W, features]
    influence = np.abs(by_embedding).sum((1, 3))
    np.testing.assert_array_equal(influence > 0, np.tri(positions, k=-1, dtype=bool))


@pytest.mark.parametrize("left", [True, False])
def test_upsampling_is_a_transposed_convolution_whose_kernel_is_masked(left):
    """As in TensorFlow Probability's PixelCNN: 2x4 taps at stride 2, of which the vertical stack has the first three
    columns; the horizontal stack has 2x2 taps."""
    layer = UpsamplingLinear(3, 1, left, rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.zeros_like(layer.bias[...])
    taps = layer.kernel[...].reshape(3, 2, -1, 3).transpose(1, 2, 3, 0)  # [row, column, fine, coarse]
    kernel = jnp.zeros((2, 4, 3, 3)).at[:, 0 if left else 1 : 3].set(taps)

    def convolve(fine):
        return jax.lax.conv_general_dilated(fine, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    x = jax.random.normal(jax.random.key(1), (2, 3, 4, 3))
    (expected,) = jax.linear_transpose(convolve, jnp.zeros((2, 6, 8, 3)))(x)
    np.testing.assert_allclose(layer.upsample(x, Region(0, 0, 6, 8)), expected, rtol=1e-5, atol=1e-6)
    # A grid of odd size is cut; a region of it is part of the whole.
    odd = layer.upsample(x, Region(0, 0, 5, 7))
    np.testing.assert_allclose(odd, expected[:, :5, :7], rtol=1e-5, atol=1e-6)
    row = layer.upsample(x[:, 1:2], Region(3, 0, 1, 8))
    np.testing.assert_allclose(row, expected[:, 3:4], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_hierarchies", [1, 2])
def test_probabilities_of_all_code_grids_sum_to_one(num_hierarchies):
    model = sharpen(build((2, 3), codebook_size=2, num_hierarchies=num_hierarchies))
    codes = np.array(list(itertools.product(range(2), repeat=6))).reshape(-1, 2, 3)
    log_prob = nnx.jit(PixelCNN.log_prob)(model, codes, jnp.broadcast_to(jnp.array([0.3, -1.0]), (len(codes), 2)))
    assert np.exp(log_prob).max() > 3 / 64  # not the uniform distribution
    np.testing.assert_allclose(np.exp(log_prob).sum(), 1.0, rtol=1e-5)


@pytest.mark.parametrize(("grid", "num_hierarchies"), GRIDS)
def test_samples_are_drawn_from_the_logits_of_one_pass(grid, num_hierarchies):
    """With the same keys, drawing from `logits` of the finished grid gives the same codes: nothing is approximated."""
    model = sharpen(build(grid, codebook_size=5, num_hierarchies=num_hierarchies))
    condition = jax.random.normal(jax.random.key(0), (3, 2))
    key = jax.random.key(1)
    codes = nnx.jit(PixelCNN.sample)(model, condition, key)
    assert codes.shape == (3, *grid) and len(np.unique(codes)) > 1
    logits, keys = nnx.jit(PixelCNN.logits)(model, codes, condition), jax.random.split(key, grid)
    for i, j in np.ndindex(grid):
        np.testing.assert_array_equal(jax.random.categorical(keys[i, j], logits[:, i, j]), codes[:, i, j])


def test_the_condition_matters_and_examples_do_not_mix():
    model = build((3, 3))
    codes = jax.random.randint(jax.random.key(0), (2, 3, 3), 0, 3)
    condition = jax.random.normal(jax.random.key(1), (2, 2))
    both = model.logits(codes, condition)
    np.testing.assert_allclose(both[:1], model.logits(codes[:1], condition[:1]), atol=1e-5)
    assert np.abs(both - model.logits(codes, condition + 1)).max() > 1e-3


def test_an_untrained_network_begins_near_a_uniform_guess():
    """The published initialisation begins at 575 to 768 nats for 49 codes of 256; a uniform guess costs 272."""
    model = PixelCNN(
        grid=(7, 7), codebook_size=256, conditional_dim=512, num_resnet=2, num_filters=32, rngs=nnx.Rngs(0)
    )
    codes = jax.random.randint(jax.random.key(0), (8, 7, 7), 0, 256)
    condition = jax.random.normal(jax.random.key(1), (8, 512))
    loss = -nnx.jit(PixelCNN.log_prob)(model, codes, condition).mean()
    assert loss < 1.25 * 49 * np.log(256)


@pytest.mark.parametrize(("options", "std"), [({}, 1 / 8), ({"embedding_std": 0.88}, 0.88)])
def test_the_embedding_begins_at_its_scale(options, std):
    actual = np.asarray(build((2, 2), codebook_size=256, num_filters=64, **options).embedding.embedding[...])
    assert abs(actual.std() / std - 1) < Z_LIMIT / np.sqrt(2 * actual.size)


def test_dropout_acts_while_training_only():
    model, codes, condition = build((3, 3), dropout=0.5), jnp.zeros((1, 3, 3), int), jnp.ones((1, 2))
    first, again = (model.log_prob(codes, condition, nnx.Rngs(dropout=seed)) for seed in (0, 1))
    assert first != again
    assert model.log_prob(codes, condition) == model.log_prob(codes, condition)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_resnet": 0}, r"^pixel_cnn\.num_resnet must be at least 1, not 0"),
        ({"num_filters": 0}, r"^pixel_cnn\.num_filters must be"),
        ({"embedding_std": 0.0}, r"^pixel_cnn\.embedding_std must be greater than 0, not 0.0"),
        ({"num_hierarchies": 4}, r"a code grid of 7x7 cannot be halved 3 times: lower pixel_cnn\.num_hierarchies"),
    ],
)
def test_bad_sizes_are_named(options, named):
    options = {"num_resnet": 2, "num_filters": 4} | options
    context = {"grid": (7, 7), "codebook_size": 3, "conditional_dim": 2, "rngs": nnx.Rngs(0)}
    with pytest.raises(UserError, match=named):
        call(PixelCNN, options, "pixel_cnn", **context)
