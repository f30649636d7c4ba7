"""Pictures of images and their imputations, as arrays (no plotting library)."""

import pathlib

import numpy as np
from jax.typing import ArrayLike

from posterior_matching.atomic import replacing

_GREY = 0.5  # of unobserved pixels
_GAP = 2  # pixels between images


def imputation_grid(x: ArrayLike, b: ArrayLike, imputations: ArrayLike) -> np.ndarray:
    """Lays out one row per image: the original, its observed part (grey where nothing is observed), its imputations.

    Args:
        x: Images `[B, H, W, C]` in [0, 1].
        b: Masks `[B, H, W, 1]`.
        imputations: `[S, B, H, W, C]`.

    Returns:
        `[rows, columns, C]` in [0, 1], like all functions here.
    """
    return image_columns(x, np.where(np.asarray(b) == 1, x, _GREY), *np.asarray(imputations))


def image_columns(*columns: ArrayLike) -> np.ndarray:
    """Lays out batches of images `[B, H, W, C]` in [0, 1] as columns: one row per image."""
    rows = np.stack([np.asarray(column) for column in columns], axis=1)
    padded = [np.pad(row, ((0, 0), (0, _GAP), (0, _GAP), (0, 0)), constant_values=1.0) for row in rows]
    return np.clip(np.concatenate([np.concatenate(list(row), axis=1) for row in padded], axis=0), 0.0, 1.0)


def image_square(x: ArrayLike) -> np.ndarray:
    """Lays out images `[B, H, W, C]` in [0, 1] as a square."""
    x = np.asarray(x)
    width = int(np.ceil(np.sqrt(len(x))))
    x = np.concatenate([x, np.ones((-len(x) % width, *x.shape[1:]), x.dtype)])
    return image_columns(*x.reshape(-1, width, *x.shape[1:]).swapaxes(0, 1))


def save_png(path: pathlib.Path, image: np.ndarray, min_width: int = 800) -> None:
    """Writes an image `[H, W, C]` in [0, 1], enlarged by an integer factor to at least `min_width` pixels."""
    from PIL import Image

    factor = -(-min_width // image.shape[1])
    pixels = np.round(image * 255).astype(np.uint8).repeat(factor, 0).repeat(factor, 1)
    with replacing(path) as temporary:
        Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(temporary, format="PNG")
