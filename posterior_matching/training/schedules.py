"""Schedules of the KL weight beta: functions of the training step (paper, appendix on experiments)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Schedule = Callable[[jax.Array], jax.Array]


def constant(value: float = 1.0) -> Schedule:
    """Always `value`."""
    return lambda step: jnp.full(jnp.shape(step), value)


def monotonic(low: float, high: float, transition_begin: int, transition_steps: int) -> Schedule:
    """`low` until `transition_begin`, then a line that reaches `high` after `transition_steps` more steps."""
    return lambda step: low + (high - low) * jnp.clip((step - transition_begin) / transition_steps, 0.0, 1.0)


def cyclic(low: float, high: float, period: int, delay: int) -> Schedule:
    """0 before `delay`; then cycles of `period` steps: a line from `low` to `high` over the first half, then `high`."""

    def beta(step: jax.Array) -> jax.Array:
        share = ((step - delay) % period) / period
        return jnp.where(step < delay, 0.0, low + (high - low) * jnp.minimum(2.0 * share, 1.0))

    return beta


SCHEDULES = {"constant": constant, "monotonic": monotonic, "cyclic": cyclic}
