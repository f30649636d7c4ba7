"""Random distortions of images; pictures of images and their imputations, as arrays (no plotting library)."""

import os

import jax
import jax.numpy as jnp
import numpy as np

_GREY = 0.5  # what is not observed
_GAP = 2  # pixels between images


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


def imputation_grid(x: np.ndarray, b: np.ndarray, imputations: np.ndarray) -> np.ndarray:
    """Lays out one row per image: the original, its observed part (grey where nothing is observed), its imputations.

    Args:
        x: Images `[B, H, W, C]` in [0, 1].
        b: Masks `[B, H, W, 1]`.
        imputations: `[S, B, H, W, C]`.

    Returns:
        `[rows, columns, C]` in [0, 1], as from all functions here.
    """
    return image_columns(x, np.where(np.asarray(b) == 1, x, _GREY), *np.asarray(imputations))


def image_columns(*columns: np.ndarray) -> np.ndarray:
    """Lays out batches of images `[B, H, W, C]` in [0, 1] as columns: one row per image."""
    rows = np.stack([np.asarray(column) for column in columns], axis=1)
    padded = [np.pad(row, ((0, 0), (0, _GAP), (0, _GAP), (0, 0)), constant_values=1.0) for row in rows]
    return np.clip(np.concatenate([np.concatenate(list(row), axis=1) for row in padded], axis=0), 0.0, 1.0)


def image_square(x: np.ndarray) -> np.ndarray:
    """Lays out images `[B, H, W, C]` in [0, 1] as a square."""
    x = np.asarray(x)
    width = int(np.ceil(np.sqrt(len(x))))
    x = np.concatenate([x, np.ones((-len(x) % width, *x.shape[1:]), x.dtype)])
    return image_columns(*x.reshape(-1, width, *x.shape[1:]).swapaxes(0, 1))


def save_png(path: str | os.PathLike, image: np.ndarray, min_width: int = 800) -> None:
    """Writes an image `[H, W, C]` in [0, 1], enlarged by a whole factor to at least `min_width` pixels."""
    from PIL import Image

    factor = -(-min_width // image.shape[1])
    pixels = np.round(image * 255).astype(np.uint8).repeat(factor, 0).repeat(factor, 1)
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(path)
