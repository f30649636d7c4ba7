"""Imputation baselines from scikit-learn."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from posterior_matching.data.columns import one_hot

Imputer = Callable[[np.ndarray], np.ndarray]


def fit(
    train: np.ndarray,
    names: Sequence[str] = ("mean", "knn", "iterative"),
    max_rows: int = 10_000,
    cardinalities: Sequence[int] = (),
) -> dict[str, Imputer]:
    """Fits imputers: `mean`, `knn` (k = 5), `iterative` (Bayesian ridge), `forest` (iterative, as missForest).

    Categories are one-hot encoded, and the one with the largest value is imputed: the mode in place of the mean.

    Args:
        train: `[N, d]`, NaN = missing; categories as indices.
        names: Which of them to fit; the cost of the iterative ones grows fast with d.
        max_rows: All but the mean are fitted to at most this many rows, evenly spaced, as their cost grows with rows.
        cardinalities: Number of categories of each column, 0 for real ones; (): all are real.

    Returns:
        Functions, by name, that map rows `[N, d]`, NaN where unobserved, to the completed rows.
    """
    # This import enables the iterative imputer.
    from sklearn.ensemble import ExtraTreesRegressor
    from sklearn.experimental import enable_iterative_imputer  # noqa: F401
    from sklearn.impute import IterativeImputer, KNNImputer, SimpleImputer

    kept = {"keep_empty_features": True}
    trees = ExtraTreesRegressor(50, n_jobs=-1, random_state=0)
    some = train[:: -(-len(train) // max_rows)]
    imputers = {
        "mean": (SimpleImputer(**kept), train),
        "knn": (KNNImputer(**kept), some),
        "iterative": (IterativeImputer(random_state=0, **kept), some),
        "forest": (IterativeImputer(trees, max_iter=5, tol=0.0, random_state=0, **kept), some),
    }
    return {name: fit_one(imputer, x, cardinalities) for name, (imputer, x) in imputers.items() if name in names}


def fit_one(imputer: Any, train: np.ndarray, cardinalities: Sequence[int] = ()) -> Imputer:
    """Fits an imputer of scikit-learn; see `fit`."""
    if not any(cardinalities):
        return imputer.fit(train).transform
    transform = imputer.fit(one_hot(train, cardinalities)).transform
    return functools.partial(_through_one_hot, transform, cardinalities)


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


def _through_one_hot(imputer: Imputer, cardinalities: Sequence[int], x: np.ndarray) -> np.ndarray:
    parts = np.split(
        imputer(one_hot(x, cardinalities)), np.cumsum([count or 1 for count in cardinalities])[:-1], axis=1
    )
    columns = [p.argmax(1) if count else p[:, 0] for p, count in zip(parts, cardinalities, strict=True)]
    return np.stack(columns, axis=1).astype(np.float64)
