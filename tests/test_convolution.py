"""Convolutions and their gradients against loops in NumPy, exactly: data are whole numbers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from posterior_matching.numerics.convolution import conv, conv_transpose

pytestmark = pytest.mark.usefixtures("strict_dtypes")

CASES = [(k, stride, padding) for k in (1, 2, 5) for stride in (1, 2, 3) for padding in ("SAME", "VALID")]


def integers(rng, *shape):
    """Whole numbers, so that float32 sums are exact whatever their order."""
    return rng.integers(-4, 5, shape).astype(np.float32)


def geometry(size, k, stride, padding):
    """Output size and zeros before the first entry of one axis, by the definitions of SAME and VALID."""
    if padding == "VALID":
        return math.ceil((size - k + 1) / stride), 0
    out = math.ceil(size / stride)
    return out, max((out - 1) * stride + k - size, 0) // 2


def pairs(size, k, stride, padding):
    """All (output, input, tap) of one axis that a convolution connects."""
    out, before = geometry(size, k, stride, padding)
    return [
        (o, o * stride + t - before, t) for o in range(out) for t in range(k) if 0 <= o * stride + t - before < size
    ]


def connections(x_shape, kernel, stride, padding):
    rows = pairs(x_shape[1], len(kernel), stride, padding)
    columns = pairs(x_shape[2], len(kernel), stride, padding)
    return [(p, q, i, j, s, t) for p, i, s in rows for q, j, t in columns]


def naive_conv(x, kernel, stride, padding):
    sizes = [geometry(n, len(kernel), stride, padding)[0] for n in x.shape[1:3]]
    y = np.zeros((len(x), *sizes, kernel.shape[3]), np.float32)
    for p, q, i, j, s, t in connections(x.shape, kernel, stride, padding):
        y[:, p, q] += x[:, i, j] @ kernel[s, t]
    return y


def naive_transpose(y, kernel, stride, padding, size):
    x = np.zeros((len(y), *size, kernel.shape[2]), np.float32)
    for p, q, i, j, s, t in connections(x.shape, kernel, stride, padding):
        x[:, i, j] += y[:, p, q] @ kernel[s, t].T
    return x


def naive_kernel_gradient(x, y, kernel, stride, padding):
    gradient = np.zeros_like(kernel)
    for p, q, i, j, s, t in connections(x.shape, kernel, stride, padding):
        gradient[s, t] += x[:, i, j].T @ y[:, p, q]
    return gradient


def value_and_gradients(fn, cotangent, *args):
    """Compiled, as in training."""

    @jax.jit
    def run(cotangent, *args):
        value, pullback = jax.vjp(fn, *args)
        return value, *pullback(cotangent)

    return [np.asarray(a) for a in run(cotangent, *args)]


def on_backends(cases):
    """The cases on CPUs and, where those compute in another way, on GPUs; either runs anywhere."""
    return [(*case, backend) for case in cases for backend in ("cpu", "gpu") if backend == "cpu" or case[1] > 1]


# Multiples of the stride, and every remainder.
SIZES = {1: [(5, 6)], 2: [(7, 6)], 3: [(6, 5), (7, 8)]}
CONVOLUTIONS = [(*case, size) for case in CASES for size in SIZES[case[1]]]
CONVOLUTIONS += [(5, 2, "SAME", (28, 28)), (4, 2, "SAME", (13, 12)), (4, 3, "VALID", (12, 9)), (5, 1, "SAME", (6, 3))]
CONVOLUTIONS += [(7, 1, "VALID", (7, 7)), (3, 1, "VALID", (3, 3))]  # one position: the last layer of an encoder


@pytest.mark.parametrize(("k", "stride", "padding", "size", "backend"), on_backends(CONVOLUTIONS))
def test_conv_and_its_gradients_equal_loops_on_every_backend(k, stride, padding, size, backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    rng = np.random.default_rng(k)
    x, kernel = integers(rng, 2, *size, 3), integers(rng, k, k, 3, 2)
    expected = naive_conv(x, kernel, stride, padding)
    g = integers(rng, *expected.shape)
    value, x_gradient, kernel_gradient = value_and_gradients(lambda x, w: conv(x, w, stride, padding), g, x, kernel)
    np.testing.assert_array_equal(value, expected)
    np.testing.assert_array_equal(x_gradient, naive_transpose(g, kernel, stride, padding, size))
    np.testing.assert_array_equal(kernel_gradient, naive_kernel_gradient(x, g, kernel, stride, padding))


TRANSPOSED = [(*case, (3, 4)) for case in CASES]
TRANSPOSED += [(3, 1, "SAME", (1, 1)), (3, 1, "VALID", (1, 1))]  # one position: the first layer of a decoder


@pytest.mark.parametrize(("k", "stride", "padding", "size", "backend"), on_backends(TRANSPOSED))
@pytest.mark.parametrize("features_in", [3, 50])  # many in and few out are computed in another way on CPUs
def test_conv_transpose_and_its_gradients_equal_loops_on_every_backend(
    k, stride, padding, size, backend, features_in, monkeypatch
):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    rng = np.random.default_rng(k)
    y, kernel = integers(rng, 2, *size, features_in), integers(rng, k, k, 2, features_in)
    size = [n * stride if padding == "SAME" else (n - 1) * stride + k for n in size]
    g = integers(rng, 2, *size, 2)
    value, y_gradient, kernel_gradient = value_and_gradients(
        lambda y, w: conv_transpose(y, w, stride, padding), g, y, kernel
    )
    np.testing.assert_array_equal(value, naive_transpose(y, kernel, stride, padding, size))
    np.testing.assert_array_equal(y_gradient, naive_conv(g, kernel, stride, padding))
    np.testing.assert_array_equal(kernel_gradient, naive_kernel_gradient(g, y, kernel, stride, padding))


@pytest.mark.parametrize("fn", [conv, conv_transpose])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("images", [127, 128, 131])  # from 128 on in blocks, of which some are one image larger
def test_many_images_equal_few_at_a_time(fn, stride, images):
    rng = np.random.default_rng(images)
    x, kernel = integers(rng, images, 4, 4, 3), integers(rng, 3, 3, 3, 3)

    def run(x, w):
        return fn(x, w, stride, "SAME")

    g = integers(rng, *jax.eval_shape(run, x, kernel).shape)
    value, x_gradient, kernel_gradient = value_and_gradients(run, g, x, kernel)
    parts = [value_and_gradients(run, g[i : i + 50], x[i : i + 50], kernel) for i in range(0, images, 50)]
    np.testing.assert_array_equal(value, np.concatenate([part[0] for part in parts]))
    np.testing.assert_array_equal(x_gradient, np.concatenate([part[1] for part in parts]))
    np.testing.assert_array_equal(kernel_gradient, sum(part[2] for part in parts))


@pytest.mark.parametrize("fn", [conv, conv_transpose])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("images", [2, 3, 8, 9])  # of 1,600 positions; from 4,097 on in blocks of whole pairs
def test_the_kernel_gradient_of_large_images_is_the_sum_over_single_ones(fn, stride, images):
    rng = np.random.default_rng(images)
    size = 40 * stride if fn is conv else 40
    x, kernel = integers(rng, images, size, size, 3), integers(rng, 3, 3, 3, 3)

    def run(x, w):
        return fn(x, w, stride, "SAME")

    g = integers(rng, *jax.eval_shape(run, x, kernel).shape)
    kernel_gradient = value_and_gradients(run, g, x, kernel)[2]
    single = (value_and_gradients(run, g[i : i + 1], x[i : i + 1], kernel)[2] for i in range(images))
    np.testing.assert_array_equal(kernel_gradient, sum(single))


@pytest.mark.parametrize("fn", [conv, conv_transpose])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_gradients_agree_with_finite_differences(fn, padding):
    rng = np.random.default_rng(0)
    channels = 2 if fn is conv else 3
    x = jnp.float32(rng.normal(size=(1, 4, 5, channels)))
    kernel = jnp.float32(rng.normal(size=(3, 3, 2, 3)))
    check_grads(lambda x, w: jnp.tanh(0.3 * fn(x, w, 2, padding)), (x, kernel), 1, ("rev",), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("fn", [conv, conv_transpose])
def test_vmap_equals_a_loop(fn):
    rng = np.random.default_rng(0)
    x, kernel = integers(rng, 3, 2, 5, 4, 2), integers(rng, 3, 3, 2, 2)
    mapped = jax.vmap(lambda x: fn(x, jnp.asarray(kernel), 2, "SAME"))(x)
    np.testing.assert_array_equal(mapped, np.stack([fn(part, kernel, 2, "SAME") for part in x]))
    total = jax.grad(lambda w: (jax.vmap(lambda x: fn(x, w, 2, "SAME"))(x) ** 2).sum())(jnp.asarray(kernel))
    parts = [jax.grad(lambda w, part=part: (fn(part, w, 2, "SAME") ** 2).sum())(jnp.asarray(kernel)) for part in x]
    np.testing.assert_array_equal(total, sum(parts))
