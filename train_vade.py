"""Trains VaDE in one run: pretraining as an autoencoder, a mixture fit to all training latents, then the ELBO.

    python train_vade.py --config configs/vade_digits.py [--config.key=value ...] [--run_dir DIR]

Labels are used only for validation scores; unlabelled data work too.
"""

import dataclasses
import functools
from typing import Annotated

from flax import nnx
from pydantic import Field, PlainValidator

from posterior_matching import cli
from posterior_matching.config import Count, call
from posterior_matching.errors import OptionError
from posterior_matching.models.vade import VADE
from posterior_matching.training.clustering import SAMPLES, contingency, mixture_accuracy, summarise_contingency
from posterior_matching.training.corruption import CorruptionOptions
from posterior_matching.training.experiment import Phase
from posterior_matching.training.family import Batch, Family, Metrics, Setup
from posterior_matching.training.optimizer import OptimizerOption
from posterior_matching.training.vade_initialisation import Restarts, choose


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """The group `config.pretraining`."""

    steps: Count
    optimizer: OptimizerOption
    mixture_inits: Count
    mixture_iterations: Count


@dataclasses.dataclass(frozen=True)
class Options(CorruptionOptions):
    """The keys specific to VaDE configs, documented in `configs/common.py`."""

    restarts: Annotated[int, Field(ge=1, le=1000)]
    pretraining: Annotated[Pretraining, PlainValidator(functools.partial(call, Pretraining))]


def autoencoder_loss(restarts: Restarts, batch: Batch, rngs: nnx.Rngs, options: Options) -> Metrics:
    """Negative log p(x | z) of all restarts, with z the posterior mean."""
    corrupted_x = options.corrupt(batch, rngs, restarts.models[0].cardinalities)
    dropout = rngs.dropout() if batch.training else None
    ll = restarts.autoencoder_ll(batch.x, corrupted_x=corrupted_x, available=batch.available, dropout_key=dropout)
    return {"loss": -ll.sum(0), "reconstruction_ll_nats": ll.mean(0)}


def loss(model: VADE, batch: Batch, rngs: nnx.Rngs, options: Options) -> Metrics:
    """Negative ELBO."""
    corrupted_x = options.corrupt(batch, rngs, model.cardinalities)
    dropout = rngs if batch.training else None
    terms = model.terms(batch.x, rngs.sample(), corrupted_x=corrupted_x, available=batch.available, rngs=dropout)
    values = {"loss": -terms.elbo(), "elbo_nats": terms.elbo()}
    values |= {"reconstruction_ll_nats": terms.reconstruction_ll, "kl_nats": terms.kl}
    if not batch.training and batch.label is not None:
        cluster = model.predict_cluster(batch.x, SAMPLES, key=rngs.sample(), available=batch.available)
        values["contingency"] = contingency(batch.label, cluster, model.num_clusters)
    return values


def phases(setup: Setup) -> list[Phase]:
    """Pretrains all restarts as autoencoders, then trains the ELBO from the restart whose initial ELBO is best."""
    options: Options = setup.options
    pretraining = options.pretraining
    models: list[VADE] = [setup.build() for _ in range(options.restarts)]
    clusters, examples = models[0].num_clusters, len(setup.train_set)
    if clusters > examples:
        raise OptionError("model.num_clusters", f"is {clusters}, but there are only {examples} training examples")

    def begin(restarts: Restarts) -> tuple[VADE, dict[str, float]]:
        inits, iterations = pretraining.mixture_inits, pretraining.mixture_iterations
        model, mixture, numbers = choose(restarts, inits, iterations, setup.train_set, setup.training.seed)
        return model, numbers | mixture_accuracy(model, mixture, setup.validation_set)

    return [
        Phase(Restarts(models), setup.bind(autoencoder_loss), pretraining.steps, pretraining.optimizer),
        Phase(models[0], setup.bind(loss), None, setup.training.optimizer, begin=begin),
    ]


FAMILY = Family("vade", Options, loss, phases=phases, summarise=summarise_contingency)
train = FAMILY.train

if __name__ == "__main__":
    cli.train_main(FAMILY)
