"""Imputation baselines from scikit-learn."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np

BaselineFn = Callable[[np.ndarray], np.ndarray]


def fit(
    train: np.ndarray,
    names: Sequence[str] = ("mean", "knn", "iterative"),
    max_rows: int = 10_000,
    cardinalities: Sequence[int] = (),
) -> dict[str, BaselineFn]:
    """Fits imputers.

    `mean`, with the mode of categories; `knn`, 5 neighbours with categories one-hot; `iterative`, regressions on the
    other columns in turn (Bayesian ridge, and logistic for categories); `forest`, the same with random forests
    (missForest: Stekhoven and Buehlmann 2012).

    Args:
        train: `[N, d]`, NaN = missing; categories as indices.
        names: Which of them to fit; the cost of the latter two grows fast with d.
        max_rows: All but the mean are fitted to at most this many rows, evenly spaced, as their cost grows with rows.
        cardinalities: Number of categories of each column, 0 for real ones; (): all are real.

    Returns:
        Functions, by name, that map rows `[N, d]`, NaN where unobserved, to the completed rows.
    """
    # This import enables the iterative imputer.
    from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
    from sklearn.experimental import enable_iterative_imputer  # noqa: F401
    from sklearn.impute import IterativeImputer, KNNImputer, SimpleImputer

    some = train[:: -(-len(train) // max_rows)]
    fitted: dict[str, BaselineFn] = {}
    for name in names:
        if name == "mean":
            fitted[name] = _fit_one_hot(SimpleImputer(keep_empty_features=True), train, cardinalities)
        elif name == "knn":
            fitted[name] = _fit_one_hot(KNNImputer(keep_empty_features=True), some, cardinalities)
        elif name == "iterative" and not any(cardinalities):
            fitted[name] = IterativeImputer(random_state=0, keep_empty_features=True).fit(some).transform
        elif name == "iterative":
            fitted[name] = ChainedImputer(cardinalities).fit(some).transform
        elif name == "forest":
            trees = RandomForestRegressor(n_jobs=-1, random_state=0), RandomForestClassifier(n_jobs=-1, random_state=0)
            fitted[name] = (
                ChainedImputer(cardinalities or (0,) * train.shape[1], *trees, num_rounds=5).fit(some).transform
            )
        else:
            raise ValueError(f"unknown imputer '{name}'")
    return fitted


class ChainedImputer:
    """Imputes every column from the others, in turn and in several rounds (van Buuren 2007).

    scikit-learn's `IterativeImputer` knows no categories: of their one-hot columns it predicts each from the others,
    which determine it, so that an imputed category never leaves its initial value.

    Args:
        cardinalities: Number of categories of each column, 0 for real ones.
        regressor: An estimator of scikit-learn for real columns; None: Bayesian ridge.
        classifier: One for categories; None: logistic.
        num_rounds: Rounds over all columns.
    """

    def __init__(
        self, cardinalities: Sequence[int], regressor: Any = None, classifier: Any = None, num_rounds: int = 10
    ):
        from sklearn.linear_model import BayesianRidge, LogisticRegression

        self.cardinalities, self.num_rounds = tuple(cardinalities), num_rounds
        self._regressor = BayesianRidge() if regressor is None else regressor  # a forest without trees is false
        self._classifier = LogisticRegression(max_iter=200) if classifier is None else classifier

    def fit(self, x: np.ndarray, rng: np.random.Generator | None = None) -> Self:
        """Fits to rows `[N, d]`, NaN = missing; with `rng`, on draws in place of predictions, as `sample` needs it."""
        from sklearn.base import clone

        missing = np.isnan(x)
        self._start = np.array([_center(*column) for column in zip(x.T, self.cardinalities, strict=True)])
        filled = np.where(missing, self._start, x)
        # In the order of use. To repeat those of the last round alone may diverge: the regressions feed each other.
        self._models: list[tuple[int, Any]] = []
        for _ in range(self.num_rounds):
            for j in np.argsort(missing.sum(0), kind="stable"):  # the most complete column first
                known = ~missing[:, j]
                if len(np.unique(x[known, j])) > 1:  # otherwise its start is all that is known
                    estimator = clone(self._classifier if self.cardinalities[j] else self._regressor)
                    model = estimator.fit(self._others(filled[known], j), x[known, j])
                    self._predict(filled, missing, j, model, rng)
                    self._models.append((int(j), model))
        return self

    def transform(self, x: np.ndarray) -> np.ndarray:
        """Returns rows `[N, d]` with predictions in place of NaN."""
        return self._complete(x, None)

    def sample(self, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns rows `[N, d]` with draws of the predictive distributions in place of NaN (multiple imputation)."""
        return self._complete(x, rng)

    def _complete(self, x: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        missing = np.isnan(x)
        filled = np.where(missing, self._start, x)
        for j, model in self._models:
            self._predict(filled, missing, j, model, rng)
        return filled

    def _predict(
        self, filled: np.ndarray, missing: np.ndarray, j: int, model: Any, rng: np.random.Generator | None
    ) -> None:
        """Replaces the missing cells of column j."""
        rows = missing[:, j]
        if not rows.any():
            return
        features = self._others(filled[rows], j)
        if rng is None:
            filled[rows, j] = model.predict(features)
        elif self.cardinalities[j]:
            cumulative = model.predict_proba(features).cumsum(1)
            chosen = (rng.uniform(size=(len(features), 1)) > cumulative[:, :-1]).sum(1)
            filled[rows, j] = model.classes_[chosen]
        else:
            filled[rows, j] = rng.normal(*model.predict(features, return_std=True))

    def _others(self, filled: np.ndarray, j: int) -> np.ndarray:
        return one_hot(np.delete(filled, j, axis=1), self.cardinalities[:j] + self.cardinalities[j + 1 :])


def _center(values: np.ndarray, cardinality: int) -> float:
    """The mean, or the mode of categories; 0 if all are missing."""
    values = values[~np.isnan(values)]
    if not len(values):
        return 0.0
    return float(np.bincount(values.astype(int)).argmax() if cardinality else values.mean())


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


def _fit_one_hot(imputer: Any, train: np.ndarray, cardinalities: Sequence[int]) -> BaselineFn:
    """Fits an imputer of scikit-learn to one-hot categories; of an imputed category, the largest column is chosen."""
    if not any(cardinalities):
        return imputer.fit(train).transform
    transform = imputer.fit(one_hot(train, cardinalities)).transform
    return functools.partial(_through_one_hot, transform, cardinalities)


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


def _through_one_hot(imputer: BaselineFn, cardinalities: Sequence[int], x: np.ndarray) -> np.ndarray:
    parts = np.split(
        imputer(one_hot(x, cardinalities)), np.cumsum([count or 1 for count in cardinalities])[:-1], axis=1
    )
    columns = [p.argmax(1) if count else p[:, 0] for p, count in zip(parts, cardinalities, strict=True)]
    return np.stack(columns, axis=1).astype(np.float64)
