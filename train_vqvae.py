"""Trains a VQ-VAE, the first stage of a PM-VQVAE.

python train_vqvae.py --config configs/vqvae_digits.py [--config.key=value ...] [--run_dir DIR]
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from posterior_matching import cli, parallel
from posterior_matching.evaluation.pictures import image_columns
from posterior_matching.models.vqvae import VQVAE
from posterior_matching.training.corruption import CorruptionOptions
from posterior_matching.training.family import Batch, Family, Metrics


@dataclasses.dataclass(frozen=True)
class Options(CorruptionOptions):
    """The keys specific to VQ-VAE configs, documented in `configs/common.py`."""


def loss(model: VQVAE, batch: Batch, rngs: nnx.Rngs, options: Options) -> Metrics:
    """Negative log-likelihood plus the quantiser loss."""
    x = options.corrupt(batch, rngs)
    terms = model.terms(x, update_codebook=batch.training, axis_name=parallel.AXIS)
    values = {
        "loss": terms.loss(),
        "reconstruction_ll_nats": terms.reconstruction_ll,
        "quantizer_loss": terms.quantizer_loss,
    }
    usage = jax.nn.one_hot(terms.indices, model.codebook_size).mean((1, 2))  # [B, K], over positions
    if not batch.training:
        return values | {"code_usage": usage}
    usage = jax.lax.pmean(usage.mean(0), parallel.AXIS)
    return values | {"perplexity": jnp.exp(jax.scipy.special.entr(usage).sum())}


def summarise(means: dict[str, np.ndarray], num_examples: int) -> dict[str, Any]:
    """Replaces the usage of each code over the validation data with the perplexity and the number of codes used."""
    del num_examples
    usage = means.pop("code_usage")
    used = usage[usage > 0]
    return means | {"perplexity": np.exp(-(used * np.log(used)).sum()), "codes_used": len(used)}


def pictures(model: VQVAE, x: jax.Array, b: jax.Array | None) -> dict[str, np.ndarray]:
    """Images and their reconstructions."""
    del b
    return {"reconstructions": image_columns(x, nnx.jit(VQVAE.reconstruct)(model, x))}


FAMILY = Family("vqvae", Options, loss, pictures=pictures, summarise=summarise)
train = FAMILY.train

if __name__ == "__main__":
    cli.train_main(FAMILY)
