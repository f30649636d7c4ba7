"""Imputation baselines from scikit-learn."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from posterior_matching.models.columns import Cardinalities, column_features, column_values

Imputer = Callable[[np.ndarray], np.ndarray]


def fit(
    train: np.ndarray,
    names: Sequence[str] = ("mean", "knn", "iterative"),
    max_rows: int = 10_000,
    cardinalities: Cardinalities = (),
) -> dict[str, Imputer]:
    """Fits mean, k-nearest-neighbour (k = 5) and iterative (Bayesian ridge) imputers.

    They see categories one-hot, and the greatest entry they impute is the category: for the mean, the mode.

    Args:
        train: `[N, d]`, NaN = missing.
        names: Which of them to fit; the cost of the iterative one grows with the cube of d.
        max_rows: The latter two are fitted to at most this many rows, evenly spaced, as their cost grows with rows.
        cardinalities: Of a table with categorical columns, see `models.columns`.

    Returns:
        Functions, by name, that map rows `[N, d]`, NaN where unobserved, to the completed rows.
    """
    # This import enables the iterative imputer.
    from sklearn.experimental import enable_iterative_imputer  # noqa: F401
    from sklearn.impute import IterativeImputer, KNNImputer, SimpleImputer

    train = _features(train, cardinalities)
    some = train[:: -(-len(train) // max_rows)]
    bounds = {}
    if any(cardinalities):  # the one-hots of a column are collinear, and regressions on them may diverge
        lowest, highest = np.fmin.reduce(some), np.fmax.reduce(some)
        bounds = {"min_value": np.fmin(lowest, 0.0), "max_value": np.fmax(highest, 1.0)}
    imputers = {
        "mean": (SimpleImputer(keep_empty_features=True), train),
        "knn": (KNNImputer(keep_empty_features=True), some),
        "iterative": (IterativeImputer(random_state=0, keep_empty_features=True, **bounds), some),
    }

    def fitted(imputer: Any, rows: np.ndarray) -> Imputer:
        transform = imputer.fit(rows).transform
        return lambda x: np.asarray(column_values(transform(_features(x, cardinalities)), cardinalities))

    return {name: fitted(*imputers[name]) for name in imputers if name in names}


def _features(x: np.ndarray, cardinalities: Cardinalities) -> np.ndarray:
    return np.asarray(column_features(jnp.asarray(x), cardinalities), np.float64) if any(cardinalities) else x


def impute(imputers: Mapping[str, Imputer], x: np.ndarray, b: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the name of every imputer and its imputation of `x`, in the shape of `x`.

    Args:
        imputers: See `fit`.
        x: `[N, d]` or `[N, H, W, C]`.
        b: Masks, `[N, d]` or `[N, H, W, 1]`; 1 = observed.
    """
    rows = np.where(np.broadcast_to(b, x.shape) == 1, x, np.nan).reshape(len(x), -1)
    for name, imputer in imputers.items():
        yield name, imputer(rows).reshape(x.shape)
