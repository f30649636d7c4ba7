"""Code that exists only for speed or for a backend. Nothing here changes a result beyond rounding."""

import jax


def on_cpu() -> bool:
    """Returns whether JAX runs on CPUs. No other code checks the backend."""
    return jax.default_backend() == "cpu"


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
