"""What the training of VaDE and that of PM-VaDE share: scores of clusters at validation."""

from typing import Any

import jax
import numpy as np

from posterior_matching import data
from posterior_matching.evaluation.metrics import clustering_scores

SAMPLES = 50  # of z, for a prediction of the cluster


def validation_arrays(dataset: data.Dataset) -> dict[str, np.ndarray]:
    """What validation reads: the examples, and their labels if there are any."""
    return {"x": dataset.x} if dataset.label is None else {"x": dataset.x, "label": dataset.label}


def contingency(label: jax.Array, cluster: jax.Array, dataset: data.Dataset, num_clusters: int) -> jax.Array:
    """A validation term, `[B, labels, clusters]`: 1 at the label `[B]` and the cluster `[B]` of each example."""
    label = jax.nn.one_hot(label, dataset.label.max() + 1)
    return label[:, :, None] * jax.nn.one_hot(cluster, num_clusters)[:, None, :]


def summarise_contingency(num_examples: int, means: dict[str, np.ndarray]) -> dict[str, Any]:
    """Replaces the mean contingency of the validation examples, if they have labels, by `clustering_scores`."""
    if "contingency" not in means:
        return means
    counts = np.rint(means["contingency"] * num_examples).astype(int)
    label, cluster = (np.repeat(index.ravel(), counts.ravel()) for index in np.indices(counts.shape))
    return {k: v for k, v in means.items() if k != "contingency"} | clustering_scores(label, cluster)
