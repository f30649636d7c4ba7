"""What only speed or a backend asks for. Nothing here changes a result beyond rounding."""

import jax


def on_cpu() -> bool:
    """Returns whether JAX computes on CPUs. No other place asks for the backend."""
    return jax.default_backend() == "cpu"
