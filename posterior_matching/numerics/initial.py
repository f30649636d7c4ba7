"""Initial weights, drawn and traced faster; the values are those of Flax."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

_flax_lecun_normal = nnx.initializers.lecun_normal()
_TRUNCATED_STD = 0.87962566103423978  # of a standard normal distribution truncated at -2 and 2
_SMALLEST_DRAW = 1024


def lecun_normal(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32, scale: float = 1.0) -> jax.Array:
    """`scale` times `nnx.initializers.lecun_normal()`, without compiling a program for every shape.

    JAX's random numbers are functions of the key and the position, so a larger draw begins with a smaller one. All
    shapes therefore share the programs of a few sizes, powers of four.
    """
    if isinstance(key, jax.core.Tracer):
        return scale * _flax_lecun_normal(key, shape, dtype)
    size = math.prod(shape)
    drawn = max(_SMALLEST_DRAW, 4 ** (((size - 1).bit_length() + 1) // 2))  # the next power of four
    unit = np.asarray(jax.random.truncated_normal(key, -2, 2, (drawn,), dtype))[:size].reshape(shape)
    std = np.sqrt(np.asarray(1 / math.prod(shape[:-1]), dtype)) / np.asarray(_TRUNCATED_STD, dtype)  # fan-in
    return jax.device_put(scale * (unit * std))  # jnp.asarray compiles a copy for every shape


def zeros(shape: int | Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    """`jnp.zeros`, without compiling a program for every shape."""
    return jax.device_put(np.zeros(shape, dtype))


class InitialKeys:
    """Keys for initial weights, one per call of `params()`, as from `nnx.Rngs`.

    Under tracing `nnx.Rngs` gets slower with every key; this does not, which matters for hundreds of layers.
    """

    def __init__(self, key: jax.Array):
        self._key, self._drawn = key, 0

    def params(self) -> jax.Array:
        """The next key."""
        self._drawn += 1
        return jax.random.fold_in(self._key, self._drawn)
