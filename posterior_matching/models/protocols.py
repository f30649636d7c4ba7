"""The methods that code asks of models of any kind. Shapes as in `masking`."""

from collections.abc import Callable
from typing import Protocol

import jax
from flax import nnx

from posterior_matching.models.columns import Cardinalities
from posterior_matching.models.distributions import Distribution, ExplicitDistribution
from posterior_matching.models.networks import Shape


class Imputes(Protocol):
    """A model that imputes, with values in the units of its data: all families but VQ-VAE, VaDE and lookahead."""

    def impute(self, x: jax.Array, b: jax.Array, num_samples: int, *, key: jax.Array) -> jax.Array:
        """Imputations `[S, B, *input_shape]`; observed values are copied."""

    def impute_and_weigh(
        self, x: jax.Array, b: jax.Array, num_samples: int, *, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Imputations, and the log importance weight of each, `[S, B]`."""


class LatentModel(Protocol):
    """p(z), q(z | x) and p(x | z): a VAE, or a VaDE."""

    input_shape: Shape
    cardinalities: Cardinalities

    def prior(self) -> Distribution:
        """p(z)."""

    def posterior(
        self, x: jax.Array, rngs: nnx.Rngs | None = None, *, available: jax.Array | None = None
    ) -> ExplicitDistribution:
        """q(z | x)."""

    def decode(self, z: jax.Array, rngs: nnx.Rngs | None = None) -> ExplicitDistribution:
        """p(x | z)."""

    def log_prob_given(self, z: jax.Array, x: jax.Array, b: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """log p(x_o | z), `[S, B]`, for `z: [S, B, e]`."""


class ConditionalPosterior(Protocol):
    """q(z | x_o)."""

    def __call__(self, x: jax.Array, b: jax.Array, rngs: nnx.Rngs | None = None) -> Distribution:
        """q(z | x_o)."""

    def with_feature(self, x: jax.Array, b: jax.Array, i: jax.Array) -> Callable[[jax.Array], Distribution]:
        """From values of feature i, `[B, C]`, to q(z | x_o, x_i)."""
