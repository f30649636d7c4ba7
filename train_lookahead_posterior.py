"""Trains lookahead posteriors on a trained PM-VAE, which stays as it is: what to observe next, in one forward pass.

python train_lookahead_posterior.py --config configs/lookahead_digits.py --config.pm_vae_dir=RUN [--run_dir DIR]
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from ml_collections import ConfigDict

from posterior_matching import cli, data, masking, runs
from posterior_matching.config import parse
from posterior_matching.models.lookahead import LookaheadPosterior, check_options
from posterior_matching.training.loop import Experiment, TrainingOptions, fit
from posterior_matching.training.pretrained import Base, build_on, load_base, load_datasets


@dataclasses.dataclass(frozen=True)
class LookaheadOptions:
    """The keys of a lookahead config besides those of the training loop; `configs/common.py` says what they mean."""

    dataset: str
    train_split: str
    validation_split: str
    mask_generator: Mapping[str, Any]
    model_samples: int
    lookahead_subsample: int
    target: str
    model: Mapping[str, Any]
    pm_vae_dir: str | None = None


def train(config: ConfigDict, run_dir: str | None = None) -> str:
    """Trains and returns the run directory."""
    options, training = parse(config, LookaheadOptions, TrainingOptions)
    base = load_base(options.pm_vae_dir, "pm_vae", run_dir)
    train_set, validation_set = load_datasets(base, config)
    experiment = make_experiment(config, train_set, validation_set, base)
    run = runs.open_run(run_dir, "lookahead", config, train_set.input_shape, train_set.standardisation)
    fit(experiment, run, training, {"x": train_set.x}, {"x": validation_set.x})
    return str(run.path)


def make_experiment(
    config: ConfigDict,
    train_set: data.Dataset,
    validation_set: data.Dataset,  # noqa: ARG001 (every family's signature)
    base: Base,
) -> Experiment:
    """Builds what the training loop needs, around the PM-VAE `base`."""
    options, training = parse(config, LookaheadOptions, TrainingOptions)
    generator = masking.build_mask_generator(options.mask_generator)
    generator.check(masking.mask_shape(train_set.input_shape))
    model = build_on(base, "lookahead", config, train_set.input_shape, training.seed)
    check_options(model, options.model_samples, options.lookahead_subsample, options.target)

    def prepare(rows: dict[str, jax.Array]) -> dict[str, jax.Array]:
        x, available = data.decode(rows["x"], train_set.max_value)
        return {"x": x, "available": available}

    def loss(model: LookaheadPosterior, batch, rngs: nnx.Rngs, step, training: bool) -> dict[str, jax.Array]:  # noqa: ARG001
        x, available = batch["x"], batch["available"]
        lookahead_ll = model.log_prob_of_samples(
            x,
            generator(rngs.mask(), available.shape) * available,
            rngs.sample(),
            num_samples=options.model_samples,
            num_features=options.lookahead_subsample,
            available=available,
            target=options.target,
            rngs=rngs if training else None,
        )
        return {"loss": -lookahead_ll, "lookahead_ll_nats": lookahead_ll}

    return Experiment(model, loss, prepare, base.trainable())


if __name__ == "__main__":
    cli.train_main(train)
