"""Whether a table is the published one: how likely a Gaussian, fitted to the training rows, finds the test rows.

Table 1 of Papamakarios et al. (2017) has the numbers for their five tables.
"""

from typing import NamedTuple

import numpy as np
from absl import logging

_ROWS = 100_000  # converted to float64 at a time; bounds the memory


def gaussian_log_likelihood(train: np.ndarray, test: np.ndarray) -> float:
    """Mean log-density of complete test rows [M, d] under the Gaussian with the training rows' mean and covariance.

    In nats per row; -inf if the covariance is singular.
    """
    mean = train.mean(axis=0, dtype=np.float64)
    covariance = sum((x - mean).T @ (x - mean) for x in _chunks(train)) / len(train)
    try:
        factor = np.linalg.cholesky(covariance)
    except np.linalg.LinAlgError:
        return -np.inf
    squares = sum((np.linalg.solve(factor, (x - mean).T) ** 2).sum() for x in _chunks(test))
    constant = len(mean) * np.log(2 * np.pi) / 2 + np.log(np.diag(factor)).sum()
    return float(-squares / (2 * len(test)) - constant)


def _chunks(x: np.ndarray) -> list[np.ndarray]:
    return [x[start : start + _ROWS] for start in range(0, len(x), _ROWS)]


class GaussianCheck(NamedTuple):
    """`gaussian_log_likelihood` of a dataset beside the published value, in nats."""

    dataset: str
    measured: float
    published: float

    def report(self) -> None:
        """Prints both numbers, and warns if they are more than 0.5 nats apart."""
        line = f"test log-likelihood of a Gaussian fitted to the training rows of {self.dataset}"
        print(f"{line}: {self.measured:.2f} nats (published: {self.published:.2f})", flush=True)
        if not abs(self.measured - self.published) <= 0.5:  # also if NaN
            logging.warning("these are not the published data of '%s': results will differ", self.dataset)
