"""The VAE, and Posterior Matching: a second encoder q(z | x_o), which gives it every conditional p(x_u | x_o)."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from posterior_matching.config import Config, Width, build
from posterior_matching.errors import OptionError
from posterior_matching.masking import checked, existing, mask_shape, observed_only, partial_input
from posterior_matching.models import distributions
from posterior_matching.models.columns import (
    Cardinalities,
    IndependentColumns,
    column_features,
    column_partial_input,
    column_partial_input_shape,
    column_values,
    features_shape,
    is_real,
)
from posterior_matching.models.distributions import (
    LATENT_HEADS,
    LIKELIHOOD_HEADS,
    Distribution,
    ExplicitDistribution,
    sample_and_log_prob,
)
from posterior_matching.models.marginal_likelihood import (
    ConditionalLogProb,
    ImportanceEstimate,
    importance_log_prob,
    log_mean_weight,
    log_prob_of_observed,
    tempered_weights,
    weighted_mean,
)
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
        cardinalities: For a table with categorical columns, see `models.columns`; training sets it from the data.
        availability: Whether q(z | x) sees which values of x exist; otherwise missing ones look like zeros.
        rngs: Source of initial weights.

    Raises:
        OptionError: An option is out of range, or does not match the data or the other options.
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
        cardinalities: Cardinalities = (),
        availability: bool = False,
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
        self.encoder = build(NETWORKS, encoder, "encoder", input_shape=encoder_shape, rngs=rngs)
        self.posterior_head = build(
            LATENT_HEADS,
            posterior,
            "posterior",
            features_shape=self.encoder.output_shape,
            event_size=latent_dim,
            rngs=rngs,
        )
        self.decoder = build(NETWORKS, decoder, "decoder", input_shape=(latent_dim,), data_shape=input_shape, rngs=rngs)
        self.likelihood_head = build(
            LIKELIHOOD_HEADS,
            likelihood,
            "likelihood",
            features_shape=self.decoder.output_shape,
            data_shape=input_shape,
            cardinalities=cardinalities,
            rngs=rngs,
        )

    def prior(self) -> Distribution:
        """p(z) = N(0, I) over `[e]`."""
        return distributions.standard_normal(self.latent_dim)

    def posterior(
        self, x: jax.Array, rngs: nnx.Rngs | None = None, *, available: jax.Array | None = None
    ) -> Distribution:
        """q(z | x), a distribution over `[B, e]`.

        Args:
            x: `[B, *input_shape]`, finite; missing values are zeros.
            rngs: Dropout streams, while training.
            available: Mask of the values that exist, `[B, d]` or `[B, H, W, 1]`, if the VAE sees it; None: all.
        """
        return self.posterior_head(self._encode(x, rngs, available))

    def _encode(self, x: jax.Array, rngs: nnx.Rngs | None, available: jax.Array | None) -> jax.Array:
        if not self.availability:
            return self.encoder(column_features(x, self.cardinalities), rngs)
        available = jnp.ones((len(x), *mask_shape(self.input_shape))) if available is None else available
        return self.encoder(column_partial_input(x, available, self.cardinalities), rngs)

    def decode(self, z: jax.Array, rngs: nnx.Rngs | None = None) -> ExplicitDistribution:
        """p(x | z) for `z: [B, e]`: independent features, batch shape `[B, *input_shape]`."""
        return self.likelihood_head(self.decoder(z, rngs))

    def log_prob_given(self, z: jax.Array, x: jax.Array, b: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """log p(x_o | z) in nats, `[S, B]`, for `z: [S, B, e]`."""
        s, n, _ = z.shape
        p = self.decode(z.reshape(s * n, -1), rngs)
        x, b = (jnp.broadcast_to(a, (s, *a.shape)).reshape(s * n, *a.shape[1:]) for a in (x, b))
        return log_prob_of_observed(p, x, b).reshape(s, n)

    def decode_mean(self, z: jax.Array, chunk_size: int = 128) -> jax.Array:
        """E[features of x | z], `[S, B, *input_shape]` or, with categories, `[S, B, width]`, for `z: [S, B, e]`.

        The features of categories are their probabilities. Decodes `chunk_size` samples at once.
        """
        return jax.lax.map(lambda z: _mean_features(self.decode(z)), z, batch_size=chunk_size)

    def decode_mean_and_log_prob(
        self, z: jax.Array, x: jax.Array, b: jax.Array, chunk_size: int = 128
    ) -> tuple[jax.Array, jax.Array]:
        """`decode_mean`, and log p(x_o | z) in nats, `[S, B]`, from one pass of the decoder."""

        def decoded(z: jax.Array) -> tuple[jax.Array, jax.Array]:
            p = self.decode(z)
            return _mean_features(p), log_prob_of_observed(p, x, b)

        return jax.lax.map(decoded, z, batch_size=chunk_size)

    def decode_draw(self, z: jax.Array, key: jax.Array, means: bool = False, chunk_size: int = 128) -> jax.Array:
        """Draws x ~ p(x | z), `[S, B, *input_shape]`, for `z: [S, B, e]`; with `means`, only categories are drawn."""

        def draw(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
            z, key = inputs
            p = self.decode(z)
            x = p.sample(key)
            return jnp.where(is_real(self.cardinalities), p.mean, x) if means else x

        return jax.lax.map(draw, (z, jax.random.split(key, len(z))), batch_size=chunk_size)


def _mean_features(p: ExplicitDistribution) -> jax.Array:
    return p.mean_features if isinstance(p, IndependentColumns) else p.mean


class PartialPosterior(nnx.Module):
    """q(z | x_o): an encoder that sees `[x * b, b]` and nothing else (paper, section 3).

    Args:
        input_shape: Shape of one example of x.
        latent_dim: Dimensions of z.
        encoder: Network config.
        head: Head config; any of `distributions.LATENT_HEADS`.
        cardinalities: See `models.columns`.
        rngs: Source of initial weights.
    """

    def __init__(
        self,
        *,
        input_shape: Shape,
        latent_dim: int,
        encoder: Config,
        head: Config,
        cardinalities: Cardinalities = (),
        rngs: nnx.Rngs,
    ):
        self.cardinalities = cardinalities
        observed_shape = column_partial_input_shape(input_shape, cardinalities)
        self.encoder = build(NETWORKS, encoder, "partial_encoder", input_shape=observed_shape, rngs=rngs)
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
        return self.head(self.encoder(column_partial_input(x, b, self.cardinalities), rngs))

    def with_feature(self, x: jax.Array, b: jax.Array, i: jax.Array) -> Callable[[jax.Array], Distribution]:
        """Returns the function from values of feature i, `[B, C]`, to q(z | x_o, x_i) over `[B, e]`.

        Only feature i of the encoder's input depends on the value, and the encoder's first layer is affine. The layer
        is therefore applied to `[x * b, b]` once, and every value adds its multiple of feature i's contribution.

        Args:
            x: `[B, *input_shape]`, or one example `[1, *input_shape]` for all values.
            b: Mask, `[B, d]` or `[B, H, W, 1]`, 1 = observed. If feature i is already observed, it keeps its value.
            i: Index of a mask entry.
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
        """What one unit of each channel of feature i, and one of its mask, add to the first layer: `[C + 1, ...]`.

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
        if self.iw_elbo is not None:  # the same with the tighter bound in place of the ELBO, reconstruction - KL
            bound = (1 - beta) * self.reconstruction_ll + beta * self.iw_elbo
        return -bound - matching_coef * self.matching_ll


class ImputationMixin(nnx.Module):
    """Imputation with z ~ q(z | x_o), for models with a `partial_posterior` and a VAE to decode z."""

    partial_posterior: PartialPosterior

    @property
    def decoding(self) -> VAE:
        """The VAE."""
        raise NotImplementedError

    def impute(self, x: jax.Array, b: jax.Array, num_samples: int, *, key: jax.Array) -> jax.Array:
        """Imputes with decoder means for z ~ q(z | x_o); categories are drawn. Observed values are copied.

        The imputations vary by z but not by the noise of p(x | z), which `draw` adds.

        Args:
            x: `[B, *input_shape]`; values where b = 0 have no influence, and may be NaN.
            b: Mask, `[B, d]` or `[B, H, W, 1]`, 1 = observed.
            num_samples: Imputations per example.
            key: Random key.

        Returns:
            `[num_samples, B, *input_shape]`.

        Raises:
            UserError: See `masking.checked`.
        """
        x, b = checked(x, b, self.decoding.input_shape)
        if any(self.decoding.cardinalities):
            key_z, key_x = jax.random.split(key)
            imputations = self.decoding.decode_draw(self._latents(x, b, num_samples, key_z), key_x, means=True)
        else:
            imputations = self.decoding.decode_mean(self._latents(x, b, num_samples, key))
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

        Args:
            x: As in `impute`.
            b: As in `impute`.
            num_samples: Draws per example.
            key: Random key.
            candidates: Choose each z among as many draws of q(z | x_o), in proportion to their weights as in `point`
                (sampling-importance-resampling, Rubin 1987); None: take draws of q(z | x_o), as published.
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
        return jnp.where(b == 1, x, self.decoding.decode_draw(z, key_x))

    def point(
        self, x: jax.Array, b: jax.Array, num_samples: int, *, key: jax.Array, weighted: bool = False
    ) -> jax.Array:
        """Estimates x_u, `[B, *input_shape]`: E[x_u | x_o] over `num_samples` draws of z, observed values copied.

        For categories it is the most probable one, with probabilities averaged over z. Otherwise like `impute`.

        Args:
            x: As in `impute`.
            b: As in `impute`.
            num_samples: Draws of z ~ q(z | x_o).
            key: Random key.
            weighted: Weigh each draw by p(x_o, z) / q(z | x_o), see `likelihood.tempered_weights`. The expectation is
                then closer to the model's own, under p(z | x_o), which q(z | x_o) approximates. As published: False.
        """
        x, b = checked(x, b, self.decoding.input_shape)
        if weighted:
            _, log_weights, means = self._weighted_latents(x, b, num_samples, key)
            return self._point(x, b, means, log_weights)
        return self._point(x, b, self.decoding.decode_mean(self._latents(x, b, num_samples, key)))

    def _point(self, x: jax.Array, b: jax.Array, means: jax.Array, log_weights: jax.Array | None = None) -> jax.Array:
        mean = means.mean(0) if log_weights is None else weighted_mean(means, tempered_weights(log_weights))
        return jnp.where(b == 1, x, column_values(mean, self.decoding.cardinalities))

    def _latents(self, x: jax.Array, b: jax.Array, num_samples: int, key: jax.Array) -> jax.Array:
        return self.partial_posterior(x, b).sample(key, (num_samples,))

    def _weighted_latents(
        self, x: jax.Array, b: jax.Array, num_samples: int, key: jax.Array, chunk_size: int = 128
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """z ~ q(z | x_o) `[S, B, e]`, log p(x_o, z) - log q(z | x_o) `[S, B]`, and the features' means given z.

        Draws and decodes `chunk_size` samples at once.
        """
        q, size = self.partial_posterior(x, b), min(num_samples, chunk_size)
        keys = jax.random.split(key, -(-num_samples // size))
        drawn = jax.lax.map(lambda key: sample_and_log_prob(q, key, (size,)), keys)
        z, log_q = (a.reshape(-1, *a.shape[2:])[:num_samples] for a in drawn)
        means, log_p_xo = self.decoding.decode_mean_and_log_prob(z, x, b, chunk_size)
        return z, log_p_xo + self.decoding.prior().log_prob(z) - log_q, means


class PosteriorMatchingVAE(ImputationMixin):
    """A VAE that models every conditional p(x_u | x_o) through z ~ q(z | x_o).

    Args:
        input_shape: Shape of one example, `(d,)` or `(H, W, C)`.
        latent_dim: See `VAE`.
        encoder: See `VAE`.
        posterior: See `VAE`.
        decoder: See `VAE`.
        likelihood: See `VAE`.
        cardinalities: See `VAE`.
        availability: See `VAE`.
        partial_encoder: Network config of q(z | x_o); None: the same as the encoder, with separate weights.
        partial_posterior: Head config of q(z | x_o); None: the same as the posterior, with separate weights.
        rngs: Source of initial weights.
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
        self.vae = VAE(
            input_shape=input_shape,
            latent_dim=latent_dim,
            encoder=encoder,
            posterior=posterior,
            decoder=decoder,
            likelihood=likelihood,
            cardinalities=cardinalities,
            availability=availability,
            rngs=rngs,
        )
        self.partial_posterior = PartialPosterior(
            input_shape=input_shape,
            latent_dim=latent_dim,
            encoder=encoder if partial_encoder is None else partial_encoder,
            head=posterior if partial_posterior is None else partial_posterior,
            cardinalities=cardinalities,
            rngs=rngs,
        )

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
        """The terms of the training objective.

        Args:
            x: `[B, *input_shape]`, finite; missing values are zeros.
            b: Mask, `[B, d]` or `[B, H, W, 1]`, 1 = observed.
            key: Random key of z.
            available: Mask of the values that exist in the data; None: all.
            stop_gradients: Stop the matching term's gradient at z, so that it does not train the VAE.
            num_samples: K draws of z per example. With several, training maximises the importance-weighted ELBO, and
                the partial posterior learns from one draw, chosen in proportion to its weight.
            rngs: Dropout streams, while training.
        """
        q = self.vae.posterior(x, rngs, available=available)
        available = jnp.ones_like(b) if available is None else available
        if num_samples == 1:
            z, iw_elbo = q.sample(key), None  # reparameterised
            reconstruction_ll = log_prob_of_observed(self.vae.decode(z, rngs), x, available)
        else:
            key_z, key_choice = jax.random.split(key)
            zs, log_q = sample_and_log_prob(q, key_z, (num_samples,))  # [K, B, e]; reparameterised
            log_p = self.vae.log_prob_given(zs, x, available, rngs)
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

    def is_log_prob(
        self,
        x: jax.Array,
        b: jax.Array,
        num_samples: int,
        *,
        key: jax.Array,
        available: jax.Array | None = None,
        chunk_size: int = 128,
        refine_steps: int = 0,
        annealing_steps: int = 0,
    ) -> ConditionalLogProb:
        """Importance-samples log p(x) with proposal q(z | x) and log p(x_o) with proposal q(z | x_o).

        Args:
            x: `[B, *input_shape]`.
            b: Mask, `[B, d]` or `[B, H, W, 1]`, 1 = observed.
            num_samples: Samples of z for each of the two estimates.
            key: Random key.
            available: Mask of the values that exist in the data; None: all that are not NaN. Others are never scored.
            chunk_size: Maximum samples per example held at once.
            refine_steps: Gradient steps that fit the two proposals to each example, see `importance_log_prob`.
            annealing_steps: Transitions of annealed importance sampling, see `importance_log_prob`.

        Raises:
            UserError: See `masking.checked`.
        """
        x, b, available = self._among_existing(x, b, available)
        key_x, key_xo = jax.random.split(key)
        options = num_samples, chunk_size, refine_steps, annealing_steps
        full = self._importance_log_prob(self.vae.posterior(x, available=available), x, available, key_x, *options)
        return ConditionalLogProb.of(
            full, self._importance_log_prob(self.partial_posterior(x, b), x, b, key_xo, *options)
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
    ) -> tuple[jax.Array, ConditionalLogProb]:
        """`point` and `is_log_prob` from the same draws of q(z | x_o), which can be nearly all of their cost.

        Holds the decoder means of all draws at once. The arguments are those of the two.
        """
        x, b, available = self._among_existing(x, b, available)
        key_x, key_xo = jax.random.split(key)
        q = self.vae.posterior(x, available=available)
        full = self._importance_log_prob(q, x, available, key_x, num_samples, chunk_size)
        _, log_weights, means = self._weighted_latents(x, b, num_samples, key_xo, chunk_size)
        observed = log_mean_weight(lambda *_: log_weights, key_xo, num_samples, chunk_size=num_samples)
        return self._point(x, b, means, log_weights if weighted else None), ConditionalLogProb.of(full, observed)

    def _among_existing(
        self, x: jax.Array, b: jax.Array, available: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Checks x and b, and returns them without the values that are missing in the data, and the mask of those."""
        x, b = checked(x, b, self.vae.input_shape)
        available = existing(x) if available is None else jnp.asarray(available)
        return observed_only(x, available), b * available, available

    def simulated_gaps(
        self,
        b: jax.Array,
        num_samples: int,
        *,
        key: jax.Array,
        available: jax.Array | None = None,
        chunk_size: int = 128,
        refine_steps: int = 0,
        annealing_steps: int = 0,
    ) -> tuple[jax.Array, jax.Array]:
        """Bounds what `is_log_prob` lacks, on data drawn from the model (Grosse et al. 2015).

        For x ~ p(x | z), z is a draw of both p(z | x) and p(z | x_o), which gives upper bounds on log p(x) and
        log p(x_o). Real data may have larger gaps.

        Args:
            b: Mask, `[B, d]` or `[B, H, W, 1]`, 1 = observed; one draw of x for each.
            num_samples: See `is_log_prob`, as all further arguments.
            key: Random key.
            available: See `is_log_prob`; None: everything.
            chunk_size: See `is_log_prob`.
            refine_steps: See `is_log_prob`.
            annealing_steps: See `is_log_prob`.

        Returns:
            Upper minus lower bound on log p(x) and on log p(x_o), `[B]` nats each: on average at least the gaps.
        """
        available = jnp.ones_like(b) if available is None else jnp.asarray(available)
        key_z, key_x, key_full, key_observed = jax.random.split(key, 4)
        z = self.vae.prior().sample(key_z, (len(b),))
        x, b = observed_only(self.vae.decode(z).sample(key_x), available), b * available
        options = num_samples, chunk_size, refine_steps, annealing_steps, z
        q = self.vae.posterior(x, available=available)
        full = self._importance_log_prob(q, x, available, key_full, *options)
        observed = self._importance_log_prob(self.partial_posterior(x, b), x, b, key_observed, *options)
        assert full.upper_bound is not None and observed.upper_bound is not None
        return full.upper_bound - full.log_prob, observed.upper_bound - observed.log_prob

    def log_prob_of(
        self,
        x: jax.Array,
        b_target: jax.Array,
        b_given: jax.Array,
        num_samples: int,
        *,
        key: jax.Array,
        chunk_size: int = 128,
    ) -> jax.Array:
        """Estimates log p(x_t | x_o), `[B]`, in nats, for any target features x_t given any others.

        It is log p(x_t, x_o) - log p(x_o), each importance-sampled with the partial posterior as proposal, so it is
        consistent as the number of samples grows. Real columns have densities per unit of `x` (standardised, for the
        user's own table; `data.TableSchema.log_det_jacobian` converts them to the table's units), categories
        probabilities.

        Args:
            x: `[B, *input_shape]`; values in neither mask have no influence, and may be NaN.
            b_target: Mask of x_t, `[B, d]` or `[B, H, W, 1]`; values that are also given are left out.
            b_given: Mask of x_o, the same shape; zeros for log p(x_t).
            num_samples: Samples of z for each of the two estimates.
            key: Random key.
            chunk_size: Maximum samples per example held at once.

        Raises:
            UserError: See `masking.checked`.
        """
        x, given = checked(x, b_given, self.vae.input_shape)
        x, target = checked(x, b_target, self.vae.input_shape)

        def estimate(b: jax.Array, key: jax.Array) -> jax.Array:
            q = self.partial_posterior(x, b)
            estimated = self._importance_log_prob(q, x, b, key, num_samples, chunk_size).log_prob
            return jnp.where(b.reshape(len(b), -1).any(-1), estimated, 0.0)  # log p of nothing is 0

        key_both, key_given = jax.random.split(key)
        return estimate(jnp.maximum(target, given), key_both) - estimate(given, key_given)

    def _importance_log_prob(
        self,
        proposal: Distribution,
        x: jax.Array,
        b: jax.Array,
        key: jax.Array,
        num_samples: int,
        chunk_size: int,
        refine_steps: int = 0,
        annealing_steps: int = 0,
        posterior_draw: jax.Array | None = None,
    ) -> ImportanceEstimate:
        """Estimates log p(x_o) for mask `b`."""

        def log_joint(z: jax.Array) -> jax.Array:
            return self.vae.log_prob_given(z, x, b) + self.vae.prior().log_prob(z)

        return importance_log_prob(
            log_joint,
            proposal,
            key,
            num_samples,
            chunk_size,
            refine_steps=refine_steps,
            annealing_steps=annealing_steps,
            posterior_draw=posterior_draw,
        )

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
            features_at_once: Features to evaluate together; memory grows with it, the result does not depend on it.

        Returns:
            `[b.size]`, one entry per mask entry, -inf where observed.
        """
        x, b = (a[0] for a in checked(x[None], b[None], self.vae.input_shape))
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
