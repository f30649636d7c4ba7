"""Trains a hierarchical VAE of images that answers every conditional p(x_u | x_o): Posterior Matching in a VDVAE.

python train_pm_vdvae.py --config configs/pm_vdvae_digits.py [--config.key=value ...] [--run_dir DIR]
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from posterior_matching import cli, data, masking, runs
from posterior_matching.config import parse
from posterior_matching.errors import UserError
from posterior_matching.evaluation.pictures import image_columns, image_square, imputation_grid
from posterior_matching.models.vdvae import PosteriorMatchingVDVAE
from posterior_matching.training.loop import Experiment, TrainingOptions, fit


@dataclasses.dataclass(frozen=True)
class PMVDVAEOptions:
    """The keys of a PM-VDVAE config besides those of the training loop; `configs/common.py` says what they mean."""

    dataset: str
    train_split: str
    validation_split: str
    mask_generator: Mapping[str, Any]
    model: Mapping[str, Any]


def train(config: ConfigDict, run_dir: str | None = None) -> str:
    """Trains and returns the run directory."""
    _, training = parse(config, PMVDVAEOptions, TrainingOptions)
    train_set, validation_set = data.load_for_training(config)
    experiment = make_experiment(config, train_set, validation_set)
    run = runs.open_run(run_dir, "pm_vdvae", config, train_set.input_shape)
    fit(experiment, run, training, {"x": train_set.x}, {"x": validation_set.x})
    return str(run.path)


def make_experiment(config: ConfigDict, train_set: data.Dataset, validation_set: data.Dataset) -> Experiment:
    """Builds what the training loop needs."""
    options, training = parse(config, PMVDVAEOptions, TrainingOptions)
    generator = masking.build_mask_generator(options.mask_generator)
    model = PosteriorMatchingVDVAE.from_config(options.model, train_set.input_shape, nnx.Rngs(training.seed))
    generator.check(masking.mask_shape(train_set.input_shape))
    if train_set.max_value not in (1.0, model.num_levels - 1.0):
        raise UserError(
            f"config.model.num_levels is {model.num_levels}, but the pixels of {train_set.name} have "
            f"{train_set.max_value + 1:.0f} values: bits per dimension would not be theirs"
        )

    def prepare(rows: dict[str, jax.Array]) -> dict[str, jax.Array]:
        x, _ = data.decode(rows["x"], train_set.max_value)
        return {"x": model.to_levels(x)}

    def loss(model: PosteriorMatchingVDVAE, batch, rngs: nnx.Rngs, step, training: bool) -> dict[str, jax.Array]:  # noqa: ARG001
        x = batch["x"]
        b = generator(rngs.mask(), (*x.shape[:3], 1))
        terms = model.terms(x, b, rngs.sample())
        return {
            "loss": terms.loss(),
            "elbo_nats": terms.elbo(),
            "reconstruction_ll_nats": terms.reconstruction_ll,
            "kl_nats": terms.kl,
            "pm_kl_nats": terms.pm_kl,
            "bpd": -terms.elbo() / (math.prod(x.shape[1:]) * math.log(2)),  # bits per dimension
        }

    images = functools.partial(example_images, validation_set, generator)
    return Experiment(model, loss, prepare, images=images)


def example_images(
    dataset: data.Dataset, generator: masking.MaskGenerator, model: PosteriorMatchingVDVAE
) -> dict[str, np.ndarray]:
    """The first validation images, reconstructed and imputed, and joint samples; the same randomness every time."""
    x, available = data.decode(dataset.x[:8], dataset.max_value)
    b = generator(jax.random.key(0), available.shape)
    reconstructions, imputations, samples = _draw(model, x, b)
    return {
        "reconstructions": image_columns(x, reconstructions),
        "imputations": imputation_grid(x, b, imputations),
        "samples": image_square(samples),
    }


@nnx.jit
def _draw(model: PosteriorMatchingVDVAE, x: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    levels = model.to_levels(x)
    drawn = (
        model.reconstruct(levels, key=jax.random.key(1)),
        model.impute(levels, b, 5, key=jax.random.key(2)),
        model.sample(16, key=jax.random.key(3), mean=True),
    )
    return jax.tree.map(model.from_levels, drawn)


if __name__ == "__main__":
    cli.train_main(train)
