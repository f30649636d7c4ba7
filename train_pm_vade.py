"""Trains the partially observed posterior of a trained VaDE, so that it clusters and imputes from x_o alone.

    python train_pm_vade.py --config configs/pm_vade_digits.py --config.vade_dir=RUN [--config.key=value ...]

The VaDE is frozen. Labels are used for nothing but the scores at validation.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from posterior_matching import cli, data, masking, runs
from posterior_matching.config import parse
from posterior_matching.evaluation.clustering import (
    SAMPLES,
    contingency,
    summarise_contingency,
    validation_arrays,
)
from posterior_matching.evaluation.pictures import imputation_grid
from posterior_matching.models.vade import PosteriorMatchingVADE
from posterior_matching.training.corruption import check_corruption, corrupt
from posterior_matching.training.loop import Experiment, TrainingOptions, fit
from posterior_matching.training.pretrained import Base, build_on, load_base, load_datasets


@dataclasses.dataclass(frozen=True)
class PMVADEOptions:
    """The keys of a PM-VaDE config besides those of the training loop; `configs/common.py` says what they mean."""

    train_split: str
    validation_split: str
    noise_std: float
    distortion_std: float
    mask_generator: Mapping[str, Any]
    model: Mapping[str, Any]
    dataset: str | None = None
    vade_dir: str | None = None


def train(config: ConfigDict, run_dir: str | None = None) -> str:
    """Trains and returns the run directory."""
    options, training = parse(config, PMVADEOptions, TrainingOptions)
    vade = load_base(options.vade_dir, "vade", run_dir)
    train_set, validation_set = load_datasets(vade, config)
    experiment = make_experiment(config, train_set, validation_set, vade)
    run = runs.open_run(run_dir, "pm_vade", config, train_set.input_shape, train_set.standardisation)
    fit(experiment, run, training, {"x": train_set.x}, validation_arrays(validation_set))
    return str(run.path)


def make_experiment(
    config: ConfigDict, train_set: data.Dataset, validation_set: data.Dataset, vade: Base
) -> Experiment:
    """Builds what the training loop needs around the frozen VaDE."""
    options, training = parse(config, PMVADEOptions, TrainingOptions)
    check_corruption(options, train_set)
    generator = masking.build_mask_generator(options.mask_generator)
    generator.check(masking.mask_shape(train_set.input_shape))
    model = build_on(vade, "pm_vade", config, train_set.input_shape, training.seed)

    def prepare(rows: dict[str, jax.Array]) -> dict[str, jax.Array]:
        x, available = data.decode(rows["x"], train_set.max_value)
        return rows | {"x": x, "available": available}

    def loss(model: PosteriorMatchingVADE, batch, rngs: nnx.Rngs, step, training: bool) -> dict[str, jax.Array]:
        del step
        x, available = batch["x"], batch["available"]
        if training:  # both posteriors see the same image
            x = corrupt(x, available, rngs.noise(), options.noise_std, options.distortion_std)
        b = generator(rngs.mask(), available.shape) * available
        matching_ll = model.matching_ll(x, b, rngs.sample(), rngs=rngs if training else None)
        values = {"loss": -matching_ll, "matching_ll_nats": matching_ll}
        if not training and "label" in batch:
            cluster = model.partial_predict_cluster(x, b, SAMPLES, key=rngs.sample())
            values["contingency"] = contingency(batch["label"], cluster, validation_set, model.vade.num_clusters)
        return values

    is_image = len(train_set.input_shape) == 3
    images = functools.partial(example_images, validation_set, generator) if is_image else None
    summarise = functools.partial(summarise_contingency, len(validation_set))
    return Experiment(model, loss, prepare, vade.trainable(), images, summarise)


def example_images(dataset: data.Dataset, generator: masking.MaskGenerator, model: nnx.Module) -> dict[str, np.ndarray]:
    """Imputations of the first validation images, with the same randomness every time."""
    x, available = data.decode(dataset.x[:8], dataset.max_value)
    b = generator(jax.random.key(0), available.shape)
    imputations = nnx.jit(lambda model: model.impute(x, b, 5, key=jax.random.key(1)))(model)
    return {"imputations": imputation_grid(x, b, imputations)}


if __name__ == "__main__":
    cli.train_main(train)
