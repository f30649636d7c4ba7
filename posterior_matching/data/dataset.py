"""One split of a dataset in host memory, the decoding of its rows to model input, and its division into batches."""

import dataclasses
from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from posterior_matching.errors import UserError

if TYPE_CHECKING:
    import jax


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """One split, in host memory, as stored; `decode` turns rows of `x` into model input.

    Attributes:
        name: The name or path given to `load`.
        split: The dataset's own name for the split.
        x: [N, H, W, C] uint8 or float32 images in [0, `max_value`], or [N, d] float32 features with NaN = missing.
        label: [N] int32 class labels, or None.
        max_value: The pixel value that means 1: 255 for uint8 images, 16 for `digits`; 1 for images already in [0, 1]
            and for features.
    """

    name: str
    split: str
    x: np.ndarray
    label: np.ndarray | None = None
    max_value: float = 1.0

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one example: (H, W, C) or (d,)."""
        return self.x.shape[1:]

    def __len__(self) -> int:
        return len(self.x)


def decode(x: "np.ndarray | jax.Array", max_value: float) -> tuple["jax.Array", "jax.Array"]:
    """Turns stored rows into model input; jit-able.

    Args:
        x: [B, H, W, C] images or [B, d] features, as in `Dataset.x`.
        max_value: `Dataset.max_value`.

    Returns:
        Model input, float32: images [B, H, W, C] in [0, 1], or features [B, d] with 0 where missing; and the mask of
        available values, float32: 1 where the value is known, 0 where it is missing, [B, H, W, 1] or [B, d].
    """
    import jax.numpy as jnp

    x = jnp.asarray(x, jnp.float32)
    if x.ndim == 4:
        return x / max_value, jnp.ones((*x.shape[:3], 1), jnp.float32)
    missing = jnp.isnan(x)
    return jnp.where(missing, 0.0, x), 1.0 - missing.astype(jnp.float32)


def resolve_split(split: str, known: Collection[str]) -> str:
    """Returns the dataset's own name for `validation` (`val`, `validation` or else `test`); others are unchanged."""
    if split in known or split not in ("validation", "val"):
        return split
    return next((name for name in ("val", "validation", "test") if name in known), split)


def unknown_split(name: str, split: str, known: Collection[str]) -> UserError:
    """Returns the error for a split that dataset `name` does not have."""
    return UserError(f"dataset '{name}' has no split '{split}': it has {', '.join(known)}")


def padded_batches(num_rows: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits rows 0..num_rows-1 into batches, padding the last one with row 0 at weight 0.

    Returns:
        Row indices int32 and weights float32 (1 = counts), both `[num_batches, batch_size]`.
    """
    indices = np.zeros(-(-num_rows // batch_size) * batch_size, np.int32)
    weights = np.zeros(len(indices), np.float32)
    indices[:num_rows], weights[:num_rows] = np.arange(num_rows), 1.0
    return indices.reshape(-1, batch_size), weights.reshape(-1, batch_size)
