"""The VAE, and Posterior Matching: a second encoder q(z | x_o) that gives it every conditional p(x_u | x_o)."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from posterior_matching.config import Config, Units, build
from posterior_matching.masking import partial_input, partial_input_shape
from posterior_matching.models import distributions
from posterior_matching.models.distributions import (
    LATENT_HEADS,
    LIKELIHOOD_HEADS,
    Distribution,
    ExplicitDistribution,
)
from posterior_matching.models.likelihood import ConditionalLogProb, importance_log_prob, log_prob_of_observed
from posterior_matching.models.networks import NETWORKS, Shape


class VAE(nnx.Module):
    """A variational autoencoder: prior p(z) = N(0, I), decoder p(x | z), posterior q(z | x).

    Args:
        input_shape: Shape of one example, `(d,)` or `(H, W, C)`.
        latent_dim: Dimensions of z.
        encoder: Network config; `name` is one of `networks.NETWORKS`.
        posterior: Head config of q(z | x); one of `distributions.LATENT_HEADS` with a closed-form KL.
        decoder: Network config.
        likelihood: Head config of p(x | z); one of `distributions.LIKELIHOOD_HEADS`.
        rngs: Source of initial weights.
    """

    def __init__(
        self,
        *,
        input_shape: Shape,
        latent_dim: Units,
        encoder: Config,
        posterior: Config,
        decoder: Config,
        likelihood: Config,
        rngs: nnx.Rngs,
    ):
        self.latent_dim = latent_dim
        self.encoder = build(NETWORKS, encoder, "encoder", input_shape=input_shape, rngs=rngs)
        self.posterior_head = build(
            LATENT_HEADS,
            posterior,
            "posterior",
            features_shape=self.encoder.output_shape,
            event_size=latent_dim,
            rngs=rngs,
        )
        self.decoder = build(NETWORKS, decoder, "decoder", input_shape=(latent_dim,), rngs=rngs)
        self.likelihood_head = build(
            LIKELIHOOD_HEADS,
            likelihood,
            "likelihood",
            features_shape=self.decoder.output_shape,
            data_shape=input_shape,
            rngs=rngs,
        )

    def prior(self) -> Distribution:
        """p(z) = N(0, I) over `[e]`."""
        return distributions.standard_normal(self.latent_dim)

    def posterior(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> Distribution:
        """q(z | x) for `x: [B, *input_shape]`, a distribution over `[B, e]`."""
        return self.posterior_head(self.encoder(x, rngs))

    def decode(self, z: jax.Array, rngs: nnx.Rngs | None = None) -> ExplicitDistribution:
        """p(x | z) for `z: [B, e]`: independent features, batch shape `[B, *input_shape]`."""
        return self.likelihood_head(self.decoder(z, rngs))

    def log_prob_given(self, z: jax.Array, x: jax.Array, b: jax.Array) -> jax.Array:
        """log p(x_o | z) in nats, `[S, B]`, for `z: [S, B, e]`."""
        s, n, _ = z.shape
        p = self.decode(z.reshape(s * n, -1))
        x, b = (jnp.broadcast_to(a, (s, *a.shape)).reshape(s * n, *a.shape[1:]) for a in (x, b))
        return log_prob_of_observed(p, x, b).reshape(s, n)

    def decode_mean(self, z: jax.Array, chunk_size: int = 128) -> jax.Array:
        """E[x | z], `[S, B, *input_shape]`, for `z: [S, B, e]`, decoding `chunk_size` samples at once."""
        return jax.lax.map(lambda z: self.decode(z).mean, z, batch_size=chunk_size)


class PartialPosterior(nnx.Module):
    """q(z | x_o): an encoder that sees `[x * b, b]` and nothing else (paper, section 3).

    Args:
        input_shape: Shape of one example of x.
        latent_dim: Dimensions of z.
        encoder: Network config.
        head: Head config; any of `distributions.LATENT_HEADS`.
        rngs: Source of initial weights.
    """

    def __init__(self, *, input_shape: Shape, latent_dim: int, encoder: Config, head: Config, rngs: nnx.Rngs):
        self.encoder = build(
            NETWORKS, encoder, "partial_encoder", input_shape=partial_input_shape(input_shape), rngs=rngs
        )
        self.head = build(
            LATENT_HEADS,
            head,
            "partial_posterior",
            features_shape=self.encoder.output_shape,
            event_size=latent_dim,
            rngs=rngs,
        )

    def __call__(self, x: jax.Array, b: jax.Array, rngs: nnx.Rngs | None = None) -> Distribution:
        """q(z | x_o) over `[B, e]` for `x: [B, *input_shape]` and mask `b` (1 = observed)."""
        return self.head(self.encoder(partial_input(x, b), rngs))

    def with_feature(self, x: jax.Array, b: jax.Array, i: jax.Array) -> Callable[[jax.Array], Distribution]:
        """Returns the function from values of feature i, `[B, C]`, to q(z | x_o, x_i) over `[B, e]`.

        Only feature i of the encoder's input depends on the value, and the encoder's first layer is affine. So the
        layer is applied to `[x * b, b]` once, and every value adds its multiple of what the layer makes of feature i.

        Args:
            x: `[B, *input_shape]`, or one example `[1, *input_shape]` for all values.
            b: Mask, `[B, d]` or `[B, H, W, 1]`, 1 = observed. Examples that have feature i observed keep their value.
            i: Index of a mask entry.
        """
        base = self.encoder.first(partial_input(x, b))
        added = self._added_by_feature(i, x.shape[1:], b.shape[1:])
        unobserved = 1.0 - b.reshape(len(b), -1)[:, i, None]  # [B, 1]

        def posterior(value: jax.Array) -> Distribution:
            revealed = jnp.concatenate([value, jnp.ones((len(value), 1))], axis=-1) * unobserved  # value and mask
            return self.head(self.encoder.after_first(base + jnp.tensordot(revealed, added, 1)))

        return posterior

    def _added_by_feature(self, i: jax.Array, input_shape: Shape, mask_shape: Shape) -> jax.Array:
        """What a unit of each channel of feature i, and a unit of its mask, add to the first layer: `[C + 1, ...]`.

        (`jax.linearize` would give the same, but `numerics.convolution` has reverse-mode derivatives only.)
        """
        mask = jnp.zeros(math.prod(mask_shape)).at[i].set(1.0).reshape(1, *mask_shape)
        channels = math.prod(input_shape) // mask.size
        value = mask * jnp.eye(channels).reshape(channels, *[1] * (len(input_shape) - 1), channels)
        value_units = jnp.concatenate([value, jnp.zeros((1, *input_shape))])
        mask_units = jnp.concatenate([jnp.zeros((channels, *mask_shape)), mask])
        units = jnp.concatenate([value_units, mask_units], axis=-1)
        return self.encoder.first(units) - self.encoder.first(jnp.zeros_like(units))  # the bias cancels


class VAETerms(NamedTuple):
    """What training optimises, per example and in nats; all `[B]`."""

    reconstruction_ll: jax.Array  # log p(x | z), one z ~ q(z | x)
    kl: jax.Array  # KL(q(z | x) || p(z)), closed form
    matching_ll: jax.Array  # log q(z | x_o), the same z

    def elbo(self) -> jax.Array:
        """Evidence lower bound on log p(x)."""
        return self.reconstruction_ll - self.kl

    def loss(self, beta: jax.Array | float, matching_coef: float) -> jax.Array:
        """Negative ELBO plus the Posterior Matching loss (paper, equations 1 and 4)."""
        return -(self.reconstruction_ll - beta * self.kl) - matching_coef * self.matching_ll


class PosteriorMatchingVAE(nnx.Module):
    """A VAE that answers every conditional p(x_u | x_o) through z ~ q(z | x_o).

    Args:
        input_shape: Shape of one example, `(d,)` or `(H, W, C)`.
        latent_dim: Of the `VAE`, as are the four below.
        encoder: See `VAE`.
        posterior: See `VAE`.
        decoder: See `VAE`.
        likelihood: See `VAE`.
        partial_encoder: Network config of q(z | x_o); None: as the encoder, with weights of its own.
        partial_posterior: Head config of q(z | x_o); None: as the posterior, with weights of its own.
        rngs: Source of initial weights.
    """

    def __init__(
        self,
        *,
        input_shape: Shape,
        latent_dim: Units,
        encoder: Config,
        posterior: Config,
        decoder: Config,
        likelihood: Config,
        partial_encoder: Config | None = None,
        partial_posterior: Config | None = None,
        rngs: nnx.Rngs,
    ):
        self.vae = VAE(
            input_shape=input_shape,
            latent_dim=latent_dim,
            encoder=encoder,
            posterior=posterior,
            decoder=decoder,
            likelihood=likelihood,
            rngs=rngs,
        )
        self.partial_posterior = PartialPosterior(
            input_shape=input_shape,
            latent_dim=latent_dim,
            encoder=encoder if partial_encoder is None else partial_encoder,
            head=posterior if partial_posterior is None else partial_posterior,
            rngs=rngs,
        )

    def terms(
        self,
        x: jax.Array,
        b: jax.Array,
        key: jax.Array,
        *,
        available: jax.Array | None = None,
        stop_gradients: bool = False,
        rngs: nnx.Rngs | None = None,
    ) -> VAETerms:
        """The terms of the training objective.

        Args:
            x: `[B, *input_shape]`, finite; missing values are zeros.
            b: Mask, `[B, d]` or `[B, H, W, 1]`, 1 = observed.
            key: Random key of z.
            available: Mask of the values that exist in the data; None: all.
            stop_gradients: Stop the matching term's gradient at z, so that it does not train the VAE.
            rngs: Dropout streams, while training.
        """
        q = self.vae.posterior(x, rngs)
        z = q.sample(key)  # reparameterised
        p = self.vae.decode(z, rngs)
        target = jax.lax.stop_gradient(z) if stop_gradients else z
        return VAETerms(
            reconstruction_ll=log_prob_of_observed(p, x, jnp.ones_like(b) if available is None else available),
            kl=distributions.kl_to_standard_normal(q),
            # Posterior Matching: q(z | x_o) by maximum likelihood on samples of q(z | x).
            matching_ll=self.partial_posterior(x, b, rngs).log_prob(target),
        )

    def impute(self, x: jax.Array, b: jax.Array, num_samples: int, *, key: jax.Array) -> jax.Array:
        """Draws imputations: decoder means for z ~ q(z | x_o) where unobserved, the observed values elsewhere.

        Args:
            x: `[B, *input_shape]`; values where b = 0 have no influence (but must be finite).
            b: Mask, `[B, d]` or `[B, H, W, 1]`, 1 = observed.
            num_samples: Imputations per example.
            key: Random key.

        Returns:
            `[num_samples, B, *input_shape]`.
        """
        z = self.partial_posterior(x, b).sample(key, (num_samples,))
        return jnp.where(b == 1, x, self.vae.decode_mean(z))

    def is_log_prob(
        self,
        x: jax.Array,
        b: jax.Array,
        num_samples: int,
        *,
        key: jax.Array,
        available: jax.Array | None = None,
        chunk_size: int = 128,
    ) -> ConditionalLogProb:
        """Importance-samples log p(x) with proposal q(z | x) and log p(x_o) with proposal q(z | x_o).

        Args:
            x: `[B, *input_shape]`, finite.
            b: Mask, `[B, d]` or `[B, H, W, 1]`, 1 = observed.
            num_samples: Samples of z for each of the two estimates.
            key: Random key.
            available: Mask of the values that exist in the data; None: all. Others are never scored.
            chunk_size: Most samples per example held at once.
        """
        available = jnp.ones_like(b) if available is None else available

        def estimate(proposal, mask, key):
            def log_joint(z):
                return self.vae.log_prob_given(z, x, mask) + self.vae.prior().log_prob(z)

            return importance_log_prob(log_joint, proposal, key, num_samples, chunk_size)

        b = b * available
        key_x, key_xo = jax.random.split(key)
        full = estimate(self.vae.posterior(x), available, key_x)
        observed = estimate(self.partial_posterior(x, b), b, key_xo)
        return ConditionalLogProb.of(full, observed)

    def expected_info_gains(
        self, x: jax.Array, b: jax.Array, num_samples: int, *, key: jax.Array, features_at_once: int = 1
    ) -> jax.Array:
        """Expected information about z that each unobserved feature would bring (paper, section 4.3).

        For feature i: `H[q(z | x_o)] - E[H[q(z | x_o, x_i)]]` in nats, x_i from `num_samples` imputations. Entropies
        are exact for Gaussian partial posteriors, else estimated with `num_samples` draws.

        Args:
            x: One example, `[*input_shape]`.
            b: Its mask, `[d]` or `[H, W, 1]`.
            num_samples: Imputations to average over.
            key: Random key.
            features_at_once: Features to look at together; memory grows with it, the result does not depend on it.

        Returns:
            `[b.size]`, one entry per mask entry, -inf where observed.
        """
        key_impute, key_now, key_then = jax.random.split(key, 3)
        imputations = self.impute(x[None], b[None], num_samples, key=key_impute)
        imputations = imputations.reshape(num_samples, b.size, -1)  # [S, features, C]
        now = distributions.entropy(self.partial_posterior(x[None], b[None]), key_now, num_samples)[0]

        def expected_entropy(i):
            then = self.partial_posterior.with_feature(x[None], b[None], i)(imputations[:, i])
            return distributions.entropy(then, key_then, num_samples).mean()

        gains = now - jax.lax.map(expected_entropy, jnp.arange(b.size), batch_size=features_at_once)
        return jnp.where(b.reshape(-1) == 1, -jnp.inf, gains)

    def sample(self, num_samples: int, *, key: jax.Array, mean: bool = False) -> jax.Array:
        """Draws x ~ p(x | z) (or E[x | z] if `mean`) for z ~ p(z); `[num_samples, *input_shape]`."""
        key_z, key_x = jax.random.split(key)
        p = self.vae.decode(self.vae.prior().sample(key_z, (num_samples,)))
        return p.mean if mean else p.sample(key_x)
