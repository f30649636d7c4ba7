"""Trains VaDE: pretraining as an autoencoder, a mixture fitted to all training latents, then the ELBO; one run.

    python train_vade.py --config configs/vade_digits.py [--config.key=value ...] [--run_dir DIR]

Labels are used for nothing but the scores at validation, and data without labels train as well.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from posterior_matching import cli, data, runs
from posterior_matching.config import call, parse
from posterior_matching.data.batches import padded_batches
from posterior_matching.errors import UserError
from posterior_matching.evaluation.clustering import (
    SAMPLES,
    clustering_scores,
    contingency,
    summarise_contingency,
    validation_arrays,
)
from posterior_matching.models.vade import VADE
from posterior_matching.numerics import on_cpu
from posterior_matching.training.corruption import check_corruption, corrupt
from posterior_matching.training.loop import Experiment, OptimizerOptions, Pretraining, TrainingOptions, fit


@dataclasses.dataclass(frozen=True)
class VADEOptions:
    """The keys of a VaDE config besides those of the training loop; `configs/common.py` says what they mean."""

    dataset: str
    train_split: str
    validation_split: str
    noise_std: float
    distortion_std: float
    restarts: int
    pretraining: Mapping[str, Any]
    model: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class PretrainingOptions:
    """The keys of `config.pretraining`."""

    steps: int
    optimizer: Mapping[str, Any]
    mixture_inits: int
    mixture_iterations: int


class Restarts(nnx.Module):
    """VaDEs that differ in their initial weights."""

    def __init__(self, models: Sequence[VADE]):
        self.models = nnx.List(models)

    def map(self, fn: Callable[[VADE, jax.Array], jax.Array], key: jax.Array) -> jax.Array:
        """Returns `fn(model, key)` of every model, each with a key of its own, `[restarts, ...]`."""
        keys = jax.random.split(key, len(self.models))
        if on_cpu():  # where convolutions with a batch of kernels are slow
            return jnp.stack([fn(model, key) for model, key in zip(self.models, keys, strict=True)])
        graphdefs, states = zip(*map(nnx.split, self.models), strict=True)
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        return jax.vmap(lambda state, key: fn(nnx.merge(graphdefs[0], state), key))(stacked, keys)


def train(config: ConfigDict, run_dir: str | None = None) -> str:
    """Trains and returns the run directory."""
    _, training = parse(config, VADEOptions, TrainingOptions)
    train_set, validation_set = data.load_for_training(config)
    experiment = make_experiment(config, train_set, validation_set)
    run = runs.open_run(run_dir, "vade", config, train_set.input_shape, train_set.standardisation)
    fit(experiment, run, training, {"x": train_set.x}, validation_arrays(validation_set))
    return str(run.path)


def make_experiment(config: ConfigDict, train_set: data.Dataset, validation_set: data.Dataset) -> Experiment:
    """Builds what the training loop needs."""
    options, training = parse(config, VADEOptions, TrainingOptions)
    pretraining = call(PretrainingOptions, options.pretraining, "config.pretraining")
    check(options, pretraining, train_set)

    def prepare(rows: dict[str, jax.Array]) -> dict[str, jax.Array]:
        x, available = data.decode(rows["x"], train_set.max_value)
        return rows | {"x": x, "available": available}

    def corrupted(batch: dict[str, jax.Array], rngs: nnx.Rngs) -> jax.Array:
        return corrupt(batch["x"], batch["available"], rngs.noise(), options.noise_std, options.distortion_std)

    def loss(model: VADE, batch, rngs: nnx.Rngs, step, training: bool) -> dict[str, jax.Array]:  # noqa: ARG001
        x = batch["x"]
        terms = model.terms(
            x,
            rngs.sample(),
            corrupted_x=corrupted(batch, rngs) if training else None,
            available=batch["available"],
            rngs=rngs if training else None,
        )
        values = {
            "loss": -terms.elbo(),
            "elbo_nats": terms.elbo(),
            "reconstruction_ll_nats": terms.reconstruction_ll,
            "kl_nats": terms.kl,
        }
        if not training and "label" in batch:
            cluster = model.predict_cluster(x, SAMPLES, key=rngs.sample())
            values["contingency"] = contingency(batch["label"], cluster, validation_set, model.num_clusters)
        return values

    def autoencoder_loss(restarts: Restarts, batch, rngs: nnx.Rngs, step, training: bool) -> dict[str, jax.Array]:  # noqa: ARG001
        corrupted_x = corrupted(batch, rngs) if training else None

        def log_likelihood(model: VADE, key: jax.Array) -> jax.Array:
            dropout = nnx.Rngs(dropout=key) if training else None
            return model.autoencoder_ll(batch["x"], corrupted_x=corrupted_x, available=batch["available"], rngs=dropout)

        ll = restarts.map(log_likelihood, rngs.dropout())  # [restarts, B]
        return {"loss": -ll.sum(0), "reconstruction_ll_nats": ll.mean(0)}

    def finish(restarts: Restarts) -> tuple[VADE, dict[str, float]]:
        return choose(restarts, pretraining, train_set, validation_set, training.seed)

    rngs = nnx.Rngs(training.seed)
    models = [VADE.from_config(config.model, train_set.input_shape, rngs) for _ in range(options.restarts)]
    return Experiment(
        models[0],
        loss,
        prepare,
        summarise=functools.partial(summarise_contingency, len(validation_set)),
        pretraining=Pretraining(
            experiment=Experiment(Restarts(models), autoencoder_loss, prepare),
            steps=pretraining.steps,
            optimizer=call(OptimizerOptions, pretraining.optimizer, "config.pretraining.optimizer"),
            finish=finish,
        ),
    )


def choose(
    restarts: Restarts, options: PretrainingOptions, train_set: data.Dataset, validation_set: data.Dataset, seed: int
) -> tuple[VADE, dict[str, float]]:
    """Initialises the prior of every restart by a mixture of its training latents; returns that of the best ELBO.

    The ELBO of the training data bounds the same log p(x) for all restarts, so it compares them, whatever the scale of
    their latents. The likelihood of a mixture does not.
    """
    from sklearn.mixture import GaussianMixture

    elbos, mixtures = [], []
    for model in restarts.models:
        mixture = GaussianMixture(
            model.num_clusters,
            covariance_type="diag",
            n_init=options.mixture_inits,
            max_iter=options.mixture_iterations,
            random_state=seed,
        ).fit(over_rows(_latents, model, train_set))
        model.initialise_prior(mixture.weights_, mixture.means_, mixture.covariances_)
        elbos.append(initialise_posterior_scale(model, train_set))
        mixtures.append(mixture)
    best = int(np.argmax(elbos))
    found = {f"restart_{i}_elbo_nats": elbo for i, elbo in enumerate(elbos)} | {"restart": best}
    if validation_set.label is not None:
        cluster = mixtures[best].predict(over_rows(_latents, restarts.models[best], validation_set))
        found["mixture_accuracy"] = clustering_scores(validation_set.label, cluster)["clustering_accuracy"]
    return restarts.models[best], found


def initialise_posterior_scale(model: VADE, train_set: data.Dataset) -> float:
    """Sets the scale of q(z | x), which pretraining leaves at random, and returns the ELBO of the training data, nats.

    It becomes the share of the clusters' own scale for which the ELBO is best. Left at random, the ELBO begins
    hundreds of nats lower, and its first steps undo much of the pretraining.
    """
    variance = jax.nn.softmax(model.logits[...]) @ jnp.exp(2 * model.log_scales[...])  # within clusters, [e]
    elbos = {}
    for share in np.geomspace(0.01, 1.0, 9):
        model.posterior_head.set_scale(share * jnp.sqrt(variance))
        elbos[share] = float(over_rows(_elbo, model, train_set, max_rows=10_000).mean())
    best = max(elbos, key=elbos.get)
    model.posterior_head.set_scale(best * jnp.sqrt(variance))
    return elbos[best]


@nnx.jit
def _latents(model: VADE, x: jax.Array, available: jax.Array) -> jax.Array:  # noqa: ARG001
    return model.posterior(x).mean


@nnx.jit
def _elbo(model: VADE, x: jax.Array, available: jax.Array) -> jax.Array:
    return model.terms(x, jax.random.key(0), available=available).elbo()


def over_rows(
    fn: Callable[..., jax.Array], model: VADE, dataset: data.Dataset, max_rows: int | None = None
) -> np.ndarray:
    """Returns `fn(model, x, available)` of the dataset's rows, or of the first `max_rows`, batch by batch."""
    indices, weights = padded_batches(min(len(dataset), max_rows or len(dataset)), 500)
    values = [np.asarray(fn(model, *data.decode(dataset.x[rows], dataset.max_value))) for rows in indices]
    return np.concatenate(values)[weights.reshape(-1) > 0]


def check(options: VADEOptions, pretraining: PretrainingOptions, train_set: data.Dataset) -> None:
    """Raises UserError if an option is out of range, or does not fit the data."""
    counts = {"restarts": options.restarts, "pretraining.steps": pretraining.steps}
    counts |= {f"pretraining.{name}": getattr(pretraining, name) for name in ("mixture_inits", "mixture_iterations")}
    for name, count in counts.items():
        if count < 1:
            raise UserError(f"config.{name} must be at least 1, not {count}")
    check_corruption(options, train_set)
    clusters = options.model.get("num_clusters", 1)
    if clusters > len(train_set):
        raise UserError(f"config.model.num_clusters is {clusters}, there are only {len(train_set)} training examples")


if __name__ == "__main__":
    cli.train_main(train)
