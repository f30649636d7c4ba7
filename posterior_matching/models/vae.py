"""The VAE, and Posterior Matching: a second encoder q(z | x_o), which gives it every conditional p(x_u | x_o)."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from posterior_matching.config import Config, Width, build
from posterior_matching.errors import OptionError
from posterior_matching.masking import mask_shape, partial_input
from posterior_matching.models import distributions
from posterior_matching.models.columns import (
    Cardinalities,
    column_features,
    column_partial_input,
    column_partial_input_shape,
    features_shape,
)
from posterior_matching.models.distributions import (
    LATENT_HEADS,
    LIKELIHOOD_HEADS,
    Distribution,
    ExplicitDistribution,
    sample_and_log_prob,
)
from posterior_matching.models.marginal_likelihood import log_prob_of_observed
from posterior_matching.models.networks import NETWORKS, Network, Shape
from posterior_matching.models.vae_inference import LikelihoodMixin


class VAE(nnx.Module):
    """A variational autoencoder: prior p(z) = N(0, I), decoder p(x | z), posterior q(z | x).

    `encoder` and `decoder` are configs of `NETWORKS`, `likelihood` of `LIKELIHOOD_HEADS`, and `posterior` of those
    `LATENT_HEADS` that have a closed-form KL. Training sets `cardinalities` from the data, see `models.columns`. With
    `availability`, q(z | x) sees which values of x exist; otherwise missing ones look like zeros. Options that do not
    match the data or each other raise an OptionError.
    """

    def __init__(
        self,
        input_shape: Shape,
        latent_dim: Width,
        encoder: Config,
        posterior: Config,
        decoder: Config,
        likelihood: Config,
        cardinalities: Cardinalities = (),
        availability: bool = False,
        *,
        rngs: nnx.Rngs,
    ):
        if cardinalities and input_shape != (len(cardinalities),):
            raise OptionError(
                "cardinalities", f"has {len(cardinalities)} entries, but the data have shape {input_shape}"
            )
        if any(cardinalities) and likelihood.get("name") != "Columns":
            raise OptionError("likelihood.name", "must be Columns: the data have categorical columns")
        self.latent_dim = latent_dim
        self.input_shape, self.cardinalities, self.availability = input_shape, cardinalities, availability
        encoder_shape = (column_partial_input_shape if availability else features_shape)(input_shape, cardinalities)
        self.encoder: Network = build(NETWORKS, encoder, "encoder", input_shape=encoder_shape, rngs=rngs)
        latent = {"features_shape": self.encoder.output_shape, "event_size": latent_dim}
        self.posterior_head = build(LATENT_HEADS, posterior, "posterior", **latent, rngs=rngs)
        data = {"data_shape": input_shape, "cardinalities": cardinalities, "rngs": rngs}
        self.decoder: Network = build(NETWORKS, decoder, "decoder", input_shape=(latent_dim,), **data)
        features = self.decoder.output_shape
        self.likelihood_head = build(LIKELIHOOD_HEADS, likelihood, "likelihood", features_shape=features, **data)

    def prior(self) -> Distribution:
        """p(z) = N(0, I) over `[e]`."""
        return distributions.standard_normal(self.latent_dim)

    def posterior(
        self, x: jax.Array, rngs: nnx.Rngs | None = None, *, available: jax.Array | None = None
    ) -> ExplicitDistribution:
        """q(z | x), a Gaussian over `[B, e]`, for finite x whose missing values are zeros.

        `available` is the mask of the values that exist, if the VAE sees it (None: all), `rngs` are dropout streams.
        """
        if self.availability:
            features = column_partial_input(x, self._all_if_none(available, x), self.cardinalities)
        else:
            features = column_features(x, self.cardinalities)
        return self.posterior_head(self.encoder(features, rngs))

    def decode(self, z: jax.Array, rngs: nnx.Rngs | None = None) -> ExplicitDistribution:
        """p(x | z) for `z: [B, e]`: independent features, batch shape `[B, *input_shape]`."""
        return self.likelihood_head(self.decoder(z, rngs))

    def reconstruction_ll(
        self, z: jax.Array, x: jax.Array, available: jax.Array | None = None, rngs: nnx.Rngs | None = None
    ) -> jax.Array:
        """log p(x | z) in nats of the available values (None: all), `[B]`, for `z: [B, e]`."""
        return log_prob_of_observed(self.decode(z, rngs), x, self._all_if_none(available, x))

    def log_prob_given(self, z: jax.Array, x: jax.Array, b: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """log p(x_o | z) in nats, `[S, B]`, for `z: [S, B, e]`."""
        s, n, _ = z.shape
        p = self.decode(z.reshape(s * n, -1), rngs)
        x, b = (jnp.broadcast_to(a, (s, *a.shape)).reshape(s * n, *a.shape[1:]) for a in (x, b))
        return log_prob_of_observed(p, x, b).reshape(s, n)

    def _all_if_none(self, available: jax.Array | None, x: jax.Array) -> jax.Array:
        return jnp.ones((len(x), *mask_shape(self.input_shape))) if available is None else available


class PartialPosterior(nnx.Module):
    """q(z | x_o) for the z of a VAE: an encoder that sees `[x * b, b]` and nothing else (paper, section 3)."""

    def __init__(self, vae: VAE, encoder: Config, head: Config, *, rngs: nnx.Rngs):
        self.cardinalities = vae.cardinalities
        observed_shape = column_partial_input_shape(vae.input_shape, vae.cardinalities)
        self.encoder: Network = build(NETWORKS, encoder, "partial_encoder", input_shape=observed_shape, rngs=rngs)
        latent = {"features_shape": self.encoder.output_shape, "event_size": vae.latent_dim}
        self.head = build(LATENT_HEADS, head, "partial_posterior", **latent, rngs=rngs)

    def __call__(self, x: jax.Array, b: jax.Array, rngs: nnx.Rngs | None = None) -> Distribution:
        """q(z | x_o) over `[B, e]` for `x: [B, *input_shape]` and mask `b` (1 = observed)."""
        return self.head(self.encoder(column_partial_input(x, b, self.cardinalities), rngs))

    def with_feature(self, x: jax.Array, b: jax.Array, i: jax.Array) -> Callable[[jax.Array], Distribution]:
        """Returns the function from values of feature i, `[B, C]`, to q(z | x_o, x_i) over `[B, e]`.

        Only feature i of the encoder's input depends on the value, and the encoder's first layer is affine. The layer
        is therefore applied to `[x * b, b]` once, and every value adds its multiple of feature i's contribution. x and
        its mask b may hold one example for all values. A feature that is already observed keeps its value.
        """
        if any(self.cardinalities):  # one-hot: not affine in the category's index
            at_i = jnp.arange(b.shape[-1]) == i
            with_i = jnp.where(at_i, 1.0, b)

            def encoded_again(value: jax.Array) -> Distribution:
                values = jnp.where(at_i & (b == 0), value, x)
                return self(values, jnp.broadcast_to(with_i, values.shape))

            return encoded_again
        base = self.encoder.first(partial_input(x, b))
        added = self._added_by_feature(i, x.shape[1:], b.shape[1:])
        unobserved = 1.0 - b.reshape(len(b), -1)[:, i, None]  # [B, 1]

        def posterior(value: jax.Array) -> Distribution:
            revealed = jnp.concatenate([value, jnp.ones((len(value), 1))], axis=-1) * unobserved  # value and mask
            return self.head(self.encoder.after_first(base + jnp.tensordot(revealed, added, 1)))

        return posterior

    def _added_by_feature(self, i: jax.Array, input_shape: Shape, mask_shape: Shape) -> jax.Array:
        """The first layer's response to one unit of each channel of feature i, and of its mask: `[C + 1, ...]`.

        (`jax.linearize` would give the same, but `numerics.convolution` only has reverse-mode derivatives.)
        """
        mask = jnp.zeros(math.prod(mask_shape)).at[i].set(1.0).reshape(1, *mask_shape)
        channels = math.prod(input_shape) // mask.size
        value = mask * jnp.eye(channels).reshape(channels, *[1] * (len(input_shape) - 1), channels)
        value_units = jnp.concatenate([value, jnp.zeros((1, *input_shape))])
        mask_units = jnp.concatenate([jnp.zeros((channels, *mask_shape)), mask])
        units = jnp.concatenate([value_units, mask_units], axis=-1)
        return self.encoder.first(units) - self.encoder.first(jnp.zeros_like(units))  # the bias cancels


class LossTerms(NamedTuple):
    """What training optimises, per example and in nats; all `[B]`."""

    reconstruction_ll: jax.Array  # log p(x | z), one z ~ q(z | x), or the mean over several
    kl: jax.Array  # KL(q(z | x) || p(z)), closed form
    matching_ll: jax.Array  # log q(z | x_o), the same z, or one of them
    iw_elbo: jax.Array | None = None  # with several z, the importance-weighted ELBO: between the ELBO and log p(x)

    def elbo(self) -> jax.Array:
        """Evidence lower bound on log p(x)."""
        return self.reconstruction_ll - self.kl

    def loss(self, beta: jax.Array | float, matching_coef: float) -> jax.Array:
        """Negative ELBO plus the Posterior Matching loss (paper, equations 1 and 4)."""
        bound = self.reconstruction_ll - beta * self.kl
        if self.iw_elbo is not None:  # the same, with this tighter bound for the ELBO, reconstruction - KL
            bound = (1 - beta) * self.reconstruction_ll + beta * self.iw_elbo
        return -bound - matching_coef * self.matching_ll


class PosteriorMatchingVAE(LikelihoodMixin):
    """A VAE that models every conditional p(x_u | x_o) through z ~ q(z | x_o).

    The options are those of `VAE`, and the network and the head of q(z | x_o), by default like those of q(z | x), with
    separate weights.
    """

    def __init__(
        self,
        *,
        input_shape: Shape,
        latent_dim: Width,
        encoder: Config,
        posterior: Config,
        decoder: Config,
        likelihood: Config,
        partial_encoder: Config | None = None,
        partial_posterior: Config | None = None,
        cardinalities: Cardinalities = (),
        availability: bool = False,
        rngs: nnx.Rngs,
    ):
        parts = encoder, posterior, decoder, likelihood
        self.vae = VAE(input_shape, latent_dim, *parts, cardinalities, availability, rngs=rngs)
        partial_encoder = encoder if partial_encoder is None else partial_encoder
        partial_posterior = posterior if partial_posterior is None else partial_posterior
        self.partial_posterior = PartialPosterior(self.vae, partial_encoder, partial_posterior, rngs=rngs)

    @property
    def decoding(self) -> VAE:
        """The VAE."""
        return self.vae

    def terms(
        self,
        x: jax.Array,
        b: jax.Array,
        key: jax.Array,
        *,
        available: jax.Array | None = None,
        stop_gradients: bool = False,
        num_samples: int = 1,
        rngs: nnx.Rngs | None = None,
    ) -> LossTerms:
        """The terms of the training objective, see `VAE.posterior`; b is a mask, 1 = observed.

        With `stop_gradients`, the matching term does not train the VAE. With several draws of z per example, training
        maximises the importance-weighted ELBO, and the partial posterior learns from one draw, chosen by its weight.
        """
        q = self.vae.posterior(x, rngs, available=available)
        if num_samples == 1:
            z, iw_elbo = q.sample(key), None  # reparameterised
            reconstruction_ll = self.vae.reconstruction_ll(z, x, available, rngs)
        else:
            key_z, key_choice = jax.random.split(key)
            zs, log_q = sample_and_log_prob(q, key_z, (num_samples,))  # [K, B, e]; reparameterised
            log_p = self.vae.log_prob_given(zs, x, jnp.ones_like(b) if available is None else available, rngs)
            log_weights = log_p + self.vae.prior().log_prob(zs) - log_q
            # log (1/K) sum_k p(x, z_k) / q(z_k | x)   (Burda et al. 2016; with missing values Mattei and Frellsen 2019)
            iw_elbo = jax.nn.logsumexp(log_weights, axis=0) - math.log(num_samples)
            reconstruction_ll = log_p.mean(0)
            # One of them in proportion to its weight: closer to p(z | x) than a draw of q(z | x).
            z = zs[jax.random.categorical(key_choice, log_weights, axis=0), jnp.arange(len(x))]
        target = jax.lax.stop_gradient(z) if stop_gradients else z
        return LossTerms(
            reconstruction_ll=reconstruction_ll,
            kl=distributions.kl_to_standard_normal(q),
            # Posterior Matching: q(z | x_o) by maximum likelihood on samples of q(z | x).
            matching_ll=self.partial_posterior(x, b, rngs).log_prob(target),
            iw_elbo=iw_elbo,
        )

    def sample(self, num_samples: int, *, key: jax.Array, mean: bool = False) -> jax.Array:
        """Draws x ~ p(x | z) (or E[x | z] if `mean`) for z ~ p(z); `[num_samples, *input_shape]`."""
        key_z, key_x = jax.random.split(key)
        p = self.vae.decode(self.vae.prior().sample(key_z, (num_samples,)))
        return p.mean if mean else p.sample(key_x)
