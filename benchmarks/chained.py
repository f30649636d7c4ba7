"""Imputation by chained equations (van Buuren 2007), for tables with categories too."""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from sklearn.base import clone
from sklearn.linear_model import BayesianRidge, LogisticRegression

from posterior_matching.evaluation.baselines import one_hot


class ChainedImputer:
    """Imputes every column from the others, in turn and in several rounds.

    scikit-learn's `IterativeImputer` knows no categories: of one-hot columns it predicts each from the others, which
    determine it, so that an imputed category never leaves its initial value.

    Args:
        cardinalities: Number of categories of each column, 0 for real ones.
        regressor: An estimator of scikit-learn for real columns.
        classifier: One for categories.
        num_rounds: Rounds over all columns.
    """

    def __init__(
        self, cardinalities: Sequence[int], regressor: Any = None, classifier: Any = None, num_rounds: int = 10
    ):
        self.cardinalities, self.num_rounds = tuple(cardinalities), num_rounds
        self._regressor = BayesianRidge() if regressor is None else regressor  # a forest without trees is false
        self._classifier = LogisticRegression(max_iter=200) if classifier is None else classifier

    def fit(self, x: np.ndarray, rng: np.random.Generator | None = None) -> Self:
        """Fits to rows `[N, d]`, NaN = missing: to predictions of the other columns, or with `rng` to draws."""
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
                    self._predict(filled, missing[:, j], j, model, rng)
                    self._models.append((int(j), model))
        return self

    def complete(self, x: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        """Returns rows `[N, d]` with NaN replaced by predictions, or with `rng` by draws (multiple imputation)."""
        missing = np.isnan(x)
        filled = np.where(missing, self._start, x)
        for j, model in self._models:
            self._predict(filled, missing[:, j], j, model, rng)
        return filled

    def _predict(
        self, filled: np.ndarray, rows: np.ndarray, j: int, model: Any, rng: np.random.Generator | None
    ) -> None:
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
    mode = cardinality and len(values)
    return float(np.bincount(values.astype(int)).argmax() if mode else values.mean() if len(values) else 0)
