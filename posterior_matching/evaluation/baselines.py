"""Imputation baselines from scikit-learn."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

Imputer = Callable[[np.ndarray], np.ndarray]


def fit(
    train: np.ndarray, names: Sequence[str] = ("mean", "knn", "iterative"), max_rows: int = 10_000
) -> dict[str, Imputer]:
    """Fits mean, k-nearest-neighbour (k = 5) and iterative (Bayesian ridge) imputers.

    Args:
        train: `[N, d]`, NaN = missing.
        names: Which of them to fit; the cost of the iterative one grows with the cube of d.
        max_rows: The latter two are fitted to at most this many rows, evenly spaced, as their cost grows with rows.

    Returns:
        Functions, by name, that map rows `[N, d]`, NaN where unobserved, to the completed rows.
    """
    # This import enables the iterative imputer.
    from sklearn.experimental import enable_iterative_imputer  # noqa: F401
    from sklearn.impute import IterativeImputer, KNNImputer, SimpleImputer

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
