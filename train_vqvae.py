"""Trains a VQ-VAE, the first half of a PM-VQVAE.

python train_vqvae.py --config configs/vqvae_digits.py [--config.key=value ...] [--run_dir DIR]
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from posterior_matching import cli, data, parallel, runs
from posterior_matching.config import parse
from posterior_matching.evaluation.pictures import image_columns
from posterior_matching.models.vqvae import VQVAE
from posterior_matching.training.corruption import check_corruption, corrupt
from posterior_matching.training.loop import Experiment, TrainingOptions, fit


@dataclasses.dataclass(frozen=True)
class VQVAEOptions:
    """The keys of a VQ-VAE config besides those of the training loop; `configs/common.py` says what they mean."""

    dataset: str
    train_split: str
    validation_split: str
    noise_std: float
    distortion_std: float
    model: Mapping[str, Any]


def train(config: ConfigDict, run_dir: str | None = None) -> str:
    """Trains and returns the run directory."""
    _, training = parse(config, VQVAEOptions, TrainingOptions)
    train_set, validation_set = data.load_for_training(config)
    experiment = make_experiment(config, train_set, validation_set)
    run = runs.open_run(run_dir, "vqvae", config, train_set.input_shape, train_set.standardisation)
    fit(experiment, run, training, {"x": train_set.x}, {"x": validation_set.x})
    return str(run.path)


def make_experiment(config: ConfigDict, train_set: data.Dataset, validation_set: data.Dataset) -> Experiment:
    """Builds what the training loop needs."""
    options, training = parse(config, VQVAEOptions, TrainingOptions)
    check_corruption(options, train_set)
    model = VQVAE.from_config(options.model, train_set.input_shape, nnx.Rngs(training.seed))
    num_codes = model.codebook_size

    def prepare(rows: dict[str, jax.Array]) -> jax.Array:
        return data.decode(rows["x"], train_set.max_value)[0]

    def loss(model: VQVAE, x, rngs: nnx.Rngs, step, training: bool) -> dict[str, jax.Array]:  # noqa: ARG001
        if training:
            x = corrupt(x, jnp.ones_like(x), rngs.noise(), options.noise_std, options.distortion_std)
        terms = model.terms(x, update_codebook=training, axis_name=parallel.AXIS)
        values = {
            "loss": terms.loss(),
            "reconstruction_ll_nats": terms.reconstruction_ll,
            "quantizer_loss": terms.quantizer_loss,
        }
        usage = jax.nn.one_hot(terms.indices, num_codes).mean((1, 2))  # [B, K], over positions
        if not training:
            return values | {"code_usage": usage}
        usage = jax.lax.pmean(usage.mean(0), parallel.AXIS)
        return values | {"perplexity": jnp.exp(jax.scipy.special.entr(usage).sum())}

    images = functools.partial(example_images, validation_set)
    return Experiment(model, loss, prepare, images=images, summarise=summarise_usage)


def summarise_usage(means: dict[str, np.ndarray]) -> dict[str, Any]:
    """Replaces the share of every code over the validation data by perplexity and number of codes ever used."""
    usage = means.pop("code_usage")
    used = usage[usage > 0]
    return means | {"perplexity": np.exp(-(used * np.log(used)).sum()), "codes_used": len(used)}


def example_images(dataset: data.Dataset, model: VQVAE) -> dict[str, np.ndarray]:
    """The first validation images and their reconstructions."""
    x = data.decode(dataset.x[:8], dataset.max_value)[0]
    return {"reconstructions": image_columns(x, nnx.jit(VQVAE.reconstruct)(model, x))}


if __name__ == "__main__":
    cli.train_main(train)
