"""Mechanisms by which cells of a table go missing (Muzellec et al. 2020, arXiv 2002.03860), to benchmark imputation.

Each is a function `(x, share, rng, cardinalities) -> b`: from rows `x: [N, d]` (categories as indices, NaN = missing)
to a mask `[N, d]` in which 1 means observed and `share` of the cells of every column that can go missing are 0.
"""

from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit

from posterior_matching.evaluation.baselines import one_hot

_CAUSES = 0.3  # share of the columns that decide what is missing, as in the paper's experiments


def mcar(x: np.ndarray, share: float, rng: np.random.Generator, cardinalities: Sequence[int] = ()) -> np.ndarray:
    """Missing completely at random: every cell with the same probability."""
    del cardinalities
    return (rng.uniform(size=x.shape) >= share).astype(np.float32)


def mar(x: np.ndarray, share: float, rng: np.random.Generator, cardinalities: Sequence[int] = ()) -> np.ndarray:
    """Missing at random: a random 30% of the columns are always observed, and decide what is missing of the others."""
    causes, others = _divide(x.shape[1], rng)
    b = np.ones(x.shape, np.float32)
    b[:, others] = _logistic(x, causes, len(others), share, rng, cardinalities)
    return b


def mnar(x: np.ndarray, share: float, rng: np.random.Generator, cardinalities: Sequence[int] = ()) -> np.ndarray:
    """Missing not at random: as `mar`, but the deciding columns go missing too, completely at random."""
    causes, others = _divide(x.shape[1], rng)
    b = mcar(x, share, rng)
    b[:, others] = _logistic(x, causes, len(others), share, rng, cardinalities)
    return b


MECHANISMS: dict[str, Callable[..., np.ndarray]] = {"MCAR": mcar, "MAR": mar, "MNAR": mnar}


def _divide(num_columns: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    if num_columns < 2:
        raise ValueError("MAR and MNAR need at least two columns: some decide what is missing of the others")
    causes, others = np.split(rng.permutation(num_columns), [max(round(_CAUSES * num_columns), 1)])
    return causes, others


def _logistic(
    x: np.ndarray,
    causes: np.ndarray,
    num_columns: int,
    share: float,
    rng: np.random.Generator,
    cardinalities: Sequence[int],
) -> np.ndarray:
    """Masks `[N, num_columns]` with P(missing) = sigmoid(w . causes + c), where w is random and c sets the share."""
    logits = _standardised(x[:, causes], [cardinalities[j] if cardinalities else 0 for j in causes])
    logits = logits @ rng.normal(size=(logits.shape[1], num_columns))
    logits /= np.maximum(logits.std(axis=0), 1e-12)
    intercepts = [brentq(lambda c, column=column: expit(column + c).mean() - share, -50, 50) for column in logits.T]
    return (rng.uniform(size=logits.shape) >= expit(logits + intercepts)).astype(np.float32)


def _standardised(x: np.ndarray, cardinalities: Sequence[int]) -> np.ndarray:
    """Features `[N, width]` of mean 0 and standard deviation 1, categories one-hot; 0 where x is missing."""
    features = one_hot(x, cardinalities)
    deviation = features - np.nanmean(features, axis=0)
    return np.nan_to_num(deviation / np.maximum(np.nanstd(features, axis=0), 1e-12))
