"""Trains a VAE that answers every conditional p(x_u | x_o) by Posterior Matching.

    python train_pm_vae.py --config configs/pm_vae_digits.py [--config.key=value ...] [--run_dir DIR]

With `--config.pretrained_dir=RUN` the VAE of that run is taken over and frozen; only q(z | x_o) trains.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from ml_collections import ConfigDict

from posterior_matching import cli, data, masking, runs, schedules
from posterior_matching.config import build, parse
from posterior_matching.errors import UserError
from posterior_matching.images import imputation_grid
from posterior_matching.models.vae import PosteriorMatchingVAE
from posterior_matching.training import Experiment, TrainingOptions, fit


@dataclasses.dataclass(frozen=True)
class PMVAEOptions:
    """The keys of a PM-VAE config besides those of the training loop; `configs/common.py` says what they mean."""

    dataset: str
    train_split: str
    validation_split: str
    noise_std: float
    mask_generator: Mapping[str, Any]
    matching_coef: float
    matching_ll_stop_gradients: bool
    beta: Mapping[str, Any]
    model: Mapping[str, Any]
    pretrained_dir: str | None = None


def train(config: ConfigDict, run_dir: str | None = None) -> str:
    """Trains and returns the run directory."""
    options, training = parse(config, PMVAEOptions, TrainingOptions)
    if options.dataset is None:
        raise UserError("missing key 'config.dataset': a name (README, \"Data\") or a path to .npy, .npz or .csv")
    train_set = data.load(options.dataset, options.train_split)
    validation_set = data.load(options.dataset, options.validation_split)
    experiment = make_experiment(config, train_set, validation_set, run_dir)
    run = runs.open_run(run_dir, "pm_vae", config, train_set.input_shape, train_set.standardisation)
    fit(experiment, run, training, {"x": train_set.x}, {"x": validation_set.x})
    return str(run.path)


def make_experiment(
    config: ConfigDict, train_set: data.Dataset, validation_set: data.Dataset, run_dir: str | None = None
) -> Experiment:
    """Builds what the training loop needs; takes the VAE and its part of `config.model` from a pretrained run if asked.

    A run that is resumed holds that VAE itself and does not need the pretrained run any more.
    """
    options, training = parse(config, PMVAEOptions, TrainingOptions)
    generator = masking.build_mask_generator(options.mask_generator)
    generator.check(masking.mask_shape(train_set.input_shape))
    beta = build(schedules.SCHEDULES, options.beta, "config.beta")

    base, trainable = None, nnx.Param
    if options.pretrained_dir is not None:
        resumed = run_dir is not None and runs.latest_step(run_dir) > 0
        base = take_pretrained(config, run_dir if resumed else options.pretrained_dir, train_set.input_shape)
        trainable = nnx.All(nnx.Param, nnx.PathContains("partial_posterior"))
    model = PosteriorMatchingVAE.from_config(config.model, train_set.input_shape, nnx.Rngs(training.seed))
    if base is not None:
        model.vae = base.vae

    def prepare(rows: dict[str, jax.Array]) -> dict[str, jax.Array]:
        x, available = data.decode(rows["x"], train_set.max_value)
        return {"x": x, "available": available}

    def loss(model: PosteriorMatchingVAE, batch, rngs: nnx.Rngs, step, training: bool) -> dict[str, jax.Array]:
        x, available = batch["x"], batch["available"]
        if training and options.noise_std:
            x = x + options.noise_std * jax.random.normal(rngs.noise(), x.shape) * available
        b = generator(rngs.mask(), available.shape) * available
        terms = model.terms(
            x,
            b,
            rngs.sample(),
            available=available,
            stop_gradients=options.matching_ll_stop_gradients,
            rngs=rngs if training else None,
        )
        weight = beta(step) if training else 1.0
        values = {
            "loss": terms.loss(weight, options.matching_coef),
            "elbo_nats": terms.elbo(),
            "reconstruction_ll_nats": terms.reconstruction_ll,
            "kl_nats": terms.kl,
            "matching_ll_nats": terms.matching_ll,
        }
        return values | ({"beta": jnp.asarray(weight)} if training else {})

    is_image = len(train_set.input_shape) == 3
    images = functools.partial(example_images, validation_set, generator) if is_image else None
    return Experiment(model, loss, prepare, trainable, images)


def take_pretrained(config: ConfigDict, pretrained_dir: str, input_shape: tuple[int, ...]) -> PosteriorMatchingVAE:
    """Returns the model of another run, and copies what describes its VAE into `config.model`."""
    description = runs.read_description(pretrained_dir, "pm_vae")
    if tuple(description["input_shape"]) != tuple(input_shape):
        raise UserError(
            f"{pretrained_dir} was trained on data of shape {tuple(description['input_shape'])}, "
            f"config.dataset has shape {tuple(input_shape)}"
        )
    with config.unlocked():
        for key in ("latent_dim", "encoder", "posterior", "decoder", "likelihood"):
            value = description["config"]["model"][key]
            config.model[key] = ConfigDict(value) if isinstance(value, dict) else value
    logging.info("taking config.model of the VAE from %s", pretrained_dir)
    return runs.load_model(pretrained_dir, "pm_vae")


def example_images(dataset: data.Dataset, generator: masking.MaskGenerator, model: nnx.Module) -> dict[str, np.ndarray]:
    """Imputations of the first validation images and joint samples, with the same randomness every time."""
    x, available = data.decode(dataset.x[:8], dataset.max_value)
    b = generator(jax.random.key(0), available.shape)
    imputations, samples = _draw(model, x, b)
    return {"imputations": imputation_grid(x, b, imputations), "samples": imputation_grid(samples, None, None)}


@nnx.jit
def _draw(model: PosteriorMatchingVAE, x: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    return model.impute(x, b, 5, key=jax.random.key(1)), model.sample(16, key=jax.random.key(2), mean=True)


if __name__ == "__main__":
    cli.train_main(train)
