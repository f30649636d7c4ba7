"""Scores: exact reductions of per-example values over a dataset (NumPy, float64)."""

import concurrent.futures
import os

import numpy as np

NUM_CLUSTERS = 20  # of the histograms that precision and recall compare


def nrmse(x: np.ndarray, imputation: np.ndarray, scored: np.ndarray) -> float:
    """Normalised root-mean-square error of imputations (paper, UCI experiments).

    Per feature, the root of the mean squared error over the scored entries, divided by the feature's standard deviation
    over the evaluated data; averaged over features. Features that are constant or never scored are left out.

    Args:
        x: True values `[N, ...]`; NaN = missing, never scored.
        imputation: `[N, ...]`.
        scored: `[N, ...]`, 1 where the value was unobserved.

    Returns:
        The NRMSE; imputing the mean gives 1, up to sampling error. NaN if nothing is scored.
    """
    x, scored = np.asarray(x, np.float64), np.asarray(scored, bool) & ~np.isnan(x)
    squared_error = np.where(scored, np.square(np.nan_to_num(x) - imputation), 0.0).sum(0)
    count, std = scored.sum(0), np.nanstd(x, axis=0)
    counted = (count > 0) & (np.nanmax(x, axis=0) > np.nanmin(x, axis=0))
    ratio = np.sqrt(squared_error[counted] / count[counted]) / std[counted]
    return float(ratio.mean()) if ratio.size else float("nan")


def category_accuracy(x: np.ndarray, imputation: np.ndarray, scored: np.ndarray) -> float:
    """Accuracy of imputed categories: per column, the share of scored entries that are correct; averaged over columns.

    Arguments as of `nrmse`, categories `[N, d]`. In [0, 1], or NaN if nothing is scored.
    """
    scored = np.asarray(scored, bool) & ~np.isnan(x)
    count = scored.sum(0)
    right = (scored & (np.nan_to_num(x) == imputation)).sum(0)
    return float((right[count > 0] / count[count > 0]).mean()) if count.any() else float("nan")


def crps(x: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Continuous ranked probability score of predictive draws, `E|X - x| - E|X - X'| / 2`; lower is better.

    From true values `x: [...]` and `draws: [S, ...]` to `[...]`, in the units of x. The estimate is unbiased (Zamo and
    Naveau 2018, equation PWM). For a point prediction, a single draw, it is the absolute error.
    """
    num_draws = len(draws)
    error = np.abs(draws - x).mean(0)  # over draws
    if num_draws == 1:
        return error
    # The sum of |X - X'| over all pairs, from the order statistics.
    weights = 2 * np.arange(num_draws) - num_draws + 1
    spread = np.tensordot(weights, np.sort(draws, axis=0), axes=1) / (num_draws * (num_draws - 1))
    return error - spread


def interval_coverage(x: np.ndarray, draws: np.ndarray, level: float = 0.9) -> np.ndarray:
    """Whether true values lie between the order statistics of S draws that enclose a new draw with probability `level`.

    Args:
        x: True values `[...]`.
        draws: `[S, ...]`; (S + 1) (1 - level) / 2 must be a whole number, as with 99 draws for 0.9.
        level: The probability.

    Returns:
        `[...]` bool.

    Raises:
        ValueError: No two order statistics have this level.
    """
    tail = (len(draws) + 1) * (1 - level) / 2
    if abs(tail - round(tail)) > 1e-9 or round(tail) < 1:
        raise ValueError(f"{len(draws)} draws have no central interval of level {level}")
    ordered = np.sort(draws, axis=0)
    return (ordered[round(tail) - 1] <= x) & (x <= ordered[-round(tail)])


def finite_mean(values: np.ndarray) -> tuple[float, int]:
    """Returns the mean of the finite values (NaN if there are none) and the number of others."""
    values = np.asarray(values, np.float64)
    finite = np.isfinite(values)
    return (float(values[finite].mean()) if finite.any() else float("nan")), int((~finite).sum())


def psnr(x: np.ndarray, imputation: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of images, in decibels: `-10 log10(mean squared error over all pixels)`.

    From images `[N, H, W, C]` in [0, 1] to `[N]`; infinite where the two are equal.
    """
    squared_error = np.square(np.asarray(x, np.float64) - imputation).mean((1, 2, 3))  # over pixels and channels
    with np.errstate(divide="ignore"):
        return -10 * np.log10(squared_error)


def precision_recall_curve(
    real: np.ndarray, generated: np.ndarray, num_angles: int = 1001
) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall of one distribution relative to another (Sajjadi et al. 2018, arXiv 1806.00035, equation 7).

    For slopes l = tan(angle), precision is `sum_k min(l p_k, q_k)` and recall `sum_k min(p_k, q_k / l)`.

    Args:
        real: Reference distribution p, `[K]`, sums to one.
        generated: Distribution q to evaluate, `[K]`, sums to one.
        num_angles: Points of the curve, at equally spaced angles strictly between 0 and pi / 2.

    Returns:
        Precision and recall, `[num_angles]` each, in [0, 1].
    """
    angles = np.linspace(1e-10, np.pi / 2 - 1e-10, num_angles)
    slopes = np.tan(angles)[:, None]
    precision = np.minimum(slopes * real, generated).sum(1)  # over bins
    recall = np.minimum(real, generated / slopes).sum(1)
    return precision.clip(0.0, 1.0), recall.clip(0.0, 1.0)  # may exceed 1 by rounding


def precision_recall(
    real: np.ndarray, generated: np.ndarray, seed: int, *, num_clusters: int = NUM_CLUSTERS, num_runs: int = 10
) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall of samples relative to data: the curve of their histograms over shared clusters.

    Args:
        real: Embeddings of the data, `[N, D]`.
        generated: Embeddings of the samples, `[N, D]`.
        seed: Random seed of the clusterings.
        num_clusters: Clusters of the union, by mini-batch k-means.
        num_runs: Number of clusterings over which the curves are averaged.

    Returns:
        Precision and recall, `[1001]` each.
    """
    from sklearn.cluster import MiniBatchKMeans
    from threadpoolctl import threadpool_limits

    union = np.concatenate([real, generated])

    def curve(run: int) -> tuple[np.ndarray, np.ndarray]:
        labels = MiniBatchKMeans(num_clusters, n_init=10, random_state=seed + run).fit(union).labels_
        counts = [np.bincount(part, minlength=num_clusters) for part in np.split(labels, [len(real)])]
        return precision_recall_curve(counts[0] / len(real), counts[1] / len(generated))

    # One thread per run: several threads in one run wait for each other, which is 20 times slower on small data.
    with threadpool_limits(1), concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        precision, recall = np.mean(list(pool.map(curve, range(num_runs))), axis=0)  # over runs
    return precision, recall


def max_f_score(precision: np.ndarray, recall: np.ndarray, beta: float) -> float:
    """Largest `F_beta = (1 + beta^2) P R / (beta^2 P + R)` along a curve; small beta favours precision."""
    denominator = beta**2 * precision + recall
    with np.errstate(invalid="ignore"):
        scores = np.where(denominator > 0, (1 + beta**2) * precision * recall / denominator, 0.0)
    return float(scores.max())
