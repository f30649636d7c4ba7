"""Trains a hierarchical VAE of images that models every conditional p(x_u | x_o): Posterior Matching in a VDVAE.

python train_pm_vdvae.py --config configs/pm_vdvae_digits.py [--config.key=value ...] [--run_dir DIR]
"""

import dataclasses
import math

import jax
import numpy as np
from flax import nnx

from posterior_matching import cli
from posterior_matching.data import Dataset
from posterior_matching.errors import OptionError
from posterior_matching.evaluation.pictures import image_columns, image_square, imputation_grid
from posterior_matching.mask_generators import MaskOption
from posterior_matching.models.vdvae import PosteriorMatchingVDVAE
from posterior_matching.training.family import Batch, Family, Metrics


@dataclasses.dataclass(frozen=True)
class Options:
    """The key specific to PM-VDVAE configs."""

    mask_generator: MaskOption


def loss(model: PosteriorMatchingVDVAE, batch: Batch, rngs: nnx.Rngs, options: Options) -> Metrics:
    """Negative ELBO plus the Posterior Matching loss."""
    x = model.to_levels(batch.x)
    b = options.mask_generator(rngs.mask(), batch.available.shape)
    terms = model.terms(x, b, rngs.sample())
    return {
        "loss": terms.loss(),
        "elbo_nats": terms.elbo(),
        "reconstruction_ll_nats": terms.reconstruction_ll,
        "kl_nats": terms.kl,
        "pm_kl_nats": terms.pm_kl,
        "bpd": -terms.elbo() / (math.prod(x.shape[1:]) * math.log(2)),  # bits per dimension
    }


@nnx.jit
def draw(model: PosteriorMatchingVDVAE, x: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A reconstruction and five imputations of every image, and 16 joint samples."""
    levels = model.to_levels(x)
    drawn = (
        model.reconstruct(levels, key=jax.random.key(1)),
        model.impute(levels, b, 5, key=jax.random.key(2)),
        model.sample(16, key=jax.random.key(3), mean=True),
    )
    return jax.tree.map(model.from_levels, drawn)


def pictures(model: PosteriorMatchingVDVAE, x: jax.Array, b: jax.Array) -> dict[str, np.ndarray]:
    """Reconstructions, imputations and joint samples."""
    reconstructions, imputations, samples = draw(model, x, b)
    return {
        "reconstructions": image_columns(x, reconstructions),
        "imputations": imputation_grid(x, b, imputations),
        "samples": image_square(samples),
    }


def check(options: Options, model: PosteriorMatchingVDVAE, train_set: Dataset) -> None:
    """Raises OptionError if the model and the data differ in the number of pixel values."""
    del options
    if train_set.max_value not in (1.0, model.num_levels - 1.0):
        values = f"the pixels of {train_set.name} have {train_set.max_value + 1:.0f} values"
        problem = f"is {model.num_levels}, but {values}: bits per dimension would be wrong"
        raise OptionError("model.num_levels", problem)


FAMILY = Family("pm_vdvae", Options, loss, pictures=pictures, check=check)
train = FAMILY.train

if __name__ == "__main__":
    cli.train_main(FAMILY)
