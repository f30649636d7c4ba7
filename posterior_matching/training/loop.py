"""The one training loop: compiled steps over device-resident data, validation, checkpoints, logging.

A run is a list of phases, each with a model, a loss and an optimiser. Most families have one; `train_vade.py` has two.
Losses are functions

    loss(model, batch, rngs) -> {"loss": [B], "<term>_<unit>": [B] or scalar, ...}

of per-example values, used alike for training (averaged over the batch) and for validation (averaged exactly over all
examples, with EMA weights if there are any, and the same random keys every time).
"""

import contextlib
import dataclasses
import functools
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.flatten_util import ravel_pytree

from posterior_matching import data, parallel, runs
from posterior_matching.config import Count, Decay, NonNegative, Steps, naming
from posterior_matching.errors import UserError
from posterior_matching.numerics import on_cpu
from posterior_matching.training.batching import Arrays, TrainingFeed, evaluation_chunks
from posterior_matching.training.log import TrainingLog
from posterior_matching.training.optimizer import OptimizerOption, OptimizerOptions

# Every use of randomness in a training step has a stream of its own. Append only: the order fixes the numbers.
STREAMS = ("noise", "mask", "sample", "dropout")

_MAX_STEPS_PER_DISPATCH = 1000


@dataclasses.dataclass(frozen=True)
class TrainingOptions:
    """The keys of a config that the training loop reads."""

    seed: Steps
    steps: Count
    batch_size: Count  # per device
    validation_every: Count
    log_every: Count
    checkpoint_every: Count | None  # in addition to every validation
    evaluate_checkpoint: Literal["best", "latest"]  # what evaluations load; "best": lowest validation loss
    ema_decay: Decay | None  # of the weights that validation and evaluation use; None: the weights themselves
    skip_nonfinite_updates: bool  # True: skip and count them; False: stop
    data_memory_budget_gb: NonNegative  # data beyond this many gigabytes per device stream from the host
    optimizer: OptimizerOption


class Batch(NamedTuple):
    """The data that a loss sees."""

    x: jax.Array  # [B, *input_shape] float32: images in [0, 1], features with 0 where missing
    available: jax.Array  # [B, d] or [B, H, W, 1]: 1 where the data have a value
    label: jax.Array | None  # [B, classes], one-hot; None: the data have none
    step: jax.Array | None  # int32, steps since the phase began; None: validation

    @property
    def training(self) -> bool:
        """Whether this is a training step."""
        return self.step is not None


Terms = dict[str, jax.Array]
Loss = Callable[[Any, Batch, nnx.Rngs], Terms]


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of a run.

    Attributes:
        model: The model with its initial weights; of a later phase only its structure matters.
        loss: See the module's docstring.
        steps: Number of steps; None, in the last phase: those that are left of `config.steps`.
        optimizer: Its options.
        trainable: NNX filter; other parameters are frozen and have no optimiser state.
        begin: Of a later phase: the model that the phase before leaves -> the model that this one begins with, and
            numbers to log. It runs on the host, and again if the run is killed in it or soon after, so it must be
            deterministic.
    """

    model: nnx.Module
    loss: Loss
    steps: int | None
    optimizer: OptimizerOptions
    trainable: Any = nnx.Param
    begin: Callable[[Any], tuple[nnx.Module, dict[str, float]]] | None = None


@dataclasses.dataclass(frozen=True)
class Experiment:
    """All that a run trains; `family.Family` builds it from a config.

    Attributes:
        config: The resolved config, which the run saves.
        options: See `TrainingOptions`.
        phases: At least one.
        train_set: The training data.
        validation_set: The validation data.
        pictures: The model, with its evaluation weights -> images `[H, W, C]` in [0, 1] by name.
        summarise: Means over the validation data and their number -> what is logged.
    """

    config: dict[str, Any]
    options: TrainingOptions
    phases: Sequence[Phase]
    train_set: data.Dataset
    validation_set: data.Dataset
    pictures: Callable[[Any], dict[str, np.ndarray]] | None = None
    summarise: Callable[[dict[str, np.ndarray], int], dict[str, Any]] | None = None


class TrainState(NamedTuple):
    """What a step changes. The frozen part of the model is not in it."""

    step: jax.Array  # int32, of the run
    trainable: nnx.State
    mutable: nnx.State  # variables that are no parameters (codebook averages, ...)
    opt_state: optax.OptState
    ema: nnx.State | None
    skipped: jax.Array  # int32, non-finite updates so far
    skipped_in_a_row: jax.Array  # int32


def fit(experiment: Experiment, run: runs.Run) -> nnx.Module:
    """Trains from the run's latest checkpoint, or the start, and returns the model with its evaluation weights.

    Args:
        experiment: What to train.
        run: Where checkpoints, metrics and TensorBoard events go.

    Raises:
        UserError: The loss is not finite, or too many updates in a row had to be skipped; or Ctrl-C or SIGTERM.
    """
    options, trainer = experiment.options, Trainer(experiment, run)
    first_step = trainer.step
    with run.finished_saving(), trainer.log as log, _interruptible() as signalled:
        while trainer.step < options.steps:
            if trainer.phase_is_over():
                trainer.begin_next_phase()
            trainer.run_dispatch()
            step, phase_is_over = trainer.step, trainer.phase_is_over()
            # Where a phase ends, the model that the next one begins with is validated instead.
            validates = (step % options.validation_every == 0 or step == options.steps) and not phase_is_over
            saves = phase_is_over or (options.checkpoint_every is not None and step % options.checkpoint_every == 0)
            # Several processes have to stop at the same step, so they ask each other, though not at every step.
            asks = jax.process_count() == 1 or step % options.log_every == 0
            interrupted = asks and parallel.any_process(signalled())
            if step % options.log_every == 0 or validates or saves or interrupted:
                log.write_training()  # stops at a non-finite step, before anything is saved
            if validates:
                trainer.validate_and_save()
            elif saves or interrupted:
                trainer.save(best=False)
            if interrupted and step < options.steps:
                raise UserError(f"interrupted: saved at step {step}; resume with --run_dir={run.path}")
    if jax.process_index() == 0:
        done = "nothing to do" if first_step >= options.steps else "done"
        print(f"{done}: step {trainer.step} of {options.steps}; run directory: {run.path}")
    return trainer.evaluation_model()


class Trainer:
    """A run in memory: its current phase, the state of that on the devices, and the log."""

    def __init__(self, experiment: Experiment, run: runs.Run):
        options = experiment.options
        self._experiment, self._options, self._run = experiment, options, run
        *first, _ = experiment.phases
        ends = [*np.cumsum([phase.steps for phase in first]).tolist(), options.steps]
        self._phases = [
            CompiledPhase(experiment, phase, first, last)
            for phase, first, last in zip(experiment.phases, [0, *ends], ends, strict=False)
        ]
        self._index = next((i for i, phase in enumerate(self._phases) if run.step <= phase.last_step), len(ends) - 1)
        with naming("config"):
            self._feed = TrainingFeed(
                _arrays(experiment.train_set), options.batch_size, options.seed, options.data_memory_budget_gb
            )
        self._chunks = _ValidationChunks(_arrays(experiment.validation_set), options)
        state, self._frozen = self._phase.initial_state()
        run.create()  # what can be wrong with the input has been found by now
        self._best_loss = math.inf
        if run.step:
            state, self._best_loss = self._restore(state)
        self.step = run.step
        run.forget_metrics_after(self.step - 1 if self.phase_is_over() else self.step)
        model, trainable = experiment.phases[-1].model, experiment.phases[-1].trainable
        self.log = TrainingLog(
            run,
            model,
            nnx.state(model, trainable),
            steps=options.steps,
            batch_size=options.batch_size,
            skip_nonfinite=options.skip_nonfinite_updates,
        )
        self._state, self._frozen_everywhere = parallel.replicate((state, self._frozen))

    @property
    def _phase(self) -> "CompiledPhase":
        return self._phases[self._index]

    @property
    def _in_last_phase(self) -> bool:
        return self._phase is self._phases[-1]

    def phase_is_over(self) -> bool:
        """Whether the next step belongs to another phase."""
        return not self._in_last_phase and self.step == self._phase.last_step

    def begin_next_phase(self) -> None:
        """Makes the next phase's first model of what this phase trained, and validates it."""
        self.log.begin("preparing the next phase")
        model, numbers = self._experiment.phases[self._index + 1].begin(self.evaluation_model())
        self._index += 1
        state, self._frozen = self._phase.initial_state(model)
        self._state, self._frozen_everywhere = parallel.replicate((state, self._frozen))
        self.log.write_validation(self.step, self._validate() | numbers)
        self.log.begin("training")

    def run_dispatch(self) -> None:
        """Runs one compiled call: one step or several."""
        num_steps = next_dispatch(self.step, self._options, self._phase.last_step)
        following = next_dispatch(self.step + num_steps, self._options, self._phase.last_step)
        arrays, indices = self._feed.get(self.step, num_steps, following)
        self._state, metrics = self._phase.train(self._state, self._frozen_everywhere, arrays, indices)
        self.step += num_steps
        self.log.add(self.step, num_steps, metrics)

    def validate_and_save(self) -> None:
        """Validates, logs, saves a checkpoint, which may become the best one, and draws pictures."""
        values = self._validate()
        self.log.write_validation(self.step, values)
        best = self._in_last_phase and values["loss"] < self._best_loss
        if best:
            self._best_loss = values["loss"]
        self.save(best)
        if self._experiment.pictures and self._in_last_phase and jax.process_index() == 0:
            self.log.write_images(self.step, self._experiment.pictures(self.evaluation_model()))
        self.log.restart_clock()

    def save(self, best: bool) -> None:
        """Saves a checkpoint."""
        # Before the last phase there is no model that anybody could use.
        weights = runs.flat_weights(nnx.state(self.evaluation_model())) if self._in_last_phase else None
        model = jax.tree.map(np.asarray, weights)
        train = {"state": parallel.unreplicate(self._state), "best_loss": np.float64(self._best_loss)}
        self._run.save(self.step, model, train, best)
        self.log.restart_clock()

    def _restore(self, state: TrainState) -> tuple[TrainState, float]:
        saved = self._run.restore({"state": state, "best_loss": np.float64(math.inf)})
        return saved["state"], float(saved["best_loss"])

    def evaluation_model(self) -> nnx.Module:
        """Returns the model with the weights that validation uses."""
        weights, mutable = jax.tree.map(jnp.asarray, parallel.unreplicate((self._weights, self._state.mutable)))
        return nnx.merge(self._phase.graphdef, weights, self._frozen, mutable)

    @property
    def _weights(self) -> nnx.State:
        return self._state.trainable if self._state.ema is None else self._state.ema

    def _validate(self) -> dict[str, float]:
        return self._phase.validate(self._weights, self._state.mutable, self._frozen_everywhere, self._chunks)


class CompiledPhase:
    """The compiled training step and validation pass of a phase, from `first_step` to `last_step` of the run."""

    def __init__(self, experiment: Experiment, phase: Phase, first_step: int, last_step: int):
        self.first_step, self.last_step = first_step, last_step
        self._loss, self._trainable, self._options = phase.loss, phase.trainable, experiment.options
        self._summarise, self._max_value = experiment.summarise, experiment.train_set.max_value
        self._num_classes = max(_num_classes(d) for d in (experiment.train_set, experiment.validation_set))
        self._num_validated = len(experiment.validation_set)
        self._schedule, self._direction = phase.optimizer.schedule(), phase.optimizer.direction()
        self.graphdef, *self._initial = nnx.split(phase.model, phase.trainable, nnx.Param, ...)
        self.train = parallel.pmap(self._train_steps, donate_argnums=0)
        self._validate = parallel.pmap(self._validation_sums)

    def initial_state(self, model: nnx.Module | None = None) -> tuple[TrainState, nnx.State]:
        """Returns the state before the first step, and the frozen parameters; neither replicated.

        Args:
            model: Whose weights to begin with; None: those of the phase's model.
        """
        trainable, frozen, mutable = self._initial
        if model is not None:
            _, trainable, frozen, mutable = nnx.split(model, self._trainable, nnx.Param, ...)
        state = TrainState(
            step=np.int32(self.first_step),
            trainable=trainable,
            mutable=mutable,
            opt_state=self._direction.init(trainable),
            ema=None if self._options.ema_decay is None else trainable,
            skipped=np.int32(0),
            skipped_in_a_row=np.int32(0),
        )
        return state, frozen

    def _batch(self, rows: Arrays, step: jax.Array | None) -> Batch:
        x, available = data.decode(rows["x"], self._max_value)
        label = jax.nn.one_hot(rows["label"], self._num_classes) if "label" in rows else None
        return Batch(x, available, label, step)

    def _train_steps(self, state, frozen, arrays, indices):
        """Runs `len(indices)` steps on one device; returns the new state and metrics `[steps]`."""
        step = functools.partial(self._train_step, frozen, arrays)
        if len(indices) == 1:  # no compiled loop around it: XLA's CPU compiler slows convolutions down in loops
            state, metrics = step(state, indices[0])
            return state, jax.tree.map(lambda a: a[None], metrics)
        return jax.lax.scan(step, state, indices)

    def _train_step(self, frozen, arrays, state: TrainState, rows):
        options = self._options
        key = jax.random.fold_in(jax.random.key(options.seed), state.step)
        key = jax.random.fold_in(key, jax.lax.axis_index(parallel.AXIS))
        step = state.step - self.first_step
        batch = self._batch(jax.tree.map(lambda a: a[rows], arrays), step)

        def mean_loss(trainable):
            model = nnx.merge(self.graphdef, trainable, frozen, state.mutable, copy=True)
            terms = self._loss(model, batch, _streams(key))
            mutable = nnx.state(model, nnx.Not(nnx.Param))
            terms = jax.tree.map(jnp.mean, terms)  # over the batch
            return terms["loss"], (terms, mutable)

        gradients, (metrics, mutable) = jax.grad(mean_loss, has_aux=True)(state.trainable)
        gradients, metrics = jax.lax.pmean((gradients, metrics), parallel.AXIS)
        # Of one vector: leaf by leaf, it is a kernel for each on accelerators, and keeps the updates from being fused.
        metrics["gradient_norm"] = jnp.linalg.norm(ravel_pytree(gradients)[0])
        metrics["learning_rate"] = learning_rate = self._schedule(step)

        updates, opt_state = self._direction.update(gradients, state.opt_state, state.trainable)
        trainable = jax.tree.map(lambda p, u: p - learning_rate * u, state.trainable, updates)
        ema = state.ema
        if ema is not None:
            ema = optax.incremental_update(trainable, ema, 1.0 - options.ema_decay)
        new = state._replace(trainable=trainable, mutable=mutable, opt_state=opt_state, ema=ema)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"])
        if options.skip_nonfinite_updates:
            new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        skipped = jnp.int32(~finite)
        new = new._replace(
            step=state.step + 1,
            skipped=state.skipped + skipped,
            skipped_in_a_row=(state.skipped_in_a_row + 1) * skipped,
        )
        metrics["skipped_updates"] = new.skipped
        metrics["skipped_in_a_row"] = new.skipped_in_a_row
        return new, metrics

    def validate(self, weights, mutable, frozen, chunks: "_ValidationChunks") -> dict[str, float]:
        """Returns the mean of every loss term over all validation examples."""
        sums: dict[str, np.ndarray] = {}
        parts = [self._validate(weights, mutable, frozen, *chunk) for chunk in chunks]
        for part in parts:
            for name, values in parallel.unreplicate(part).items():
                sums[name] = sums.get(name, 0.0) + np.sum(values, axis=0, dtype=np.float64)  # over batches
        count = sums.pop("count")
        means = {name: value / count for name, value in sums.items()}
        if self._summarise:
            means = self._summarise(means, self._num_validated)
        return {name: float(value) for name, value in means.items()}

    def _validation_sums(self, weights, mutable, frozen, arrays, example_weights, batch_index):
        """Sums of the loss terms over the devices for each batch of a chunk, `[batches, ...]`."""
        model = nnx.merge(self.graphdef, weights, frozen, mutable, copy=True)
        key = jax.random.fold_in(jax.random.key(self._options.seed), np.uint32(2**32 - 1))  # no training step's key

        def batch_sums(_, inputs):
            rows, weight, index = inputs
            batch_key = jax.random.fold_in(key, index)
            rngs = _streams(jax.random.fold_in(batch_key, jax.lax.axis_index(parallel.AXIS)))
            terms = self._loss(model, self._batch(rows, step=None), rngs)

            def total(value):  # over the batch
                value = jnp.broadcast_to(value, weight.shape) if jnp.ndim(value) == 0 else value
                # `where`, so that what padding rows may produce cannot turn 0 * inf into NaN.
                return jnp.where(weight.reshape(-1, *[1] * (value.ndim - 1)) > 0, value, 0.0).sum(0)

            return None, jax.lax.psum(jax.tree.map(total, terms | {"count": 1.0}), parallel.AXIS)

        return jax.lax.scan(batch_sums, None, (arrays, example_weights, batch_index))[1]


class _ValidationChunks:
    """The validation data in padded chunks, kept on the devices when they fit there."""

    def __init__(self, arrays: Arrays, options: TrainingOptions):
        self._arrays, self._batch_size = arrays, options.batch_size
        size_gb = sum(a.nbytes for a in arrays.values()) / jax.device_count() / 1e9
        self._kept = list(parallel.shard(list(self._read()))) if size_gb <= options.data_memory_budget_gb else None

    def __iter__(self) -> Iterator[tuple[Any, Any, Any]]:
        return iter(self._kept) if self._kept is not None else self._read()

    def _read(self):
        first = 0
        for arrays, weights in evaluation_chunks(self._arrays, self._batch_size):
            num_batches = weights.shape[1]
            index = np.broadcast_to(np.arange(first, first + num_batches), (len(weights), num_batches))
            first += num_batches
            yield arrays, weights, index


def max_steps_per_dispatch(options: TrainingOptions) -> int:
    """How many steps go into one compiled call: one on CPU, else a divisor of all intervals."""
    if on_cpu():
        return 1
    intervals = math.gcd(options.log_every, options.validation_every, options.checkpoint_every or 0)
    return max(d for d in range(1, min(intervals, _MAX_STEPS_PER_DISPATCH) + 1) if intervals % d == 0)


def next_dispatch(step: int, options: TrainingOptions, last_step: int) -> int:
    """Steps of the compiled call that begins at `step`: fewer after an interruption and at the end of the phase."""
    usual = max_steps_per_dispatch(options)
    return max(0, min(usual - step % usual, last_step - step))


def _streams(key: jax.Array) -> nnx.Rngs:
    return nnx.Rngs(**{name: jax.random.fold_in(key, i) for i, name in enumerate(STREAMS)})


def _arrays(dataset: data.Dataset) -> Arrays:
    return {"x": dataset.x} | ({} if dataset.label is None else {"label": dataset.label})


def _num_classes(dataset: data.Dataset) -> int:
    return 0 if dataset.label is None else int(dataset.label.max()) + 1


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Turns SIGTERM and Ctrl-C into a question that the loop asks between dispatches; a second Ctrl-C kills."""
    received = []

    def receive(number, _frame):
        received.append(number)
        if number == signal.SIGINT:
            signal.signal(number, previous[number])

    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for number in previous:
            signal.signal(number, receive)
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
