"""An experiment: the options, data and phases of a run. Each phase has a model, a loss and an optimiser.

Losses are functions

    loss(model, batch, rngs) -> {"loss": [B], "<term>_<unit>": [B] or scalar, ...}

that return per-example values. They serve for training (averaged over the batch) and for validation (averaged exactly
over all examples, with EMA weights if there are any, and the same random keys every time).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import nnx

from posterior_matching import data
from posterior_matching.config import Count, Decay, NonNegative, Steps
from posterior_matching.training.optimizer import OptimizerOption, OptimizerOptions


@dataclasses.dataclass(frozen=True)
class TrainingOptions:
    """The keys of a config that the training loop reads."""

    seed: Steps
    steps: Count
    batch_size: Count | None  # per device; None: set from the number of rows, see `batching.default_batch_size`
    validation_every: Count
    log_every: Count
    checkpoint_every: Count | None  # in addition to every validation
    patience: Count | None  # stop after this many consecutive validations without a lower loss; None: never
    evaluate_checkpoint: Literal["best", "latest"]  # what evaluations load; "best": lowest validation loss
    ema_decay: Decay | None  # of the weights for validation and evaluation; None: no averaging
    skip_nonfinite_updates: bool  # True: skip and count them; False: stop
    data_memory_budget_gb: NonNegative  # larger data (gigabytes per device) are streamed from the host
    optimizer: OptimizerOption


class Batch(NamedTuple):
    """A batch as the loss sees it."""

    x: jax.Array  # [B, *input_shape] float32: images in [0, 1], features with 0 where missing
    available: jax.Array  # [B, d] or [B, H, W, 1]: 1 where a value exists
    label: jax.Array | None  # [B, classes], one-hot; None: the data are unlabelled
    step: jax.Array | None  # int32, steps since the phase began; None: validation

    @property
    def training(self) -> bool:
        """Whether this is a training step."""
        return self.step is not None


Metrics = dict[str, jax.Array]
Loss = Callable[[Any, Batch, nnx.Rngs], Metrics]


@dataclasses.dataclass(frozen=True)
class Phase:
    """A phase of a run.

    Attributes:
        model: The model with its initial weights; in later phases only its structure matters.
        loss: See the top of this module.
        steps: Number of steps; None for the last phase, which takes what is left of `config.steps`.
        optimizer: The optimiser's options.
        trainable: NNX filter; other parameters are frozen and have no optimiser state.
        begin: For later phases: maps the model trained by the previous phase to the initial model of this one, and
            numbers to log; None: the same model. It runs on the host, and is repeated if the run is killed during it or
            soon after, so it must be deterministic.
    """

    model: nnx.Module
    loss: Loss
    steps: int | None
    optimizer: OptimizerOptions
    trainable: Any = nnx.Param
    begin: Callable[[Any], tuple[nnx.Module, dict[str, float]]] | None = None


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that defines a run; `family.Family` builds it from a config.

    Attributes:
        config: The resolved config, which the run saves.
        options: See `TrainingOptions`.
        phases: At least one.
        train_set: The training data.
        validation_set: The validation data.
        pictures: Maps the model, with its evaluation weights, to images `[H, W, C]` in [0, 1] by name.
        summarise: Maps the means over the validation data and the number of examples to what is logged.
    """

    config: dict[str, Any]
    options: TrainingOptions
    phases: Sequence[Phase]
    train_set: data.Dataset
    validation_set: data.Dataset
    pictures: Callable[[Any], dict[str, np.ndarray]] | None = None
    summarise: Callable[[dict[str, np.ndarray], int], dict[str, Any]] | None = None
