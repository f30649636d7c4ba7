"""Random corruption of training data to reduce overfitting: noise, and distortions of images."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from posterior_matching.config import NonNegative
from posterior_matching.errors import OptionError
from posterior_matching.models.columns import Cardinalities, is_real
from posterior_matching.training.experiment import Batch


def add_noise(
    x: jax.Array, available: jax.Array, key: jax.Array, std: float, cardinalities: Cardinalities = ()
) -> jax.Array:
    """Adds Gaussian noise to available values, except for categories (see `models.columns`)."""
    if not std:
        return x
    noisy = available * is_real(cardinalities) if any(cardinalities) else available
    return x + std * jax.random.normal(key, x.shape) * noisy


@dataclasses.dataclass(frozen=True)
class CorruptionOptions:
    """The options of families that corrupt their training data; `corrupt` applies them."""

    noise_std: NonNegative  # of Gaussian noise
    distortion_std: NonNegative  # of a random affine distortion of images, see `distort`

    def corrupt(self, batch: Batch, rngs: nnx.Rngs, cardinalities: Cardinalities = ()) -> jax.Array:
        """Returns `batch.x`, while training distorted and then noisy where values are available."""
        if not batch.training:
            return batch.x
        key_distortion, key_noise = jax.random.split(rngs.noise())
        x = distort(key_distortion, batch.x, self.distortion_std) if self.distortion_std else batch.x
        return add_noise(x, batch.available, key_noise, self.noise_std, cardinalities)

    def check(self, input_shape: tuple[int, ...]) -> None:
        """Raises OptionError if data other than images are to be distorted."""
        if self.distortion_std and len(input_shape) != 3:
            raise OptionError("distortion_std", f"is for images, but the data have shape {input_shape}")


def distort(key: jax.Array, x: jax.Array, std: float) -> jax.Array:
    """Applies to each image its own random affine map near the identity; bilinear, with zeros outside the image.

    Args:
        key: Random key.
        x: Images `[B, H, W, C]`.
        std: Standard deviation of each of the six coefficients around the identity, in coordinates where the image is
            the square [-1, 1]^2.

    Returns:
        `[B, H, W, C]`.
    """
    _, height, width, _ = x.shape
    half = jnp.array([(height - 1) / 2, (width - 1) / 2])
    pixels = jnp.stack(jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij"), -1).reshape(-1, 2)
    deviations = std * jax.random.normal(key, (len(x), 2, 3))

    def one(
        image: jax.Array, deviation: jax.Array
    ) -> jax.Array:  # each new pixel is the old image at the point that the map sends it to
        u = pixels / half - 1
        source = (u + u @ deviation[:, :2].T + deviation[:, 2] + 1) * half
        interpolate = jax.vmap(lambda c: jax.scipy.ndimage.map_coordinates(c, list(source.T), order=1), -1, -1)
        return interpolate(image).reshape(image.shape)

    return jax.vmap(one)(x, deviations)
