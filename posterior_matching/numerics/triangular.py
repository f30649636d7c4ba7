"""Batches of small lower triangular matrices: filling, diagonals, inverses and linear systems, with derivatives.

On CPUs forward substitution, and for inverses division into halves, is faster than LAPACK's solver, and two of JAX's
batched solvers running at once on two cores can deadlock (seen with jaxlib 0.10.2). Accelerators use their own solver,
since a loop over the rows would take at least one kernel per row.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from posterior_matching.numerics import on_cpu


def diagonal(matrices: jax.Array) -> jax.Array:
    """The diagonals `[..., e]` of matrices `[..., e, e]`: a strided slice, not a gather."""
    e = matrices.shape[-1]
    return matrices.reshape(*matrices.shape[:-2], e * e)[..., :: e + 1]


def fill(entries: jax.Array, e: int, on_diagonal: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Arranges e (e + 1) / 2 entries `[..., e (e + 1) / 2]` as lower triangular matrices `[..., e, e]`.

    The diagonals are `on_diagonal` of their entries.

    The order follows `tfp.math.fill_triangular` and needs no gather or scatter: read row by row, the e x e square holds
    the entries from index e on, and then all entries in reverse.
    """
    square = jnp.concatenate([entries[..., e:], entries[..., ::-1]], axis=-1).reshape(*entries.shape[:-1], e, e)
    return jnp.where(jnp.eye(e, dtype=bool), on_diagonal(diagonal(square))[..., None, :], jnp.tril(square))


@jax.custom_vjp
def solve(tril: jax.Array, v: jax.Array) -> jax.Array:
    """w = L^-1 v for lower triangular L `[..., e, e]` and v `[..., e]` (same leading axes)."""
    if not on_cpu():
        return jax.lax.linalg.triangular_solve(tril, v[..., None], left_side=True, lower=True)[..., 0]
    index = jnp.arange(v.shape[-1])

    def add_entry(
        solution: jax.Array, i: jax.Array
    ) -> tuple[jax.Array, None]:  # w_i = (v_i - sum_{j<i} L_ij w_j) / L_ii
        row = jnp.take(tril, i, axis=-2)
        entry = (jnp.take(v, i, axis=-1) - (row * solution).sum(-1)) / jnp.take(row, i, axis=-1)
        return jnp.where(index == i, entry[..., None], solution), None

    return jax.lax.scan(add_entry, jnp.zeros_like(v), index)[0]


def _solve_forward(tril: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    solution = solve(tril, v)
    return solution, (tril, solution)


def _solve_backward(residuals: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    tril, solution = residuals
    # L^T with both axes reversed is lower triangular.
    transposed = jnp.flip(tril.swapaxes(-1, -2), (-2, -1))
    v_gradient = jnp.flip(solve(transposed, jnp.flip(g, -1)), -1)
    return -jnp.tril(v_gradient[..., :, None] * solution[..., None, :]), v_gradient


solve.defvjp(_solve_forward, _solve_backward)


@jax.custom_vjp
def inverse(tril: jax.Array) -> jax.Array:
    """L^-1 for lower triangular L `[..., e, e]`."""
    e = tril.shape[-1]
    if not on_cpu():
        identity = jnp.broadcast_to(jnp.eye(e, dtype=tril.dtype), tril.shape)
        return jax.lax.linalg.triangular_solve(tril, identity, left_side=True, lower=True)
    if e == 1:
        return 1 / tril
    if e % 2:  # the inverse of [[L, 0], [0, 1]] holds L^-1
        padded = jnp.pad(tril, [(0, 0)] * (tril.ndim - 2) + [(0, 1), (0, 1)])
        return inverse(padded.at[..., e, e].set(1.0))[..., :e, :e]
    # The inverse of [[A, 0], [B, C]] is [[A^-1, 0], [-C^-1 B A^-1, C^-1]].
    half = e // 2
    a, c = inverse(jnp.stack([tril[..., :half, :half], tril[..., half:, half:]]))
    b = -_product(_product(c, tril[..., half:, :half]), a)
    upper, lower = jnp.concatenate([a, jnp.zeros_like(a)], axis=-1), jnp.concatenate([b, c], axis=-1)
    return jnp.concatenate([upper, lower], axis=-2)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """a @ b; for small matrices on CPUs a sum of outer products, which XLA vectorises."""
    if a.shape[-1] > 24 or not on_cpu():
        return a @ b
    return functools.reduce(jnp.add, (a[..., :, k, None] * b[..., None, k, :] for k in range(a.shape[-1])))


def _inverse_forward(tril: jax.Array) -> tuple[jax.Array, jax.Array]:
    result = inverse(tril)
    return result, result


def _inverse_backward(result: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    transposed = result.swapaxes(-1, -2)
    return (-jnp.tril(_product(_product(transposed, g), transposed)),)


inverse.defvjp(_inverse_forward, _inverse_backward)
