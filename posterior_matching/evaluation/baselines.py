"""Imputation baselines from scikit-learn."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

Imputer = Callable[[np.ndarray], np.ndarray]


def fit(
    train: np.ndarray,
    names: Sequence[str] = ("mean", "knn", "iterative"),
    max_rows: int = 10_000,
    cardinalities: Sequence[int] = (),
) -> dict[str, Imputer]:
    """Fits mean, k-nearest-neighbour (k = 5) and iterative (Bayesian ridge) imputers.

    Categories are one-hot encoded, and the one with the largest value is imputed: the mode in place of the mean.

    Args:
        train: `[N, d]`, NaN = missing; categories as indices.
        names: Which of them to fit; the cost of the iterative one grows with the cube of d.
        max_rows: The latter two are fitted to at most this many rows, evenly spaced, as their cost grows with rows.
        cardinalities: Number of categories of each column, 0 for real ones; (): all are real.

    Returns:
        Functions, by name, that map rows `[N, d]`, NaN where unobserved, to the completed rows.
    """
    # This import enables the iterative imputer.
    from sklearn.experimental import enable_iterative_imputer  # noqa: F401
    from sklearn.impute import IterativeImputer, KNNImputer, SimpleImputer

    if any(cardinalities):
        fitted = fit(_one_hot(train, cardinalities), names, max_rows)
        return {name: functools.partial(_through_one_hot, imputer, cardinalities) for name, imputer in fitted.items()}
    some = train[:: -(-len(train) // max_rows)]
    imputers = {
        "mean": (SimpleImputer(keep_empty_features=True), train),
        "knn": (KNNImputer(keep_empty_features=True), some),
        "iterative": (IterativeImputer(random_state=0, keep_empty_features=True), some),
    }
    return {name: imputer.fit(rows).transform for name, (imputer, rows) in imputers.items() if name in names}


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


def _one_hot(x: np.ndarray, cardinalities: Sequence[int]) -> np.ndarray:
    """Rows `[N, d]` -> `[N, width]` with categories one-hot, NaN where x is NaN."""
    columns = []
    for values, count in zip(x.T, cardinalities, strict=True):
        one_hot = np.where(np.isnan(values)[:, None], np.nan, values[:, None] == np.arange(count))
        columns.append(one_hot if count else values[:, None])
    return np.concatenate(columns, axis=1)


def _through_one_hot(imputer: Imputer, cardinalities: Sequence[int], x: np.ndarray) -> np.ndarray:
    parts = np.split(
        imputer(_one_hot(x, cardinalities)), np.cumsum([count or 1 for count in cardinalities])[:-1], axis=1
    )
    columns = [p.argmax(1) if count else p[:, 0] for p, count in zip(parts, cardinalities, strict=True)]
    return np.stack(columns, axis=1).astype(np.float64)
