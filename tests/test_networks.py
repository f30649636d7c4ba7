"""Network bodies against NumPy, their announced shapes, their initial weights and their errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from helpers.arrays import filled
from posterior_matching.errors import UserError
from posterior_matching.models.networks import Conv, ConvDecoder, ConvEncoder, ResidualMLP

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def arrays(linear):
    return np.asarray(linear.kernel[...], np.float64), np.asarray(linear.bias[...], np.float64)


def relu(h):
    return np.maximum(h, 0.0)


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize(("input_shape", "blocks"), [((7,), 0), ((7,), 1), ((2, 3, 4), 3)])
def test_residual_mlp_equals_numpy(input_shape, blocks, layer_norm):
    network = filled(lambda: ResidualMLP(input_shape, blocks, 5, layer_norm, rngs=nnx.Rngs(0)))
    x = np.random.default_rng(1).normal(size=(4, *input_shape)).astype(np.float32)

    def linear(layer, h):
        kernel, bias = arrays(layer)
        h = h @ kernel + bias
        if layer_norm:
            h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5)
        return h

    h = linear(network.linear_in, x.reshape(4, -1).astype(np.float64))
    for first, second in network.blocks:
        h = h + linear(second, relu(linear(first, relu(h))))
    assert len(network.blocks) == blocks
    np.testing.assert_allclose(network(jnp.asarray(x)), relu(h), rtol=1e-4, atol=1e-5)


def test_layer_norm_has_no_parameters():
    def shapes(layer_norm):
        network = nnx.eval_shape(lambda: ResidualMLP((3,), 2, 8, layer_norm, rngs=nnx.Rngs(0)))
        return jax.tree.map(lambda a: a.shape, nnx.to_pure_dict(nnx.state(network, nnx.Param)))

    assert shapes(True) == shapes(False)


def test_dropout_acts_only_with_rngs_drops_its_share_and_keeps_the_mean():
    share, units, rows = 0.3, 200, 500
    network = ResidualMLP((units,), 1, units, dropout=share, rngs=nnx.Rngs(0))
    first, second = network.blocks[0]
    network.linear_in.kernel[...] = jnp.eye(units)
    first.kernel[...] = jnp.eye(units)
    first.bias[...] = jnp.ones(units)
    second.kernel[...] = jnp.eye(units)
    x = jnp.full((rows, units), 2.0)  # every unit: 2 + dropout(relu(2) + 1)
    np.testing.assert_array_equal(network(x), 5.0)
    out = np.asarray(network(x, nnx.Rngs(dropout=1)), np.float64)
    kept = 2.0 + 3.0 / (1.0 - share)
    assert set(np.round(np.unique(out), 4)) == {2.0, round(kept, 4)}
    dropped, n = (out < 2.5), out.size
    assert abs(dropped.mean() - share) < 5 * np.sqrt(share * (1 - share) / n)
    assert abs(out.mean() - 5.0) < 5 * out.std() / np.sqrt(n)
    # Rows and columns are dropped independently: no row or column is dropped as one.
    for axis, size in ((0, rows), (1, units)):
        z = (dropped.mean(axis) - share) / np.sqrt(share * (1 - share) / size)
        assert np.abs(z).max() < 5
    np.testing.assert_array_equal(out, network(x, nnx.Rngs(dropout=1)))
    assert (out != np.asarray(network(x, nnx.Rngs(dropout=2)))).any()


def abstract_shapes(cls, input_shape, layers):
    """Announced and produced shape of the output, without computing anything."""
    announced = []

    def run(x):
        network = cls(input_shape, layers, rngs=nnx.Rngs(0))
        announced.append(network.output_shape)
        return network(x)

    out = jax.eval_shape(run, jax.ShapeDtypeStruct((3, *input_shape), jnp.float32))
    return (3, *announced[0]), out.shape


ENCODERS = [
    ((8, 8, 1), ((4, 3, 1), (5, 3, 2), (6, 4, 1))),
    ((9, 7, 3), ((4, 5, 2), (3, 2, 2))),
    ((16, 16, 1), ((2, 3, 1), (2, 3, 2), (4, 3, 2), (4, 1, 1))),
    ((11, 11, 2), ((2, 4, 3), (3, 2, 3), (5, 1, 2))),
    ((6, 5, 1), ((3, 3, 2),)),
]
DECODERS = [((64, 4, 1), (3, 3, 2), (1, 3, 1)), ((5, 3, 1),), ((2, 2, 1), (3, 4, 3), (2, 1, 2))]


CONVOLUTIONS = [(ConvEncoder, *case) for case in ENCODERS] + [(ConvDecoder, (7,), layers) for layers in DECODERS]


@pytest.mark.parametrize(("cls", "input_shape", "layers"), CONVOLUTIONS, ids=str)
def test_convolutions_produce_the_shape_they_announce(cls, input_shape, layers):
    announced, produced = abstract_shapes(cls, input_shape, layers)
    assert produced == announced


def test_conv_encoder_is_convolutions_each_followed_by_a_leaky_relu_with_the_last_one_valid():
    network = filled(lambda: ConvEncoder((5, 5, 2), ((3, 3, 2), (4, 3, 1)), rngs=nnx.Rngs(0)))
    x = np.random.default_rng(0).normal(size=(2, 5, 5, 2))
    (w1, b1), (w2, b2) = (arrays(layer) for layer in network.layers)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))  # SAME: 5 -> 3 with stride 2 and kernel 3
    h = np.zeros((2, 3, 3, 3))
    for i in range(3):
        for j in range(3):
            h[:, i, j] = np.tensordot(padded[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3], w1, 3) + b1
    h = np.where(h > 0, h, 0.01 * h)
    out = np.tensordot(h, w2, 3) + b2  # VALID: one position
    out = np.where(out > 0, out, 0.01 * out)
    assert (out < 0).any() and network.output_shape == (1, 1, 4)
    np.testing.assert_allclose(network(jnp.float32(x))[:, 0, 0], out, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("activate_output", [False, True])
def test_conv_decoder_has_a_leaky_relu_between_layers_and_behind_the_last_one_only_if_asked(activate_output):
    layers = ((3, 2, 1), (2, 1, 1))  # kernel size 1: a matrix product at every position
    options = {"activate_output": True} if activate_output else {}  # linear by default
    network = filled(lambda: ConvDecoder((4,), layers, **options, rngs=nnx.Rngs(0)))
    z = np.random.default_rng(0).normal(size=(5, 4))
    (w1, b1), (w2, b2) = (arrays(layer) for layer in network.layers)
    h = np.einsum("bo,hwio->bhwi", z, w1) + b1
    h = np.where(h > 0, h, 0.01 * h)
    out = h @ w2[0, 0].T + b2
    assert (out < -0.1).any()
    if activate_output:
        out = np.where(out > 0, out, 0.01 * out)
    np.testing.assert_allclose(network(jnp.float32(z)), out, rtol=1e-4, atol=1e-5)


def kernels_with_fan_in():
    rngs = nnx.Rngs(0)
    mlp = ResidualMLP((120,), 1, 120, rngs=rngs)
    encoder = ConvEncoder((8, 8, 30), ((40, 3, 1), (60, 5, 1)), rngs=rngs)
    decoder = ConvDecoder((90,), ((50, 4, 1), (20, 5, 2)), rngs=rngs)
    yield "linear in", mlp.linear_in, 120
    yield "linear", mlp.blocks[0][1], 120
    yield "conv SAME", encoder.layers[0], 3 * 3 * 30
    yield "conv VALID", encoder.layers[1], 5 * 5 * 40
    yield "conv transpose VALID", decoder.layers[0], 4 * 4 * 90
    yield "conv transpose SAME", decoder.layers[1], 5 * 5 * 50


def test_kernels_start_truncated_normal_with_std_one_over_root_fan_in_and_biases_at_zero():
    for name, layer, fan_in in kernels_with_fan_in():
        kernel, bias = arrays(layer)
        assert (bias == 0).all() and bias.size in kernel.shape, name
        scaled = kernel.ravel() * np.sqrt(fan_in)
        n, kurtosis = scaled.size, 2.37  # of a normal truncated at two of its standard deviations: E[x^4] / E[x^2]^2
        assert abs(scaled.mean()) < 5 / np.sqrt(n), name
        assert abs(np.mean(scaled**2) - 1.0) < 5 * np.sqrt((kurtosis - 1) / n), name
        # The truncated normal's own standard deviation is 0.8796 of that of the normal it is cut from.
        assert 2.2 < np.abs(scaled).max() <= 2 / 0.8796 + 1e-3, name


def test_conv_encoder_refuses_data_that_are_not_images():
    with pytest.raises(UserError, match=r"ConvEncoder needs images .* \(8,\); use ResidualMLP"):
        ConvEncoder((8,), ((4, 3, 1),), rngs=nnx.Rngs(0))


def test_conv_encoder_refuses_images_smaller_than_its_last_kernel():
    with pytest.raises(UserError, match=r"kernel \(7x7\) exceeds its 2x2 input; .*\(8, 8, 1\)"):
        ConvEncoder((8, 8, 1), ((4, 3, 2), (4, 3, 2), (4, 7, 1)), rngs=nnx.Rngs(0))
    assert abstract_shapes(ConvEncoder, (8, 8, 1), ((4, 3, 2), (4, 4, 1)))[0] == (3, 1, 1, 4)
    with pytest.raises(UserError, match="5x5"):  # one side is large enough
        ConvEncoder((4, 9, 1), ((4, 5, 1),), rngs=nnx.Rngs(0))


def test_a_convolution_of_several_arrays_is_that_of_all_their_channels():
    layer = filled(lambda: Conv(5, 4, 3, 1, "SAME", rngs=nnx.Rngs(0)))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 6, 5)), jnp.float32)
    np.testing.assert_allclose(layer(x[..., :2], x[..., 2:3], x[..., 3:]), layer(x), rtol=1e-4, atol=1e-5)
