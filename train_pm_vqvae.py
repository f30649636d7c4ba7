"""Trains q(z | x_o), a PixelCNN over the codes of a trained VQ-VAE, which gives it the conditionals p(x_u | x_o).

    python train_pm_vqvae.py --config configs/pm_vqvae_digits.py --config.vqvae_dir=RUN [--run_dir DIR]

The VQ-VAE of RUN is copied and frozen.
"""

import dataclasses

import jax
import numpy as np
from flax import nnx

from posterior_matching import cli
from posterior_matching.evaluation.pictures import imputation_grid
from posterior_matching.mask_generators import MaskOption
from posterior_matching.models.vqvae import PosteriorMatchingVQVAE
from posterior_matching.training.corruption import CorruptionOptions
from posterior_matching.training.family import Batch, Family, Metrics
from posterior_matching.training.pretrained import Base


@dataclasses.dataclass(frozen=True)
class Options(CorruptionOptions):
    """The keys specific to PM-VQVAE configs, documented in `configs/common.py`."""

    mask_generator: MaskOption


def loss(model: PosteriorMatchingVQVAE, batch: Batch, rngs: nnx.Rngs, options: Options) -> Metrics:
    """The Posterior Matching loss; the VQ-VAE is frozen."""
    x = options.corrupt(batch, rngs)
    b = options.mask_generator(rngs.mask(), batch.available.shape)
    matching_ll = model.matching_ll(x, b, rngs if batch.training else None)
    return {"loss": -matching_ll, "matching_ll_nats": matching_ll}


@nnx.jit
def impute(model: PosteriorMatchingVQVAE, x: jax.Array, b: jax.Array) -> jax.Array:
    """Five imputations of every image."""
    return model.impute(x, b, 5, key=jax.random.key(1))


def pictures(model: PosteriorMatchingVQVAE, x: jax.Array, b: jax.Array) -> dict[str, np.ndarray]:
    """Imputations."""
    return {"imputations": imputation_grid(x, b, impute(model, x, b))}


FAMILY = Family("pm_vqvae", Options, loss, base=Base("vqvae"), pictures=pictures)
train = FAMILY.train

if __name__ == "__main__":
    cli.train_main(FAMILY)
