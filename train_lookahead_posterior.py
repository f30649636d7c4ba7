"""Trains lookahead posteriors on a trained, frozen PM-VAE; they choose what to observe next in one forward pass.

python train_lookahead_posterior.py --config configs/lookahead_digits.py --config.pm_vae_dir=RUN [--run_dir DIR]
"""

import dataclasses
from typing import ClassVar, Literal

from flax import nnx

from posterior_matching import cli
from posterior_matching.config import Count
from posterior_matching.data import Dataset
from posterior_matching.errors import OptionError
from posterior_matching.mask_generators import MaskOption
from posterior_matching.models.lookahead import LookaheadPosterior
from posterior_matching.training.family import Batch, Family, Metrics
from posterior_matching.training.pretrained import Base


@dataclasses.dataclass(frozen=True)
class Options:
    """The keys specific to lookahead configs, documented in `configs/common.py`."""

    mask_generator: MaskOption
    model_samples: Count
    lookahead_subsample: Count
    target: Literal["conditional", "marginal"]
    RENAMED: ClassVar = {"spread": "'target', with 'conditional' for 'remaining' and 'marginal' for 'total'"}


def loss(model: LookaheadPosterior, batch: Batch, rngs: nnx.Rngs, options: Options) -> Metrics:
    """Negative log-probability under the lookahead posteriors, at samples of the posteriors they approximate."""
    lookahead_ll = model.log_prob_of_samples(
        batch.x,
        options.mask_generator(rngs.mask(), batch.available.shape) * batch.available,
        rngs.sample(),
        num_samples=options.model_samples,
        num_features=options.lookahead_subsample,
        available=batch.available,
        target=options.target,
        rngs=rngs if batch.training else None,
    )
    return {"loss": -lookahead_ll, "lookahead_ll_nats": lookahead_ll}


def check(options: Options, model: LookaheadPosterior, train_set: Dataset) -> None:
    """Raises OptionError if `lookahead_subsample` exceeds the number of features."""
    del train_set
    if options.lookahead_subsample > model.num_features:
        raise OptionError("lookahead_subsample", f"must be at most {model.num_features}, the number of features")


FAMILY = Family("lookahead", Options, loss, base=Base("pm_vae"), check=check)
train = FAMILY.train

if __name__ == "__main__":
    cli.train_main(FAMILY)
