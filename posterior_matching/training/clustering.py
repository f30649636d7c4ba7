"""Agreement of clusters with labels: the scores, and their computation over a validation set during training."""

from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from posterior_matching import data
from posterior_matching.models.vade import VADE
from posterior_matching.training.vade_initialisation import latents

if TYPE_CHECKING:
    from sklearn.mixture import GaussianMixture

SAMPLES = 50  # of z for each cluster prediction


def clustering_scores(label: np.ndarray, cluster: np.ndarray) -> dict[str, float]:
    """Scores the agreement of clusters with labels, regardless of how the clusters are numbered; 1 is perfect.

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

    counts = contingency_matrix(label, cluster)  # examples of each label in each cluster
    return {
        "clustering_accuracy": float(counts[linear_sum_assignment(-counts)].sum() / counts.sum()),
        "nmi": float(normalized_mutual_info_score(label, cluster)),
        "ari": float(adjusted_rand_score(label, cluster)),
    }


def contingency(label: jax.Array, cluster: jax.Array, num_clusters: int) -> jax.Array:
    """A validation term, `[B, classes, clusters]`: 1 at each label (one-hot `[B, classes]`) and cluster (`[B]`)."""
    return label[:, :, None] * jax.nn.one_hot(cluster, num_clusters)[:, None, :]


def summarise_contingency(means: dict[str, np.ndarray], num_examples: int) -> dict[str, Any]:
    """Replaces the mean contingency of the validation examples, if they have labels, with `clustering_scores`."""
    if "contingency" not in means:
        return means
    counts = np.rint(means["contingency"] * num_examples).astype(int)
    label, cluster = (np.repeat(index.ravel(), counts.ravel()) for index in np.indices(counts.shape))
    return {k: v for k, v in means.items() if k != "contingency"} | clustering_scores(label, cluster)


def mixture_accuracy(model: VADE, mixture: "GaussianMixture", dataset: data.Dataset) -> dict[str, float]:
    """The accuracy of a mixture fitted to VaDE's latents, as `mixture_accuracy`; empty for data without labels."""
    if dataset.label is None:
        return {}
    scores = clustering_scores(dataset.label, mixture.predict(latents(model, dataset)))
    return {"mixture_accuracy": scores["clustering_accuracy"]}
