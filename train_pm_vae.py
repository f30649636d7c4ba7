"""Trains a VAE that models every conditional p(x_u | x_o) by Posterior Matching.

    python train_pm_vae.py --config configs/pm_vae_digits.py [--config.key=value ...] [--run_dir DIR]

With `--config.pretrained_dir=RUN` the VAE of that run is copied and frozen, and only q(z | x_o) is trained.
"""

import dataclasses

import jax
import numpy as np
from flax import nnx

from posterior_matching import cli
from posterior_matching.evaluation.pictures import image_square, imputation_grid
from posterior_matching.models.vae import PosteriorMatchingVAE
from posterior_matching.training import pm_vae


@nnx.jit
def draw(model: PosteriorMatchingVAE, x: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Five imputations of every image, and 16 joint samples."""
    return model.impute(x, b, 5, key=jax.random.key(1)), model.sample(16, key=jax.random.key(2), mean=True)


def pictures(model: PosteriorMatchingVAE, x: jax.Array, b: jax.Array) -> dict[str, np.ndarray]:
    """Imputations and joint samples."""
    imputations, samples = draw(model, x, b)
    return {"imputations": imputation_grid(x, b, imputations), "samples": image_square(samples)}


FAMILY = dataclasses.replace(pm_vae.FAMILY, pictures=pictures)
train = FAMILY.train

if __name__ == "__main__":
    cli.train_main(FAMILY)
