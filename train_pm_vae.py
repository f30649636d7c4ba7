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

from posterior_matching import cli, data, masking, runs
from posterior_matching.config import build, parse
from posterior_matching.evaluation.pictures import image_square, imputation_grid
from posterior_matching.models.vae import PosteriorMatchingVAE
from posterior_matching.training import schedules
from posterior_matching.training.loop import Experiment, TrainingOptions, fit
from posterior_matching.training.pretrained import Base, check_shape, load_base


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
    pretrained = None
    if options.pretrained_dir is not None:
        pretrained = load_base(options.pretrained_dir, "pm_vae", run_dir)
    train_set, validation_set = data.load_for_training(config, pretrained and pretrained.standardisation)
    experiment = make_experiment(config, train_set, validation_set, pretrained)
    run = runs.open_run(run_dir, "pm_vae", config, train_set.input_shape, train_set.standardisation)
    fit(experiment, run, training, {"x": train_set.x}, {"x": validation_set.x})
    return str(run.path)


def make_experiment(
    config: ConfigDict, train_set: data.Dataset, validation_set: data.Dataset, pretrained: Base | None = None
) -> Experiment:
    """Builds what the training loop needs; the VAE and its part of `config.model` may come from a pretrained run."""
    options, training = parse(config, PMVAEOptions, TrainingOptions)
    generator = masking.build_mask_generator(options.mask_generator)
    generator.check(masking.mask_shape(train_set.input_shape))
    beta = build(schedules.SCHEDULES, options.beta, "config.beta")

    trainable = nnx.Param
    if pretrained is not None:
        check_shape(pretrained, train_set.input_shape)
        trainable = nnx.All(nnx.Param, nnx.PathContains("partial_posterior"))
        with config.unlocked():
            for key in ("latent_dim", "encoder", "posterior", "decoder", "likelihood"):
                value = pretrained.config[key]
                config.model[key] = ConfigDict(value) if isinstance(value, Mapping) else value
        logging.info("config.model of the VAE is that of %s", options.pretrained_dir)
    model = PosteriorMatchingVAE.from_config(config.model, train_set.input_shape, nnx.Rngs(training.seed))
    if pretrained is not None:
        model.vae = pretrained.model.vae

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


def example_images(dataset: data.Dataset, generator: masking.MaskGenerator, model: nnx.Module) -> dict[str, np.ndarray]:
    """Imputations of the first validation images and joint samples, with the same randomness every time."""
    x, available = data.decode(dataset.x[:8], dataset.max_value)
    b = generator(jax.random.key(0), available.shape)
    imputations, samples = _draw(model, x, b)
    return {"imputations": imputation_grid(x, b, imputations), "samples": image_square(samples)}


@nnx.jit
def _draw(model: PosteriorMatchingVAE, x: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    return model.impute(x, b, 5, key=jax.random.key(1)), model.sample(16, key=jax.random.key(2), mean=True)


if __name__ == "__main__":
    cli.train_main(train)
