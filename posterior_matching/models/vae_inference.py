"""Inference through q(z | x_o): imputations, draws of x_u, log p(x_u | x_o), and the information of a feature.

For all methods, `x` is `[B, *input_shape]` (values where b = 0 have no influence, and may be NaN), and `b` is a mask,
`[B, d]` or `[B, H, W, 1]`, 1 = observed. They raise a UserError if these do not fit the model, see `masking.checked`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from posterior_matching.masking import checked, existing, observed_only
from posterior_matching.models import distributions
from posterior_matching.models.columns import IndependentColumns, column_values, is_real
from posterior_matching.models.distributions import Distribution, ExplicitDistribution, sample_and_log_prob
from posterior_matching.models.marginal_likelihood import (
    ConditionalLogProb,
    ImportanceEstimate,
    importance_log_prob,
    log_mean_weight,
    log_prob_of_observed,
    tempered_weights,
    weighted_mean,
)
from posterior_matching.models.protocols import ConditionalPosterior, LatentModel

_MOST_IMPUTATIONS = 1024  # held at once; more would change the mean by less than 0.1%


class ImputationMixin(nnx.Module):
    """Imputation with z ~ q(z | x_o), for models with a `partial_posterior` and a VAE to decode z."""

    partial_posterior: ConditionalPosterior

    @property
    def decoding(self) -> LatentModel:
        """The VAE."""
        raise NotImplementedError

    def impute(self, x: jax.Array, b: jax.Array, num_samples: int, *, key: jax.Array) -> jax.Array:
        """Imputes with decoder means for z ~ q(z | x_o), `[num_samples, B, *input_shape]`; categories are drawn.

        Observed values are copied. Imputations vary by z but not by the noise of p(x | z), which `draw` adds.
        """
        x, b = checked(x, b, self.decoding.input_shape)
        if any(self.decoding.cardinalities):
            key_z, key_x = jax.random.split(key)
            imputations = self._decode_draw(self._latents(x, b, num_samples, key_z), key_x, means=True)
        else:
            imputations = self._decode(self._latents(x, b, num_samples, key), _mean_features)
        return jnp.where(b == 1, x, imputations)

    def impute_and_weigh(
        self, x: jax.Array, b: jax.Array, num_samples: int, *, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Like `impute`, but with the most probable categories; and log p(x_o, z) - log q(z | x_o), `[S, B]`."""
        x, b = checked(x, b, self.decoding.input_shape)
        _, log_weights, means = self._weighted_latents(x, b, num_samples, key)
        return jnp.where(b == 1, x, column_values(means, self.decoding.cardinalities)), log_weights

    def draw(
        self, x: jax.Array, b: jax.Array, num_samples: int, *, key: jax.Array, candidates: int | None = None
    ) -> jax.Array:
        """Draws x_u ~ p(x_u | x_o), including the noise of p(x | z); otherwise like `impute`.

        With `candidates`, each z is chosen among as many draws of q(z | x_o), in proportion to their weights as in
        `point` (sampling-importance-resampling, Rubin 1987); without, it is a draw of q(z | x_o), as published.
        """
        x, b = checked(x, b, self.decoding.input_shape)
        key_z, key_x = jax.random.split(key)
        if candidates is None:
            z = self._latents(x, b, num_samples, key_z)
        else:
            key_z, key_choice = jax.random.split(key_z)
            z, log_weights, _ = self._weighted_latents(x, b, candidates, key_z)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key_choice, jnp.arange(num_samples))
            u = jax.vmap(lambda key: jax.random.uniform(key, (len(x),)))(keys)  # [S, B]
            below = jnp.cumsum(tempered_weights(log_weights), axis=0)
            chosen = jax.vmap(jnp.searchsorted, in_axes=1, out_axes=1)(below[:-1], u * below[-1])
            z = jnp.take_along_axis(z, chosen[..., None], axis=0)
        return jnp.where(b == 1, x, self._decode_draw(z, key_x))

    def point(
        self, x: jax.Array, b: jax.Array, num_samples: int, *, key: jax.Array, weighted: bool = False
    ) -> jax.Array:
        """Estimates x_u, `[B, *input_shape]`: E[x_u | x_o] over `num_samples` draws of z, observed values copied.

        For categories it is the most probable one, with probabilities averaged over z. If `weighted`, each draw is
        weighed by p(x_o, z) / q(z | x_o), see `tempered_weights`: closer to the model's own expectation, under
        p(z | x_o), which q(z | x_o) approximates. As published, it is not.
        """
        x, b = checked(x, b, self.decoding.input_shape)
        if weighted:
            _, log_weights, means = self._weighted_latents(x, b, num_samples, key)
            return self._point(x, b, means, log_weights)
        return self._point(x, b, self._decode(self._latents(x, b, num_samples, key), _mean_features))

    def _point(self, x: jax.Array, b: jax.Array, means: jax.Array, log_weights: jax.Array | None = None) -> jax.Array:
        mean = means.mean(0) if log_weights is None else weighted_mean(means, tempered_weights(log_weights))
        return jnp.where(b == 1, x, column_values(mean, self.decoding.cardinalities))

    def _latents(self, x: jax.Array, b: jax.Array, num_samples: int, key: jax.Array) -> jax.Array:
        return self.partial_posterior(x, b).sample(key, (num_samples,))

    def _weighted_latents(
        self, x: jax.Array, b: jax.Array, num_samples: int, key: jax.Array, chunk_size: int = 128
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """z ~ q(z | x_o) `[S, B, e]`, log p(x_o, z) - log q(z | x_o) `[S, B]`, and the features' means given z."""
        q, size = self.partial_posterior(x, b), min(num_samples, chunk_size)
        keys = jax.random.split(key, -(-num_samples // size))
        drawn = jax.lax.map(lambda key: sample_and_log_prob(q, key, (size,)), keys)
        z, log_q = (a.reshape(-1, *a.shape[2:])[:num_samples] for a in drawn)
        means, log_p_xo = self._decode(z, lambda p: (_mean_features(p), log_prob_of_observed(p, x, b)), chunk_size)
        return z, log_p_xo + self.decoding.prior().log_prob(z) - log_q, means

    def _decode(self, z: jax.Array, read: Callable[[ExplicitDistribution], Any], chunk_size: int = 128) -> Any:
        """`read(p(x | z))` for each sample of `z: [S, B, e]`; decodes `chunk_size` samples at once."""
        return jax.lax.map(lambda z: read(self.decoding.decode(z)), z, batch_size=chunk_size)

    def _decode_draw(self, z: jax.Array, key: jax.Array, means: bool = False, chunk_size: int = 128) -> jax.Array:
        """Draws x ~ p(x | z), `[S, B, *input_shape]`; with `means`, only categories are drawn."""

        def draw(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
            z, key = inputs
            p = self.decoding.decode(z)
            x = p.sample(key)
            return jnp.where(is_real(self.decoding.cardinalities), p.mean, x) if means else x

        return jax.lax.map(draw, (z, jax.random.split(key, len(z))), batch_size=chunk_size)


def _mean_features(p: ExplicitDistribution) -> jax.Array:
    """E[features of x | z], `[B, *input_shape]` or, with categories, whose features are probabilities, `[B, width]`."""
    return p.mean_features if isinstance(p, IndependentColumns) else p.mean


class LikelihoodMixin(ImputationMixin):
    """Importance-sampled likelihoods and information gains as well.

    The number of samples is that of each estimate. Further arguments, `sampling`, are those of `importance_log_prob`,
    such as `chunk_size`. `available` is the mask of the values that exist in the data; others are never scored.
    """

    def is_log_prob(
        self,
        x: jax.Array,
        b: jax.Array,
        num_samples: int,
        *,
        key: jax.Array,
        available: jax.Array | None = None,
        **sampling: int,
    ) -> ConditionalLogProb:
        """Importance-samples log p(x) with proposal q(z | x) and log p(x_o) with proposal q(z | x_o).

        `available` is by default what is not NaN.
        """
        x, b, available = self._among_existing(x, b, available)
        key_x, key_xo = jax.random.split(key)
        q = self.decoding.posterior(x, available=available)
        full = self._importance_log_prob(q, x, available, key_x, num_samples, **sampling)
        return ConditionalLogProb.of(
            full, self._importance_log_prob(self.partial_posterior(x, b), x, b, key_xo, num_samples, **sampling)
        )

    def point_and_log_prob(
        self,
        x: jax.Array,
        b: jax.Array,
        num_samples: int,
        *,
        key: jax.Array,
        available: jax.Array | None = None,
        weighted: bool = False,
        chunk_size: int = 128,
        refine_steps: int = 0,
    ) -> tuple[jax.Array, ConditionalLogProb]:
        """`point` and `is_log_prob`, where possible from the same draws of q(z | x_o), nearly all of their cost.

        The point estimate averages at most `_MOST_IMPUTATIONS` draws. The arguments are those of the two.
        """
        x, b, available = self._among_existing(x, b, available)
        key_x, key_xo = jax.random.split(key)
        sampling = {"chunk_size": chunk_size, "refine_steps": refine_steps}
        q = self.decoding.posterior(x, available=available)
        full = self._importance_log_prob(q, x, available, key_x, num_samples, **sampling)
        kept = min(num_samples, _MOST_IMPUTATIONS)
        _, log_weights, means = self._weighted_latents(x, b, kept, key_xo, chunk_size)
        if refine_steps or kept < num_samples:
            proposal = self.partial_posterior(x, b)
            observed = self._importance_log_prob(proposal, x, b, key_xo, num_samples, **sampling)
        else:
            observed = log_mean_weight(lambda *_: log_weights, key_xo, num_samples, chunk_size=num_samples)
        return self._point(x, b, means, log_weights if weighted else None), ConditionalLogProb.of(full, observed)

    def _among_existing(
        self, x: jax.Array, b: jax.Array, available: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Checks x and b, and returns them without the values that are missing in the data, and the mask of those."""
        x, b = checked(x, b, self.decoding.input_shape)
        available = existing(x) if available is None else jnp.asarray(available)
        return observed_only(x, available), b * available, available

    def simulated_gaps(
        self, b: jax.Array, num_samples: int, *, key: jax.Array, available: jax.Array | None = None, **sampling: int
    ) -> tuple[jax.Array, jax.Array]:
        """Upper minus lower bound on log p(x) and on log p(x_o), `[B]` nats each, for data drawn from the model.

        For x ~ p(x | z), z is a draw of both p(z | x) and p(z | x_o), which gives upper bounds (Grosse et al. 2015).
        On average the differences are at least what `is_log_prob` lacks; real data may have larger gaps. One x is drawn
        for each mask; `available` is by default everything.
        """
        available = jnp.ones_like(b) if available is None else jnp.asarray(available)
        key_z, key_x, key_full, key_observed = jax.random.split(key, 4)
        z = self.decoding.prior().sample(key_z, (len(b),))
        x, b = observed_only(self.decoding.decode(z).sample(key_x), available), b * available
        q, q_o = self.decoding.posterior(x, available=available), self.partial_posterior(x, b)
        full = self._importance_log_prob(q, x, available, key_full, num_samples, z, **sampling)
        observed = self._importance_log_prob(q_o, x, b, key_observed, num_samples, z, **sampling)
        assert full.upper_bound is not None and observed.upper_bound is not None
        return full.upper_bound - full.log_prob, observed.upper_bound - observed.log_prob

    def log_prob_of(
        self, x: jax.Array, target: jax.Array, given: jax.Array, num_samples: int, *, key: jax.Array, **sampling: int
    ) -> jax.Array:
        """Estimates log p(x_t | x_o), `[B]`, in nats, for any x_t (mask `target`) given any x_o (mask `given`).

        It is log p(x_t, x_o) - log p(x_o), each importance-sampled with the partial posterior as proposal. Real columns
        have densities per unit of `x` (`TableSchema.log_det_jacobian` converts them to a table's units), categories
        probabilities. Values that are also given are left out of the target; nothing given gives log p(x_t).
        """
        x, given = checked(x, given, self.decoding.input_shape)
        x, target = checked(x, target, self.decoding.input_shape)

        def estimate(b: jax.Array, key: jax.Array) -> jax.Array:
            estimated = self._importance_log_prob(self.partial_posterior(x, b), x, b, key, num_samples, **sampling)
            return jnp.where(b.reshape(len(b), -1).any(-1), estimated.log_prob, 0.0)  # log p of nothing is 0

        key_both, key_given = jax.random.split(key)
        return estimate(jnp.maximum(target, given), key_both) - estimate(given, key_given)

    def _importance_log_prob(
        self,
        proposal: Distribution,
        x: jax.Array,
        b: jax.Array,
        key: jax.Array,
        num_samples: int,
        posterior_draw: jax.Array | None = None,
        /,
        **sampling: int,
    ) -> ImportanceEstimate:
        def log_joint(z: jax.Array) -> jax.Array:
            return self.decoding.log_prob_given(z, x, b) + self.decoding.prior().log_prob(z)

        return importance_log_prob(log_joint, proposal, key, num_samples, posterior_draw=posterior_draw, **sampling)

    def expected_info_gains(
        self, x: jax.Array, b: jax.Array, num_samples: int, *, key: jax.Array, features_at_once: int = 1
    ) -> jax.Array:
        """Expected information about z that each unobserved feature of one example would bring (paper, section 4.3).

        For feature i: `H[q(z | x_o)] - E[H[q(z | x_o, x_i)]]` in nats, x_i from `num_samples` imputations. Entropies
        are exact for Gaussian partial posteriors, else estimated with `num_samples` draws. Returns `[b.size]`, one
        per mask entry, -inf where observed. Memory grows with `features_at_once`; the result does not depend on it.
        """
        x, b = (a[0] for a in checked(x[None], b[None], self.decoding.input_shape))
        key_impute, key_now, key_then = jax.random.split(key, 3)
        imputations = self.impute(x[None], b[None], num_samples, key=key_impute)
        imputations = imputations.reshape(num_samples, b.size, -1)  # [S, features, C]
        now = distributions.entropy(self.partial_posterior(x[None], b[None]), key_now, num_samples)[0]

        def expected_entropy(i: jax.Array) -> jax.Array:
            then = self.partial_posterior.with_feature(x[None], b[None], i)(imputations[:, i])
            return distributions.entropy(then, key_then, num_samples).mean()

        gains = now - jax.lax.map(expected_entropy, jnp.arange(b.size), batch_size=features_at_once)
        return jnp.where(b.reshape(-1) == 1, -jnp.inf, gains)
