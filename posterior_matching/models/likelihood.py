"""Per-example log-likelihoods in nats: of observed features given z, and marginal over z by importance sampling."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from posterior_matching.models.distributions import Distribution, sample_and_log_prob
from posterior_matching.models.logistic_mixture import DiscretisedLogisticMixture


def log_prob_of_observed(p: Distribution | DiscretisedLogisticMixture, x: jax.Array, b: jax.Array) -> jax.Array:
    """log p(x_o | z): the independent features' log-probabilities, summed where observed.

    Args:
        p: p(x | z), a distribution with one independent entry per feature and batch shape `[..., B, *data_shape]`.
        x: `[B, d]` or `[B, H, W, C]`; unobserved values have no influence, even if not finite.
        b: Mask, `[B, d]` or `[B, H, W, 1]`; ones for log p(x | z).

    Returns:
        `[..., B]`, nats.
    """
    # `where` in place of a product, and on both sides: -inf * 0 is NaN, in the value or in its gradient.
    log_prob = jnp.where(b == 1, p.log_prob(jnp.where(b == 1, x, 0.0)), 0.0)
    return log_prob.sum(tuple(range(log_prob.ndim - (x.ndim - 1), log_prob.ndim)))  # over features


def truncated_weights(log_weights: jax.Array) -> jax.Array:
    """Self-normalised importance weights, after cutting those above sqrt(S) times the mean down to it.

    The few draws that a proposal with too thin tails misses would otherwise decide the estimate: the variance becomes
    finite for a bias that vanishes as S grows (Ionides 2008, "Truncated importance sampling").

    Args:
        log_weights: log p(x_o, z) - log q(z), `[S, B]`, nats.

    Returns:
        `[S, B]`, with sum 1 over S.
    """
    log_s = math.log(len(log_weights))
    log_mean = jax.nn.logsumexp(log_weights, axis=0) - log_s
    return jax.nn.softmax(jnp.minimum(log_weights, log_mean + log_s / 2), axis=0)


class ConditionalLogProb(NamedTuple):
    """Importance-sampled log-likelihoods in nats, and their effective sample sizes; all `[B]`."""

    log_p_x: jax.Array  # log p(x)
    log_p_xo: jax.Array  # log p(x_o)
    log_p_xu_given_xo: jax.Array  # log p(x_u | x_o) = log p(x) - log p(x_o)
    ess_x: jax.Array  # effective sample size of each estimate, in [1, num_samples]
    ess_xo: jax.Array

    @classmethod
    def of(cls, full: "ImportanceEstimate", observed: "ImportanceEstimate") -> "ConditionalLogProb":
        """From the estimates of log p(x) and log p(x_o)."""
        return cls(
            log_p_x=full.log_prob,
            log_p_xo=observed.log_prob,
            log_p_xu_given_xo=full.log_prob - observed.log_prob,
            ess_x=full.effective_sample_size,
            ess_xo=observed.effective_sample_size,
        )


class ImportanceEstimate(NamedTuple):
    """An importance-sampled log-likelihood, `log (1/K) sum_k p(x, z_k) / q(z_k)`."""

    log_prob: jax.Array  # [B], nats
    effective_sample_size: jax.Array  # [B], (sum w)^2 / sum w^2, in [1, K]; 0 if all weights vanish


def importance_log_prob(
    log_joint: Callable[[jax.Array], jax.Array],
    proposal: Distribution,
    key: jax.Array,
    num_samples: int,
    chunk_size: int = 128,
) -> ImportanceEstimate:
    """Estimates the log of the integral of exp(log_joint(z)) over z with `num_samples` draws from `proposal`.

    Args:
        log_joint: Maps `z: [S, B, e]` to log p(x_o | z) + log p(z), `[S, B]`, nats.
        proposal: q, a distribution over `[B, e]`.
        key: Random key.
        num_samples: K.
        chunk_size: Maximum samples held at once.
    """

    def log_weights(key, chunk_size):
        z, log_q = sample_and_log_prob(proposal, key, (chunk_size,))
        return log_joint(z) - log_q

    return log_mean_weight(log_weights, key, num_samples, chunk_size)


def log_mean_weight(
    log_weights: Callable[[jax.Array, int], jax.Array], key: jax.Array, num_samples: int, chunk_size: int
) -> ImportanceEstimate:
    """Estimates the log of the mean of importance weights from `num_samples` draws of their logs.

    Works in log space throughout, `chunk_size` samples at a time, so memory does not grow with `num_samples`.

    Args:
        log_weights: `log_weights(key, S)` draws `[S, B]`, nats.
        key: Random key.
        num_samples: K.
        chunk_size: Maximum samples held at once.
    """
    chunk_size = min(chunk_size, num_samples)
    num_chunks = -(-num_samples // chunk_size)

    def add_chunk(sums, inputs):
        index, key = inputs
        log_weight = log_weights(key, chunk_size)
        counted = index * chunk_size + jnp.arange(chunk_size) < num_samples  # the last chunk may be partial
        log_weight = jnp.where(counted[:, None], log_weight, -jnp.inf)
        log_sum, log_sum_squares = sums
        log_sum = jnp.logaddexp(log_sum, jax.nn.logsumexp(log_weight, axis=0))
        log_sum_squares = jnp.logaddexp(log_sum_squares, jax.nn.logsumexp(2 * log_weight, axis=0))
        return (log_sum, log_sum_squares), None

    batch_shape = jax.eval_shape(lambda k: log_weights(k, chunk_size), key).shape[1:]
    empty = jnp.full(batch_shape, -jnp.inf)
    chunks = (jnp.arange(num_chunks), jax.random.split(key, num_chunks))
    (log_sum, log_sum_squares), _ = jax.lax.scan(add_chunk, (empty, empty), chunks)
    effective = jnp.where(jnp.isneginf(log_sum), 0.0, jnp.exp(2 * log_sum - log_sum_squares))
    return ImportanceEstimate(log_sum - jnp.log(num_samples), effective)
