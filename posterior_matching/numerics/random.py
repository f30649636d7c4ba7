"""Random keys whose bits XLA compiles faster."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import random as extend

_THREEFRY = extend.threefry_prng_impl


def _generator(name: str, length: Callable[[int], int]) -> Any:
    """JAX's default generator, with the same bits, drawn as vectors.

    It computes them in the shape that is asked for, and on CPUs LLVM takes up to a second for a loop over several short
    axes, where one over a vector takes 20 ms (docs/notes.md).

    Args:
        name: Name of the generator.
        length: Maps the number of values to that of values drawn, of which the first are used.
    """

    def drawn(draw: Callable[[int], jax.Array], shape: tuple[int, ...]) -> jax.Array:
        size = math.prod(shape)
        # Only if they are partitionable, JAX's default, do the first values not depend on how many follow.
        partitionable = jax.config.jax_threefry_partitionable  # type: ignore[attr-defined]
        values = draw(length(size) if partitionable else size)[:size]
        return values.reshape(*shape, *values.shape[1:])

    return extend.define_prng_impl(
        key_shape=_THREEFRY.key_shape,
        seed=_THREEFRY.seed,
        split=lambda key, shape: drawn(lambda size: _THREEFRY.split(key, (size,)), shape),
        fold_in=_THREEFRY.fold_in,
        random_bits=lambda key, width, shape: drawn(lambda size: _THREEFRY.random_bits(key, width, (size,)), shape),
        name=name,
        tag=name[:4],
    )


_EXACT = _generator("flat_threefry2x32", lambda size: size)
# XLA compiles the kernels of a draw for every length: short draws share them if they are of one length.
_SHARED = _generator("shared_threefry2x32", lambda size: max(size, 2048))


def random_key(seed: int | jax.Array) -> jax.Array:
    """The key of a seed, `[]`; it draws what that of `jax.random.key` draws."""
    return jax.random.key(seed, impl=_EXACT)


def wrap_key_data(data: Any) -> jax.Array:
    """Keys, `[...]`, from their data, uint32 `[..., 2]`; they draw what those of `jax.random.wrap_key_data` draw.

    They are for large programs, such as training steps: short draws are of 2,048 values, whose kernels they share, so
    that there is less to compile. Under `vmap` each of many short draws costs as much.
    """
    return jax.random.wrap_key_data(data, impl=_SHARED)
