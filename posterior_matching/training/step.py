"""The compiled training step and validation pass."""

import dataclasses
import functools
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from posterior_matching import data, parallel
from posterior_matching.training.batching import Arrays, ValidationChunks
from posterior_matching.training.experiment import Batch, Experiment, Loss, Metrics, Phase
from posterior_matching.training.optimizer import OptimizerOptions

# Each use of randomness in a training step has its own stream. Append only: the order determines the random numbers.
STREAMS = ("noise", "mask", "sample", "dropout")


class TrainState(NamedTuple):
    """The state that a step updates, without the frozen part of the model."""

    step: jax.Array | np.integer  # int32, of the run
    trainable: nnx.State
    mutable: nnx.State  # variables that are not parameters (codebook averages, ...)
    opt_state: optax.OptState
    ema: nnx.State | None
    skipped: jax.Array | np.integer  # int32, non-finite updates so far
    skipped_in_a_row: jax.Array | np.integer  # int32


class Constants(NamedTuple):
    """What a step reads and never updates."""

    frozen: nnx.State  # parameters
    key: Any  # the data of the run's random key, uint32; an argument, so that all seeds share a program


class CompiledPhase:
    """The compiled training step and validation pass of a phase, from `first_step` to `last_step` of the run."""

    def __init__(self, experiment: Experiment, phase: Phase, first_step: int, last_step: int):
        self.first_step, self.last_step = first_step, last_step
        self._trainable, self._options = phase.trainable, experiment.options
        self._summarise, self._num_validated = experiment.summarise, len(experiment.validation_set)
        self._optimizer, self._model = phase.optimizer, phase.model
        self.graphdef = nnx.graphdef(phase.model)
        step = TrainStep(
            loss=phase.loss,
            config=json.dumps(experiment.config | {"seed": None}, sort_keys=True),
            graphdef=self.graphdef,
            optimizer=phase.optimizer,
            ema_decay=experiment.options.ema_decay,
            skip_nonfinite_updates=experiment.options.skip_nonfinite_updates,
            first_step=first_step,
            max_value=experiment.train_set.max_value,
            num_classes=max(_num_classes(d) for d in (experiment.train_set, experiment.validation_set)),
        )
        self.train, self._validate = _compiled(step)

    def initial_state(self, model: nnx.Module | None = None) -> tuple[TrainState, Constants]:
        """Returns the state before the first step, from the model with the initial weights (None: the phase's)."""
        trainable, frozen, mutable = nnx.state(self._model if model is None else model, self._trainable, nnx.Param, ...)
        state = TrainState(
            step=np.int32(self.first_step),
            trainable=trainable,
            mutable=mutable,
            opt_state=self._optimizer.direction().init(trainable),
            ema=None if self._options.ema_decay is None else trainable,
            skipped=np.int32(0),
            skipped_in_a_row=np.int32(0),
        )
        return state, Constants(frozen, np.asarray(jax.random.key_data(jax.random.key(self._options.seed))))

    def validate(
        self, weights: nnx.State, mutable: nnx.State, constants: Constants, chunks: ValidationChunks
    ) -> dict[str, float]:
        """Returns the mean of every loss term over all validation examples."""
        sums: dict[str, Any] = {}
        parts = [self._validate(weights, mutable, constants, *chunk) for chunk in chunks]
        for part in parts:
            for name, values in parallel.unreplicate(part).items():
                sums[name] = sums.get(name, 0.0) + np.sum(values, axis=0, dtype=np.float64)  # over batches
        count = sums.pop("count")
        means = {name: value / count for name, value in sums.items()}
        if self._summarise:
            means = self._summarise(means, self._num_validated)
        return {name: float(value) for name, value in means.items()}


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """The training step and the validation pass of a phase, to be compiled.

    Equal ones are traced and compiled once in a process, for all folds and seeds that share a shape.
    """

    loss: Loss
    config: str  # JSON; a `family.BoundLoss` leaves the comparison of its options to it
    graphdef: nnx.GraphDef
    optimizer: OptimizerOptions
    ema_decay: float | None
    skip_nonfinite_updates: bool
    first_step: int
    max_value: float
    num_classes: int

    def _batch(self, rows: Arrays, step: jax.Array | None) -> Batch:
        x, available = data.decode(rows["x"], self.max_value)
        label = jax.nn.one_hot(rows["label"], self.num_classes) if "label" in rows else None
        return Batch(x, available, label, step)

    def train_steps(
        self, state: TrainState, constants: Constants, arrays: Arrays, indices: jax.Array
    ) -> tuple[TrainState, Metrics]:
        """Runs `len(indices)` steps on one device; returns the new state and metrics `[steps]`."""
        step = functools.partial(self._train_step, constants, arrays)
        if len(indices) == 1:  # without a compiled loop, in which XLA's CPU convolutions are slower
            state, metrics = step(state, indices[0])
            return state, jax.tree.map(lambda a: a[None], metrics)
        return jax.lax.scan(step, state, indices)

    def _train_step(
        self, constants: Constants, arrays: Arrays, state: TrainState, rows: jax.Array
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(constants.key), state.step)
        key = jax.random.fold_in(key, jax.lax.axis_index(parallel.AXIS))
        step = state.step - self.first_step  # of the phase
        batch = self._batch(jax.tree.map(lambda a: a[rows], arrays), step)

        def mean_loss(trainable: nnx.State) -> tuple[jax.Array, tuple[Metrics, nnx.State]]:
            model = nnx.merge(self.graphdef, trainable, constants.frozen, state.mutable, copy=True)
            terms = jax.tree.map(jnp.mean, self.loss(model, batch, _streams(key)))  # over the batch
            return terms["loss"], (terms, nnx.state(model, nnx.Not(nnx.Param)))

        gradients, (metrics, mutable) = jax.grad(mean_loss, has_aux=True)(state.trainable)
        gradients, metrics = jax.lax.pmean((gradients, metrics), parallel.AXIS)  # over devices
        direction, opt_state = self.optimizer.direction().update(gradients, state.opt_state, state.trainable)
        learning_rate = self.optimizer.schedule()(step)
        trainable = jax.tree.map(lambda p, d: p - learning_rate * d, state.trainable, direction)
        ema = state.ema
        if ema is not None and self.ema_decay is not None:
            ema = optax.incremental_update(trainable, ema, 1.0 - self.ema_decay)
        metrics |= {"gradient_norm": optax.tree.norm(gradients), "learning_rate": learning_rate}
        new = state._replace(trainable=trainable, mutable=mutable, opt_state=opt_state, ema=ema)
        return self._counted(state, new, metrics)

    def _counted(self, old: TrainState, new: TrainState, metrics: Metrics) -> tuple[TrainState, Metrics]:
        """Counts the step; if it is not finite, counts that, too, and takes the update back if the config asks."""
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"])
        if self.skip_nonfinite_updates:
            new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
        skipped = jnp.int32(~finite)
        counts = {
            "skipped": old.skipped + skipped,
            "skipped_in_a_row": (old.skipped_in_a_row + 1) * skipped,
        }
        metrics |= {"skipped_updates": counts["skipped"], "skipped_in_a_row": counts["skipped_in_a_row"]}
        return new._replace(step=old.step + 1, **counts), metrics

    def validation_sums(
        self,
        weights: nnx.State,
        mutable: nnx.State,
        constants: Constants,
        arrays: Arrays,
        example_weights: jax.Array,
        batch_index: jax.Array,
    ) -> Metrics:
        """Sums of the loss terms over the devices for each batch of a chunk, `[batches, ...]`."""
        model = nnx.merge(self.graphdef, weights, constants.frozen, mutable, copy=True)
        key = jax.random.wrap_key_data(constants.key)
        key = jax.random.fold_in(key, np.uint32(2**32 - 1))  # no training step's key

        def batch_sums(_: None, inputs: tuple[Arrays, jax.Array, jax.Array]) -> tuple[None, Metrics]:
            rows, weight, index = inputs
            batch_key = jax.random.fold_in(key, index)
            rngs = _streams(jax.random.fold_in(batch_key, jax.lax.axis_index(parallel.AXIS)))
            terms = self.loss(model, self._batch(rows, step=None), rngs)

            def total(value: jax.Array) -> jax.Array:  # over the batch
                value = jnp.broadcast_to(value, weight.shape) if jnp.ndim(value) == 0 else value
                # `where`, not a product: padding rows may yield infinities, and 0 * inf is NaN.
                return jnp.where(weight.reshape(-1, *[1] * (value.ndim - 1)) > 0, value, 0.0).sum(0)

            return None, jax.lax.psum(jax.tree.map(total, terms | {"count": 1.0}), parallel.AXIS)

        return jax.lax.scan(batch_sums, None, (arrays, example_weights, batch_index))[1]


@functools.lru_cache(maxsize=8)
def _compiled(step: TrainStep) -> tuple[Any, Any]:
    return parallel.pmap(step.train_steps, donate_argnums=0), parallel.pmap(step.validation_sums)


def _streams(key: jax.Array) -> nnx.Rngs:
    return nnx.Rngs(**{name: jax.random.fold_in(key, i) for i, name in enumerate(STREAMS)})


def _num_classes(dataset: data.Dataset) -> int:
    return 0 if dataset.label is None else int(dataset.label.max()) + 1
