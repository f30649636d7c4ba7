"""Lookahead posteriors: q(z | x_o, x_i) before x_i is seen, for every feature i."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from posterior_matching.config import Config, build, call
from posterior_matching.masking import checked, mask_shape
from posterior_matching.models import distributions
from posterior_matching.models.columns import column_partial_input, column_partial_input_shape
from posterior_matching.models.distributions import Distribution, ExplicitDistribution
from posterior_matching.models.networks import NETWORKS, Network, Shape
from posterior_matching.models.vae import PosteriorMatchingVAE

TARGETS = ("conditional", "marginal")

# With target "conditional", a lookahead posterior with mean m, which should have mean c, is fitted to samples around
# m + PULL (c - m). The gradient with respect to m still points to c, but the distance adds only PULL^2 (c - m)^2 to the
# variance of the samples.
PULL = 0.1


class LookaheadPosterior(nnx.Module):
    """A diagonal Gaussian over z for every feature i: q(z | x_o, x_i), averaged over the unknown x_i (section 4.3).

    One forward pass gives all of them, whereas estimating expected information gains by sampling takes one pass of the
    partial encoder for every feature and every imputation. `pm_vae` holds the options of the `PosteriorMatchingVAE`
    underneath; its encoder is the default of `lookahead_encoder`, which has weights of its own.
    """

    def __init__(self, *, pm_vae: Config, input_shape: Shape, lookahead_encoder: Config | None = None, rngs: nnx.Rngs):
        self.pm_vae: PosteriorMatchingVAE = call(
            PosteriorMatchingVAE, pm_vae, "pm_vae", input_shape=input_shape, rngs=rngs
        )
        self.cardinalities = self.pm_vae.vae.cardinalities
        encoder = pm_vae["encoder"] if lookahead_encoder is None else lookahead_encoder
        shape = column_partial_input_shape(input_shape, self.cardinalities)
        self.encoder: Network = build(NETWORKS, encoder, "lookahead_encoder", input_shape=shape, rngs=rngs)
        self.num_features = math.prod(mask_shape(input_shape))
        sizes = self.encoder.output_shape, self.num_features, self.pm_vae.vae.latent_dim
        self.head = distributions.PerFeatureGaussian(*sizes, rngs=rngs)

    def __call__(
        self, x: jax.Array, b: jax.Array, chosen: jax.Array | slice = slice(None), rngs: nnx.Rngs | None = None
    ) -> ExplicitDistribution:
        """The lookahead posteriors, over `[B, K, e]`, of the `chosen` features, `[K]` flat mask entries or all."""
        return self.head(self.encoder(column_partial_input(x, b, self.cardinalities), rngs), chosen)

    def log_prob_of_samples(
        self,
        x: jax.Array,
        b: jax.Array,
        key: jax.Array,
        *,
        num_samples: int,
        num_features: int,
        target: str,
        available: jax.Array | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """The training objective: the log-probability of samples z ~ q(z | x_o, x_i) under lookahead posterior i.

        `num_features` features are chosen at random, the same for the whole batch. Each is revealed in `num_samples`
        imputations, and one z is drawn for each. The log-probabilities are averaged over the imputations and over the
        chosen features that are available (None: all) but not yet observed: `[B]`, nats; 0 where there are none.

        `target` is the variance that the lookahead posteriors should have. By the law of total variance
        Var(z | x_o) = E[Var(z | x_o, x_i)] + Var(E[z | x_o, x_i]), expectations over x_i given x_o.
        "conditional": the first term, which remains once x_i is seen. Their mean is E[z | x_o].
        "marginal", as published: the variance of z over all imputations, and hence the sum, which still counts the
        information in x_i as unknown. With x_i ~ p(x_i | x_o) it would be the same for all features; they differ only
        because decoder means vary less than data.
        """
        x, b = checked(x, b, self.pm_vae.vae.input_shape)
        key_chosen, key_impute, key_centre, key_z = jax.random.split(key, 4)
        (batch, *_), flat = b.shape, b.reshape(len(b), -1)
        chosen = jax.random.choice(key_chosen, self.num_features, (num_features,), replace=False)
        imputations = self.pm_vae.impute(x, b, num_samples, key=key_impute)
        lookahead = self(x, b, chosen, rngs)
        if target == "marginal":
            z = self._sample_revealed(x, b, chosen, imputations, lambda q, key: q.sample(key), key_z)
        else:
            centre = distributions.mean(self.pm_vae.partial_posterior(x, b), key_centre, num_samples)[:, None]
            z = self._sample_revealed(x, b, chosen, imputations, _centred_draw, key_z)
            z += lookahead.mean + PULL * (centre - lookahead.mean)
        log_prob = lookahead.log_prob(jax.lax.stop_gradient(z)).mean(0)  # over imputations: [B, K]
        scored = 1.0 - flat[:, chosen]
        if available is not None:
            scored *= available.reshape(batch, -1)[:, chosen]
        return (log_prob * scored).sum(-1) / jnp.maximum(scored.sum(-1), 1.0)  # over chosen features

    def _sample_revealed(
        self,
        x: jax.Array,
        b: jax.Array,
        chosen: jax.Array,
        imputations: jax.Array,
        draw: Callable[[Distribution, jax.Array], jax.Array],
        key: jax.Array,
    ) -> jax.Array:
        """Reveals each of the `chosen` features `[K]` in each of the `imputations` `[S, B, *input_shape]`, and draws
        from q(z | x_o, x_i) with `draw(q, key)`: `[S, B, K, e]`.
        """
        values = imputations.reshape(len(imputations), len(x), self.num_features, -1)  # [S, B, features, C]

        def reveal_feature(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:  # [S, B, e]
            i, key = inputs
            posterior = self.pm_vae.partial_posterior.with_feature(x, b, i)
            keys = jax.random.split(key, len(values))
            return jax.vmap(lambda value, key: draw(posterior(value), key))(values[:, :, i], keys)

        # One feature at a time, so that memory does not grow with their number: [K, S, B, e].
        z = jax.lax.map(reveal_feature, (chosen, jax.random.split(key, len(chosen))))
        return z.transpose(1, 2, 0, 3)

    def info_gains(self, x: jax.Array, b: jax.Array, num_samples: int, *, key: jax.Array) -> jax.Array:
        """Estimates the information about z that each unobserved feature would bring, in one forward pass.

        For feature i: the entropy of q(z | x_o), estimated with `num_samples` draws if it is not Gaussian, minus the
        entropy of lookahead posterior i, in nats. `[B, num_features]`, one per mask entry, -inf where observed.
        """
        x, b = checked(x, b, self.pm_vae.vae.input_shape)
        now = distributions.entropy(self.pm_vae.partial_posterior(x, b), key, num_samples)
        return now[:, None] + self.relative_info_gains(x, b)

    def relative_info_gains(self, x: jax.Array, b: jax.Array) -> jax.Array:
        """`info_gains` less the entropy of q(z | x_o), which is the same for all features: what a choice depends on.

        Unlike `info_gains`, this is fast and exact if q(z | x_o) has no closed-form entropy.
        """
        x, b = checked(x, b, self.pm_vae.vae.input_shape)
        # The lookahead posteriors are Gaussian, so their entropy needs no draws.
        then = distributions.entropy(self(x, b), jax.random.key(0), 0)
        return jnp.where(b.reshape(len(b), -1) == 1, -jnp.inf, -then)


def _centred_draw(q: Distribution, key: jax.Array) -> jax.Array:
    """A draw with mean zero and the covariance of q, for any q: the difference of two draws over sqrt(2)."""
    z = q.sample(key, (2,))
    return (z[0] - z[1]) / math.sqrt(2)
