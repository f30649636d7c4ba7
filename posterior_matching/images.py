"""Pictures of images and their imputations, as arrays; no plotting library."""

import os

import numpy as np

_GREY = 0.5  # what is not observed
_GAP = 2  # pixels between images


def imputation_grid(x: np.ndarray, b: np.ndarray | None, imputations: np.ndarray | None) -> np.ndarray:
    """Lays out one row per image: the original, its observed part, its imputations. Or, without masks, a square.

    Args:
        x: Images `[B, H, W, C]` in [0, 1].
        b: Masks `[B, H, W, 1]`; None: only `x`.
        imputations: `[S, B, H, W, C]`; None: none.

    Returns:
        `[rows, columns, C]` in [0, 1], grey where nothing is observed.
    """
    x = np.asarray(x)
    if b is None:
        width = int(np.ceil(np.sqrt(len(x))))
        blank = np.ones((-len(x) % width, *x.shape[1:]), x.dtype)
        rows = np.concatenate([x, blank]).reshape(-1, width, *x.shape[1:])
    else:
        observed = np.where(np.asarray(b) == 1, x, _GREY)
        rows = np.stack([x, observed, *np.asarray(imputations)], axis=1)
    padded = [np.pad(row, ((0, 0), (0, _GAP), (0, _GAP), (0, 0)), constant_values=1.0) for row in rows]
    return np.clip(np.concatenate([np.concatenate(list(row), axis=1) for row in padded], axis=0), 0.0, 1.0)


def save_png(path: str | os.PathLike, image: np.ndarray, min_width: int = 800) -> None:
    """Writes an image `[H, W, C]` in [0, 1], enlarged by a whole factor to at least `min_width` pixels."""
    from PIL import Image

    factor = -(-min_width // image.shape[1])
    pixels = np.round(image * 255).astype(np.uint8).repeat(factor, 0).repeat(factor, 1)
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(path)
