"""Per-example log-likelihoods in nats: of observed features given z, and marginal over z by importance sampling."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from posterior_matching.models.distributions import Distribution, sample_and_log_prob
from posterior_matching.models.logistic_mixture import DiscretisedLogisticMixture
from posterior_matching.models.proposals import DefensiveMixture, LogDensity, fit_mixture


def log_prob_of_observed(p: Distribution | DiscretisedLogisticMixture, x: jax.Array, b: jax.Array) -> jax.Array:
    """log p(x_o | z) in nats, `[..., B]`: log-probabilities of independent features, summed where b is 1.

    `p` has batch shape `[..., B, *data_shape]`. Unobserved values have no influence, even if not finite.
    """
    # `where` instead of a product, and on both sides: -inf * 0 is NaN, in the value or in its gradient.
    log_prob = jnp.where(b == 1, p.log_prob(jnp.where(b == 1, x, 0.0)), 0.0)
    return log_prob.sum(tuple(range(log_prob.ndim - (x.ndim - 1), log_prob.ndim)))  # over features


def tempered_weights(log_weights: jax.Array, min_share: float = 0.1) -> jax.Array:
    """Self-normalised importance weights w^t, with the largest t in [0, 1] that keeps enough samples effective.

    Where q misses p(z | x_o), a few draws have nearly all of the weight, and an average over them is noise. Tempering
    trades this variance for a bias towards q. The rule for t is that of adaptive sequential Monte Carlo (Jasra et al.
    2011, "Inference for Levy-driven stochastic volatility models via adaptive sequential Monte Carlo").

    For log p(x_o, z) - log q(z) in nats, `[S, B]`, returns `[S, B]` with sum 1 over S. `min_share` is the smallest
    effective sample size, as a share of S; docs/notes.md has the choice.
    """
    log_weights = jnp.maximum(log_weights, jnp.finfo(log_weights.dtype).min / 2)  # finite, so that 0 times them is 0

    def weights(t: jax.Array) -> jax.Array:
        return jax.nn.softmax(t * log_weights, axis=0)

    def enough(t: jax.Array) -> jax.Array:  # the effective sample size falls with t
        return min_share * len(log_weights) * jnp.square(weights(t)).sum(0) <= 1.0

    def bisect(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low + high) / 2
        return jnp.where(enough(middle), middle, low), jnp.where(enough(middle), high, middle)

    zero, one = jnp.zeros(log_weights.shape[1:]), jnp.ones(log_weights.shape[1:])
    low, _ = jax.lax.fori_loop(0, 20, bisect, (zero, one))
    return weights(jnp.where(enough(one), one, low))


def weighted_mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    """The mean over samples of `values: [S, B, ...]` with `weights: [S, B]`, which sum to 1 over S."""
    return (weights.reshape(*weights.shape, *[1] * (values.ndim - 2)) * values).sum(0)


class ConditionalLogProb(NamedTuple):
    """Importance-sampled log-likelihoods in nats, their effective sample sizes and gaps; all `[B]`."""

    log_p_x: jax.Array  # log p(x)
    log_p_xo: jax.Array  # log p(x_o)
    log_p_xu_given_xo: jax.Array  # log p(x_u | x_o) = log p(x) - log p(x_o)
    ess_x: jax.Array  # effective sample size of each estimate, in [1, num_samples]
    ess_xo: jax.Array
    gap_x: jax.Array  # estimated distance from an upper bound, see `ImportanceEstimate`
    gap_xo: jax.Array

    @classmethod
    def of(cls, full: "ImportanceEstimate", observed: "ImportanceEstimate") -> "ConditionalLogProb":
        """From the estimates of log p(x) and log p(x_o)."""
        log_probs = full.log_prob, observed.log_prob, full.log_prob - observed.log_prob
        return cls(*log_probs, full.effective_sample_size, observed.effective_sample_size, full.gap, observed.gap)


class ImportanceEstimate(NamedTuple):
    """An importance-sampled log-likelihood, `log (1/K) sum_k p(x, z_k) / q(z_k)`: on average a lower bound.

    With a draw of p(z | x) among the samples, it is on average an upper bound (Sobolev and Vetrov 2019). `gap`
    estimates how far apart the two are: about 1 / effective sample size - 1 / K if no weight dominates, twice what the
    lower bound lacks. As it takes the weighted samples for draws of p(z | x), it is too small if they miss parts of it.
    `upper_bound` uses a true draw, which is known for data drawn from the model.
    """

    log_prob: jax.Array  # [B], nats
    effective_sample_size: jax.Array  # [B], (sum w)^2 / sum w^2, in [1, K]; 0 if all weights vanish
    gap: jax.Array  # [B], nats; infinite for K = 1 or if all weights vanish
    upper_bound: jax.Array | None = None  # [B], nats, on average


def importance_log_prob(
    log_joint: LogDensity,
    proposal: Distribution,
    key: jax.Array,
    num_samples: int,
    chunk_size: int = 128,
    *,
    refine_steps: int = 0,
    posterior_draw: jax.Array | None = None,
) -> ImportanceEstimate:
    """Estimates the log of the integral of exp(log_joint(z)) over z with `num_samples` draws from `proposal`.

    Args:
        log_joint: Maps `z: [S, B, e]` to log p(x_o | z) + log p(z), `[S, B]`, nats.
        proposal: q, a distribution over `[B, e]`.
        key: Random key.
        num_samples: K.
        chunk_size: Maximum samples held at once.
        refine_steps: If positive, draw from a mixture of q with Gaussians that so many gradient steps fit.
        posterior_draw: A draw from exp(log_joint), normalised, `[B, e]`, for the upper bound.
    """
    if refine_steps:
        fitted = fit_mixture(log_joint, proposal, jax.random.fold_in(key, 1), refine_steps)
        proposal = DefensiveMixture(proposal, fitted)

    def log_weights(key: jax.Array, chunk_size: int) -> jax.Array:
        z, log_q = sample_and_log_prob(proposal, key, (chunk_size,))
        return log_joint(z) - log_q

    estimate = log_mean_weight(log_weights, key, num_samples, chunk_size)
    if posterior_draw is None:
        return estimate
    log_weight = (log_joint(posterior_draw[None]) - proposal.log_prob(posterior_draw[None]))[0]
    log_sum = jnp.logaddexp(estimate.log_prob + jnp.log(num_samples), log_weight)
    return estimate._replace(upper_bound=log_sum - jnp.log(num_samples + 1))


_Sums = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def log_mean_weight(
    log_weights: Callable[[jax.Array, int], jax.Array], key: jax.Array, num_samples: int, chunk_size: int
) -> ImportanceEstimate:
    """Estimates the log of the mean of importance weights from `num_samples` draws, `log_weights(key, S) -> [S, B]`.

    Works in log space throughout, `chunk_size` samples at a time, so memory does not grow with `num_samples`.
    """
    chunk_size = min(chunk_size, num_samples)
    num_chunks = -(-num_samples // chunk_size)

    def add_chunk(sums: _Sums, inputs: tuple[jax.Array, jax.Array]) -> tuple[_Sums, None]:
        index, key = inputs
        log_weight = log_weights(key, chunk_size)
        counted = index * chunk_size + jnp.arange(chunk_size) < num_samples  # the last chunk may be partial
        log_weight = jnp.where(counted[:, None], log_weight, -jnp.inf)
        log_sum, log_sum_squares, log_largest, log_others = sums
        log_sum = jnp.logaddexp(log_sum, jax.nn.logsumexp(log_weight, axis=0))
        log_sum_squares = jnp.logaddexp(log_sum_squares, jax.nn.logsumexp(2 * log_weight, axis=0))
        is_largest = jnp.arange(chunk_size)[:, None] == jnp.argmax(log_weight, axis=0)
        others = jax.nn.logsumexp(jnp.where(is_largest, -jnp.inf, log_weight), axis=0)
        smaller, log_largest = jnp.sort(jnp.stack([log_largest, log_weight.max(0)]), axis=0)
        log_others = jnp.logaddexp(jnp.logaddexp(log_others, others), smaller)
        return (log_sum, log_sum_squares, log_largest, log_others), None

    batch_shape = jax.eval_shape(lambda k: log_weights(k, chunk_size), key).shape[1:]
    empty = jnp.full(batch_shape, -jnp.inf)
    chunks = (jnp.arange(num_chunks), jax.random.split(key, num_chunks))
    (log_sum, log_sum_squares, log_largest, log_others), _ = jax.lax.scan(add_chunk, (empty,) * 4, chunks)
    vanish = jnp.isneginf(log_sum)
    effective = jnp.where(vanish, 0.0, jnp.exp(2 * log_sum - log_sum_squares))
    # With the weights' shares s_k of their sum, leaving a sample out in turn and choosing it with probability s_k gives
    # upper - lower = -sum_k s_k log(1 - s_k) - log(K / (K - 1)). As -log(1 - s) / s grows with s, its value at the
    # largest share bounds the sum by this multiple of sum_k s_k^2 = 1 / effective.
    log_all_over_others = log_sum - log_others  # -log(1 - s) without rounding s to 1
    spread = log_all_over_others * jnp.exp(log_sum - log_largest) / effective
    excess = jnp.maximum(spread + jnp.log1p(-1.0 / num_samples), 0.0)  # rounding may take it below zero
    gap = jnp.where(vanish | (num_samples == 1), jnp.inf, excess)
    return ImportanceEstimate(log_sum - jnp.log(num_samples), effective, gap)
