"""Batches of rows of equal size, for compiled functions."""

import numpy as np


def padded_batches(num_rows: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits rows 0..num_rows-1 into batches, padding the last one with row 0 at weight 0.

    Returns:
        Row indices int32 and weights float32 (1 = counts), both `[num_batches, batch_size]`.
    """
    indices = np.zeros(-(-num_rows // batch_size) * batch_size, np.int32)
    weights = np.zeros(len(indices), np.float32)
    indices[:num_rows], weights[:num_rows] = np.arange(num_rows), 1.0
    return indices.reshape(-1, batch_size), weights.reshape(-1, batch_size)
