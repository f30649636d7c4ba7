"""The bounds that benchmarks compare with: the rate of a large matrix product, and the bandwidth of the memory."""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp


def matrix_product_flops_per_second(size: int = 4096, dtype: str = "float32") -> float:
    """Best rate of a product of two `size` x `size` matrices of this `dtype`."""
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    return 2 * size**3 / fastest(jax.jit(lambda a: a @ a), a)


def memory_bandwidth(size: int) -> float:
    """Best rate, in bytes per second, at which one float32 array of `size` numbers is added to another."""
    # In place: to touch new memory takes longer than to add.
    total, ones = (jnp.ones(size, jnp.float32) for _ in range(2))
    add = jax.jit(jnp.add, donate_argnums=0)

    def accumulate() -> jax.Array:
        nonlocal total
        total = add(total, ones)
        return total

    return 3 * ones.nbytes / fastest(accumulate, repeats=10)


def fastest(fn: Callable[..., jax.Array], *arguments: jax.Array, repeats: int = 3) -> float:
    """Seconds of the fastest of `repeats` calls, after one that compiles."""
    fn(*arguments).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        fn(*arguments).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
