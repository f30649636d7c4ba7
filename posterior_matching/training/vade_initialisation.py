"""Initialises VaDE's main training: the best of several pretrained autoencoders, and a mixture fit to its latents."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from posterior_matching import data
from posterior_matching.data.dataset import padded_batches
from posterior_matching.models.vade import VADE
from posterior_matching.numerics import on_cpu

if TYPE_CHECKING:
    from sklearn.mixture import GaussianMixture


class Restarts(nnx.Module):
    """VaDEs that differ in their initial weights, pretrained together."""

    def __init__(self, models: Sequence[VADE]):
        self.models = nnx.List(models)

    def autoencoder_ll(
        self,
        x: jax.Array,
        *,
        corrupted_x: jax.Array | None = None,
        available: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """`VADE.autoencoder_ll` of every model, `[restarts, B]` in nats; without a key, dropout is off."""

        def log_likelihood(model: VADE, key: jax.Array) -> jax.Array:
            dropout = None if dropout_key is None else nnx.Rngs(dropout=key)
            return model.autoencoder_ll(x, corrupted_x=corrupted_x, available=available, rngs=dropout)

        keys = jax.random.split(jax.random.key(0) if dropout_key is None else dropout_key, len(self.models))
        return self._map(log_likelihood, keys)

    def _map(self, fn: Callable[[VADE, jax.Array], jax.Array], keys: jax.Array) -> jax.Array:
        """Returns `fn(model, key)` of every model with its key, `[restarts, ...]`."""
        if on_cpu():  # where convolutions with a batch of kernels are slow
            return jnp.stack([fn(model, key) for model, key in zip(self.models, keys, strict=True)])
        graphdefs, states = zip(*map(nnx.split, self.models), strict=True)
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        return jax.vmap(lambda state, key: fn(nnx.merge(graphdefs[0], state), key))(stacked, keys)


def choose(
    restarts: Restarts, mixture_inits: int, mixture_iterations: int, train_set: data.Dataset, seed: int
) -> "tuple[VADE, GaussianMixture, dict[str, float]]":
    """Initialises the prior of every restart with a mixture fit to its training latents, and picks the best ELBO.

    The ELBO of the training data bounds the same log p(x) for all restarts, so it can compare them, whatever the scale
    of their latents. The likelihood of a mixture cannot.

    Args:
        restarts: The pretrained models; their priors and posterior scales are set.
        mixture_inits: Fits of each mixture; the most likely one is used.
        mixture_iterations: Maximum iterations of a fit.
        train_set: The training data.
        seed: Random seed of the fits.

    Returns:
        The best model, its mixture, and every restart's ELBO in nats with the index of the best, to log.
    """
    from sklearn.mixture import GaussianMixture

    elbos, mixtures = [], []
    for model in restarts.models:
        mixture = GaussianMixture(
            model.num_clusters,
            covariance_type="diag",
            n_init=mixture_inits,
            max_iter=mixture_iterations,
            random_state=seed,
        ).fit(latents(model, train_set))
        model.initialise_prior(mixture.weights_, mixture.means_, mixture.covariances_)
        elbos.append(initialise_posterior_scale(model, train_set))
        mixtures.append(mixture)
    best = int(np.argmax(elbos))
    numbers = {f"restart_{i}_elbo_nats": elbo for i, elbo in enumerate(elbos)} | {"restart": best}
    return restarts.models[best], mixtures[best], numbers


def initialise_posterior_scale(model: VADE, train_set: data.Dataset) -> float:
    """Sets the scale of q(z | x), which pretraining leaves random, and returns the ELBO of the training data in nats.

    The scale becomes the fraction of the clusters' own scale with the best ELBO. With the random scale, the ELBO would
    begin hundreds of nats lower, and its first steps would undo much of the pretraining.
    """
    variance = jax.nn.softmax(model.logits[...]) @ jnp.exp(2 * model.log_scales[...])  # within clusters, [e]
    elbos: dict[float, float] = {}
    for share in np.geomspace(0.01, 1.0, 9):
        model.posterior_head.set_scale(share * jnp.sqrt(variance))
        elbos[share] = float(_over_rows(_elbo, model, train_set, max_rows=10_000).mean())
    best = max(elbos, key=lambda share: elbos[share])
    model.posterior_head.set_scale(best * jnp.sqrt(variance))
    return elbos[best]


def latents(model: VADE, dataset: data.Dataset) -> np.ndarray:
    """Posterior means `[N, e]` of a dataset."""
    return _over_rows(_posterior_mean, model, dataset)


@nnx.jit
def _posterior_mean(model: VADE, x: jax.Array, available: jax.Array) -> jax.Array:
    return model.posterior(x, available=available).mean


@nnx.jit
def _elbo(model: VADE, x: jax.Array, available: jax.Array) -> jax.Array:
    return model.terms(x, jax.random.key(0), available=available).elbo()


def _over_rows(
    fn: Callable[..., jax.Array], model: VADE, dataset: data.Dataset, max_rows: int | None = None
) -> np.ndarray:
    """Returns `fn(model, x, available)` of the dataset's rows, or of the first `max_rows`, batch by batch."""
    indices, weights = padded_batches(min(len(dataset), max_rows or len(dataset)), 500)
    values = [np.asarray(fn(model, *data.decode(dataset.x[rows], dataset.max_value))) for rows in indices]
    return np.concatenate(values)[weights.reshape(-1) > 0]
