"""The PM-VAE family. It is not in its script because `estimator.py` trains it from an installed package, too."""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from posterior_matching.config import Count, NonNegative
from posterior_matching.mask_generators import MaskOption
from posterior_matching.models.vae import PosteriorMatchingVAE
from posterior_matching.training.corruption import add_noise
from posterior_matching.training.family import Batch, Family, Metrics
from posterior_matching.training.optimizer import ScheduleOption
from posterior_matching.training.pretrained import Base


@dataclasses.dataclass(frozen=True)
class Options:
    """The keys specific to PM-VAE configs, documented in `configs/common.py`."""

    noise_std: NonNegative
    mask_generator: MaskOption
    matching_coef: NonNegative
    matching_ll_stop_gradients: bool
    elbo_samples: Count
    beta: ScheduleOption


def loss(model: PosteriorMatchingVAE, batch: Batch, rngs: nnx.Rngs, options: Options) -> Metrics:
    """Negative ELBO plus the Posterior Matching loss."""
    x = batch.x
    if batch.training:
        x = add_noise(x, batch.available, rngs.noise(), options.noise_std, model.vae.cardinalities)
    b = options.mask_generator(rngs.mask(), batch.available.shape) * batch.available
    terms = model.terms(
        x,
        b,
        rngs.sample(),
        available=batch.available,
        stop_gradients=options.matching_ll_stop_gradients,
        num_samples=options.elbo_samples,
        rngs=rngs if batch.training else None,
    )
    beta = jnp.ones(()) if batch.step is None else options.beta(batch.step)
    values = {
        "loss": terms.loss(beta, options.matching_coef),
        "elbo_nats": terms.elbo(),
        "reconstruction_ll_nats": terms.reconstruction_ll,
        "kl_nats": terms.kl,
        "matching_ll_nats": terms.matching_ll,
    }
    if terms.iw_elbo is not None:
        values["iw_elbo_nats"] = terms.iw_elbo
    return values | ({"beta": beta} if batch.training else {})


FAMILY = Family(
    name="pm_vae",
    options=Options,
    loss=loss,
    base=Base(
        "pm_vae",
        dir_key="pretrained_dir",
        part="vae",
        config_keys=("latent_dim", "encoder", "posterior", "decoder", "likelihood", "cardinalities", "availability"),
        required=False,
    ),
)
