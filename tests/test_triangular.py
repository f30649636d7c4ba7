"""Diagonals, solutions, inverses and their derivatives against NumPy's solver and the textbook's formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.arrays import normal
from posterior_matching.numerics import triangular

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def triangles(e=5):
    return np.tril(normal(0, 2, 4, e, e)) * np.float32((5 / e) ** 0.5) + 3 * np.eye(e, dtype=np.float32)


@pytest.fixture(params=["cpu", "gpu"])
def backend(request, monkeypatch):  # what runs on which; either runs anywhere
    monkeypatch.setattr(jax, "default_backend", lambda: request.param)


@pytest.mark.parametrize("e", [1, 2, 5])
def test_filling_puts_every_entry_into_the_lower_triangle_once(e):
    count = e * (e + 1) // 2
    filled = np.asarray(triangular.fill(jnp.arange(1.0, 2 * count + 1).reshape(2, count), e, lambda a: -a))
    assert filled.shape == (2, e, e)
    np.testing.assert_array_equal(filled != 0, np.broadcast_to(np.tri(e, dtype=bool), (2, e, e)))
    np.testing.assert_array_equal(filled < 0, np.broadcast_to(np.eye(e, dtype=bool), (2, e, e)))
    np.testing.assert_array_equal(np.sort(np.abs(filled[filled != 0])), np.arange(1, 2 * count + 1))


def test_diagonal_and_its_gradient():
    matrices, g = normal(0, 2, 4, 5, 5), normal(1, 2, 4, 5)
    value, pullback = jax.vjp(triangular.diagonal, jnp.asarray(matrices))
    np.testing.assert_array_equal(value, np.diagonal(matrices, axis1=-2, axis2=-1))
    np.testing.assert_array_equal(pullback(jnp.asarray(g))[0], g[..., None] * np.eye(5, dtype=np.float32))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("e", [1, 2, 5, 24, 37])
def test_inverse_and_its_gradient(e):
    tril = triangles(e)
    g = normal(1, 2, 4, e, e)

    @jax.jit
    def run(tril):
        value, pullback = jax.vjp(triangular.inverse, tril)
        return value, pullback(jnp.asarray(g))[0]

    value, gradient = run(jnp.asarray(tril))
    inverse = np.linalg.inv(tril.astype(np.float64))
    np.testing.assert_allclose(value, inverse, rtol=1e-4, atol=1e-6)
    transposed = inverse.swapaxes(-1, -2)
    np.testing.assert_allclose(gradient, -np.tril(transposed @ g @ transposed), rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("backend")
def test_solution_and_its_gradients():
    tril, v, g = triangles(), normal(1, 2, 4, 5), normal(2, 2, 4, 5)

    @jax.jit
    def run(tril, v):
        value, pullback = jax.vjp(triangular.solve, tril, v)
        return value, *pullback(jnp.asarray(g))

    value, tril_gradient, v_gradient = run(jnp.asarray(tril), jnp.asarray(v))
    inverse = np.linalg.inv(tril.astype(np.float64))
    expected = np.einsum("...ij,...j->...i", inverse, v)
    np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-6)
    expected_gradient = np.einsum("...ji,...j->...i", inverse, g)  # L^-T g
    np.testing.assert_allclose(v_gradient, expected_gradient, rtol=1e-3, atol=1e-6)
    outer = expected_gradient[..., :, None] * expected[..., None, :]
    np.testing.assert_allclose(tril_gradient, -np.tril(outer), rtol=1e-3, atol=1e-5)
