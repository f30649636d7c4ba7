"""Scores of clusters against labels, as VaDE and PM-VaDE log them at validation."""

from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from posterior_matching import data
from posterior_matching.evaluation.metrics import clustering_scores
from posterior_matching.models.vade import VADE
from posterior_matching.models.vade_initialisation import latents

if TYPE_CHECKING:
    from sklearn.mixture import GaussianMixture

SAMPLES = 50  # of z, for a prediction of the cluster


def contingency(label: jax.Array, cluster: jax.Array, num_clusters: int) -> jax.Array:
    """A validation term, `[B, classes, clusters]`: 1 at the label (one-hot `[B, classes]`) and cluster `[B]`."""
    return label[:, :, None] * jax.nn.one_hot(cluster, num_clusters)[:, None, :]


def summarise_contingency(means: dict[str, np.ndarray], num_examples: int) -> dict[str, Any]:
    """Replaces the mean contingency of the validation examples, if they have labels, by `clustering_scores`."""
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
