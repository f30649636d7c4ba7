"""Scores: per-example values in, exact reductions over a dataset out (NumPy, float64)."""

import numpy as np


def nrmse(x: np.ndarray, imputation: np.ndarray, scored: np.ndarray) -> float:
    """Normalised root-mean-square error of imputations (paper, UCI experiments).

    Per feature, the root of the mean squared error over the scored entries, divided by the feature's standard deviation
    over the evaluated data; averaged over features. Features that are constant or never scored do not count.

    Args:
        x: True values `[N, d]`; NaN = missing.
        imputation: `[N, d]`.
        scored: `[N, d]`, 1 where the value was unobserved and is known.

    Returns:
        The NRMSE; 1 is what imputing the mean gives, up to sampling.
    """
    x, scored = np.asarray(x, np.float64), np.asarray(scored, bool) & ~np.isnan(x)
    squared_error = np.where(scored, np.square(np.nan_to_num(x) - imputation), 0.0).sum(0)
    count, std = scored.sum(0), np.nanstd(x, axis=0)
    counted = (count > 0) & (np.nanmax(x, axis=0) > np.nanmin(x, axis=0))
    return float(np.mean(np.sqrt(squared_error[counted] / count[counted]) / std[counted]))


def finite_mean(values: np.ndarray) -> tuple[float, int]:
    """Returns the mean of the finite values (NaN if there are none) and the number of others."""
    values = np.asarray(values, np.float64)
    finite = np.isfinite(values)
    return (float(values[finite].mean()) if finite.any() else float("nan")), int((~finite).sum())


def clustering_scores(label: np.ndarray, cluster: np.ndarray) -> dict[str, float]:
    """Returns how well clusters agree with labels, whatever the clusters are called; 1 is perfect.

    `clustering_accuracy`: share of examples with the label of their cluster, under the best one-to-one assignment of
    clusters to labels (Hungarian algorithm). `nmi`: normalised mutual information. `ari`: adjusted Rand index, about 0
    for random clusters.

    Args:
        label: `[N]` integers.
        cluster: `[N]` integers.
    """
    from scipy.optimize import linear_sum_assignment
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
    from sklearn.metrics.cluster import contingency_matrix

    contingency = contingency_matrix(label, cluster)  # examples of each label in each cluster
    return {
        "clustering_accuracy": float(contingency[linear_sum_assignment(-contingency)].sum() / contingency.sum()),
        "nmi": float(normalized_mutual_info_score(label, cluster)),
        "ari": float(adjusted_rand_score(label, cluster)),
    }
