"""Code that exists only for speed or for a backend. Nothing here changes a result beyond rounding."""

import jax


def on_cpu() -> bool:
    """Returns whether JAX runs on CPUs. No other code checks the backend."""
    return jax.default_backend() == "cpu"
