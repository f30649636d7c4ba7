"""Code that exists only for speed or for a backend. Nothing here changes a result beyond rounding."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_ROWS_IN_CACHE = 64  # rows of a batch whose activations fit into a CPU's cache, for networks of a few hundred units


def on_cpu() -> bool:
    """Returns whether JAX runs on CPUs. No other code checks the backend."""
    return jax.default_backend() == "cpu"


def first_argmin(values: jax.Array) -> jax.Array:
    """Index, int32 `[...]`, of the first minimum of `values: [..., K]`; K - 1 where all are NaN.

    On CPUs two `min` reductions take a third of the time of one `argmin`.
    """
    last = values.shape[-1] - 1
    least = values == values.min(-1, keepdims=True)
    return jnp.where(least, jnp.arange(last + 1), last).min(-1)


@jax.custom_vjp
def materialise(x: jax.Array) -> jax.Array:
    """Returns x, `[...]`, not empty; both x and its gradient are computed once.

    XLA otherwise fuses what is cheap into each of its uses. For a chain of residual layers that means that the gradient
    of every layer's output, a sum over all later layers, is summed anew in each kernel that reads it.
    """
    return _computed_once(x)


def _computed_once(x: jax.Array) -> jax.Array:
    if not on_cpu():
        return jax.lax.optimization_barrier(x)
    # XLA for CPUs drops barriers before it fuses. Nothing is fused across an update in place, here of nothing.
    corner = jax.lax.slice(x, (0,) * x.ndim, (1,) * x.ndim)
    return jax.lax.dynamic_update_slice(x, corner, (0,) * x.ndim)


materialise.defvjp(lambda x: (_computed_once(x), None), lambda _, g: (_computed_once(g),))


def split(x: jax.Array, parts: int) -> list[jax.Array]:
    """`jnp.array_split(x, parts)` of x, `[B, ...]`; see `split_at`."""
    size, larger = divmod(len(x), parts)
    return split_at(x, (size + 1,) * larger + (size,) * (parts - larger))


@functools.partial(jax.jit, static_argnames="sizes")  # traced once for each shape
def split_at(x: jax.Array, sizes: tuple[int, ...]) -> list[jax.Array]:
    """Splits x, `[N, ...]`, into parts of these sizes; on CPUs one compiled kernel serves all parts of a size.

    XLA compiles what reads a part anew for every constant start, so on CPUs starts are data, each computed from the one
    before.
    """
    if len(sizes) == 1 or not on_cpu():
        return jnp.split(x, np.cumsum(sizes)[:-1])
    start, out = _computed_once(jnp.arange(2)), []  # the first is the start: XLA would fold an array of one
    for size in sizes:
        starts = (start[0],) + (0,) * (x.ndim - 1)
        out.append(jax.lax.dynamic_slice(x, starts, (size, *x.shape[1:]), allow_negative_indices=False))
        start = _computed_once(start + size)
    return out


def concatenate(parts: list[jax.Array]) -> jax.Array:
    """`jnp.concatenate(parts, axis=1)` of parts, `[B, N_i, C]`; on CPUs one compiled kernel writes all parts of a size.

    The counterpart of `split_at`: starts are data. The gradients of the parts, slices of one array, share kernels, too.
    """
    if not on_cpu():
        return jnp.concatenate(parts, axis=1)
    batch, _, channels = parts[0].shape
    out = jnp.zeros((batch, sum(part.shape[1] for part in parts), channels), parts[0].dtype)
    start = _computed_once(jnp.arange(2))
    zero = jnp.zeros((), start.dtype)
    for part in parts:
        out = jax.lax.dynamic_update_slice(out, part, (zero, start[0], zero), allow_negative_indices=False)
        start = _computed_once(start + part.shape[1])
    return materialise(out)


def map_in_cache(fn: Callable[..., Any], inputs: Any, rows: int) -> Any:
    """`jax.lax.map(fn, inputs)`, with several calls at once where that is faster.

    CPUs run as many at once as keep the activations of a network in the cache; accelerators run all.

    Args:
        fn: The function.
        inputs: Arrays with a common leading axis.
        rows: Batch size of one call.
    """
    calls = len(jax.tree.leaves(inputs)[0])
    return jax.lax.map(fn, inputs, batch_size=max(1, _ROWS_IN_CACHE // rows) if on_cpu() else calls)
