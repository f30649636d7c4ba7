"""Imputation baselines from scikit-learn. `benchmarks/imputation.py` compares more."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

BaselineFn = Callable[[np.ndarray], np.ndarray]


def fit(
    train: np.ndarray,
    names: Sequence[str] = ("mean", "knn", "iterative"),
    max_rows: int = 10_000,
    cardinalities: Sequence[int] = (),
) -> dict[str, BaselineFn]:
    """Fits imputers.

    `mean`, with the mode of categories; `knn`, 5 neighbours with categories one-hot; `iterative`, Bayesian ridge
    regressions on the other columns in turn, left out for tables with categories.

    Args:
        train: `[N, d]`, NaN = missing; categories as indices.
        names: Which of them to fit; the cost of the latter two grows fast with d.
        max_rows: All but the mean are fitted to at most this many rows, evenly spaced, as their cost grows with rows.
        cardinalities: Number of categories of each column, 0 for real ones; (): all are real.

    Returns:
        Functions, by name, that map rows `[N, d]`, NaN where unobserved, to the completed rows.
    """
    from sklearn.experimental import enable_iterative_imputer  # noqa: F401 (it enables the next import)
    from sklearn.impute import IterativeImputer, KNNImputer, SimpleImputer

    some, categories = train[:: -(-len(train) // max_rows)], any(cardinalities)
    imputers: dict[str, tuple[Any, np.ndarray]] = {
        "mean": (SimpleImputer(keep_empty_features=True), train),
        "knn": (KNNImputer(keep_empty_features=True), some),
        "iterative": (IterativeImputer(random_state=0, keep_empty_features=True), some),
    }
    chosen = {name: imputers[name] for name in names if not (categories and name == "iterative")}
    if not categories:
        return {name: imputer.fit(rows).transform for name, (imputer, rows) in chosen.items()}
    return {name: _with_categories(*imputer, cardinalities) for name, imputer in chosen.items()}


def impute(imputers: Mapping[str, BaselineFn], x: np.ndarray, b: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the name of every imputer and its imputation of `x`, in the shape of `x`.

    Args:
        imputers: See `fit`.
        x: `[N, d]` or `[N, H, W, C]`.
        b: Masks, `[N, d]` or `[N, H, W, 1]`; 1 = observed.
    """
    rows = np.where(np.broadcast_to(b, x.shape) == 1, x, np.nan).reshape(len(x), -1)
    for name, imputer in imputers.items():
        yield name, imputer(rows).reshape(x.shape)


def _with_categories(imputer: Any, train: np.ndarray, cardinalities: Sequence[int]) -> BaselineFn:
    """Fits an imputer to one-hot categories; of an imputed category, the largest column is chosen."""
    transform = imputer.fit(one_hot(train, cardinalities)).transform
    ends = np.cumsum([count or 1 for count in cardinalities])[:-1]

    def completed(x: np.ndarray) -> np.ndarray:
        parts = zip(np.split(transform(one_hot(x, cardinalities)), ends, axis=1), cardinalities, strict=True)
        return np.stack([p.argmax(1) if count else p[:, 0] for p, count in parts], axis=1).astype(np.float64)

    return completed


def one_hot(x: np.ndarray, cardinalities: Sequence[int]) -> np.ndarray:
    """Encodes the categories of encoded rows one-hot, real columns unchanged.

    Args:
        x: `[N, d]`, NaN = missing; categories as indices.
        cardinalities: See `TableSchema.cardinalities`.

    Returns:
        `[N, width]`; NaN in all columns of a missing category.
    """
    columns = []
    for values, count in zip(x.T, cardinalities, strict=True):
        encoded = np.where(np.isnan(values)[:, None], np.nan, values[:, None] == np.arange(count))
        columns.append(encoded if count else values[:, None])
    return np.concatenate(columns, axis=1)
