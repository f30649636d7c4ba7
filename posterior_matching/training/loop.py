"""The one training loop: compiled steps over device-resident data, validation, checkpoints, logging.

A script gives `fit` a model and a loss; see `train_pm_vae.py`. Losses are functions

    loss(model, batch, rngs, step, training) -> {"loss": [B], "<term>_<unit>": [B] or scalar, ...}

of per-example values, used alike for training (averaged over the batch) and for validation (averaged exactly over all
examples, with EMA weights if there are any, and the same random keys every time).

A run may begin with a pretraining that has a model, a loss and an optimiser of its own; see `train_vade.py`.
"""

import contextlib
import dataclasses
import functools
import math
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.flatten_util import ravel_pytree

from posterior_matching import parallel, runs
from posterior_matching.config import call
from posterior_matching.errors import UserError
from posterior_matching.numerics import on_cpu
from posterior_matching.training.batching import Arrays, TrainingFeed, evaluation_chunks
from posterior_matching.training.log import TrainingLog

Batch = dict[str, jax.Array]
Loss = Callable[..., dict[str, jax.Array]]

# Every use of randomness in a training step has a stream of its own. Append only: the order fixes the numbers.
STREAMS = ("noise", "mask", "sample", "dropout")

_MAX_STEPS_PER_DISPATCH = 1000


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
    """Adam with decoupled weight decay; `config.optimizer`."""

    learning_rate: float
    decay_rate: float = 1.0  # learning_rate * decay_rate ** (step / transition_steps)
    transition_steps: int = 1
    staircase: bool = False  # decay in jumps: floor(step / transition_steps)
    warmup_steps: int = 0  # linear from 0
    weight_decay: float = 0.0  # on matrices and convolution kernels only
    clip_norm: float | None = None  # of the global gradient
    eps: float = 1e-8

    def __post_init__(self):
        positive = ("decay_rate", "transition_steps", "eps") + (("clip_norm",) if self.clip_norm is not None else ())
        for name in positive:
            if not getattr(self, name) > 0:
                raise UserError(f"config.optimizer.{name} must be positive, not {getattr(self, name)}")
        for name in ("learning_rate", "warmup_steps", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise UserError(f"config.optimizer.{name} must not be negative, it is {getattr(self, name)}")

    def schedule(self) -> optax.Schedule:
        """Returns the learning rate as a function of the step."""
        decay = optax.exponential_decay(
            self.learning_rate, self.transition_steps, self.decay_rate, staircase=self.staircase
        )
        if not self.warmup_steps:
            return decay
        return lambda step: decay(step) * jnp.minimum(1.0, step / self.warmup_steps)

    def direction(self) -> optax.GradientTransformation:
        """Returns the transformation of gradients into steps, but for the factor `-learning_rate`."""
        clip = optax.identity() if self.clip_norm is None else optax.clip_by_global_norm(self.clip_norm)
        decay = optax.add_decayed_weights(self.weight_decay, mask=lambda p: jax.tree.map(lambda a: a.ndim >= 2, p))
        return optax.chain(clip, optax.scale_by_adam(eps=self.eps), decay if self.weight_decay else optax.identity())


@dataclasses.dataclass(frozen=True)
class TrainingOptions:
    """The keys of a config that the training loop reads."""

    seed: int
    steps: int
    batch_size: int  # per device
    validation_every: int
    log_every: int
    optimizer: Mapping[str, Any] | OptimizerOptions
    checkpoint_every: int | None = None  # besides every validation
    ema_decay: float | None = None  # of the weights that validation and evaluation use; None: the weights themselves
    skip_nonfinite_updates: bool = False  # True: skip and count them; False: stop
    data_memory_budget_gb: float = 8.0  # data beyond this many gigabytes per device stream from the host
    evaluate_checkpoint: str = "best"  # which checkpoint evaluations load: "best" (lowest validation loss) or "latest"

    def __post_init__(self):
        for name in ("steps", "batch_size", "validation_every", "log_every", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"config.{name} must be at least 1, not {value}")
        if self.seed < 0:
            raise UserError(f"config.seed must not be negative, it is {self.seed}")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise UserError(f"config.ema_decay must lie in [0, 1), not be {self.ema_decay}")
        if self.evaluate_checkpoint not in ("best", "latest"):
            raise UserError(f"config.evaluate_checkpoint must be 'best' or 'latest', not '{self.evaluate_checkpoint}'")


class TrainState(NamedTuple):
    """What a step changes. The frozen part of the model is not in it."""

    step: jax.Array  # int32
    trainable: nnx.State
    mutable: nnx.State  # variables that are no parameters (codebook averages, ...)
    opt_state: optax.OptState
    ema: nnx.State | None
    skipped: jax.Array  # int32, non-finite updates so far
    skipped_in_a_row: jax.Array  # int32


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What distinguishes one training script from another."""

    model: nnx.Module  # with its initial weights
    loss: Loss  # see the module's docstring
    prepare: Callable[[Batch], Batch]  # stored rows -> model inputs, inside the compiled step
    trainable: Any = nnx.Param  # NNX filter; other parameters are frozen and have no optimiser state
    images: Callable[[nnx.Module], dict[str, np.ndarray]] | None = None  # evaluation model -> [H, W, C] in [0, 1]
    # Means over the validation data -> what is logged. Terms may be vectors per example, [B, ...], that only together
    # mean something: how often each code was used, which cluster met which label.
    summarise: Callable[[dict[str, np.ndarray]], dict[str, Any]] = dict
    pretraining: "Pretraining | None" = None


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """The first steps of a run, in which something else is trained than the experiment that they are to initialise."""

    experiment: Experiment
    steps: int
    optimizer: OptimizerOptions
    # On the host, when the steps are done: the pretrained model -> the main experiment's model with its initial
    # weights, and numbers to log. Must give the same again: a run killed in it or soon after comes here again.
    finish: Callable[[nnx.Module], tuple[nnx.Module, dict[str, float]]]


def fit(
    experiment: Experiment, run: runs.Run, options: TrainingOptions, train: Arrays, validation: Arrays
) -> nnx.Module:
    """Trains from the run's latest checkpoint, or the start, and returns the model with its evaluation weights.

    Args:
        experiment: Model, loss and what belongs to them.
        run: Where checkpoints, metrics and TensorBoard events go.
        options: See `TrainingOptions`.
        train: Training data as stored, leading axis N; moved to the devices as it is.
        validation: Validation data, likewise.

    Raises:
        UserError: The loss is not finite, or too many updates in a row had to be skipped.
    """
    pretraining = experiment.pretraining
    border = pretraining.steps if pretraining else 0  # where the main training begins
    if options.steps <= border:
        raise UserError(f"config.steps must exceed the {border} steps of pretraining, it is {options.steps}")
    program = main_program = Program(experiment, options, border)
    if pretraining and run.step <= border:
        program = Program(pretraining.experiment, dataclasses.replace(options, optimizer=pretraining.optimizer))
    state, frozen = program.initial_state()
    feed = TrainingFeed(train, options.batch_size, options.seed, options.data_memory_budget_gb)
    chunks = _ValidationChunks(validation, options)
    run.create()  # what can be wrong with the input has been found by now
    best_loss = math.inf
    if run.step:
        state, best_loss = _restore(run, state)
    first_step, step = run.step, run.step
    run.forget_metrics_after(step if program is main_program else min(step, border - 1))
    log = TrainingLog(
        run,
        experiment.model,
        nnx.state(experiment.model, experiment.trainable),
        steps=options.steps,
        batch_size=options.batch_size,
        skip_nonfinite=options.skip_nonfinite_updates,
    )
    state, frozen_everywhere = parallel.replicate((state, frozen))

    def evaluation_model() -> nnx.Module:
        weights = state.trainable if state.ema is None else state.ema
        weights, mutable = jax.tree.map(jnp.asarray, parallel.unreplicate((weights, state.mutable)))
        return nnx.merge(program.graphdef, weights, frozen, mutable)

    def validate() -> dict[str, float]:
        weights = state.trainable if state.ema is None else state.ema
        return program.validate(weights, state.mutable, frozen_everywhere, chunks)

    def save(best: bool) -> None:
        model = None  # while pretraining, there is none that could be used
        if program is main_program:
            weights = runs.flat_weights(nnx.state(evaluation_model()))
            model = jax.tree.map(np.asarray, weights)
        run.save(step, model, _to_save(parallel.unreplicate(state), best_loss), best)

    with run.finished_saving(), log, _interruptible() as signalled:
        while step < options.steps:
            if program is not main_program and step == border:
                log.begin("after pretraining")
                model, found = pretraining.finish(evaluation_model())
                program = main_program
                state, frozen = program.initial_state(model)
                state, frozen_everywhere = parallel.replicate((state, frozen))
                log.write_validation(step, validate() | found)
                log.begin("training")
            num_steps = _steps_in_dispatch(step, options, border)
            next_num_steps = _steps_in_dispatch(step + num_steps, options, border)
            arrays, indices = feed.get(step, num_steps, next_num_steps)
            state, metrics = program.train(state, frozen_everywhere, arrays, indices)
            step += num_steps
            log.add(step, num_steps, metrics)
            # Where pretraining ends, the model that it initialises is validated instead.
            ends_pretraining = program is not main_program and step == border
            validates = (step % options.validation_every == 0 or step == options.steps) and not ends_pretraining
            checkpoints = options.checkpoint_every is not None and step % options.checkpoint_every == 0
            checkpoints = checkpoints or ends_pretraining
            # Several processes have to stop at the same step, so they ask each other, though not at every step.
            ask = jax.process_count() == 1 or step % options.log_every == 0
            interrupted = ask and parallel.any_process(signalled())
            if step % options.log_every == 0 or validates or checkpoints or interrupted:
                log.write_training()  # also refuses to go on after a non-finite step, before anything is saved
            if validates:
                values = validate()
                log.write_validation(step, values)
                is_best = program is main_program and values["loss"] < best_loss
                best_loss = min(best_loss, values["loss"]) if program is main_program else best_loss
                save(is_best)
                if program.images is not None and jax.process_index() == 0:
                    log.write_images(step, program.images(evaluation_model()))
                log.restart_clock()
            elif checkpoints or interrupted:
                save(best=False)
                log.restart_clock()
            if interrupted and step < options.steps:
                raise UserError(
                    f"interrupted: saved at step {step}; the same command with --run_dir={run.path} goes on"
                )
    if jax.process_index() == 0:
        done = "nothing to do" if first_step >= options.steps else "done"
        print(f"{done}: step {step} of {options.steps}; run directory: {run.path}")
    return evaluation_model()


class Program:
    """The compiled training step and validation pass of an experiment, whose first step is the run's `first_step`."""

    def __init__(self, experiment: Experiment, options: TrainingOptions, first_step: int = 0):
        optimizer = options.optimizer
        if not isinstance(optimizer, OptimizerOptions):
            optimizer = call(OptimizerOptions, optimizer, "config.optimizer")
        self._loss, self._prepare, self._options = experiment.loss, experiment.prepare, options
        self._summarise, self.images = experiment.summarise, experiment.images
        self._trainable, self._first_step = experiment.trainable, first_step
        self._schedule, self._direction = optimizer.schedule(), optimizer.direction()
        self.graphdef, *self._initial = nnx.split(experiment.model, experiment.trainable, nnx.Param, ...)
        self.train = parallel.pmap(self._train_steps, donate_argnums=0)
        self._validate = parallel.pmap(self._validation_sums)

    def initial_state(self, model: nnx.Module | None = None) -> tuple[TrainState, nnx.State]:
        """Returns the state before the first step, and the frozen parameters; neither replicated.

        Args:
            model: Whose weights to begin with; None: those of the experiment's model.
        """
        trainable, frozen, mutable = self._initial
        if model is not None:
            _, trainable, frozen, mutable = nnx.split(model, self._trainable, nnx.Param, ...)
        state = TrainState(
            step=np.int32(self._first_step),
            trainable=trainable,
            mutable=mutable,
            opt_state=self._direction.init(trainable),
            ema=None if self._options.ema_decay is None else trainable,
            skipped=np.int32(0),
            skipped_in_a_row=np.int32(0),
        )
        return state, frozen

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
        batch = self._prepare(jax.tree.map(lambda a: a[rows], arrays))
        step = state.step - self._first_step

        def mean_loss(trainable):
            model = nnx.merge(self.graphdef, trainable, frozen, state.mutable, copy=True)
            terms = self._loss(model, batch, _streams(key), step=step, training=True)
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
        values = self._summarise({name: value / count for name, value in sums.items()})
        return {name: float(value) for name, value in values.items()}

    def _validation_sums(self, weights, mutable, frozen, arrays, example_weights, batch_index):
        """Sums of the loss terms over the devices for each batch of a chunk, `[batches, ...]`."""
        model = nnx.merge(self.graphdef, weights, frozen, mutable, copy=True)
        key = jax.random.fold_in(jax.random.key(self._options.seed), np.uint32(2**32 - 1))  # no training step's key

        def batch_sums(_, inputs):
            rows, weight, index = inputs
            batch_key = jax.random.fold_in(key, index)
            rngs = _streams(jax.random.fold_in(batch_key, jax.lax.axis_index(parallel.AXIS)))
            terms = self._loss(model, self._prepare(rows), rngs, step=None, training=False)

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


def steps_per_dispatch(options: TrainingOptions) -> int:
    """How many steps go into one compiled call: one on CPU, else a divisor of all intervals."""
    if on_cpu():
        return 1
    intervals = math.gcd(options.log_every, options.validation_every, options.checkpoint_every or 0)
    return max(d for d in range(1, min(intervals, _MAX_STEPS_PER_DISPATCH) + 1) if intervals % d == 0)


def _steps_in_dispatch(step: int, options: TrainingOptions, border: int = 0) -> int:
    """Steps of the call that begins at `step`; after an interruption, at `border` or at the end, fewer than usual."""
    usual, end = steps_per_dispatch(options), border if step < border else options.steps
    return max(0, min(usual - step % usual, end - step))


def _streams(key: jax.Array) -> nnx.Rngs:
    return nnx.Rngs(**{name: jax.random.fold_in(key, i) for i, name in enumerate(STREAMS)})


def _to_save(state: TrainState, best_loss: float) -> dict[str, Any]:
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
    return {"leaves": {str(i): leaf for i, leaf in enumerate(leaves)}, "best_loss": np.float64(best_loss)}


def _restore(run: runs.Run, state: TrainState) -> tuple[TrainState, float]:
    saved = run.restore(_to_save(state, math.inf))
    leaves = [saved["leaves"][str(i)] for i in range(len(saved["leaves"]))]
    return jax.tree.unflatten(jax.tree.structure(state), leaves), float(saved["best_loss"])


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
