"""Numbers, weights and comparisons."""

import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Z_LIMIT = 5.0  # standard errors that a statistic may be off


def softplus(a):
    """log(1 + exp(a))."""
    return np.logaddexp(0.0, a)


def normal(seed, *shape):
    """Standard normal numbers, float32."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def randomised(module, seed=0, scale=1.0, bias=0.5):
    """Gives a module, perhaps an abstract one, random parameters; drawn by NumPy, which compiles nothing.

    Kernels have `scale` times the usual size, vectors and scalars `scale * bias`: those that start at zero matter, too.
    """
    rng = np.random.default_rng(seed)

    def draw(leaf):
        size = np.prod(leaf.shape[:-1]) ** -0.5 if leaf.ndim > 1 else bias
        return jnp.asarray(scale * size * rng.normal(size=leaf.shape), jnp.float32)

    state, rest = nnx.state(module, nnx.Param), nnx.state(module, nnx.Not(nnx.Param))
    nnx.update(module, jax.tree.map(draw, state))
    abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(rest))
    if abstract:  # codebooks, and what is counted
        floating = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)  # noqa: E731
        fill = lambda leaf: draw(leaf) if floating(leaf) else jnp.zeros(leaf.shape, leaf.dtype)  # noqa: E731
        nnx.update(module, jax.tree.map(fill, rest))
    return module


def filled(make, seed=0, scale=1.0, bias=1.0):
    """The module that `make` builds, `randomised`."""
    return randomised(nnx.eval_shape(make), seed, scale, bias)


def by_path(state):
    """Flattens a pytree to NumPy arrays by path."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in leaves}


def assert_same(found, expected):
    """Two pytrees are equal bit for bit."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def assert_close(found, expected, rtol=1e-5, atol=1e-6):
    """Two pytrees are equal up to rounding."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol), found, expected)


def standard_errors(samples, expected):
    """How many standard errors the mean of samples over the first axis is from `expected`."""
    samples = np.asarray(samples, np.float64)
    return (samples.mean(0) - expected) / (samples.std(0, ddof=1) / np.sqrt(len(samples)))


def assert_mean(samples, expected):
    """The mean of samples over the first axis is `expected`."""
    assert (np.abs(standard_errors(samples, expected)) < Z_LIMIT).all()


def assert_moments(samples, mean, covariance):
    """Samples `[n, ..., d]` have this mean `[..., d]` and this covariance `[..., d, d]`."""
    assert_mean(samples, mean)
    centred = np.asarray(samples, np.float64) - mean
    assert_mean(np.einsum("n...i,n...j->n...ij", centred, centred), covariance)


class Compilations:
    """Counts what XLA compiles, or reads from its cache, from its making on."""

    _seconds: ClassVar[list[float]] = []

    def __init__(self):
        if not self._seconds:  # listeners cannot be taken away: one for all
            self._seconds.append(0.0)
            jax.monitoring.register_event_duration_secs_listener(self._listen)
        self._first = len(self._seconds)

    def __len__(self):
        return len(self._seconds) - self._first

    @classmethod
    def _listen(cls, event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            cls._seconds.append(seconds)
