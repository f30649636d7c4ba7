"""Greedy active feature acquisition: repeatedly observe the feature most informative about z (section 4.3).

A policy scores the features of one example, `policy(model, x, b, num_samples, key) -> [num_features]`, one entry per
mask entry, -inf where observed. It sees nothing of x but x_o.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from posterior_matching.models.columns import is_real
from posterior_matching.models.lookahead import LookaheadPosterior

# Gains this close to the largest, in nats, are ties: far above rounding errors, far below any relevant difference.
TIE = 1e-5

Policy = Callable[[LookaheadPosterior, jax.Array, jax.Array, int, jax.Array], jax.Array]


def sampling_policy(
    model: LookaheadPosterior, x: jax.Array, b: jax.Array, num_samples: int, key: jax.Array, features_at_once: int = 1
) -> jax.Array:
    """Expected information gains in nats, from revealing each feature in each of `num_samples` imputations."""
    return model.pm_vae.expected_info_gains(x, b, num_samples, key=key, features_at_once=features_at_once)


def lookahead_policy(model: LookaheadPosterior, x: jax.Array, b: jax.Array, *_: object) -> jax.Array:
    """Information gains in nats as the lookahead posteriors estimate them, up to a constant."""
    return model.relative_info_gains(x[None], b[None])[0]


def random_policy(_: LookaheadPosterior, _x: jax.Array, b: jax.Array, _samples: int, key: jax.Array) -> jax.Array:
    """The baseline: random numbers in [0, 1), so that every unobserved feature is chosen equally often."""
    return jnp.where(b.reshape(-1) == 1, -jnp.inf, jax.random.uniform(key, (b.size,)))


POLICIES: dict[str, Policy] = {"sampling": sampling_policy, "lookahead": lookahead_policy, "random": random_policy}


def features_that_fit(
    model: LookaheadPosterior, x: jax.Array, b: jax.Array, num_samples: int, memory_budget_gb: float
) -> int:
    """The number of features that the sampling policy can evaluate together within a memory budget (1e9 bytes), >= 1.

    Of `x`, a batch for one device, only the shape matters.
    """

    def gains(model: LookaheadPosterior, x: jax.Array, b: jax.Array) -> jax.Array:
        return jax.vmap(lambda x, b: sampling_policy(model, x, b, num_samples, jax.random.key(0)))(x, b)

    memory = nnx.jit(gains).lower(model, x, b).compile().memory_analysis()
    if memory is None:  # a backend that does not report it
        return 1
    return max(1, min(b[0].size, int(memory_budget_gb * 1e9 / memory.temp_size_in_bytes)))


class Trajectory(NamedTuple):
    """The acquisition of one example; entry t of each array is the state with t features acquired."""

    action: jax.Array  # [T] int32, the feature chosen next (flat mask entry); -1: none left
    probabilities: jax.Array  # [T, num_features], softmax of the policy's gains
    mask: jax.Array  # [T, *mask_shape], 1 = observed
    imputation: jax.Array  # [T, *input_shape], point estimates, observed values copied
    rmse: jax.Array  # [T], sqrt(mean((x - imputation)^2 * (1 - b))) over all features; a wrong category counts as 1
    unobserved_rmse: jax.Array  # [T], the same mean over the unobserved features only; 0 if there are none


def greedy_action(gains: jax.Array) -> jax.Array:
    """The feature of largest gain, or the first within `TIE` of it; -1 if all gains, `[num_features]`, are -inf."""
    best = gains.max()
    return jnp.where(jnp.isneginf(best), -1, jnp.argmax(gains >= best - TIE))


def acquire(
    policy: Policy,
    model: LookaheadPosterior,
    key: jax.Array,
    x: jax.Array,
    available: jax.Array,
    *,
    num_steps: int,
    num_samples: int,
) -> Trajectory:
    """Acquires features of one example greedily, starting with none observed.

    All policies impute with the same random numbers, so that the same mask has the same error. Values that are not
    available are zeros in x, and never acquired or scored. `num_steps` is T, the states to visit; the last has T - 1
    features acquired.
    """

    def step(b: jax.Array, key: jax.Array) -> tuple[jax.Array, Trajectory]:
        key_impute, key_gains = jax.random.split(key)
        imputation = model.pm_vae.point(x[None], b[None], num_samples, key=key_impute)[0]
        gains = policy(model, x, b, num_samples, key_gains)
        gains = jnp.where(available.reshape(-1) == 1, gains, -jnp.inf)
        action = greedy_action(gains)
        known = jnp.broadcast_to(available, x.shape)
        unobserved = known * (1 - b)
        error = jnp.where(is_real(model.cardinalities), x - imputation, x != imputation)
        squared_error = (jnp.square(error) * unobserved).sum()
        state = Trajectory(
            action=action,
            probabilities=jnp.where(action >= 0, jax.nn.softmax(gains), 0.0),
            mask=b,
            imputation=imputation,
            rmse=jnp.sqrt(squared_error / jnp.maximum(known.sum(), 1.0)),
            unobserved_rmse=jnp.sqrt(squared_error / jnp.maximum(unobserved.sum(), 1.0)),
        )
        # An index beyond the end is dropped.
        acquired = b.reshape(-1).at[jnp.where(action >= 0, action, b.size)].set(1.0, mode="drop")
        return acquired.reshape(b.shape), state

    return jax.lax.scan(step, jnp.zeros_like(available), jax.random.split(key, num_steps))[1]
