"""Gives a trained VQ-VAE its conditionals p(x_u | x_o): a PixelCNN over its codes learns q(z | x_o).

    python train_pm_vqvae.py --config configs/pm_vqvae_digits.py --config.vqvae_dir=RUN [--run_dir DIR]

The VQ-VAE of RUN is copied and frozen.
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

from posterior_matching import cli, data, masking, runs
from posterior_matching.config import parse
from posterior_matching.evaluation.pictures import imputation_grid
from posterior_matching.models.vqvae import PosteriorMatchingVQVAE
from posterior_matching.training.corruption import check_corruption, corrupt
from posterior_matching.training.loop import Experiment, TrainingOptions, fit
from posterior_matching.training.pretrained import Base, build_on, load_base, load_datasets


@dataclasses.dataclass(frozen=True)
class PMVQVAEOptions:
    """The keys of a PM-VQVAE config besides those of the training loop; `configs/common.py` says what they mean."""

    dataset: str
    train_split: str
    validation_split: str
    noise_std: float
    distortion_std: float
    mask_generator: Mapping[str, Any]
    model: Mapping[str, Any]
    vqvae_dir: str | None = None


def train(config: ConfigDict, run_dir: str | None = None) -> str:
    """Trains and returns the run directory."""
    options, training = parse(config, PMVQVAEOptions, TrainingOptions)
    base = load_base(options.vqvae_dir, "vqvae", run_dir)
    train_set, validation_set = load_datasets(base, config)
    experiment = make_experiment(config, train_set, validation_set, base)
    run = runs.open_run(run_dir, "pm_vqvae", config, train_set.input_shape, train_set.standardisation)
    fit(experiment, run, training, {"x": train_set.x}, {"x": validation_set.x})
    return str(run.path)


def make_experiment(
    config: ConfigDict, train_set: data.Dataset, validation_set: data.Dataset, base: Base
) -> Experiment:
    """Builds what the training loop needs, around the VQ-VAE `base`."""
    options, training = parse(config, PMVQVAEOptions, TrainingOptions)
    check_corruption(options, train_set)
    generator = masking.build_mask_generator(options.mask_generator)
    generator.check(masking.mask_shape(train_set.input_shape))
    model = build_on(base, "pm_vqvae", config, train_set.input_shape, training.seed)

    def prepare(rows: dict[str, jax.Array]) -> jax.Array:
        return data.decode(rows["x"], train_set.max_value)[0]

    def loss(model: PosteriorMatchingVQVAE, x, rngs: nnx.Rngs, step, training: bool) -> dict[str, jax.Array]:  # noqa: ARG001
        if training:
            x = corrupt(x, jnp.ones_like(x), rngs.noise(), options.noise_std, options.distortion_std)
        b = generator(rngs.mask(), (len(x), *masking.mask_shape(x.shape[1:])))
        matching_ll = model.matching_ll(x, b, rngs if training else None)
        return {"loss": -matching_ll, "matching_ll_nats": matching_ll}

    images = functools.partial(example_images, validation_set, generator)
    return Experiment(model, loss, prepare, base.trainable(), images)


def example_images(dataset: data.Dataset, generator: masking.MaskGenerator, model: nnx.Module) -> dict[str, np.ndarray]:
    """Imputations of the first validation images, with the same randomness every time."""
    x, available = data.decode(dataset.x[:8], dataset.max_value)
    b = generator(jax.random.key(0), available.shape)
    return {"imputations": imputation_grid(x, b, _impute(model, x, b))}


@nnx.jit
def _impute(model: PosteriorMatchingVQVAE, x: jax.Array, b: jax.Array) -> jax.Array:
    return model.impute(x, b, 5, key=jax.random.key(1))


if __name__ == "__main__":
    cli.train_main(train)
