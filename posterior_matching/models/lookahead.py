"""Lookahead posteriors: what will be known about z after observing one more feature, before its value is seen."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from posterior_matching.config import Config, build, call
from posterior_matching.masking import checked, mask_shape
from posterior_matching.models import distributions
from posterior_matching.models.columns import column_partial_input, partial_input_shape
from posterior_matching.models.networks import NETWORKS, Shape
from posterior_matching.models.vae import PosteriorMatchingVAE
from posterior_matching.numerics import on_cpu

SPREADS = ("remaining", "total")


class LookaheadPosterior(nnx.Module):
    """For every feature i a diagonal Gaussian over z: q(z | x_o, x_i), averaged over the unknown x_i (section 4.3).

    One forward pass gives them all, where expected information gains by sampling need one pass of the partial encoder
    for every feature and every imputation.

    Args:
        pm_vae: Config of the `PosteriorMatchingVAE` underneath.
        input_shape: Shape of one example, `(d,)` or `(H, W, C)`.
        lookahead_encoder: Network config; None: that of the PM-VAE's encoder, with weights of its own.
        rngs: Source of initial weights.
    """

    def __init__(self, *, pm_vae: Config, input_shape: Shape, lookahead_encoder: Config | None = None, rngs: nnx.Rngs):
        self.pm_vae: PosteriorMatchingVAE = call(
            PosteriorMatchingVAE, pm_vae, "pm_vae", input_shape=input_shape, rngs=rngs
        )
        self.cardinalities = self.pm_vae.vae.cardinalities
        self.encoder = build(
            NETWORKS,
            pm_vae["encoder"] if lookahead_encoder is None else lookahead_encoder,
            "lookahead_encoder",
            input_shape=partial_input_shape(input_shape, self.cardinalities),
            rngs=rngs,
        )
        self.num_features = math.prod(mask_shape(input_shape))
        latent_dim = self.pm_vae.vae.latent_dim
        self.head = distributions.DiagonalGaussians(self.encoder.output_shape, self.num_features, latent_dim, rngs=rngs)

    def __call__(
        self, x: jax.Array, b: jax.Array, chosen: jax.Array | slice = slice(None), rngs: nnx.Rngs | None = None
    ) -> Any:
        """The lookahead posteriors of the `chosen` features (flat mask entries; default: all).

        Args:
            x: `[B, *input_shape]`; values where b = 0 have no influence.
            b: Mask, `[B, d]` or `[B, H, W, 1]`, 1 = observed.
            chosen: Indices `[K]`.
            rngs: Dropout streams, while training.

        Returns:
            A distribution over z with batch shape `[B, K]` and event shape `[e]`.
        """
        return self.head(self.encoder(column_partial_input(x, b, self.cardinalities), rngs), chosen)

    def log_prob_of_samples(
        self,
        x: jax.Array,
        b: jax.Array,
        key: jax.Array,
        *,
        num_samples: int,
        num_features: int,
        spread: str,
        available: jax.Array | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """What training maximises: how probable lookahead posteriors make samples of the posteriors they stand for.

        `num_features` features are chosen at random, the same for the whole batch. Each is revealed in `num_samples`
        imputations in turn, and z ~ q(z | x_o, x_i) drawn for each. The log-probabilities are averaged over imputations
        and over the chosen features that are not observed yet.

        Args:
            x: `[B, *input_shape]`, finite.
            b: Mask, `[B, d]` or `[B, H, W, 1]`, 1 = observed.
            key: Random key.
            num_samples: Imputations per example.
            num_features: Features to choose.
            available: Mask of the values that exist in the data; None: all. Others are never looked at.
            spread: What the lookahead posteriors' scale stands for. "remaining": E[Var(z | x_o, x_i)], what will be
                unknown once x_i is seen; their mean is that of q(z | x_o), which is E[E[z | x_o, x_i]]. "total", as
                published: the spread of z over all imputations. By the law of total variance that adds what x_i will
                tell, Var(E[z | x_o, x_i]); with x_i ~ p(x_i | x_o) the sum is Var(z | x_o), the same for all features,
                and only what decoder means lack in spread tells features apart.
            rngs: Dropout streams, while training.

        Returns:
            `[B]`, nats; 0 where all chosen features are observed or missing.
        """
        key_chosen, key_impute, key_centre, key_z = jax.random.split(key, 4)
        (batch, *_), flat = b.shape, b.reshape(len(b), -1)
        chosen = jax.random.choice(key_chosen, self.num_features, (num_features,), replace=False)
        imputations = self.pm_vae.impute(x, b, num_samples, key=key_impute)
        imputations = imputations.reshape(num_samples, *flat.shape, -1)  # [S, B, features, C]
        centre = distributions.mean(self.pm_vae.partial_posterior(x, b), key_centre, num_samples)  # [B, e]
        # On a CPU, networks are fastest while activations stay in its cache.
        at_once = max(1, 64 // batch) if on_cpu() else num_samples

        def sample_posteriors(inputs):  # [S, B, e]: of every imputation, with feature i revealed
            i, key = inputs
            posterior = self.pm_vae.partial_posterior.with_feature(x, b, i)

            def sample_posterior(inputs):  # [B, e]: of one imputation
                value, key = inputs
                q = posterior(value)
                if spread == "total":
                    return q.sample(key)
                # The difference of two draws has mean zero and twice the covariance of q, whatever q is.
                z = q.sample(key, (2,))
                return (z[0] - z[1]) / math.sqrt(2)

            inputs = (imputations[:, :, i], jax.random.split(key, num_samples))
            return jax.lax.map(sample_posterior, inputs, batch_size=at_once)

        # One feature after the other, so that memory does not grow with their number: [K, S, B, e].
        z = jax.lax.map(sample_posteriors, (chosen, jax.random.split(key_z, num_features)))
        z = z.transpose(1, 2, 0, 3)
        lookahead = self(x, b, chosen, rngs)
        if spread == "remaining":
            # Around a point a tenth of the way from the mean to the one it should have: it moves there all the same,
            # but the distance that is left hardly counts as spread.
            z += lookahead.mean + 0.1 * (centre[:, None] - lookahead.mean)
        log_prob = lookahead.log_prob(jax.lax.stop_gradient(z)).mean(0)  # over imputations: [B, K]
        counted = 1.0 - flat[:, chosen]
        if available is not None:
            counted *= available.reshape(batch, -1)[:, chosen]
        return (log_prob * counted).sum(-1) / jnp.maximum(counted.sum(-1), 1.0)  # over chosen features

    def info_gains(self, x: jax.Array, b: jax.Array, num_samples: int, *, key: jax.Array) -> jax.Array:
        """Estimates the information about z that each unobserved feature would bring, in one forward pass.

        For feature i: the entropy of q(z | x_o) minus that of lookahead posterior i, in nats.

        Args:
            x: `[B, *input_shape]`.
            b: Mask, `[B, d]` or `[B, H, W, 1]`, 1 = observed.
            num_samples: Draws for the entropy of q(z | x_o), if it is no Gaussian.
            key: Random key, for the same purpose.

        Returns:
            `[B, num_features]`, one entry per mask entry, -inf where observed.
        """
        x, b = checked(x, b, self.pm_vae.vae.input_shape)
        now = distributions.entropy(self.pm_vae.partial_posterior(x, b), key, num_samples)
        then = distributions.entropy(self(x, b), key, num_samples)
        return jnp.where(b.reshape(len(b), -1) == 1, -jnp.inf, now[:, None] - then)
