"""VaDE, a VAE whose prior is a mixture with one component per cluster, and PM-VaDE, which clusters from x_o alone."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from posterior_matching.config import Config, Count, Width, call
from posterior_matching.errors import OptionError
from posterior_matching.masking import checked, existing, observed_only
from posterior_matching.models import distributions
from posterior_matching.models.columns import Cardinalities
from posterior_matching.models.distributions import Mixture
from posterior_matching.models.networks import Shape
from posterior_matching.models.vae import VAE, PartialPosterior
from posterior_matching.models.vae_inference import ImputationMixin


class VaDETerms(NamedTuple):
    """What VaDE optimises, per example and in nats; all `[B]`."""

    reconstruction_ll: jax.Array  # log p(x | z), one z ~ q(z | x)
    kl: jax.Array  # log q(z | x) - log p(z), the same z: KL(q(z | x) || p(z)) with one sample

    def elbo(self) -> jax.Array:
        """Evidence lower bound on log p(x), estimated with one sample."""
        return self.reconstruction_ll - self.kl


class VADE(VAE):
    """Variational deep embedding: the prior is p(z) = sum_c pi_c N(z; mean_c, diag(scale_c^2)), c the cluster.

    The options are those of `VAE`, and `num_clusters`, the components of the prior. q(z | x) is a DiagonalGaussian.
    """

    def __init__(
        self,
        *,
        input_shape: Shape,
        latent_dim: Width,
        num_clusters: Count,
        encoder: Config,
        posterior: Config,
        decoder: Config,
        likelihood: Config,
        cardinalities: Cardinalities = (),
        availability: bool = False,
        rngs: nnx.Rngs,
    ):
        parts = encoder, posterior, decoder, likelihood
        super().__init__(input_shape, latent_dim, *parts, cardinalities, availability, rngs=rngs)
        if not isinstance(self.posterior_head, distributions.DiagonalGaussian):
            raise OptionError("posterior", "must be a DiagonalGaussian in a VaDE")
        self.num_clusters = num_clusters
        # Zero until `initialise_prior`, since good values depend on the pretrained encoder.
        self.logits = nnx.Param(jnp.zeros(num_clusters))
        self.means = nnx.Param(jnp.zeros((num_clusters, latent_dim)))
        self.log_scales = nnx.Param(jnp.zeros((num_clusters, latent_dim)))

    def initialise_prior(self, weights: jax.Array, means: jax.Array, variances: jax.Array) -> None:
        """Sets the mixture: weights `[K]`, means `[K, e]`, variances `[K, e]` (not standard deviations)."""
        self.logits[...] = jnp.log(weights)
        self.means[...] = jnp.asarray(means)
        self.log_scales[...] = 0.5 * jnp.log(variances)

    def prior(self) -> Mixture:
        """p(z), a mixture of K diagonal Gaussians over `[e]`."""
        return distributions.diagonal_mixture(self.logits[...], self.means[...], jnp.exp(self.log_scales[...]))

    def responsibilities(self, z: jax.Array) -> jax.Array:
        """gamma_c = p(c | z) by Bayes' rule, `[..., K]`, for `z: [..., e]`."""
        return jax.nn.softmax(self.prior().component_log_probs(z), axis=-1)  # log pi_c + log p(z | c)

    def terms(
        self,
        x: jax.Array,
        key: jax.Array,
        *,
        corrupted_x: jax.Array | None = None,
        available: jax.Array | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> VaDETerms:
        """The terms of the ELBO; see `VAE.posterior`.

        `corrupted_x` is the encoder's input during training, x with noise or distortions (None: x). The decoder still
        reconstructs x, so z learns to ignore them; the ELBO remains a bound on log p(x).
        """
        q = self.posterior(x if corrupted_x is None else corrupted_x, rngs, available=available)
        z = q.sample(key)  # reparameterised
        # VaDE's paper has sum_c gamma_c (log p(z | c) + log pi_c - log gamma_c) for log p(z). They are equal, because
        # every bracket is log p(z) by Bayes' rule.
        return VaDETerms(self.reconstruction_ll(z, x, available, rngs), q.log_prob(z) - self.prior().log_prob(z))

    def autoencoder_ll(
        self,
        x: jax.Array,
        *,
        corrupted_x: jax.Array | None = None,
        available: jax.Array | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """log p(x | z) in nats, `[B]`, where z is the mean of q(z | x): the objective of pretraining. See `terms`."""
        z = self.posterior(x if corrupted_x is None else corrupted_x, rngs, available=available).mean
        return self.reconstruction_ll(z, x, available, rngs)

    def cluster_probs(
        self, x: jax.Array, num_samples: int, *, key: jax.Array, available: jax.Array | None = None
    ) -> jax.Array:
        """q(c | x), `[B, K]`: the mean of gamma over `num_samples` draws of z ~ q(z | x).

        `available` is the mask of the values that exist, by default what is not NaN.
        """
        available = existing(x) if available is None else available
        z = self.posterior(observed_only(x, available), available=available).sample(key, (num_samples,))
        return self.responsibilities(z).mean(0)

    def predict_cluster(
        self, x: jax.Array, num_samples: int, *, key: jax.Array, available: jax.Array | None = None
    ) -> jax.Array:
        """Returns the most probable cluster of every example, int32 `[B]`; see `cluster_probs`."""
        return self.cluster_probs(x, num_samples, key=key, available=available).argmax(-1)


class PosteriorMatchingVADE(ImputationMixin):
    """A VaDE that also clusters and imputes partially observed examples, through z ~ q(z | x_o).

    `vade` holds the options of `VADE`; the others are the head and the network of q(z | x_o), by default like the
    VaDE's encoder, with separate weights.
    """

    def __init__(
        self,
        *,
        input_shape: Shape,
        vade: Config,
        partial_posterior: Config,
        partial_encoder: Config | None = None,
        rngs: nnx.Rngs,
    ):
        self.vade: VADE = call(VADE, vade, "vade", input_shape=input_shape, rngs=rngs)
        self.partial_posterior = PartialPosterior(
            self.vade, partial_encoder or vade["encoder"], partial_posterior, rngs=rngs
        )

    @property
    def decoding(self) -> VAE:
        """The VaDE."""
        return self.vade

    def matching_ll(
        self,
        x: jax.Array,
        b: jax.Array,
        key: jax.Array,
        *,
        available: jax.Array | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """log q(z | x_o) in nats, `[B]`, for one z ~ q(z | x): the Posterior Matching objective (paper, equation 4).

        The arguments are those of `PosteriorMatchingVAE.terms`; `rngs` are of the partial posterior.
        """
        z = jax.lax.stop_gradient(self.vade.posterior(x, available=available).sample(key))
        return self.partial_posterior(x, b, rngs).log_prob(z)

    def predict_cluster(
        self, x: jax.Array, num_samples: int, *, key: jax.Array, available: jax.Array | None = None
    ) -> jax.Array:
        """See `VADE.predict_cluster`."""
        return self.vade.predict_cluster(x, num_samples, key=key, available=available)

    def partial_cluster_probs(self, x: jax.Array, b: jax.Array, num_samples: int, *, key: jax.Array) -> jax.Array:
        """q(c | x_o), `[B, K]`: the mean of gamma over `num_samples` draws of z ~ q(z | x_o)."""
        x, b = checked(x, b, self.vade.input_shape)
        return self.vade.responsibilities(self._latents(x, b, num_samples, key)).mean(0)

    def partial_predict_cluster(self, x: jax.Array, b: jax.Array, num_samples: int, *, key: jax.Array) -> jax.Array:
        """Returns the most probable cluster given x_o, int32 `[B]`; see `partial_cluster_probs`."""
        return self.partial_cluster_probs(x, b, num_samples, key=key).argmax(-1)
