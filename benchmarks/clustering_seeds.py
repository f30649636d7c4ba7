"""Trains VaDE and PM-VaDE with several seeds and compares them with k-means and Gaussian mixtures on PCA.

    python benchmarks/clustering_seeds.py [--dataset digits] [--num_seeds 5] [--folder runs/clustering_seeds]

Trains `configs/vade_<dataset>.py` and `configs/pm_vade_<dataset>.py` in run directories under `folder`, resuming
interrupted runs. All clusterings are fitted to the training split and scored on the test split by the share of
examples that have the label of their cluster, under the best assignment of clusters to labels. Labels are used for
nothing else.
"""

import importlib
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import numpy as np
from absl import flags
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture

import train_pm_vade
import train_vade
from posterior_matching import cli, data, masking, runs
from posterior_matching.evaluation.examples import ExampleMap
from posterior_matching.models.vade import PosteriorMatchingVADE
from posterior_matching.training.clustering import clustering_scores

_DATASET = flags.DEFINE_string("dataset", "digits", "A labelled dataset that has both configs.")
_SEEDS = flags.DEFINE_integer("num_seeds", 5, "Number of seeds: 0, 1, ...", lower_bound=1)
_FOLDER = flags.DEFINE_string("folder", "runs/clustering_seeds", "Folder for the run directories.")

SHARES = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)  # of the pixels observed


def main() -> None:
    """Trains, scores and prints."""
    train_set, test_set = data.load(_DATASET.value, "train"), data.load(_DATASET.value, "test")
    table: dict[str, list[float]] = {}
    seconds = []
    for seed in range(_SEEDS.value):
        start = time.perf_counter()
        vade_dir = train("vade", train_vade, seed)
        pm_vade_dir = train("pm_vade", train_pm_vade, seed, vade_dir=vade_dir)
        seconds.append(time.perf_counter() - start)
        found = baselines(train_set, test_set, seed) | neural(pm_vade_dir, test_set)
        for name, accuracy in found.items():
            table.setdefault(name, []).append(accuracy)
    print(
        f"\nclustering accuracy on the {len(test_set)} test examples of {_DATASET.value}, seeds 0 to {_SEEDS.value - 1}"
    )
    for name, accuracies in table.items():
        print(f"{name:32} {np.median(accuracies):.3f} median   " + "  ".join(f"{a:.3f}" for a in accuracies))
    print("seconds of training, VaDE and PM-VaDE:  " + "  ".join(f"{s:.0f}" for s in seconds))


def train(family: str, script, seed: int, **changes: str) -> str:
    """Trains one seed of `configs/<family>_<dataset>.py`; returns the run directory."""
    config = importlib.import_module(f"configs.{family}_{_DATASET.value}").get_config()
    config.update({"seed": seed, **changes})
    return script.train(config, f"{_FOLDER.value}/{family}_{_DATASET.value}_{seed}")


def baselines(train_set: data.Dataset, test_set: data.Dataset, seed: int) -> dict[str, float]:
    """Accuracy of k-means on pixels and of Gaussian mixtures on 10 principal components."""
    train, test = (d.x.reshape(len(d), -1) / d.max_value for d in (train_set, test_set))
    assert train_set.label is not None  # digits have labels
    clusters = len(np.unique(train_set.label))
    kmeans = KMeans(clusters, n_init=10, random_state=seed).fit(train)
    found = {"k-means": kmeans.predict(test)}
    pca = PCA(10, random_state=seed).fit(train)
    for kind in ("diag", "full"):
        mixture = GaussianMixture(clusters, covariance_type=kind, n_init=10, random_state=seed)
        found[f"Gaussian mixture on PCA, {kind}"] = mixture.fit(pca.transform(train)).predict(pca.transform(test))
    return {name: accuracy(test_set, cluster) for name, cluster in found.items()}


def neural(run_dir: str, test_set: data.Dataset) -> dict[str, float]:
    """Accuracy of VaDE on complete examples and of PM-VaDE under Bernoulli masks."""
    model = runs.load_model(run_dir, "pm_vade")
    shape = masking.mask_shape(test_set.input_shape)

    def predict(
        model: PosteriorMatchingVADE, key: jax.Array, x: jax.Array, available: jax.Array
    ) -> dict[str, jax.Array]:
        found = {"VaDE": model.predict_cluster(x[None], 50, key=key)[0]}
        for share in SHARES:
            b = jax.random.bernoulli(key, share, (1, *shape)) * available
            found[f"PM-VaDE, {share:.0%} observed"] = model.partial_predict_cluster(x[None], b, 50, key=key)[0]
        return found

    found = ExampleMap(predict, model, test_set, 100)(jax.random.key(0))
    names = ["VaDE", *(f"PM-VaDE, {share:.0%} observed" for share in SHARES)]
    return {name: accuracy(test_set, found[name]) for name in names}


def accuracy(test_set: data.Dataset, cluster: np.ndarray) -> float:
    """Clustering accuracy on the test split."""
    assert test_set.label is not None  # digits have labels
    return clustering_scores(test_set.label, cluster)["clustering_accuracy"]


if __name__ == "__main__":
    cli.run(main)
