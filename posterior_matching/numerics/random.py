"""Random keys whose bits XLA compiles faster."""

import math
from typing import Any

import jax
from jax.extend import random as extend

_THREEFRY = extend.threefry_prng_impl


def _flat_bits(key: jax.Array, bit_width: int, shape: tuple[int, ...]) -> jax.Array:
    return _THREEFRY.random_bits(key, bit_width, (math.prod(shape),)).reshape(shape)


# JAX's default generator, with the same bits. It computes them in the shape that is asked for, and on CPUs LLVM takes
# up to a second for a loop over several short axes, where one over a vector takes 20 ms (docs/notes.md).
_FLAT = extend.define_prng_impl(
    key_shape=_THREEFRY.key_shape,
    seed=_THREEFRY.seed,
    split=_THREEFRY.split,
    fold_in=_THREEFRY.fold_in,
    random_bits=_flat_bits,
    name="flat_threefry2x32",
    tag="flat",
)


def random_key(seed: int | jax.Array) -> jax.Array:
    """The key of a seed, `[]`; it draws what that of `jax.random.key` draws."""
    return jax.random.key(seed, impl=_FLAT)


def wrap_key_data(data: Any) -> jax.Array:
    """Keys, `[...]`, from their data, uint32 `[..., 2]`; they draw what those of `jax.random.wrap_key_data` draw."""
    return jax.random.wrap_key_data(data, impl=_FLAT)
