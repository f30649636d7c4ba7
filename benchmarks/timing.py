"""A bound of a program's speed: the time that its matrix products and convolutions take, each run by itself."""

import collections
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


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

    Bodies of `scan` count as often as they run, those of `while_loop` once.
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
