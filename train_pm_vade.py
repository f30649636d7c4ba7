"""Trains the partially observed posterior of a trained VaDE, so that it can cluster and impute from x_o alone.

    python train_pm_vade.py --config configs/pm_vade_digits.py --config.vade_dir=RUN [--config.key=value ...]

The VaDE is frozen. Labels are used only for validation scores.
"""

import dataclasses

import jax
import numpy as np
from flax import nnx

from posterior_matching import cli
from posterior_matching.evaluation.pictures import imputation_grid
from posterior_matching.mask_generators import MaskOption
from posterior_matching.models.vade import PosteriorMatchingVADE
from posterior_matching.training.clustering import SAMPLES, contingency, summarise_contingency
from posterior_matching.training.corruption import CorruptionOptions
from posterior_matching.training.family import Batch, Family, Metrics
from posterior_matching.training.pretrained import Base


@dataclasses.dataclass(frozen=True)
class Options(CorruptionOptions):
    """The keys specific to PM-VaDE configs, documented in `configs/common.py`."""

    mask_generator: MaskOption


def loss(model: PosteriorMatchingVADE, batch: Batch, rngs: nnx.Rngs, options: Options) -> Metrics:
    """The Posterior Matching loss; the VaDE is frozen."""
    x = options.corrupt(batch, rngs, model.vade.cardinalities)  # the same for both posteriors
    b = options.mask_generator(rngs.mask(), batch.available.shape) * batch.available
    matching_ll = model.matching_ll(
        x, b, rngs.sample(), available=batch.available, rngs=rngs if batch.training else None
    )
    values = {"loss": -matching_ll, "matching_ll_nats": matching_ll}
    if not batch.training and batch.label is not None:
        cluster = model.partial_predict_cluster(x, b, SAMPLES, key=rngs.sample())
        values["contingency"] = contingency(batch.label, cluster, model.vade.num_clusters)
    return values


@nnx.jit
def impute(model: PosteriorMatchingVADE, x: jax.Array, b: jax.Array) -> jax.Array:
    """Five imputations of every image."""
    return model.impute(x, b, 5, key=jax.random.key(1))


def pictures(model: PosteriorMatchingVADE, x: jax.Array, b: jax.Array) -> dict[str, np.ndarray]:
    """Imputations."""
    return {"imputations": imputation_grid(x, b, impute(model, x, b))}


FAMILY = Family("pm_vade", Options, loss, base=Base("vade"), pictures=pictures, summarise=summarise_contingency)
train = FAMILY.train

if __name__ == "__main__":
    cli.train_main(FAMILY)
