"""Random changes of training data, against overfitting: noise, and distortions of images."""

from typing import Any

import jax
import jax.numpy as jnp

from posterior_matching import data
from posterior_matching.errors import UserError


def corrupt(x: jax.Array, available: jax.Array, key: jax.Array, noise_std: float, distortion_std: float) -> jax.Array:
    """Distorts images, `distort`, and adds Gaussian noise to the values that are available."""
    key_distortion, key_noise = jax.random.split(key)
    if distortion_std:
        x = distort(key_distortion, x, distortion_std)
    if noise_std:
        x = x + noise_std * jax.random.normal(key_noise, x.shape) * available
    return x


def distort(key: jax.Array, x: jax.Array, std: float) -> jax.Array:
    """Maps every image by a random affine map of its own: near the identity, bilinear, zeros beyond the border.

    Args:
        key: Random key.
        x: Images `[B, H, W, C]`.
        std: Standard deviation of all six coefficients' deviations from the identity, in coordinates in which the image
            is the square [-1, 1]^2.

    Returns:
        `[B, H, W, C]`.
    """
    _, height, width, _ = x.shape
    half = jnp.array([(height - 1) / 2, (width - 1) / 2])
    pixels = jnp.stack(jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij"), -1).reshape(-1, 2)
    deviations = std * jax.random.normal(key, (len(x), 2, 3))

    def one(image, deviation):  # the new image at each pixel is the old one at where the map takes it
        u = pixels / half - 1
        source = (u + u @ deviation[:, :2].T + deviation[:, 2] + 1) * half
        interpolate = jax.vmap(lambda c: jax.scipy.ndimage.map_coordinates(c, list(source.T), order=1), -1, -1)
        return interpolate(image).reshape(image.shape)

    return jax.vmap(one)(x, deviations)


def check_corruption(options: Any, train_set: data.Dataset) -> None:
    """Raises UserError if `noise_std` or `distortion_std` is out of range, or does not fit the data."""
    for name in ("noise_std", "distortion_std"):
        if getattr(options, name) < 0:
            raise UserError(f"config.{name} must not be negative, it is {getattr(options, name)}")
    if options.distortion_std and len(train_set.input_shape) != 3:
        raise UserError(f"config.distortion_std is for images, the data have shape {train_set.input_shape}")
