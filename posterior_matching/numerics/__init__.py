"""What only speed or a backend asks for. Nothing here changes a result beyond rounding."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

_ROWS_IN_CACHE = 64  # rows of a batch whose activations stay in a CPU's cache, for networks of a few hundred units


def on_cpu() -> bool:
    """Returns whether JAX computes on CPUs. No other place asks for the backend."""
    return jax.default_backend() == "cpu"


def first_argmin(values: jax.Array) -> jax.Array:
    """Index, int32 `[...]`, of the least of `values: [..., K]`, the first of equals; K - 1 where all are NaN.

    Two minima take a CPU a third of the time of one `argmin`.
    """
    last = values.shape[-1] - 1
    least = values == values.min(-1, keepdims=True)
    return jnp.where(least, jnp.arange(last + 1), last).min(-1)


def materialise(x: jax.Array) -> jax.Array:
    """Returns x, computed once: XLA may otherwise compute it again inside each of its uses."""
    return jax.lax.optimization_barrier(x)


def map_in_cache(fn: Callable[..., Any], inputs: Any, rows: int) -> Any:
    """`jax.lax.map(fn, inputs)`, several calls at once where that is faster.

    On CPUs as many as keep the activations of a network in the cache, on accelerators all.

    Args:
        fn: The function.
        inputs: Arrays with one leading axis in common.
        rows: Batch size of one call.
    """
    calls = len(jax.tree.leaves(inputs)[0])
    return jax.lax.map(fn, inputs, batch_size=max(1, _ROWS_IN_CACHE // rows) if on_cpu() else calls)


class InitialKeys:
    """Keys of initial weights, one per `params()`, as `nnx.Rngs` gives them.

    Under tracing `nnx.Rngs` takes longer for every key; this does not, which counts for hundreds of layers.
    """

    def __init__(self, key: jax.Array):
        self._key, self._drawn = key, 0

    def params(self) -> jax.Array:
        """The next key."""
        self._drawn += 1
        return jax.random.fold_in(self._key, self._drawn)
