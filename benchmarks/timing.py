"""The bounds that benchmarks compare with: the rate of a large matrix product, and the bandwidth of the memory."""

import collections
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


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


def seconds_of_products(jaxpr: Any) -> tuple[int, float]:
    """The number of matrix products and convolutions in a program, and the seconds they take one by one, each alone.

    It bounds the program's speed more tightly than a large matrix product: small ones do not reach that rate. Bodies of
    `scan` count as often as they run, those of `while_loop` once.
    """
    calls: dict[str, Any] = {}
    counts: collections.Counter[str] = collections.Counter()
    for equation, repeats in _products(jaxpr, 1):
        inputs = [variable.aval for variable in equation.invars]
        key = f"{equation.primitive} {inputs} {equation.params}"
        calls[key] = equation, inputs
        counts[key] += repeats
    total, rng = 0.0, np.random.default_rng(0)
    for key, (equation, inputs) in calls.items():
        operands = [jnp.asarray(rng.standard_normal(aval.shape), aval.dtype) for aval in inputs]
        call = jax.jit(lambda *arrays, equation=equation: equation.primitive.bind(*arrays, **equation.params))
        total += counts[key] * fastest(call, *operands, repeats=10)
    return counts.total(), total


def _products(jaxpr: Any, repeats: int) -> Iterator[tuple[Any, int]]:
    """The products of a program and how often each runs, in the programs that it calls, too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield equation, repeats
        times = repeats * equation.params.get("length", 1) if equation.primitive.name == "scan" else repeats
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(value):
                yield from _products(getattr(value, "jaxpr", value), times)


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")
